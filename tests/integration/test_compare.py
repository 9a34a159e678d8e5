"""`allspark compare` on finished runs, and scripts/compare.sh."""

import gzip
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from allspark.__main__ import main
from allspark.api import load_checkpoint, predict
from allspark.cli import compare
from allspark.cli.compare import origin_table, paired_table, read_rows, score_table, tables, unfinished
from allspark.config_io import merge
from allspark.engine.checkpoint import save_checkpoint
from allspark.runs import differing_lists, read_archive
from allspark.split_lists.manifest import load_manifest
from allspark.utils.errors import UserError
from helpers import REPO
from helpers.runs import load

sys.path.insert(0, "docs/tools")
import results

CLASSES = ["ground", "left", "right"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def mean_and_std(values: list[float], digits: int = 2) -> str:
    mean = sum(values) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


@pytest.fixture
def write_run(finished, tmp_path):
    """(folder, seed, mIoU of each epoch) -> the folder of a run with these scores and the finished run's weights."""

    def write(name: str, seed: int, *scores: float, more: list[dict] | None = None, **sections: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        recipe = merge(yaml.safe_load((finished.run / "config.yaml").read_text()), {"seed": seed, **sections})
        (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
        lines = [{"step": 1, "epoch": 0, "loss": 2.0, "loss_x": 1.0}]
        for epoch, score in enumerate(scores):  # of two classes; the first is nowhere where the score is 23
            iou = {"ground": None if score == 23.0 else score, "left": score + 1, "right": None}
            others = more[epoch] if more else {}
            lines.append({"step": 3 * (epoch + 1), "epoch": epoch, "miou": score, **others, "iou": iou})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "latest.pth").symlink_to(finished.run / "latest.pth")
        return folder

    return write


def test_table_curves_and_pictures(finished, tmp_path, capsys):
    out = tmp_path / "table"
    main(["compare", f"first={finished.run}", str(finished.run), "--out", str(out), "--images", "2"])
    lines = [json.loads(line) for line in (finished.run / "metrics.jsonl").read_text().splitlines()]
    scores = [line["miou"] for line in lines if "miou" in line]
    rows = (out / "table.md").read_text().splitlines()
    assert cells(rows[0])[:4] == ["run", "seeds", "mIoU last", "mIoU best"]
    assert cells(rows[2])[:4] == ["first", "1", f"{scores[-1]:.2f}", f"{max(scores):.2f}"]
    assert cells(rows[3])[0] == "run"  # without a name: that of the folder
    assert rows[2] in capsys.readouterr().out
    grid = np.asarray(Image.open(out / "predictions.png"))
    assert grid.shape[1] > 4 * 240 and len(np.unique(grid.reshape(-1, 3), axis=0)) > 50
    assert Image.open(out / "curves.png").width > 500


def test_files_of_others_are_not_replaced(finished, tmp_path, capsys):
    for name, content in (("table.md", b"my notes"), ("curves.png", b"no picture of ours")):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: exists and was not written by this program"):
            main(["compare", str(finished.run), "--out", str(out)])
        assert (out / name).read_bytes() == content
    for _ in range(2):  # its own are
        main(["compare", str(finished.run), "--out", str(tmp_path / "again")])


def test_names_that_other_languages_use(finished, tmp_path, capsys):
    """$ of formulas, | of tables, _ of hidden labels."""
    names = ["lr_$1e^$", "x$$y", "a|b", "_old"]
    main(["compare", *(f"{name}={finished.run}" for name in names), "--out", str(tmp_path), "--paired", "_old"])
    head, _, *rows = (tmp_path / "table.md").read_text().splitlines()[:6]
    assert [re.split(r"(?<!\\)\|", row)[1].strip() for row in rows] == ["lr_$1e^$", "x$$y", "a\\|b", "_old"]
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in (head, *rows)}) == 1


