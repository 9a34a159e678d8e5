"""Fixtures of the tests of `allspark weights`."""

import pytest
import torch

from allspark.__main__ import main
from allspark.utils.errors import run_main


@pytest.fixture
def call(capsys):
    """Run `allspark weights` with these arguments; returns stdout, or stderr if an error is expected."""

    def run(*words, code=0):
        assert run_main(main, ["weights", *map(str, words)]) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return err if code else out

    return run


@pytest.fixture
def source(original, tmp_path):
    torch.save(original, tmp_path / "mit_b0.pth")
    return tmp_path / "mit_b0.pth"
