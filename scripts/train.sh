#!/bin/sh
# sh scripts/train.sh <num_gpu> <port> [train.py options and key.path=value ...]
# Another recipe: dataset=cityscapes method=imas split=1_4 sh scripts/train.sh 4 29500 (methods: docs/methods.md)
# Your own recipe: sh scripts/train.sh 4 29500 --config my.yaml
# 0 GPUs: one process on the CPU. Several processes on the CPU: sh scripts/train.sh 2 29500 device=cpu
# A run stopped by Ctrl-C or kill has saved its state; the same command resumes it. With max_restarts=3 set, several
# processes are restarted up to three times if one of them dies, and resume from the last checkpoint.
set -eu

case ${1:-x}${2:-x} in *[!0-9]*)
    echo "usage: sh scripts/train.sh <num_gpu> <port> [key.path=value ...]" >&2
    exit 2 ;;
esac
num_gpu=$1 port=$2
shift 2
cd -- "$(dirname -- "$0")/.."
. scripts/setup.sh

if [ "$num_gpu" -gt 0 ]; then # cuda, not auto: an unusable GPU is an error. A later device=... overrides it
    set -- device=cuda "$@"
else
    set -- device=cpu "$@"
fi
case " $* " in
    *" --config"[\ =]*) set -- ${method:+--method "$method"} ${split:+--split "$split"} "$@" ;;
    *) set -- --dataset "${dataset:-pascal}" --method "${method:-fixmatch}" --split "${split:-1_8}" "$@" ;;
esac
set -- train.py ${save_path:+--save-path "$save_path"} "$@"
case $num_gpu in
    0 | 1) exec python "$@" ;;
    *) exec python -m allspark.torchrun --nproc_per_node="$num_gpu" --master_port="$port" \
        --max-restarts="${max_restarts:-0}" "$@" ;;
esac