def test_images_of_a_small_val(finished, tmp_path, monkeypatch):
    """Two images: both, whatever --images says; and each row reads and normalizes them as in its own training."""
    drawn = []
    monkeypatch.setattr(
        compare, "draw_grid", lambda examples, *a, **k: drawn.append(examples) or Image.new("RGB", (9, 9))
    )
    other = tmp_path / "other"
    shutil.copytree(finished.run, other)
    content = load(other / "latest.pth")
    content["recipe"]["data"]["custom"].update(mean=[0.1, 0.9, 0.1], std=[0.05, 0.9, 0.9])
    save_checkpoint(other / "latest.pth", content)
    main(["compare", f"a={finished.run}", f"b={other}", "--out", str(tmp_path / "out"), "--images", "5"])
    (examples,) = drawn
    assert [example.name for example in examples] == ["val0", "val1"]
    for row, run in ((1, finished.run), (2, other)):
        trained = load_checkpoint(run, device="cpu")
        for example in examples:
            image = finished.root / "images" / "val" / f"{example.name}.png"
            assert np.array_equal(example.masks[row], predict(trained, image)), run


def test_three_small_files_suffice(finished, tmp_path):
    """As runs are kept in docs/: their numbers without their weights."""
    kept, out = tmp_path / "kept", tmp_path / "table"
    kept.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "run.json"):
        shutil.copy(finished.run / name, kept)
    main(["compare", f"run={kept}", "--out", str(out)])
    main(["compare", f"run={finished.run}", "--out", str(tmp_path / "whole"), "--images", "1"])
    assert (out / "table.md").read_text() == (tmp_path / "whole" / "table.md").read_text()
    assert (out / "curves.png").is_file() and not (out / "predictions.png").exists()


@pytest.mark.parametrize("experiment", sorted((REPO / "docs/runs").iterdir()), ids=lambda path: path.name)
def test_recorded_table_is_rebuilt(experiment):
    """As docs/tools/results.py does, byte by byte; and the folder has nothing that it does not make."""
    options = results.options(experiment / "runs.jsonl.gz")
    rows = read_rows([str(experiment / "runs.jsonl.gz")], draws="--draws" in options)
    table = tables(rows, [option.removeprefix("--paired=") for option in options if option != "--draws"])
    assert (experiment / "table.md").read_bytes() == table.encode("utf-8")
    pages = "".join(page.read_text(encoding="utf-8") for page in (REPO / "docs").glob("*.md"))
    pictures = {f"{name}.png" for name in re.findall(rf"\(runs/{experiment.name}/(\w+)\.png\)", pages)}
    files = {path.name for path in experiment.iterdir()} - {"parts.json"}
    assert files == {"table.md", "runs.jsonl.gz"} | pictures, "run docs/tools/results.py, remove pictures no page shows"


def test_recorded_runs_are_small():
    assert sum(path.stat().st_size for path in (REPO / "docs/runs").rglob("*") if path.is_file()) < 2_000_000


def test_archive_gives_the_table_of_folders(write_run, tmp_path, capsys):
    folder = tmp_path / "recorded"
    for name, seed, score in (("supervised", 0, 20.0), ("a+b", 0, 30.0), ("a+b", 1, 31.0)):
        run = write_run(f"run{seed}{name}", seed, score / 2, score)
        (folder / name).mkdir(parents=True, exist_ok=True)
        run.rename(folder / name / f"seed_{seed}")
    packed = results.pack(folder)
    archive = tmp_path / "some.jsonl.gz"
    assert packed == results.pack(folder, archive)
    archive.write_bytes(packed)
    assert packed == results.pack(folder, archive)  # the same runs replace themselves
    words = [f"{name}={folder / name / seed}" for name, seed in (("supervised", "seed_0"), ("a+b", "seed_0"))]
    other = f"other={folder / 'supervised' / 'seed_0'}"
    direct, rows = read_rows([*words, f"a+b={folder / 'a+b' / 'seed_1'}", other]), read_rows([str(archive), other])
    assert [row.name for row in rows] == ["supervised", "a+b", "other"]
    assert score_table(rows) == score_table(direct) and origin_table(rows) == origin_table(direct)
    assert rows[0].runs[0].points("loss_x") == direct[0].runs[0].points("loss_x") == [(1, 1.0)]
    main(["compare", str(archive), "--out", str(tmp_path / "out"), "--paired", "supervised"])
    assert "a+b" in capsys.readouterr().out and not (tmp_path / "out" / "predictions.png").exists()
    (tmp_path / "more" / "b").mkdir(parents=True)
    write_run("run0b", 0, 12.0, 24.0).rename(tmp_path / "more" / "b" / "seed_0")
    archive.write_bytes(results.pack(tmp_path / "more", archive))
    assert [row.name for row in read_rows([str(archive)])] == ["supervised", "a+b", "b"]
    with pytest.raises(UserError, match="has no runs"):
        results.pack(tmp_path / "nowhere")


