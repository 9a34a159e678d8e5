"""docs/notebook.ipynb runs from its first cell to its last, with fewer epochs."""

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
        cell.source = cell.source.replace("epochs: 10", "epochs: 1").replace("burn_in_epochs: 4", "burn_in_epochs: 0")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2
    printed = "".join(output.get("text", "") for output in outputs)
    assert "no problems found" in printed and "epoch 1: mIoU" in printed
    masks = list((tmp_path / "predictions").rglob("*.png"))
    assert masks and np.asarray(Image.open(masks[0])).shape[:2] == (128, 128)
    assert (tmp_path / "model.pth").is_file()
