"""docs/notebook.ipynb runs from its first cell to its last, with fewer epochs and images."""

import nbformat
import numpy as np
import pytest
from PIL import Image

from helpers import REPO

nbclient = pytest.importorskip("nbclient", reason="the notebook needs nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="the notebook needs nbclient and ipykernel")


def test_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    notebook = nbformat.read(REPO / "docs" / "notebook.ipynb", 4)
    for cell in notebook.cells:
        for long, short in (
            ("range(24, 120)", "range(24, 40)"),
            ("epochs: 10", "epochs: 1"),
            ("_epochs: 4", "_epochs: 0"),
        ):
            cell.source = cell.source.replace(long, short)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2
    printed = "".join(output.get("text", "") for output in outputs)
    assert "no problems found" in printed and "epoch 1: mIoU" in printed
    masks = list((tmp_path / "predictions").rglob("*.png"))
    assert masks and np.asarray(Image.open(masks[0])).shape[:2] == (128, 128)
    assert (tmp_path / "model.pth").is_file()