def entry(**changes) -> str:
    line = {"step": 3, "epoch": 0, "miou": 20.0, "iou": {"a": 20.0}}
    return json.dumps({"name": "a", "config": {}, "provenance": {}, "metrics": [line]} | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"plain text", "cannot be read"),
        pytest.param(gzip.compress(entry().encode())[:-9], "cannot be read", id="truncated"),  # its bytes hold the time
        ("", "no runs"),
        ("\n", "line 1: not a run"),
        ("[" * 100_000, "line 1: not a run"),
        ("3", "line 1: not a run"),
        (entry(name=3), "line 1: not a run"),
        (entry(name="../../a"), "line 1: not a run"),
        (entry(metrics={"step": 1}), "line 1: not a run"),
        (entry(provenance={"split": 1}), "line 1: not a run"),
        (entry(metrics=[{"step": "1"}]), "line 1: not a run"),
        (entry(metrics=[3]), "line 1: not a run"),
        (entry(metrics=[{"step": 1, "epoch": 0, "miou": 1.0, "iou": {"a": "b"}}]), "line 1: not a run"),
        (entry(config=[]), "line 1: config"),
        (entry(config={"data": {"dataset": "shapes"}, "nothing": 1}), "line 1: config"),
    ],
)
def test_damaged_archive_is_refused(content, message, tmp_path):
    archive = tmp_path / "runs.jsonl.gz"
    if content is not None:
        archive.write_bytes(content if isinstance(content, bytes) else gzip.compress(content.encode()))
    with pytest.raises(UserError, match=re.escape(str(archive))) as error:
        read_archive(archive)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)


def test_archive_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("allspark.runs.MAX_ARCHIVE", 1 << 20)
    (tmp_path / "runs.jsonl.gz").write_bytes(gzip.compress(b" " * (1 << 20) + b" "))
    with pytest.raises(UserError, match="more than 1 MiB"):
        read_archive(tmp_path / "runs.jsonl.gz")


def test_reduced_colors():
    """Frequent colors exactly, few colors unchanged, and the others nearly."""
    noise = np.random.default_rng(0).integers(0, 40, (100, 100, 3)).astype(np.uint8)
    flat = np.zeros((100, 100, 3), np.uint8) + np.uint8([[[255, 3, 128]]])
    found = results.reduce_colors(Image.fromarray(np.concatenate((flat, noise))))
    pixels = np.asarray(found.convert("RGB"))
    assert found.mode == "P" and (pixels[:100] == flat).all()
    assert np.abs(pixels[100:].astype(int) - noise).mean() < 5
    assert (np.asarray(results.reduce_colors(Image.fromarray(flat)).convert("RGB")) == flat).all()


def test_runs_of_one_name_are_seeds(write_run, capsys):
    scores = [(24.0, 20.0), (22.0, 23.0), (30.5, 29.0)]  # two evaluations of each seed
    words = [write_run(f"b{seed}", seed, *pair) for seed, pair in enumerate(scores)]
    rows = read_rows([*(f"mine={run}" for run in words), f"other={write_run('alone', 0, 10.0)}"])
    assert [(row.name, len(row.runs)) for row in rows] == [("mine", 3), ("other", 1)]
    lines = score_table(rows).splitlines()
    last = mean_and_std([20.0, 23.0, 29.0])
    best = mean_and_std([24.0, 23.0, 30.5])
    left = mean_and_std([21.0, 24.0, 30.0], digits=1)
    assert last == "24.00 ± 4.58"  # (4 ** 2 + 1 ** 2 + 5 ** 2) / 2 = 4.58 ** 2
    assert cells(lines[0]) == ["run", "seeds", "mIoU last", "mIoU best", *CLASSES]
    assert cells(lines[2]) == ["mine", "3", last, best, mean_and_std([20.0, 29.0], digits=1), left, "-"]
    assert cells(lines[3]) == ["other", "1", "10.00", "10.00", "10.0", "11.0", "-"]
    assert "it is selected on" in score_table(rows)


