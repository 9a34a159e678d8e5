"""A tiny data set of real files, and its recipe."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

CLASSES = ("ground", "left", "right")
SIZE = (80, 64)  # width, height
COUNTS = {"labeled": 4, "unlabeled": 6, "val": 2}
STEPS_PER_EPOCH = 3  # 6 unlabeled images in batches of 2


@dataclass(frozen=True)
class Place:
    """A copy of the data set that a test may damage, its recipe file, and the folder for a run."""

    root: Path
    config: Path
    run: Path

    def train(self, *words: object) -> list[str]:
        """Arguments of train.py: the recipe and folder of this place, then `words`."""
        return ["--config", str(self.config), "--save-path", str(self.run), *map(str, words)]

    def lists(self, *words: object) -> list[str]:
        """Arguments of train.py: a small PASCAL recipe with lists of these files; `words` name the method."""
        small = ("model.encoder=mit_b0", "model.decoder_channels=32", "model.pretrained=none", "crop_size=65")
        short = ("batch_size=2", "epochs=1", "warmup_epochs=null", "log.interval=1", "num_workers=0", "device=cpu")
        data = (f"data_root={self.root}", f"data.val_id_path={self.root}/lists/val.txt")
        files = [f"--{kind}-id-path={self.root}/lists/{kind}.txt" for kind in ("labeled", "unlabeled")]
        return ["--dataset", "pascal", *files, *small, *short, *data, *map(str, words)]

    def edit(self, **sections: dict) -> None:
        """Merge values into the recipe file, section by section."""
        recipe = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        for section, values in sections.items():
            recipe[section].update(values)
        self.config.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def write_files(root: Path) -> None:
    """Images whose left and right parts differ in color and class; mask folders for labeled and val only."""
    rng = np.random.default_rng(0)
    width, height = SIZE
    for kind, count in COUNTS.items():
        lines = []
        for index in range(count):
            mask = np.zeros((height, width), np.uint8)
            mask[8:, : 20 + 4 * index], mask[8:, 50:] = 1, 2
            image = np.array([[90, 90, 90], [200, 60, 40], [40, 60, 200]], np.uint8)[mask]
            image = (image + rng.integers(0, 40, image.shape)).astype(np.uint8)
            mask[:, -3:] = 255
            for folder, array in (("images", image), ("masks", mask)):
                if folder == "images" or kind != "unlabeled":
                    path = root / folder / kind / f"{kind}{index}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(path)
            names = [f"{folder}/{kind}/{kind}{index}.png" for folder in ("images", "masks")]
            lines.append(" ".join(names[: 1 if kind == "unlabeled" else 2]) + "\n")
        (root / "lists").mkdir(exist_ok=True)
        (root / "lists" / f"{kind}.txt").write_text("".join(lines), encoding="utf-8")


def write_recipe(path: Path, root: Path) -> Path:
    """The recipe of a custom data set: AllSpark, 2 epochs of 3 steps, a log line every 2 steps."""
    custom = {"classes": list(CLASSES), "unlabeled_images": "images/unlabeled"}
    for kind in ("labeled", "val"):
        custom |= {f"{kind}_images": f"images/{kind}", f"{kind}_masks": f"masks/{kind}"}
    recipe = {
        "data": {"dataset": "tiny", "data_root": str(root), "crop_size": 65, "num_workers": 0, "custom": custom},
        "model": {
            "encoder": "mit_b0",
            "decoder_channels": 32,
            "bottleneck": {"name": "allspark", "warmup_epochs": 1},
        },
        "method": {"name": "allspark"},
        "optim": {"name": "adamw", "lr": 1e-3, "lr_multi": 1.0, "weight_decay": 0.01},
        "epochs": 2,
        "batch_size": 2,
        "log": {"interval": 2},
        "device": "cpu",
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
