"""The allowed imports between modules, parsed from the files, so that imports inside functions count."""

import ast
import re

import pytest

from helpers import REPO

ALLOWED = {  # package or module -> what of allspark it may import, besides itself and utils
    "utils": set(),
    "config": set(),
    "config_keys": {"config"},
    "config_io": {"config", "config_keys"},
    "config_help": {"config", "config_keys"},
    "arguments": {
        "__version__",
        "config",
        "config_help",
        "config_io",
        "config_keys",
        "split_lists.layouts",
        "weights.mirrors",
    },
    "device": set(),
    "distributed": set(),
    "launch": {"device", "distributed"},
    "torchrun": set(),
    "losses": set(),
    "pseudo_labels": set(),
    "data": {"config", "config_io", "distributed", "split_lists.manifest"},
    "split_lists": {"config_io", "data"},
    "prepare": {"data"},
    "models": {"config", "distributed", "pseudo_labels"},
    "weights": {"config", "models"},
    "methods": {"data.batch", "data.spec", "distributed", "losses", "models", "pseudo_labels"},
    "evaluation": {"config", "data", "distributed", "models.eval_mode", "models.resize"} | {"pseudo_labels"},
    "visualization": {"data", "evaluation"},
    "engine": {"config", "distributed"},
    "build": {"config", "config_io", "config_keys", "data", "distributed", "losses", "methods"},
    "cuda_graph": {"config", "data.batch", "distributed", "engine.stepper", "methods"} | {"models.timm_encoder"},
    "train_step": {"config", "cuda_graph", "data.batch", "distributed", "engine", "methods", "models"},
    "checkpointer": {"build", "config_io", "data", "distributed", "engine", "launch", "train_step"},
    "run": {"build", "checkpointer", "config", "config_io", "cuda_graph", "data", "distributed", "engine", "evaluation"}
    | {"launch", "methods", "models", "train_step", "weights"},
    "recipe_arguments": {"build", "config", "config_io", "engine.optim"},
    "hub": {"engine"},
    "inference": {"build", "config", "config_io", "data", "engine", "evaluation", "hub", "models"},
    "memory_estimate": {"config", "data", "engine", "methods", "models", "train_step"},
    "runs": {"build", "config", "config_io", "data", "engine", "evaluation", "inference", "split_lists"}
    | {"visualization"},
    "api": {"config", "data", "device", "evaluation", "inference", "models"},
    "bench": {"config", "data", "distributed", "engine", "evaluation", "losses", "memory_estimate", "methods", "models"}
    | {"cuda_graph", "train_step", "visualization"},
}


def imports(path):
    """Names below allspark that a file imports, such as models.bottleneck."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "allspark":
            base = node.module.removeprefix("allspark").lstrip(".")
            yield from (base,) if base else (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative import")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("allspark."):
                    yield alias.name.removeprefix("allspark.")


FILES = sorted(path for path in (REPO / "allspark").rglob("*.py") if path.parent.name != "cli")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_import_order(path):
    part = path.relative_to(REPO / "allspark").with_suffix("").parts[0]
    if part in ("__init__", "__main__"):
        return
    allowed = ALLOWED[part] | {part, "utils"}
    for name in imports(path):
        assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{path.name} imports allspark.{name}"


def test_no_imports_of_commands():
    for path in FILES:
        if path.name != "__main__.py":
            assert not {name for name in imports(path) if name.split(".")[0] in ("cli", "train", "eval")}, path


def test_no_import_cycles():
    """Remove modules that import none of the rest until nothing is left."""
    modules = {".".join(path.relative_to(REPO / "allspark").with_suffix("").parts): path for path in FILES}
    rest = {name: {other for other in imports(path) if other in modules} for name, path in modules.items()}
    while leaves := [name for name, others in rest.items() if not others & rest.keys()]:
        for name in leaves:
            del rest[name]
    assert not rest


def test_methods_do_not_know_bottleneck():
    """What a network with AllSpark's bottleneck needs beyond other ones is the business of Student."""
    for path in (REPO / "allspark" / "methods").glob("*.py"):
        found = re.findall("memory|warmup|bottleneck", path.read_text(encoding="utf-8"), re.IGNORECASE)
        assert path.name == "allspark.py" or not found, path


def test_no_hard_coded_device_or_dataset():
    for path in (*FILES, REPO / "train.py", REPO / "eval.py", *(REPO / "allspark/cli").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "." + "cuda(" not in text, path
        assert "dataset ==" not in text, path
