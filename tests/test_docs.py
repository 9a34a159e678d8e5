"""What the documents promise is there: tests that they name, and words that the commands say of themselves."""

import ast
import re
from pathlib import Path

import pytest

import eval as eval_script
import train

ROOT = Path(train.__file__).parent
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split(" | ")]
    for line in (ROOT / "docs" / "differences.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| U?\d+ ", line)
]


def test_every_oddity_has_its_row():
    """The 32 of the released AllSpark code, and UniMatch's."""
    numbers = [row[0].split()[0] for row in ROWS]
    assert numbers[:32] == [str(number) for number in range(1, 33)]
    assert numbers[32:] == [f"U{number}" for number in range(1, len(numbers) - 31)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_names_a_test_that_exists(row):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[-1])
    assert named, row[0]
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


@pytest.mark.parametrize("script", [train, eval_script], ids=["train.py", "eval.py"])
def test_help_names_this_project(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    help_text = capsys.readouterr().out
    assert help_text.startswith(f"usage: {Path(script.__file__).name}")
    assert "UniMatch" not in help_text
