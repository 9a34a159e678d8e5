"""The tables of docs/recipes.md: the settings of each recipe, the memory and computation of its steps.

python docs/tools/recipe_tables.py                             # writes them, from the code and benchmarks/recipes.json
python docs/tools/recipe_tables.py count pascal allspark imas  # counts these recipes again: a minute each, no GPU
"""

from __future__ import annotations

import functools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


from allspark.bench.measure import aten, convolution_backward_flops
from allspark.build import build_method, complete
from allspark.config import Recipe
from allspark.config_io import CONFIG_ROOT, load_recipe
from allspark.data.datasets import DATASETS
from allspark.data.spec import DatasetSpec
from allspark.memory_estimate import GB, FakeMemoryCounter, TrainingStep, predict_step
from allspark.models.segmentor import build_model
from allspark.split_lists.manifest import load_manifest

PAGE = ROOT / "docs" / "recipes.md"
COUNTED = ROOT / "docs" / "benchmarks" / "recipes.json"
SPLITS = {"pascal": "1_8", "cityscapes": "1_8", "coco": "1_128", "ade20k": "1_8", "camvid": "1_8", "shapes": "1_30"}
SMALL = ("camvid", "shapes")  # whose steps need less than 1 GB
FAMILIES = {"dinov2": "DINOv2", "_r50": "ResNet", "_r101": "ResNet"}  # part of a method's name -> family of its encoder
WAYS = {  # column -> processes that share the batch, precision
    "1 GPU, fp32": (1, "fp32"),
    "each of 4, fp32": (4, "fp32"),
    "each of 4, bf16": (4, "bf16"),
}


@functools.cache
def recipe_of(dataset: str, method: str, precision: str = "fp32") -> Recipe:
    return complete(load_recipe(dataset, method, {"model.pretrained": "none", "precision": precision}))


def methods() -> list[str]:
    """The names of all method files, those on a ResNet and then those on DINOv2 last."""
    names = sorted(path.stem for path in (CONFIG_ROOT / "methods").glob("*.yaml"))
    return sorted(names, key=lambda name: ("dinov2" in name, re.search(r"_r\d+$", name) is not None))


def steps(recipe: Recipe, dataset: str) -> int:
    """Optimizer steps of the whole run on the split of SPLITS."""
    _, _, facts = load_manifest().find(f"{dataset}/{SPLITS[dataset]}/{recipe.epoch_of}")
    return recipe.epochs * (facts.count // recipe.batch_size)


def family(method: str) -> str:
    return next((name for mark, name in FAMILIES.items() if mark in method), "MiT")


def settings(dataset: str, method: str) -> tuple[str, ...]:
    """The cells of a recipe's row after the first."""
    recipe = recipe_of(dataset, method)
    optim = recipe.optim
    rate = f"{optim.name} {optim.lr:g} (x {optim.lr_multi:g})"
    passes = f"{recipe.epochs}" if recipe.epoch_of == "unlabeled" else f"{recipe.epochs} (labeled)"
    count = f"{steps(recipe, dataset):,}"
    return str(recipe.data.crop_size), str(recipe.batch_size), rate, recipe.criterion.name, passes, count


def group_text(names: list[str]) -> str:
    """The recipes that share a row: those of a family together, by the methods' names if they are fewer than half."""
    parts, plain = [], {name: re.sub(r"_(r\d+|dinov2_.)$", "", name) for name in methods()}
    supervised = {plain[name] for name in names} == {"supervised"}
    for kind in dict.fromkeys(map(family, names)):
        mine = [name for name in names if family(name) == kind]
        few = not supervised and 2 * len(mine) < sum(family(name) == kind for name in plain)
        parts.append(f"{kind} {', '.join(dict.fromkeys(plain[name] for name in mine))}" if few else kind)
    return ("supervised " if supervised else "") + ", ".join(parts)


def settings_text() -> str:
    """Recipes with equal settings share a row."""
    table = [["data set, split", "recipes", "crop", "batch", "optimizer, rate", "loss", "epochs", "steps"]]
    for dataset, split in SPLITS.items():
        rows: dict[tuple[str, ...], list[str]] = {}
        for method in methods():
            rows.setdefault(settings(dataset, method), []).append(method)
        first = [f"{dataset} `{split}`", *[""] * (len(rows) - 1)]
        table += [[name, group_text(names), *cells] for name, (cells, names) in zip(first, rows.items(), strict=True)]
    return markdown(table)


def work(recipe: Recipe, spec: DatasetSpec) -> int:
    """Floating-point operations of a training step of the whole batch, counted on fake tensors."""
    model, method = (
        build_model(recipe.model, spec.num_classes, recipe.data.crop_size, spec.channels),
        build_method(recipe, spec),
    )
    method.attach(model)
    counter = FlopCounterMode(display=False, custom_mapping={aten.convolution_backward: convolution_backward_flops})
    with FakeTensorMode(allow_non_fake_inputs=True), FakeMemoryCounter():
        for module in (model, method):
            module.to_empty(device="cpu")
        step = TrainingStep(replace(recipe, micro_batch=None), spec, method, model)
        step.init_optimizer()
        with counter:
            step.run(1)
    return counter.get_total_flops()


def count(dataset: str, method: str) -> dict[str, float]:
    """TFLOP of a step, and its peak memory in GB for each column of WAYS."""
    spec, row = DATASETS[dataset], {"TFLOP": work(recipe_of(dataset, method), DATASETS[dataset]) / 1e12}
    for name, (processes, precision) in WAYS.items():
        recipe = recipe_of(dataset, method, precision)
        row[name] = predict_step(recipe, spec, build_method(recipe, spec), "cuda", processes).peak / GB
    return {key: round(value, 3) for key, value in row.items()}


def count_all(dataset: str, chosen: list[str]) -> None:
    """Count the chosen methods and write COUNTED and the page after each."""
    for method in chosen:
        known = json.loads(COUNTED.read_text(encoding="utf-8")) if COUNTED.exists() else {}
        known.setdefault(dataset, {})[method] = count(dataset, method)
        known = {name: {m: known[name][m] for m in methods() if m in known[name]} for name in SPLITS if name in known}
        COUNTED.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        write_page()
        print(dataset, method, known[dataset][method], flush=True)


def counted_text() -> str:
    head = ["data set", "method", *WAYS, "TFLOP per step", "EFLOP per run"]
    rows = []
    for dataset, counted in json.loads(COUNTED.read_text(encoding="utf-8")).items():
        for method, row in counted.items() if dataset not in SMALL else ():
            total = row["TFLOP"] * steps(recipe_of(dataset, method), dataset) / 1e6
            cells = [f"{row[name]:.1f}" for name in WAYS]
            rows.append([dataset, f"`{method}`", *cells, f"{row['TFLOP']:.2f}", f"{total:.3g}"])
    return markdown([head, *rows])


def markdown(table: list[list[str]]) -> str:
    head, *rows = (f"| {' | '.join(cells)} |\n" for cells in table)
    return "".join((head, "|---" * len(table[0]) + "|\n", *rows))


def render(text: str) -> str:
    """The page with new tables."""
    for name, content in (("settings", settings_text()), ("counted", counted_text())):
        before, start, rest = text.partition(f"<!-- recipes: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert start and end, name
        text = "".join((before, start, content, end, after))
    return text


def write_page() -> None:
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def main(argv: list[str]) -> None:
    if argv[:1] == ["count"]:
        count_all(argv[1], argv[2:])
    else:
        write_page()


if __name__ == "__main__":
    main(sys.argv[1:])
