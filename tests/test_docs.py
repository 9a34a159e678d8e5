"""What the documents promise is there: tests, lists, commands that they name, and what commands say of themselves."""

import ast
import re
from pathlib import Path

import pytest
import yaml

import eval as eval_script
import train
from allspark.data.manifest import load_manifest
from allspark.errors import run_main

ROOT = Path(train.__file__).parent
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split(" | ")]
    for line in (ROOT / "docs" / "differences.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| U?\d+ ", line)
]


def test_every_oddity_has_its_row():
    """The 32 of the released AllSpark code, and those of the other methods."""
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


def published_rows():
    """Of each table of published results: name -> hash of its lists, encoder and crop, command words of each row."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").partition("## Published results")[2]
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        assert head[-1] == "command" and {len(row) for row in rows} == {len(head)}
        lists = dict(re.findall(r"(\w+) \(([0-9a-f]{12})\)", " ".join(head)))
        for row in rows:
            if words := row[-1].strip("`").split():
                yield lists, row[1], words


def test_published_results_name_lists_that_are_known_and_commands_that_resolve(capsys):
    """Each to a recipe of the encoder and crop of its row."""
    commands = 0
    for lists, network, words in published_rows():
        choice = {"dataset": "pascal", **dict(word.split("=") for word in words if "." not in word)}
        overrides = [word for word in words if "." in word]
        encoder, crop = network.partition(",")[0], network.rpartition(", ")[2].split()[0]
        for split, sha256 in lists.items():
            _, _, facts = load_manifest().find(f"{choice['dataset']}/{split}/labeled")
            assert facts.sha256.startswith(sha256), split
            options = ["--dataset", choice["dataset"], "--method", choice["method"], "--split", split]
            assert run_main(train.main, [*options, "--print-config", *overrides]) == 0
            recipe = yaml.safe_load(capsys.readouterr().out)
            found = (
                recipe["model"]["encoder"].replace("_", "").removesuffix("s")
            )  # s: a ResNet with a stem of three layers
            assert found == encoder.lower().replace("-", ""), words
            assert recipe["data"]["crop_size"] == int(crop), words
            commands += 1
    assert commands > 60


@pytest.mark.parametrize("script", [train, eval_script], ids=["train.py", "eval.py"])
def test_help_names_this_project(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    help_text = capsys.readouterr().out
    assert help_text.startswith(f"usage: {Path(script.__file__).name}")
    assert "UniMatch" not in help_text
