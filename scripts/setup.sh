#!/bin/sh
# Prepare the environment of the other scripts: the active venv or conda environment, else .venv in the repository root,
# with everything in requirements.txt. Run it, or source it from the repository root as the other scripts do.
case ${ZSH_EVAL_CONTEXT:-}:$0 in
    *:file:*) ;; # sourced by zsh, where $0 is this file, too
    *setup.sh)
        set -eu
        cd -- "$(dirname -- "$0")/.." ;;
esac

# By default glibc returns every large block to the system when it is freed, and the next step page-faults it in again.
# Retaining them makes a CPU step faster. (MMAP_MAX 0, not a high MMAP_THRESHOLD: older glibc ignores one above 32 MiB.)
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-67108864}"
# Waiting OpenMP threads spin before they sleep. Spin for less than the default, because loader workers need the cores;
# sleeping at once would cost the step more than it gives the workers.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"

env=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -z "$env" ] || [ ! -x "$env/bin/python" ]; then
    env=$PWD/.venv
    export VIRTUAL_ENV="$env"
fi
export PATH="$env/bin:$PATH"
stamp=$env/allspark-requirements.txt # requirements.txt as of the last complete installation

env_is_ready() { # fast: nothing large is imported
    cmp -s requirements.txt "$stamp" && "$env/bin/python" - <<'EOF' 2>/dev/null
from importlib.util import find_spec
import cv2
names = "torch torchvision timm einops numpy PIL yaml tqdm tensorboard matplotlib mmcv mmengine pytest xdist ruff"
assert all(map(find_spec, names.split()))
EOF
}

imports_work() {
    "$env/bin/python" - <<'EOF'
import cv2, einops, matplotlib, numpy, PIL, pytest, ruff, timm, torch, torchvision, tqdm, xdist, yaml
from mmcv.cnn import ConvModule
from torch.utils.tensorboard import SummaryWriter
EOF
}

create_venv() {
    [ ! -e .venv/unfinished ] || rm -rf .venv # an earlier setup was interrupted
    [ ! -x .venv/bin/python ] || return 0
    for python in python3 python3.13 python3.12 python3.11 python3.10 ''; do
        [ -n "$python" ] || { echo "setup: needs Python 3.10 or newer as python3" >&2; exit 2; }
        ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || break
    done
    mkdir -p .venv && : >.venv/unfinished
    "$python" -m venv .venv
}

requirements() { # one per line
    sed 's/#.*//; s/ *$//; /^$/d' requirements.txt
}

pip_install() {
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

driver_cuda() { # the newest CUDA version that the NVIDIA driver supports, such as 12.8; nothing without a driver
    nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*[.][0-9]*\).*/\1/p'
}

gpu_capability() { # the compute capability of the first GPU, such as 9.0; nothing if the driver does not tell it
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n '1s/^ *\([0-9]*[.][0-9]*\) *$/\1/p'
}

# PyPI's torch is built for CUDA 13 and GPUs since Turing (7.5). For older drivers and GPUs: the name of one of PyTorch's
# own indices, of which only cu128 has Blackwell (10 to 12) for drivers of CUDA 12
torch_index() { # CUDA version of the driver, compute capability
    case "$1 $2" in
        11.*) echo cu118 ;;
        "12."[89]" 1"[0-9].*) echo cu128 ;;
        12.* | *" "[3-6].* | *" 7."[0-4]) echo cu126 ;;
    esac
}

torch_for_driver() {
    index=$(torch_index "$(driver_cuda)" "$(gpu_capability)")
    [ -z "$index" ] ||
        pip_install --index-url "https://download.pytorch.org/whl/$index" $(requirements | grep '^torch')
}

# mmcv-lite and mmengine are installed without dependencies, because they would bring opencv-python, which needs
# libGL.so.1; opencv-python-headless replaces it. A cv2 or mmcv that already works (full mmcv, for example) is kept.
install_packages() {
    "$env/bin/python" -m pip --version >/dev/null 2>&1 || "$env/bin/python" -m ensurepip
    later='^(mmcv|mmengine)'
    ! "$env/bin/python" -c 'import cv2' 2>/dev/null || later='^(mmcv|mmengine|opencv)'
    torch_for_driver || return 1
    pip_install $(requirements | grep -vE "$later") || return 1 # not -r /dev/stdin: a minimal /dev may lack it
    "$env/bin/python" -c 'import cv2' 2>/dev/null ||
        pip_install --force-reinstall --no-deps $(requirements | grep '^opencv') || return 1
    "$env/bin/python" -c 'from mmcv.cnn import ConvModule' 2>/dev/null ||
        pip_install --no-deps $(requirements | grep -E '^(mmcv|mmengine)')
}

if ! env_is_ready; then
    (
        ! command -v flock >/dev/null || flock 9 # if two scripts start at once, the second waits
        ! env_is_ready || exit 0
        [ "$env" != "$PWD/.venv" ] || create_venv
        echo "setup: installing requirements.txt into $env (several GB and some minutes the first time)"
        if install_packages; then installed=yes; else installed=no; fi
        if ! imports_work; then
            echo "setup: $env is not complete, see above; fix it or run again" >&2
            exit 2
        fi
        if [ "$installed" = yes ]; then
            rm -f "$env/unfinished"
            cp requirements.txt "$stamp" || true
        else
            echo "setup: pip failed, but all packages import: continuing" >&2
        fi
    ) 9>.setup.lock
fi

case $0 in *setup.sh) echo "setup: ready in $env" ;; esac