def test_difference_per_seed(write_run):
    base = {0: 20.0, 1: 21.5, 2: 25.0}
    mine = {1: 22.0, 2: 24.0, 3: 90.0}
    words = [f"base={write_run(f'a{seed}', seed, score)}" for seed, score in base.items()]
    words += [f"mine={write_run(f'b{seed}', seed, score)}" for seed, score in mine.items()]
    rows = read_rows([*words, f"one={write_run('c', 2, 27.0)}"])
    lines = paired_table(rows, "base").splitlines()
    seeds = ["seed 0", "seed 1", "seed 2"]
    assert cells(lines[0]) == ["mIoU last, minus base", *seeds, "mean ± std", "95 % interval", "p"]
    mean, std = (0.5 - 1.0) / 2, math.sqrt(((0.5 + 0.25) ** 2 + (-1.0 + 0.25) ** 2) / 1)
    half = math.tan(0.475 * math.pi) * std / math.sqrt(2)  # Student's t with one degree of freedom is Cauchy's
    p = 1 - 2 / math.pi * math.atan(abs(mean) / std * math.sqrt(2))
    test = [f"{mean - half:+.2f} to {mean + half:+.2f}", f"{p:.2g}"]
    assert cells(lines[2]) == ["mine", "-", "+0.50", "-1.00", f"{mean:+.2f} ± {std:.2f}", *test]
    assert cells(lines[3]) == ["one", "-", "-", "+2.00", "+2.00", "-", "-"] and lines[5].startswith("95 % interval")
    assert paired_table(rows[:1], "base") == ""
    with pytest.raises(UserError, match=r"--paired fixmatch: .* there are base, mine, one"):
        paired_table(rows, "fixmatch")


def test_pairs_with_other_labeled_images(write_run):
    """They are compared, as for supervised training on more labels, but the table says so."""
    words = []
    for name, labeled in (("base", "6"), ("same", "6"), ("more", "23")):
        run = write_run(name, 0, 20.0)
        (run / "run.json").write_text(json.dumps({"split": {"labeled": labeled}}))
        words.append(f"{name}={run}")
    assert paired_table(read_rows(words), "base").endswith("\nOther labeled images than base: more.\n")


def test_draws_of_the_labeled_images(write_run, tmp_path):
    """With --draws a row has runs on several lists; pairs are of one list and one seed."""
    base = {("a", 0): 20.0, ("b", 0): 30.0, ("b", 1): 31.0}
    mine = {("b", 1): 33.0, ("a", 0): 21.0, ("c", 0): 50.0}
    words = []
    for name, scores in (("base", base), ("mine", mine)):
        for (draw, seed), score in scores.items():
            words.append(f"{name}={write_run(f'{name}{draw}{seed}', seed, score, data={'split': draw})}")
    with pytest.raises(UserError, match=r"data.split: a -> b.*allow several lists with --draws"):
        read_rows(words)
    with pytest.raises(UserError, match="both have a seed 0"):
        read_rows([*words, words[0].replace("base=", "mine=")], draws=True)
    lines = paired_table(read_rows(words, draws=True), "base").splitlines()
    assert cells(lines[0])[1:4] == ["a seed 0", "b seed 0", "b seed 1"]
    assert cells(lines[2])[1:5] == ["+1.00", "-", "+2.00", "+1.50 ± 0.71"]
    words.append(f"mine={write_run('more', 0, 31.0, data={'split': 'b'})}")  # draw a: +1; draw b: +1 and +2
    lines = paired_table(read_rows(words, draws=True), "base").splitlines()
    half = math.tan(0.475 * math.pi) * 0.25  # the standard error of 1 and 1.5
    assert cells(lines[2])[4:6] == ["+1.33 ± 0.58", f"{1.25 - half:+.2f} to {1.25 + half:+.2f}"]
    assert lines[4].endswith("over the draws of labeled images that both rows have.")
    main(["compare", *words, "--out", str(tmp_path / "out"), "--draws", "--paired", "base", "--paired", "mine"])
    table = (tmp_path / "out" / "table.md").read_text()
    assert "minus base" in table and "minus mine" in table


