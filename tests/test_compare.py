"""python -m allspark compare and check, on a finished run of the tiny data set."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from allspark.__main__ import main
from allspark.cli.compare import differing_lists
from allspark.data.manifest import load_manifest
from allspark.errors import UserError


def test_table_curves_and_pictures(finished, tmp_path, capsys):
    out = tmp_path / "table"
    main(["compare", f"first={finished.run}", str(finished.run), "--out", str(out), "--images", "2"])
    lines = [json.loads(line) for line in (finished.run / "metrics.jsonl").read_text().splitlines()]
    scores = [line["miou"] for line in lines if "miou" in line]
    rows = (out / "table.md").read_text().splitlines()
    assert [cell.strip() for cell in rows[0].split("|")[1:5]] == ["run", "mIoU last", "mIoU best", "ground"]
    cells = [cell.strip() for cell in rows[2].split("|")[1:4]]
    assert cells == ["first", f"{scores[-1]:.2f}", f"{max(scores):.2f}"]
    assert rows[3].split("|")[1].strip() == "run"  # without a name: that of the folder
    assert rows[2] in capsys.readouterr().out
    grid = np.asarray(Image.open(out / "predictions.png"))
    assert grid.shape[1] > 4 * 240 and len(np.unique(grid.reshape(-1, 3), axis=0)) > 50
    assert Image.open(out / "curves.png").width > 500


def test_overlay_differs(finished, tmp_path):
    for words in ([], ["--overlay"]):
        main(["compare", str(finished.run), "--out", str(tmp_path / f"o{len(words)}"), *words])
    plain, laid = (np.asarray(Image.open(tmp_path / f"o{n}" / "predictions.png")) for n in range(2))
    assert plain.shape == laid.shape and not np.array_equal(plain, laid)


def test_other_images_under_one_name_are_told(finished, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(finished.run, other)
    content = torch.load(other / "latest.pth", weights_only=True)
    content["split"]["labeled"] = load_manifest().splits["pascal/u2pl_1_8"].lists["labeled"].sha256
    torch.save(content, other / "latest.pth")
    mine = torch.load(finished.run / "latest.pth", weights_only=True)["split"]
    assert set(mine) == {"name", "sha256", "labeled", "unlabeled", "val"}
    logged = f"split folders: labeled list sha256 {mine['labeled'][:12]} (not published), val list sha256 "
    assert logged in (finished.run / "train.log").read_text()
    main(["compare", f"a={finished.run}", f"b={other}", "--out", str(tmp_path / "out"), "--images", "1"])
    shown = capsys.readouterr()
    note = (tmp_path / "out" / "table.md").read_text().splitlines()[-1]
    assert note in shown.err and note in shown.out and note.startswith("split folders is not the same labeled list")
    assert f"a: sha256 {mine['labeled'][:12]}; b: sha256 {content['split']['labeled'][:12]} (pascal/u2pl_1_8 of" in note
    for file in other.glob("*.pth"):
        file.unlink()


def test_which_lists_are_told():
    a = {"name": "1_8", "sha256": "0", "labeled": "1" * 64, "val": "2" * 64}
    assert differing_lists({"a": a, "b": a, "older": {"name": "1_8", "sha256": "0"}}) == []
    assert differing_lists({"a": a, "b": {**a, "name": "92", "labeled": "3" * 64}}) == []
    (note,) = differing_lists({"a": a, "b": {**a, "labeled": "3" * 64}, "c": a})
    assert note.startswith("split 1_8 is not") and "a, c: sha256 111111111111; b: sha256 333333333333" in note
    (note,) = differing_lists({"a": a, "b": {**a, "name": "92", "val": "3" * 64}})
    assert note.startswith("val is not the same val list")


def test_what_is_not_a_finished_run_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="no metrics.jsonl"):
        main(["compare", str(tmp_path), "--out", str(tmp_path / "out")])
    young = tmp_path / "young"
    shutil.copytree(finished.run, young, ignore=shutil.ignore_patterns("*.pth"))
    (young / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    with pytest.raises(UserError, match="not evaluated yet"):
        main(["compare", str(young), "--out", str(tmp_path / "out")])
    other = tmp_path / "other"
    shutil.copytree(finished.run, other, ignore=shutil.ignore_patterns("*.pth"))
    recipe = yaml.safe_load((other / "config.yaml").read_text())
    recipe["data"]["dataset"] = "elsewhere"
    (other / "config.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="different data sets"):
        main(["compare", str(finished.run), str(other), "--out", str(tmp_path / "out")])


def test_check_tells_what_training_would(place, capsys):
    main(["check", "--config", str(place.config)])
    out = capsys.readouterr().out
    assert "4 labeled, 6 unlabeled, 2 val images" in out and "nothing that would stop this run" in out


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("check", "compare", "splits"))
