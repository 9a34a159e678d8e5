"""Imports at startup: --help without torch, a lazy public API; one version everywhere."""

import re
import shlex
import signal
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest
import tomllib
import yaml
from PIL import Image

import allspark
from allspark.__main__ import main
from allspark.arguments import COMMANDS
from allspark.build import complete
from allspark.prepare import PLANS
from allspark.utils.errors import UserError
from allspark.utils.signals import SIGNALS
from helpers import REPO

HEAVY = ("torchvision", "mmcv", "timm", "torch._dynamo", "tensorboard", "matplotlib")


def imported(*words):
    """The modules that a Python process imports, and what it prints."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], capture_output=True, text=True, cwd=REPO, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}, done.stdout


@pytest.mark.parametrize("command", [["train.py"], ["eval.py"], *(["-m", "allspark", name] for name in COMMANDS)])
def test_help_imports_no_torch(command):
    modules, text = imported(*command, "--help")
    assert "argparse" in modules and not {"torch", "numpy"} & modules
    assert text.startswith("usage: ")


@pytest.mark.parametrize(
    "command", [["train.py"], ["eval.py"], ["-m", "allspark", "report"], ["-m", "allspark.torchrun"]]
)
def test_no_environment(command):
    """A Python without site-packages, as before `. scripts/setup.sh`."""
    words = [sys.executable, "-S", *command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=REPO, timeout=60, env={})
    assert done.returncode == 2 and done.stderr.startswith("error: yaml is not installed for "), done.stderr
    assert done.stderr.endswith(f"cd {shlex.quote(str(REPO))} && . scripts/setup.sh\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("module", ["argparse", "torch"])
@pytest.mark.parametrize("command", [["train.py"], ["-m", "allspark", "train"]], ids=" ".join)
def test_signal_during_imports(command, module, number):
    """Slurm requeues a job that ends with 75, and no other."""
    code = f"""
import os, runpy, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Finder())
*option, sys.argv[0] = {command[:2]!r}
sys.argv += {[*command[2:], "--dataset", "shapes", "--method", "fixmatch"]!r}
(runpy.run_module if option else runpy.run_path)(sys.argv[0], run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=60)
    name = signal.Signals(number).name
    assert (done.returncode, done.stderr.count("\n")) == (75, 2) and f"stopped by {name}, nothing" in done.stderr


@pytest.mark.parametrize(
    "code",
    ["import allspark.config, allspark.config_io", "import allspark; allspark.load_config; allspark.__version__"],
)
def test_config_imports_no_torch(code):
    modules, _ = imported("-c", code)
    assert "torch" not in modules


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "import allspark; allspark.build_model, allspark.load_checkpoint, allspark.predict"],
        ["train.py", "--dataset", "shapes", "--method", "allspark", "--print-config"],
        ["-m", "allspark", "splits", "list", "--dataset", "shapes"],
        ["-c", "import allspark.cli.check"],
    ],
)
def test_startup_imports_only_torch(words):
    modules, _ = imported(*words)
    assert "torch" in modules and not {name for name in HEAVY if name in modules}


def test_one_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"allspark {allspark.__version__}\n"
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "allspark.__version__"}
    assert yaml.safe_load((REPO / "CITATION.cff").read_text())["version"] == allspark.__version__
    assert resources.files("allspark").joinpath("py.typed").is_file()


def test_public_api(finished, tmp_path):
    recipe = allspark.load_config(finished.run / "config.yaml")
    model = allspark.build_model(recipe)
    assert model.decoder is not None and complete(recipe).data.dataset == "tiny"
    trained = allspark.load_checkpoint(finished.run / "best.pth", device="cpu")
    assert trained.spec.classes == ("ground", "left", "right")
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    mask = allspark.predict(trained, image)
    assert mask.shape == (70, 90) and mask.dtype == np.uint8 and mask.max() < 3
    assert (allspark.predict(trained, tmp_path / "image.png") == mask).all()
    assert allspark.predict(trained, image, "sliding_window", flip=True).shape == (70, 90)
    dtypes, shapes = ("float64", "int64", "uint16"), (image[..., 0], image[..., [0, 1, 2, 2]])
    for wrong in (*(image.astype(dtype) for dtype in dtypes), *shapes):
        given = re.escape(f"shape {wrong.shape} and dtype {wrong.dtype}, must be a non-empty image")
        with pytest.raises(UserError, match=given):
            allspark.predict(trained, wrong)
    with pytest.raises(UserError, match=r"image: is a Image, must be an array \(H, W, 3\) of uint8, or a path"):
        allspark.predict(trained, Image.fromarray(image))
    assert {"load_config", "build_model", "load_checkpoint", "predict", "__version__"} <= set(dir(allspark))
    with pytest.raises(AttributeError, match="has no attribute 'something'"):
        _ = allspark.something


def test_prepare_help_names_archives(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    text = capsys.readouterr().out
    for name, plan in PLANS.items():
        assert name in text and plan.dataset in text
        assert all(archive.name in text for archive in plan.archives)


@pytest.mark.parametrize(
    ("cuda", "capability", "index"),
    [
        ("12.2", "8.0", "cu126"),
        ("12.8", "9.0", "cu126"),
        ("12.8", "12.0", "cu128"),  # Blackwell: not in cu126
        ("13.0", "12.0", ""),
        ("13.0", "7.5", ""),
        ("13.0", "7.0", "cu126"),  # V100: not in PyPI's wheel
        ("13.0", "", ""),
        ("11.4", "8.0", "cu118"),
        ("", "", ""),  # no driver
    ],
)
def test_torch_wheel_for_driver_and_gpu(tmp_path, cuda, capability, index):
    tool = tmp_path / "nvidia-smi"
    about = f"| NVIDIA-SMI 535.183.01    Driver Version: 535.183.01    CUDA Version: {cuda}     |" if cuda else ""
    answer = capability or 'Field "compute_cap" is not a valid field to query.'
    tool.write_text(f"#!/bin/sh\ncase $* in *compute_cap*) echo '{answer}' ;; *) echo '{about}' ;; esac\n")
    tool.chmod(0o755)
    text = (REPO / "scripts" / "setup.sh").read_text()
    functions = text[text.index("driver_cuda() {") : text.index("torch_for_driver() {")]
    script = f'{functions} torch_index "$(driver_cuda)" "$(gpu_capability)"'
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    found = subprocess.run(["sh", "-eu", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (found.stdout.strip(), found.stderr) == (index, "")
