"""A data set of RGB + near infrared, from its files to a trained, evaluated, predicted and reported model."""

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from allspark.__main__ import main
from allspark.utils.errors import run_main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_four_bands(place, tmp_path, capsys):
    """The near infrared band alone tells the classes, so only a network that reads it can separate them."""
    tifffile = pytest.importorskip("tifffile")
    rng = np.random.default_rng(0)
    for image in sorted((place.root / "images").rglob("*.png")):
        mask = place.root / "masks" / image.parent.name / image.name
        truth = rng.integers(0, 3, (8, 10)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        bands = rng.integers(90, 110, (64, 80, 4)).astype(np.uint8)
        bands[..., 3] = np.array([10, 120, 250], np.uint8)[truth]
        tifffile.imwrite(image.with_suffix(".tif"), bands, photometric="rgb")
        image.unlink()
        if mask.exists():
            Image.fromarray(truth).save(mask)
    place.edit(model={"bottleneck": "none", "encoder": "tiny"})
    recipe = yaml.safe_load(place.config.read_text())
    recipe["data"]["custom"]["channels"] = 4
    place.config.write_text(yaml.safe_dump(recipe))

    def run(command, *words):
        capsys.readouterr()
        assert run_main(main, [command, *map(str, words)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    words = place.train("method=fixmatch", "crop_size=[64, 80]", "vertical_flip=true", f"cache={tmp_path / 'cache'}")
    run("train", *words, "epochs=24", "lr=6e-3", "evaluation.interval=24", "log.interval=24", "checkpoint_minutes=0")
    checkpoint = place.run / "latest.pth"
    run("eval", "--checkpoint", checkpoint, "--json", tmp_path / "scores.json")
    scores = yaml.safe_load((tmp_path / "scores.json").read_text())
    assert scores["miou"] > 60
    out = tmp_path / "out"
    run("predict", "--checkpoint", checkpoint, "--out", out, place.root / "images" / "val")
    val = sorted((place.root / "masks" / "val").glob("*.png"))
    predicted = [np.asarray(Image.open(next(out.rglob(mask.name)))) for mask in val]
    assert np.mean([np.mean(a == np.asarray(Image.open(b))) for a, b in zip(predicted, val, strict=True)]) > 0.7
    (tmp_path / "list.txt").write_text("".join(f"images/val/{mask.stem}.tif\n" for mask in val))
    words = ["--list", tmp_path / "list.txt", "--save-dir", tmp_path / "masks", "--no-pictures"]
    run("eval", "--checkpoint", checkpoint, *words)  # as a test set, without masks
    saved = [np.asarray(Image.open(tmp_path / "masks" / mask.name)) for mask in val]
    assert all(np.array_equal(a, b) for a, b in zip(saved, predicted, strict=True))
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"mp4v"), 10, (96, 64))
    writer.write(np.zeros((64, 96, 3), np.uint8))
    writer.release()
    words = ["predict", "--checkpoint", checkpoint, "--out", tmp_path / "frames", tmp_path / "clip.mp4"]
    assert run_main(main, list(map(str, words))) == 2
    assert "clip.mp4: a video has 3 channels, the model takes 4" in capsys.readouterr().err
    assert run_main(main, ["weights", "import", str(checkpoint), "--out", str(tmp_path / "no.pth")]) == 2
    assert "use `weights export`" in capsys.readouterr().err
    run("report", place.run, "--out", tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000