def test_one_name_needs_one_recipe(write_run, tmp_path):
    first = write_run("a", 0, 20.0)
    moved = write_run("b", 1, 20.0, data={"data_root": "/elsewhere"}, device="auto")  # where it ran, not what
    assert len(read_rows([f"x={first}", f"x={moved}"])[0].runs) == 2
    other = write_run("c", 1, 20.0, optim={"lr": 0.5})
    with pytest.raises(UserError, match=r"^x: .*a and .*c are not two seeds.*\(optim.lr: 0.001 -> 0.5\).*name=FOLDER"):
        read_rows([f"x={first}", f"x={other}"])
    assert len(read_rows([f"x={first}", f"y={other}"])) == 2
    with pytest.raises(UserError, match=r"both have seed 1"):
        read_rows([f"x={first}", f"x={moved}", f"x={write_run('d', 1, 20.0)}"])


def test_pseudo_labels_and_pairs_in_table(write_run, tmp_path, capsys):
    pseudo = [{"pseudo_accuracy": None, "pseudo_coverage": 0.0}, {"pseudo_accuracy": 81.5, "pseudo_coverage": 40.25}]
    more = [{"pseudo_accuracy": math.nan, "pseudo_coverage": 10.0}, {"pseudo_accuracy": 84.5, "pseudo_coverage": 44.75}]
    words = [f"mine={write_run('a', 0, 20.0, 22.0, more=pseudo)}", f"mine={write_run('b', 1, 21.0, 25.0, more=more)}"]
    assert [run.points("pseudo_accuracy") for run in read_rows(words)[0].runs] == [[(6, 81.5)], [(6, 84.5)]]
    words += [f"plain={write_run('c', 0, 20.0, 21.0)}"]
    main(["compare", *words, "--out", str(tmp_path / "out"), "--paired", "plain", "--images", "1"])
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out and "| plain" in table and "+1.00" in table
    lines = table.splitlines()
    assert cells(lines[0])[4:6] == ["pseudo-label accuracy", "pseudo-label coverage"]
    assert cells(lines[2])[4:6] == [mean_and_std([81.5, 84.5], 1), mean_and_std([40.25, 44.75], 1)]
    assert cells(lines[3])[4:6] == ["-", "-"] and "coverage: share of pixels" in table
    for name in ("seeds", "curves", "losses", "predictions", "pseudo_labels"):
        drawn = np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))
        assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50
    main(["compare", words[-1], "--out", str(tmp_path / "without"), "--images", "1"])
    made = {path.name for path in (tmp_path / "without").iterdir()}
    assert made == {"table.md", "seeds.png", "curves.png", "losses.png", "classes.png", "predictions.png"}
    assert "pseudo" not in (tmp_path / "without" / "table.md").read_text().lower()


def test_unfinished_run_is_marked(write_run):
    done, half = write_run("a", 0, 20.0, 21.0), write_run("b", 1, 20.0)
    (note,) = unfinished(read_rows([f"x={done}", f"x={half}"]))
    assert note == "x seed 1 is not finished: 1 of 2 epochs are evaluated"


def test_overlay_differs(finished, tmp_path):
    for words in ([], ["--overlay"]):
        main(["compare", str(finished.run), "--out", str(tmp_path / f"o{len(words)}"), *words])
    plain, laid = (np.asarray(Image.open(tmp_path / f"o{n}" / "predictions.png")) for n in range(2))
    assert plain.shape == laid.shape and not np.array_equal(plain, laid)


