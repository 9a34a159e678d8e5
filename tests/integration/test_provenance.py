"""run.json: the code, command and lists of a run."""

import json
import shutil
import subprocess

import pytest
import torch

from allspark.engine import provenance
from allspark.utils.processor import cpu_name


def git(folder, *words):
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", *author, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_revision_of_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    git(tmp_path, "init", "-q")
    assert provenance.revision() == "unknown"  # nothing is committed yet
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    assert provenance.revision() == git(tmp_path, "rev-parse", "HEAD")[:7]
    (tmp_path / "exp").write_text("not of the code")
    assert "changed" not in provenance.revision()
    (tmp_path / "code.py").write_text("2")
    assert provenance.revision().endswith(", changed")


def test_without_checkout_or_git(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.revision() == "unknown" or provenance.revision().startswith("version ")
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.revision() == "unknown"


def test_round_trip(tmp_path):
    split = {"name": "1_8", "sha256": "0" * 64, "labeled": "1" * 64}
    assert provenance.read_provenance(tmp_path) == {}
    provenance.write_provenance(
        tmp_path, "--dataset shapes 'data.data_root=a b'", split, torch.device("cpu"), resumed=False
    )
    read = provenance.read_provenance(tmp_path)
    assert read == json.loads((tmp_path / "run.json").read_text()) and read["split"] == split
    assert (read["device"], read["processes"], read["torch"]) == ("cpu", 1, torch.__version__)
    assert read["command"] == "--dataset shapes 'data.data_root=a b'"
    assert read["processor"].startswith(cpu_name())


def test_resume_with_other_code_names_both(tmp_path, monkeypatch):
    def start(revision, resumed):
        monkeypatch.setattr(provenance, "revision", lambda: revision)
        provenance.write_provenance(tmp_path, "--dataset shapes", {"name": "1_8"}, torch.device("cpu"), resumed=resumed)
        return provenance.read_provenance(tmp_path)["revision"]

    assert start("aaaaaaa", resumed=True) == "aaaaaaa"  # of a run that is older than the file
    assert start("aaaaaaa", resumed=True) == "aaaaaaa"
    assert start("bbbbbbb, changed", resumed=True) == "aaaaaaa, later bbbbbbb, changed"
    assert start("bbbbbbb, changed", resumed=True) == "aaaaaaa, later bbbbbbb, changed"
    assert start("ccccccc", resumed=False) == "ccccccc"
