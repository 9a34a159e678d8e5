"""Who may import whom, one way. Parsed from the files, so that an import inside a function counts too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {  # package or module -> what of allspark it may import, besides itself and utils
    "utils": set(),
    "config": set(),
    "config_io": {"config"},
    "arguments": {"__version__", "config", "config_io", "split_lists.layouts"},
    "distributed": set(),
    "losses": set(),
    "data": {"config", "config_io", "distributed", "split_lists"},
    "split_lists": {"config_io", "data"},
    "prepare": {"config", "data", "split_lists"},
    "models": {"config", "distributed", "weights"},
    "weights": {"config", "models"},
    "methods": {"data.batch", "distributed", "losses", "models.bottleneck", "models.cam", "models.segmentor"},
    "evaluation": {"config", "data", "distributed"},
    "visualization": {"config", "data", "evaluation"},
    "engine": {"config", "distributed"},
    "inference": {"config", "config_io", "data", "methods", "models", "weights", "engine", "evaluation", "cli.recipe"},
    "memory_estimate": {"config", "data", "methods", "models", "engine", "losses", "cli.recipe", "bench"},
    "runs": {"config", "config_io", "data", "split_lists", "engine", "inference", "visualization", "cli.recipe"},
    "api": {"config", "data", "distributed", "evaluation", "inference", "models"},
    "bench": {"config", "distributed", "losses", "data", "models", "methods", "evaluation", "engine", "memory_estimate"}
    | {"visualization"},
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


FILES = sorted(path for path in (ROOT / "allspark").rglob("*.py") if path.parent.name != "cli")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_order(path):
    part = path.relative_to(ROOT / "allspark").with_suffix("").parts[0]
    if part in ("__init__", "__main__"):
        return
    allowed = ALLOWED[part] | {part, "utils"}
    for name in imports(path):
        assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{path.name} imports allspark.{name}"


def test_nobody_imports_the_commands():
    for path in FILES:
        if path.name != "__main__.py":
            commands = {name for name in imports(path) if name.split(".")[0] in ("cli", "train", "eval")}
            assert commands <= {"cli.recipe"}, path


def test_no_hard_wired_device_or_data_set():
    for path in (*FILES, ROOT / "train.py", ROOT / "eval.py", *(ROOT / "allspark/cli").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "." + "cuda(" not in text, path
        assert "dataset ==" not in text, path
