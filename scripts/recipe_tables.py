"""The tables of docs/recipes.md: what each recipe sets, and what a step of it takes, counted without a computation.

python scripts/recipe_tables.py                             # writes both from the recipes and benchmarks/recipes.json
python scripts/recipe_tables.py count pascal allspark imas  # counts these anew, a minute each; needs no GPU
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from allspark.bench.measure import aten, convolution_backward_flops  # noqa: E402
from allspark.bench.memory import GB, Hollow, TrainingStep, predict_step  # noqa: E402
from allspark.cli.recipe import build_method, complete  # noqa: E402
from allspark.config import CONFIG_ROOT, Recipe, load_recipe  # noqa: E402
from allspark.data import DATASETS  # noqa: E402
from allspark.data.base import DatasetSpec  # noqa: E402
from allspark.data.manifest import load_manifest  # noqa: E402
from allspark.models.segmentor import build_model  # noqa: E402

PAGE = ROOT / "docs" / "recipes.md"
COUNTED = ROOT / "docs" / "benchmarks" / "recipes.json"
SPLITS = {"pascal": "1_8", "cityscapes": "1_8", "coco": "1_128", "ade20k": "1_8", "camvid": "1_8", "shapes": "1_30"}
WAYS = {  # head of the column -> processes that share the batch, precision
    "1 GPU, fp32": (1, "fp32"),
    "each of 4, fp32": (4, "fp32"),
    "each of 4, bf16": (4, "bf16"),
}


def recipe_of(dataset: str, method: str, changes: dict | None = None) -> Recipe:
    return complete(load_recipe(dataset, method, {"model.pretrained": "none", **(changes or {})}))


def methods() -> list[str]:
    """All recipes of methods; those on a ResNet behind the others."""
    names = sorted(path.stem for path in (CONFIG_ROOT / "methods").glob("*.yaml"))
    return sorted(names, key=lambda name: re.search(r"_r\d+$", name) is not None)


def steps(recipe: Recipe, dataset: str) -> int:
    """Of the whole run on the split of SPLITS."""
    _, _, facts = load_manifest().find(f"{dataset}/{SPLITS[dataset]}/{recipe.epoch_of}")
    return recipe.epochs * (facts.count // recipe.batch_size)


def settings(dataset: str, method: str) -> tuple[str, ...]:
    """The cells of a recipe's row."""
    recipe = recipe_of(dataset, method)
    optim, model = recipe.optim, recipe.model
    network = f"{model.encoder}, {model.decoder}" + (", bottleneck" if model.bottleneck.name != "none" else "")
    second = "" if method_is_supervised(recipe) else f" + {recipe.batch_size}"
    rate = f"{optim.name} {optim.lr:g}, head x {optim.lr_multi:g}"
    epochs = f"{recipe.epochs} of the {recipe.epoch_of}"
    cells = (network, recipe.data.crop_size, f"{recipe.batch_size}{second}", rate, recipe.criterion.name, epochs)
    return (*map(str, cells), f"{steps(recipe, dataset):,}")


def method_is_supervised(recipe: Recipe) -> bool:
    return recipe.method.name == "supervised"


def settings_rows(dataset: str) -> Iterator[list[str]]:
    """Recipes that set the same stand in one row."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for method in methods():
        groups.setdefault(settings(dataset, method), []).append(f"`{method}`")
    for cells, names in groups.items():
        yield [dataset, ", ".join(names), *cells]


def settings_table() -> list[list[str]]:
    head = ["data set", "method", "network", "crop", "batch", "optimizer", "loss", "epochs", "steps"]
    return [head, *(row for dataset in SPLITS for row in settings_rows(dataset))]


def work(recipe: Recipe, spec: DatasetSpec) -> int:
    """Floating-point operations of a step of the whole batch, counted on tensors without content."""
    model, method = build_model(recipe.model, spec.num_classes, recipe.data.crop_size), build_method(recipe, spec)
    method.attach(model)
    counter = FlopCounterMode(display=False, custom_mapping={aten.convolution_backward: convolution_backward_flops})
    with FakeTensorMode(allow_non_fake_inputs=True), Hollow():
        for module in (model, method):
            module.to_empty(device="cpu")
        step = TrainingStep(recipe, spec, method, model, recipe.batch_size)
        step.settle()
        with counter:
            step.run(1)
    return counter.get_total_flops()


def count(dataset: str, method: str) -> dict[str, float]:
    """TFLOP of a step, and GB at its peak each way."""
    spec, row = DATASETS[dataset], {"TFLOP": work(recipe_of(dataset, method), DATASETS[dataset]) / 1e12}
    for name, (processes, precision) in WAYS.items():
        recipe = recipe_of(dataset, method, {"precision": precision})
        row[name] = predict_step(recipe, spec, build_method(recipe, spec), "cuda", processes).peak / GB
    return {key: round(value, 3) for key, value in row.items()}


def count_all(dataset: str, chosen: list[str]) -> None:
    """Into COUNTED, one after the other."""
    for method in chosen:
        known = json.loads(COUNTED.read_text(encoding="utf-8")) if COUNTED.exists() else {}
        known.setdefault(dataset, {})[method] = count(dataset, method)
        known = {name: {m: known[name][m] for m in methods() if m in known[name]} for name in SPLITS if name in known}
        COUNTED.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(dataset, method, known[dataset][method], flush=True)


def counted_table() -> list[list[str]]:
    head = ["data set", "method", *WAYS, "TFLOP per step", "EFLOP in all"]
    rows = []
    for dataset, counted in json.loads(COUNTED.read_text(encoding="utf-8")).items():
        for method, row in counted.items():
            total = row["TFLOP"] * steps(recipe_of(dataset, method), dataset) / 1e6
            cells = [f"{row[name]:.1f}" for name in WAYS]
            rows.append([dataset, f"`{method}`", *cells, f"{row['TFLOP']:.2f}", f"{total:.3g}"])
    return [head, *rows]


def markdown(table: list[list[str]]) -> str:
    head, *rows = (f"| {' | '.join(cells)} |\n" for cells in table)
    return "".join((head, "|---" * len(table[0]) + "|\n", *rows))


def write_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (("settings", settings_table), ("counted", counted_table)):
        pattern = rf"(<!-- recipes: {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(
            pattern, lambda match, t=table: match[1] + markdown(t()) + match[2], text, flags=re.DOTALL
        )
        assert found == 1, name
    PAGE.write_text(text, encoding="utf-8")


def main(words: list[str]) -> None:
    if words[:1] == ["count"]:
        count_all(words[1], words[2:])
    write_page()


if __name__ == "__main__":
    main(sys.argv[1:])
