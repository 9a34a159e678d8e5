"""Model folders of `weights push`, and models on the Hugging Face Hub as its client keeps them offline."""

import shutil

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from allspark.__main__ import main
from allspark.engine.checkpoint import save_checkpoint
from allspark.hub import CARD, CONFIG, WEIGHTS
from allspark.utils.errors import run_main
from helpers.runs import load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pushed(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "crack-model"
    assert run_main(main, ["weights", "push", str(finished.run), str(folder), "--license", "CC BY 4.0"]) == 0
    return folder


def predict(checkpoint, place, out):
    code = run_main(
        main, ["predict", "--checkpoint", str(checkpoint), "--out", str(out), str(place.root / "images/val")]
    )
    return code, [path.read_bytes() for path in sorted(out.rglob("*.png"))]


@pytest.fixture(scope="module")
def predicted(finished, pushed, tmp_path_factory):
    return predict(pushed, finished, tmp_path_factory.mktemp("predicted"))


def test_model_folder_predicts_as_the_run(finished, pushed, predicted, tmp_path):
    assert {path.name for path in pushed.iterdir()} == {WEIGHTS, CONFIG, CARD}
    assert not any("memory" in name for name in load_file(pushed / WEIGHTS))
    assert predict(finished.run, finished, tmp_path) == predicted and predicted[0] == 0 and len(predicted[1]) > 1
    assert str(finished.root) not in (pushed / CONFIG).read_text()
    assert run_main(main, ["eval", "--checkpoint", str(pushed), f"--data-root={finished.root}"]) == 0


def test_a_model_has_no_best_epoch(pushed, place, tmp_path, capsys):
    for model in (pushed, "hf://lab/cracks"):
        words = ["predict", "--checkpoint", str(model), "--best", "--out", str(tmp_path / "out"), str(place.root)]
        assert run_main(main, words) == 2
        assert f"--best needs the folder of a run, and {model} is one model; omit --best" in capsys.readouterr().err


def test_nothing_else_is_replaced(finished, pushed, tmp_path, capsys):
    """Neither a run's recipe nor a README, and a model only with --force."""
    before = (finished.run / "config.yaml").read_bytes()
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target, told in (
        (finished.run, "config.yaml: exists, and is not of a model of this program"),
        (tmp_path / "project", "README.md: exists, and is not"),
        (tmp_path / "file", "file: is a file; give a folder"),
        (pushed, "already holds a model; choose another folder, or replace it with --force"),
        ("hf:/lab/cracks", "hf:/lab/cracks: write hf://USER/NAME"),
    ):
        assert run_main(main, ["weights", "push", str(finished.run), str(target)]) == 2
        assert told in capsys.readouterr().err
    assert run_main(main, ["weights", "push", str(pushed), "hf://lab/cracks"]) == 2
    assert "is a model already; push its run" in capsys.readouterr().err
    assert (finished.run / "config.yaml").read_bytes() == before and not (finished.run / WEIGHTS).exists()
    assert (tmp_path / "project" / "README.md").read_text() == "mine"
    assert run_main(main, ["weights", "push", str(finished.run), str(pushed), "--license", "CC BY 4.0", "--force"]) == 0


def test_card_of_a_run_between_evaluations(finished, tmp_path):
    """Scores are those of the weights' step, or none."""
    content = load(finished.run / "latest.pth")
    shutil.copytree(finished.run, tmp_path / "run")
    save_checkpoint(tmp_path / "run" / "latest.pth", {**content, "step": content["step"] - 1})
    assert run_main(main, ["weights", "push", str(tmp_path / "run"), str(tmp_path / "model")]) == 0
    assert "| class |" not in (tmp_path / "model" / CARD).read_text(encoding="utf-8")


def test_model_card(finished, pushed):
    card = (pushed / CARD).read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "allspark"
    lines = [yaml.safe_load(line) for line in (finished.run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "miou" in line][-1]
    for words in (
        "# crack-model",
        "--checkpoint crack-model --out",
        "tiny",
        f"{last['miou']:.2f} % after epoch 2",
        "| left |",
        "CC BY 4.0",
        "predict",
    ):
        assert words in card


def test_hub_offline(finished, pushed, predicted, tmp_path, monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub", reason="models on the Hub need huggingface_hub")
    cache = tmp_path / "cache" / "models--lab--cracks"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    shutil.copytree(pushed, cache / "snapshots" / ("a" * 40))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert predict("hf://lab/cracks", finished, tmp_path / "out") == predicted
    capsys.readouterr()
    for address, words in {
        "hf://lab/other": "hf://lab/other: cannot be downloaded",
        "hf://lab": "hf://lab: write hf://USER/NAME",
    }.items():
        assert predict(address, finished, tmp_path / "c")[0] == 2
        assert words in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert run_main(main, ["weights", "push", str(finished.run), "hf://lab/cracks"]) == 2
    assert "hf://lab/cracks: cannot be uploaded" in capsys.readouterr().err


def test_damaged_model_folder(finished, pushed, tmp_path, capsys):
    def damaged(change):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pushed, folder)
        change(folder)
        capsys.readouterr()
        assert predict(folder, finished, tmp_path / "out")[0] == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    def other_shape(folder):
        state = load_file(folder / WEIGHTS)
        name = next(name for name in state if name.startswith("decoder.classifier"))
        save_file({**state, name: state[name][:1].clone()}, folder / WEIGHTS)

    assert WEIGHTS in damaged(lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:999]))
    assert CONFIG in damaged(lambda folder: (folder / CONFIG).write_text("a: [" * 999))
    assert CONFIG in damaged(lambda folder: (folder / CONFIG).unlink())
    assert "no model of this program" in damaged(lambda folder: (folder / CONFIG).write_text("format: bert"))
    assert "has no 'method'" in damaged(lambda folder: (folder / CONFIG).write_text("format: allspark-1\nrecipe: 3"))
    assert "decoder.classifier" in damaged(other_shape)
    state = load_file(pushed / WEIGHTS)
    bad = {name: np.nan * value if value.is_floating_point() else value for name, value in state.items()}
    assert "NaN" in damaged(lambda folder: save_file(bad, folder / WEIGHTS))
