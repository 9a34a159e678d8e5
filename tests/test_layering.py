"""Who may import whom, one way. Parsed from the files, so that an import inside a function counts too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {"config", "batch", "distributed", "losses", "ema", "errors", "download", "perturb", "masking"}
ALLOWED = {  # package or module -> what of allspark it may import, besides itself and errors
    "errors": set(),
    "whole": set(),
    "download": {"whole"},
    "untrusted": set(),
    "workers": set(),
    "config": {"untrusted", "ranges"},
    "ranges": {"config"},
    "batch": set(),
    "distributed": set(),
    "losses": set(),
    "ema": set(),
    "perturb": set(),
    "masking": set(),
    "pseudo": {"batch"},
    "hardness": {"pseudo"},
    "thresholds": {"pseudo", "distributed"},
    "data": {"config", "batch", "distributed", "workers", "whole"},
    "models": {"config", "distributed", "untrusted"},
    "methods": {"batch", "pseudo", "hardness", "perturb", "masking", "losses", "ema", "thresholds"}
    | {"models.bottleneck", "models.cam", "models.segmentor"},
    "evaluation": {"batch", "config", "distributed", "data.base", "workers", "whole"},
    "engine": {"config", "distributed", "untrusted"},
    "bench": {"config", "batch", "distributed", "losses", "data", "models", "methods", "evaluation", "engine"}
    | {"workers"},
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
    allowed = ALLOWED[part] | {part, "errors"}
    for name in imports(path):
        assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{path.name} imports allspark.{name}"


def test_nobody_imports_the_commands():
    for path in FILES:
        if path.name != "__main__.py":
            assert not any(name.split(".")[0] in ("cli", "train", "eval") for name in imports(path)), path


def test_no_hard_wired_device_or_data_set():
    for path in (*FILES, ROOT / "train.py", ROOT / "eval.py", *(ROOT / "allspark/cli").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "." + "cuda(" not in text, path
        assert "dataset ==" not in text, path


def test_no_long_function_without_a_reason():
    """40 lines and no more; the run in train.py is the one that is read from top to bottom."""
    reasons = {"train.py:train"}
    for path in (*FILES, ROOT / "train.py", ROOT / "eval.py", *(ROOT / "allspark/cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and f"{path.name}:{node.name}" not in reasons:
                assert node.end_lineno - node.lineno < 40, f"{path.name}:{node.name}"
