"""The command `bench`: its measurements and its output."""

import json
import re
import sys

import pytest
import torch

from allspark.__main__ import main
from allspark.bench import measure, scale
from allspark.cli import bench
from allspark.utils.errors import UserError

POINT = {"vary": "crop", "value": 64}


CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def test_step_output(tmp_path, capsys):
    words = ["--crop", "64", "--batch", "1", "--classes", "3", "--repeats", "1", "--threads", "1"]
    main(["bench", "step", *words, "--precision", "fp32", "--json", str(tmp_path / "step.json")])
    result = json.loads((tmp_path / "step.json").read_text())
    assert result["machine"]["threads"] == 1 and result["machine"]["torch"] == torch.__version__
    assert set(result["floor"]) == {"fp32", "copy"} and min(result["floor"].values()) > 1e8
    plain, ours = result["rows"]
    assert (plain["side"], ours["side"], ours["images"], ours["precision"]) == ("plain", "ours", 2, "fp32")
    assert ours["ratio"] == pytest.approx(plain["median"] / ours["median"]) and plain["ratio"] == 1
    assert plain["work"]["flops"] > ours["work"]["flops"] > 1e8 and ours["work"]["moved_bytes"] > 1e7
    assert ours["peak_ratio"] == pytest.approx(ours["work"]["peak_bytes"] / plain["work"]["peak_bytes"])
    assert 0 < ours["share_of_matrix_rate"] < 1.5
    assert result["options"]["classes"] == 3 and torch.get_num_threads() == 1
    out = capsys.readouterr().out
    assert "| mit_b0, crop 64, 1+1, 3 classes | plain" in out and "GFLOP/s" in out


def test_evaluation_and_loader_output(tmp_path):
    words = ["--height", "64", "--width", "96", "--window", "64", "--classes", "3", "--repeats", "1"]
    main(["bench", "eval", *words, "--precision", "fp32", "--json", str(tmp_path / "eval.json")])
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    cases = list(dict.fromkeys(row["case"].split(",")[0] for row in rows))
    assert cases == ["mit_b0", "labels from scores", "metric counting"]
    words = ["--like", "voc", "--images", "2", "--workers", "0", "--repeats", "1"]
    main(["bench", "loader", *words, "--json", str(tmp_path / "loader.json")])
    rows = json.loads((tmp_path / "loader.json").read_text())["rows"]
    assert [row["side"] for row in rows] == ["plain", "ours", "ours, cache"] * 3
    assert all(row["images_per_second"] > 0 for row in rows)


def test_document_is_filled_in(tmp_path, capsys):
    place = {"precision": "fp32", "images": 4, "work": measure.Work(10**9, 10**9, 2**30), "point": POINT}
    rows = [
        measure.Row("crop 64: a", "plain", seconds=[1.0, 3.0, 2.0], baseline=True, **place),
        measure.Row("crop 64: a", "ours", seconds=[1.0], **place),
    ]
    result = bench.report.make_result("scale", {}, rows, ["crop 65: left out"], CPU)
    (tmp_path / "scale.json").write_text(json.dumps(result))
    table = {**result, "rows": [{**row, "point": None} for row in result["rows"]]}
    (tmp_path / "step.json").write_text(json.dumps(table))
    document = tmp_path / "benchmarks.md"
    names = ("scale.json", "step.json", "no.json")
    document.write_text("".join(f"# A\n<!-- bench: {name} -->\nold {name}\n<!-- end -->\n" for name in names))
    main(["bench", "docs", str(document)])
    text = document.read_text()
    assert re.findall("old .*", text) == ["old no.json"] and text.count("left out") == 2
    assert "ms (min-max)" in text and "2,000 (1,000-3,000)" in text and "2.00x" in text and " 1,024 " in text
    assert "](benchmarks_crop.png)" in text and text.count("| plain") == 1
    assert (tmp_path / "benchmarks_crop.png").stat().st_size > 10_000
    main(["bench", "docs", str(document)])
    assert document.read_text() == text
    (tmp_path / "scale.json").write_text("{}")
    with pytest.raises(UserError, match=r"scale\.json"):
        main(["bench", "docs", str(document)])
    assert document.read_text() == text


def test_unmeasurable_is_refused(tmp_path, capsys):
    for words in (["step", "--crop", "32"], ["step", "--classes", "300"], ["loader", "--workers", "-1"]):
        with pytest.raises(SystemExit):
            main(["bench", *words])
        assert f"argument {words[1]}" in capsys.readouterr().err
    with pytest.raises(UserError, match="a file that ends in .json"):
        main(["bench", "eval", "--json", str(tmp_path)])
    (tmp_path / "precious.pth").write_text("mine")
    with pytest.raises(UserError, match="a file that ends in .json"):
        main(["bench", "eval", "--json", str(tmp_path / "precious.pth")])
    with pytest.raises(UserError, match="--images 3: must be a multiple of the batch of 2"):
        main(["bench", "loader", "--like", "voc", "--images", "3", "--workers", "0", "--repeats", "1"])
    with pytest.raises(UserError, match="precision=fp16"):
        main(["bench", "step", "--precision", "fp16"])


def test_too_expensive_point_is_skipped(monkeypatch):
    hold = "import time; held = b'1' * 300_000_000; time.sleep(60)"
    assert "more than 60 s" in scale.run_limited([sys.executable, "-c", hold], deadline=0.3)
    monkeypatch.setattr(scale, "LIMIT_BYTES", 2e8)
    assert "GB" in scale.run_limited([sys.executable, "-c", hold], deadline=30)
    started = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"  # as torchrun does
    assert "GB" in scale.run_limited([sys.executable, "-c", started], deadline=30)
    assert scale.run_limited([sys.executable, "-c", ""], deadline=30) is None
    with pytest.raises(UserError, match="no such thing"):
        scale.run_limited([sys.executable, "-c", "raise SystemExit('no such thing')"], deadline=30)
