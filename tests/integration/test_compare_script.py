"""scripts/compare.sh: trains what is missing, and compares."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml

from helpers import REPO


@pytest.fixture
def script(tmp_path):
    """(arguments, variables) -> scripts/compare.sh run by the Python of this process."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    shutil.copy(REPO / "requirements.txt", tmp_path / "env" / "allspark-requirements.txt")  # nothing to install
    here = {"VIRTUAL_ENV": str(tmp_path / "env"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "gpus": "0"}

    def run(words=(), **variables):
        command, env = ["sh", str(REPO / "scripts" / "compare.sh"), *words], os.environ | here | variables
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run


def test_script_trains_missing_runs(place, script, tmp_path):
    out = tmp_path / "some where"
    words = [word for word in place.lists() if word not in ("--dataset", "pascal", "epochs=1")]
    (out / "supervised").mkdir(parents=True)
    (out / "supervised" / "seed_2").write_text("in the way of a run's folder\n")
    done = script(words, dataset="pascal", SPLIT="tiny", methods="supervised", seeds="1 2", BUDGET="1", out=str(out))
    assert "compare: pascal tiny, 1 epochs: supervised; seeds 1 2; 2 runs into" in done.stdout, done.stderr
    recipe = yaml.safe_load((out / "supervised" / "seed_1" / "config.yaml").read_text())
    assert (recipe["seed"], recipe["epochs"], recipe["data"]["crop_size"]) == (1, 1, 65)
    row = (out / "table.md").read_text().splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[1:3]] == ["supervised", "1"]
    assert (out / "curves.png").is_file() and (out / "predictions.png").is_file()
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith(
        "did not finish, see above: supervised seed 2"
    )
    for file in out.rglob("*.pth"):
        file.unlink()


def test_script_takes_own_recipe(script, tmp_path):
    """The words of each training and of the comparison, from a Python that writes them down."""
    python, called, out = tmp_path / "env" / "bin" / "python", tmp_path / "called", tmp_path / "out"
    python.write_text(f'#!/bin/sh\necho "$@" >>"{called}"\n')
    methods = "supervised fixmatch+allspark"
    done = script(["epochs=2"], config="my own.yaml", split="1_8", methods=methods, seeds="3", out=str(out))
    assert done.returncode == 0 and "compare: my own 1_8: supervised fixmatch+allspark" in done.stdout
    trained = [line for line in called.read_text().splitlines() if line.startswith("train.py")]
    own = "--method {} --split 1_8 device=cpu --config my own.yaml seed=3"
    assert trained == [
        f"train.py --save-path {out}/supervised/seed_3 {own.format('supervised')} epochs=2",
        f"train.py --save-path {out}/fixmatch+allspark/seed_3 {own.format('fixmatch')} "
        "model.bottleneck=allspark epochs=2",
    ]
    rows = [f"{row}={out}/{row}/seed_3" for row in methods.split()]
    assert called.read_text().splitlines()[-1] == (
        f"-m allspark compare --out {out} --paired=supervised {' '.join(rows)}"
    )


def test_script_reports_mistakes_first(script, tmp_path):
    slip = script(methods="supervised fixmach+allspark", out=str(tmp_path / "out"))
    assert slip.returncode == 2 and "configs/methods/fixmach.yaml does not exist" in slip.stderr
    no_split = script(dataset="pascal", methods="supervised")
    assert no_split.returncode == 2 and "split=NAME" in no_split.stderr and not slip.stdout + no_split.stdout