def test_different_images_under_one_name(finished, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(finished.run, other)
    facts = json.loads((other / "run.json").read_text())
    facts["split"]["labeled"] = load_manifest().splits["pascal/u2pl_1_8"].lists["labeled"].sha256
    (other / "run.json").write_text(json.dumps(facts))
    mine = torch.load(finished.run / "latest.pth", weights_only=True)["split"]
    assert set(mine) == {"name", "sha256", "labeled", "unlabeled", "val"}
    logged = f"split folders: labeled list sha256 {mine['labeled'][:12]} (not published), val list sha256 "
    assert logged in (finished.run / "train.log").read_text()
    main(["compare", f"a={finished.run}", f"b={other}", "--out", str(tmp_path / "out"), "--images", "1"])
    shown = capsys.readouterr()
    assert json.loads((finished.run / "run.json").read_text())["split"] == mine
    note = (tmp_path / "out" / "table.md").read_text().splitlines()[-1]
    assert note in shown.err and note in shown.out and note.startswith("split folders is not the same labeled list")
    assert f"a: sha256 {mine['labeled'][:12]}; b: sha256 {facts['split']['labeled'][:12]} (pascal/u2pl_1_8 of" in note
    for file in other.glob("*.pth"):
        file.unlink()


def test_other_unlabeled_images(write_run):
    """A folder of unlabeled images that has grown between two seeds of a row."""
    folders = [write_run("a", 0, 50.0), write_run("b", 1, 51.0)]
    for unlabeled, notes in (("33", 0), ("34", 1)):
        for folder, each in zip(folders, unlabeled, strict=True):
            split = {"name": "own", "labeled": "1" * 64, "unlabeled": each * 64, "val": "2" * 64}
            (folder / "run.json").write_text(json.dumps({"split": split}))
        found = compare.differing_unlabeled(read_rows([f"x={folder}" for folder in folders]))
        assert len(found) == notes and all(
            "x: its runs do not have the same unlabeled images" in note for note in found
        )


def test_lists_in_table():
    a = {"name": "1_8", "sha256": "0", "labeled": "1" * 64, "val": "2" * 64}
    assert differing_lists({"a": a, "b": a, "older": {"name": "1_8", "sha256": "0"}}) == []
    assert differing_lists({"a": a, "b": {**a, "name": "92", "labeled": "3" * 64}}) == []
    (note,) = differing_lists({"a": a, "b": {**a, "labeled": "3" * 64}, "c": a})
    assert note.startswith("split 1_8 is not") and "a, c: sha256 111111111111; b: sha256 333333333333" in note
    (note,) = differing_lists({"a": a, "b": {**a, "name": "92", "val": "3" * 64}})
    assert note.startswith("val is not the same val list")


def test_row_origins(write_run, capsys):
    """Command without the seed, revision, list, processor, seeds, minutes; an older run says nothing."""
    runs = [write_run(name, seed, 20.0, 30.0) for seed, name in enumerate("abcd")]
    for folder, revision in zip(runs, ("1234567", "1234567", "89abcde"), strict=False):
        facts = {"command": f"--method fixmatch lr=0.1 seed={folder.name}", "revision": revision, "processor": "Z80"}
        (folder / "run.json").write_text(json.dumps({**facts, "split": {"name": "1_8", "labeled": "5" * 64}}))
        lines = [{"step": step, "epoch": 0, "loss": 1.0, "images_per_s": speed} for step, speed in ((30, 0.5), (60, 2))]
        with open(folder / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    rows = read_rows([f"row={folder}" for folder in runs[:3]] + [f"old={runs[3]}"])
    head, _, first, second, *legend = origin_table(rows).splitlines()
    assert cells(head)[2:] == ["revision", "labeled list", "processor", "seeds", "minutes"]
    assert not any("old" in row for row in legend)
    batch = rows[0].runs[0].recipe.batch_size
    minutes = f"{batch * (30 / 0.5 + 30 / 2) / 60:.0f}"
    assert cells(first) == ["row", "`--method fixmatch lr=0.1`", "1234567", "5" * 12, "Z80", "0, 1", minutes]
    assert cells(second)[2:] == ["89abcde", "5" * 12, "Z80", "2", minutes]
    assert origin_table(rows[1:]) == ""
    for text in ("{", "[]", '{"split": {"name": 3}}'):
        (runs[0] / "run.json").write_text(text)
        with pytest.raises(UserError, match=r"run\.json: .*remove it"):
            read_rows([str(runs[0])])


def test_unfinished_run_is_refused(finished, tmp_path, capsys):
    with pytest.raises(UserError, match="no metrics.jsonl"):
        main(["compare", str(tmp_path), "--out", str(tmp_path / "out")])
    young = tmp_path / "young"
    shutil.copytree(finished.run, young, ignore=shutil.ignore_patterns("*.pth"))
    (young / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    with pytest.raises(UserError, match="no evaluation yet"):
        main(["compare", str(young), "--out", str(tmp_path / "out")])
    capsys.readouterr()
    assert [row.name for row in read_rows([str(young), f"done={finished.run}"])] == ["done"]
    assert f"WARNING: {young} has no evaluation yet and is left out" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(finished.run, other, ignore=shutil.ignore_patterns("*.pth"))
    recipe = yaml.safe_load((other / "config.yaml").read_text())
    recipe["data"]["dataset"] = "elsewhere"
    (other / "config.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match="different data sets"):
        main(["compare", str(finished.run), str(other), "--out", str(tmp_path / "out")])


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("check", "compare", "splits"))
