"""The fault harness, short: a run that is killed, killed while it saves, stopped, and has its checkpoint damaged ends
as the one that nobody disturbed; and the harness sees what differs.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from helpers import REPO, forks

HARNESS = REPO / "tests" / "stress" / "faults.py"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks, which this system does not")


@pytest.fixture(scope="module")
def faults():
    """The harness; its folder is on the path of the processes that it has forked, too."""
    forks.serve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(HARNESS.parent)])
        environment = dict(os.environ)
        import faults

        os.environ.clear()
        os.environ.update(environment)
        yield faults


def test_disturbed_run_equals_undisturbed(faults, tmp_path):
    words = ["--kills", "3", "--terms", "1", "--flips", "1", "--methods", "allspark", "--out", str(tmp_path / "runs")]
    words += ["--json", str(tmp_path / "found.json")]
    assert faults.main([*words, "epochs=2", "evaluation.interval=2", "evaluation.pseudo_labels=0"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted(fault["kind"] for fault in found["faults"]) == ["flip", "kill", "kill", "term", "write"]
    assert all(fault["run"] and not fault["problem"] for fault in found["faults"])
    assert found["runs"] and not any(run["different"] for run in found["runs"])


def test_harness_finds_differences(faults, tmp_path):
    content = {"model": {"w": torch.arange(3.0)}, "best": {"miou": 1.0}, "log": [{"loss": torch.ones(())}]}
    changes = {
        "same": {},
        "weight": {"model": {"w": torch.tensor([0.0, 1.0, 2.0001])}},
        "best": {"best": {"miou": 2.0}},
    }
    for name, change in changes.items():
        for folder, what in ((f"{name}-a", content), (f"{name}-b", {**content, **change})):
            (tmp_path / folder).mkdir()
            torch.save(what, tmp_path / folder / "latest.pth")
            torch.save(content, tmp_path / folder / "best.pth")
            (tmp_path / folder / "metrics.jsonl").write_text('{"step": 1, "images_per_s": ' + f"{len(folder)}}}\n")
    found = {name: faults.differences(tmp_path / f"{name}-a", tmp_path / f"{name}-b") for name in changes}
    assert found == {"same": [], "weight": ["latest.pth: .model.w"], "best": ["latest.pth: .best.miou"]}
    (tmp_path / "same-a" / "metrics.jsonl").write_text('{"step": 2}\n')
    assert faults.differences(tmp_path / "same-a", tmp_path / "same-b") == ["metrics.jsonl: 1 and 1 lines"]


def submit(folder, code, words, **environment):
    """slurm_train.sh with programs in slurm's place, which note how they were called; srun ends as training would."""
    script = folder / "scripts" / "slurm_train.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(REPO / "scripts" / "slurm_train.sh", script)
    (folder / "scripts" / "setup.sh").write_text("")
    record = f" Command={script} {' '.join(words)}"
    answers = f'case "$1 $2" in "show job") echo "{record}"; echo " Command=other";; "show hostnames") echo one;; esac'
    for name, does in {"srun": f"exit {code}", "scontrol": answers}.items():
        (folder / "bin" / name).parent.mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@" >>"{folder}/called"\n{does}\n')
        (folder / "bin" / name).chmod(0o755)
    names = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "one"}
    done = subprocess.run(["bash", script, *words], env={**os.environ, **names, **environment}, timeout=20)
    assert done.returncode == code
    return (folder / "called").read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="slurm_train.sh needs bash")
@pytest.mark.parametrize(("code", "requeued"), [(75, 1), (0, 0), (2, 0)])
def test_slurm_requeue(tmp_path, code, requeued):
    called = submit(tmp_path, code, ["epochs=1"])
    assert called.count("scontrol requeue 7") == requeued
    assert "srun --wait=60 --kill-on-bad-exit=0 python train.py --dataset pascal" in called and "epochs=1" in called


@pytest.mark.skipif(shutil.which("bash") is None, reason="slurm_train.sh needs bash")
def test_slurm_array_requeue(tmp_path):
    """The array's first id is also that of one task, and shows all. An unusual path; a recipe of one's own."""
    called = submit(
        tmp_path / "lab.shared" / "my code",
        75,
        ["--config", "my.yaml"],
        SLURM_ARRAY_JOB_ID="7",
        SLURM_ARRAY_TASK_ID="2",
    )
    assert "scontrol show job 7_2\n" in called and "scontrol requeue 7_2\n" in called
    assert "python train.py --config my.yaml\n" in called
