"""The docs: links, commands, examples, named tests, lists and tables are valid."""

import ast
import contextlib
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image

import allspark
import train
from allspark import recipe_arguments as recipe_words
from allspark.__main__ import main as allspark_main
from allspark.arguments import parse
from allspark.build import method_class
from allspark.config_io import load_recipe
from allspark.config_keys import bind_options
from allspark.methods import METHODS
from allspark.split_lists.manifest import load_manifest
from allspark.utils.errors import UserError, run_main
from helpers import REPO

BESIDE = ("splits", "pretrained_weights")  # folders with a README of their own
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split(" | ")]
    for line in (REPO / "docs" / "differences.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| U?\d+ ", line)
]


def test_every_oddity_has_a_row():
    """The 32 of the released AllSpark code, and those of the other methods."""
    numbers = [row[0].split()[0] for row in ROWS]
    assert numbers[:32] == [str(number) for number in range(1, 33)]
    assert numbers[32:] == [f"U{number}" for number in range(1, len(numbers) - 31)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_rows_name_tests_that_run(row, request):
    """Each test that a row names is part of this session, and skipped nowhere; of files not in it, it exists."""
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[-1])
    assert named, row[0]
    paths = {path.name: path for path in (REPO / "tests").rglob("test_*.py")}
    collected = {item.path for item in request.session.items}
    for file, name in named:
        tree = ast.parse(paths[file].read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
        if paths[file] in collected and not request.config.option.keyword:
            items = [i for i in request.session.items if (i.path, i.originalname) == (paths[file], name)]
            assert items and not any(i.get_closest_marker(mark) for i in items for mark in ("skip", "skipif", "xfail"))


def published_rows():
    """Of each table of published results: name -> hash of its lists, encoder and crop, command words of each row."""
    text = (REPO / "docs" / "published_results.md").read_text(encoding="utf-8")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        assert head[-1] == "command" and {len(row) for row in rows} == {len(head)}
        lists = dict(re.findall(r"(\w+) \(([0-9a-f]{12})\)", " ".join(head)))
        for row in rows:
            if words := row[-1].strip("`").split():
                yield lists, row[1], words


def test_published_results(capsys):
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
            name = recipe["model"]["encoder"]
            assert ("output stride 8" in network) == name.endswith("_os8"), words
            found = name.partition("s_imas")[0].removesuffix("s")  # s: a ResNet with a stem of three layers
            found = re.sub(r"(dinov2)_(\w).*", r"\1\2", found).replace("_", "")
            assert found == encoder.lower().replace("-", ""), words
            assert recipe["data"]["crop_size"] == int(crop), words
            commands += 1
    assert commands > 60


@pytest.mark.parametrize("script", ["train", "eval"])
def test_help_names_this_project(script, capsys):
    with pytest.raises(SystemExit):
        parse(script, ["--help"])
    help_text = capsys.readouterr().out
    assert help_text.startswith(f"usage: {script}.py")
    assert "UniMatch" not in help_text


PAGES = sorted(
    [
        *(REPO / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
        *(REPO / "docs").glob("*.md"),
        *(REPO / folder / "README.md" for folder in BESIDE),
    ],
    key=str,
)


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    """The fenced blocks of a language, and the line that each begins in."""
    text = text_of(page)
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, found.start()) + 2, found[1]


def anchors(page):
    """Of its headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(next(name for name in (slug, *(f"{slug}-{n}" for n in range(1, 99))) if name not in found))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links(page):
    """Files and their headings; what lies outside is at least written as an address."""
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file == REPO or REPO in file.parents, f"{target} leads out of the repository"
        assert not anchor or anchor in anchors(file), target


def commands():
    """Each command of the sh blocks as page:line and its words; comments left out, continued lines put together."""
    for page in PAGES:
        for first, block in blocks(page, "sh"):
            text = ""
            for number, line in enumerate(block.splitlines(), first):
                if line.endswith("\\"):
                    text += line[:-1]
                    continue
                text += line + "\n"
                with contextlib.suppress(ValueError):  # a quotation that goes on
                    words, text = shlex.split(text, comments=True), ""
                    if words:
                        yield f"{page.relative_to(REPO)}:{number}", words
            assert not text, f"{page.relative_to(REPO)}:{first}: an open quotation"


COMMANDS = list(commands())


def said(words):
    """The verb and what is said to it, whoever starts it; None where it is another program's command."""
    for place, word in enumerate(words):
        if word in ("train.py", "eval.py"):
            return [word.removesuffix(".py"), *words[place + 1 :]]
        if word == "allspark" and words[max(place - 1, 0)] in ("-m", "allspark"):
            return words[place + 1 :]
    return None


def test_commands_parse():
    """Every option of every command on these pages is one that there is; every recipe named by them resolves."""
    count = 0
    for place, words in COMMANDS:
        call = said(words)
        if call and not {"-h", "--help"} & set(call):
            try:
                args = parse(call[0], call[1:])
            except SystemExit:
                pytest.fail(f"{place}: {' '.join(words)}")
            if getattr(args, "method", None) and args.config is None and ":" not in args.method:
                recipe_words.recipe_of(args)
            count += 1
    assert count > 60


def test_several_processes_end_with_one_message():
    """Plain torchrun ends with 40 lines and exit code 1."""
    launched = [words for _, words in COMMANDS if "allspark.torchrun" in words]
    assert len(launched) > 1 and not [place for place, words in COMMANDS if "torchrun" in words]


def test_named_scripts_exist():
    """And the variables that are set in front of them are theirs."""
    count = 0
    for place, words in COMMANDS:
        for script in (word for word in words if re.fullmatch(r"(scripts|docs/tools)/\w+\.(sh|py)", word)):
            text = text_of(REPO / script)
            for name in re.findall(r"^(\w+)=", "\n".join(words[: words.index(script)]), re.MULTILINE):
                assert re.search(rf"\{{{name}\b", text) or name.isupper(), f"{place}: {name} means nothing to {script}"
            count += 1
    assert count > 15


def test_quick_commands_run(capsys):
    """Those that need no data: they are the first that a reader tries."""
    calls = [call for _, words in COMMANDS if (call := said(words))]
    quick = [call for call in calls if "--print-config" in call or call[:2] == ["splits", "list"]]
    assert len(quick) > 3
    for call in quick:
        assert run_main(*((train.main, call[1:]) if call[0] == "train" else (allspark_main, call))) == 0, call
        assert capsys.readouterr().out


def test_python_examples_parse():
    for page in PAGES:
        for line, block in blocks(page, "python"):
            compile(block, f"{page.name}:{line}", "exec")


def test_api_examples_run(place, tmp_path, monkeypatch, capsys):
    """A method outside of the package trains by its name; the examples load what it saved, if it is trusted."""
    page, names = REPO / "docs" / "api.md", {"__name__": "api"}
    texts = [block for _, block in blocks(page, "python")]
    examples = [compile(block, "api.md", "exec") for block in texts]
    ((_, recipe),) = blocks(page, "yaml")
    place.edit(method=yaml.safe_load(recipe)["method"], model={"bottleneck": "none"})
    code, name = place.train("epochs=1", "warmup_epochs=0"), "mean_teacher:MeanTeacher"
    assert run_main(train.main, code) == 2
    assert "mean_teacher cannot be imported" in capsys.readouterr().err
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "mean_teacher.py").write_text(texts[-1])
    monkeypatch.syspath_prepend(tmp_path / "modules")
    assert run_main(train.main, code) == 0
    saved = torch.load(place.run / "latest.pth", weights_only=True)
    assert saved["step"] == 3 and any(name.startswith("teacher.") for name in saved["method"])

    slim = tmp_path / "slim.pth"
    assert run_main(allspark_main, ["weights", "export", str(place.run / "latest.pth"), "--out", str(slim)]) == 0
    monkeypatch.delitem(sys.modules, "mean_teacher")  # as in another process
    assert allspark.load_checkpoint(slim).spec.num_classes == 3  # which needs no method
    with pytest.raises(UserError, match=f"latest.pth: method.name={name}: code from outside.*ALLSPARK_METHODS={name}"):
        allspark.load_checkpoint(place.run / "latest.pth")
    assert "mean_teacher" not in sys.modules
    monkeypatch.setenv("ALLSPARK_METHODS", f"other:Other,{name}")
    for wrong in ("mean_teacher:Gone", "mean_teacher:Views", "mean_teacher:a.b", ":A", "os:"):
        with pytest.raises(UserError, match=f"method.name={wrong}"):
            method_class(wrong, trusted=True)

    (tmp_path / "exp" / "demo").mkdir(parents=True)
    place.run.rename(tmp_path / "exp" / "demo" / "allspark_revised")
    Image.linear_gradient("L").resize((90, 70)).convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    for example in examples:
        exec(example, names)
    assert names["label"].shape == names["confidence"].shape == (1, 70, 90)
    assert set(names["label"].unique().tolist()) <= {0, 1, 2}


def test_every_method_has_section_and_picture():
    page = REPO / "docs" / "methods.md"
    for file in (REPO / "configs" / "methods").glob("*.yaml"):
        if not re.search(r"_(r\d+|dinov2_\w)$", file.stem):
            assert file.stem in anchors(page), file.stem
            assert f"](method_{file.stem}.png)" in text_of(page)


def test_recipe_table_matches_configs():
    """docs/recipes.md: `python docs/tools/recipe_tables.py` writes it."""
    spec = importlib.util.spec_from_file_location("recipe_tables", REPO / "docs" / "tools" / "recipe_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert text_of(tables.PAGE) == tables.render(text_of(tables.PAGE))


def test_faq_covers_every_theme():
    themes = re.split(r"^## ", text_of(REPO / "docs" / "faq.md"), flags=re.MULTILINE)[1:]
    assert [theme.split(".")[0] for theme in themes] == [str(number) for number in range(1, 19)]
    for theme in themes:
        answer, _, threads = theme.partition("<sub>Threads: ")
        assert re.search(r"`[^`]+`|\]\(", answer), theme[:60]
        assert re.search(r"\]\(https://github.com/[\w.-]+/[\w.-]+/issues/\d+\)", threads), theme[:60]


def test_citation():
    cited = yaml.safe_load(text_of(REPO / "CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "license", "version"} <= cited.keys()
    assert cited["preferred-citation"]["authors"][0]["family-names"] == "Wang"


def test_method_options_are_documented():
    sections = re.split(r"^## ", text_of(REPO / "docs" / "methods.md"), flags=re.MULTILINE)[1:]
    for section in sections:
        name, options = section.split()[0], section.partition("\nOptions: ")[2]
        kind = METHODS[load_recipe("shapes", name).method.name]
        if "those of" not in options:
            told = set(re.findall(r"`(\w+)`", options))
            assert told == set(bind_options(kind, {}, "method")), name


def test_site_builds(tmp_path):
    """Without a warning: each link and anchor leads somewhere, each name of the API reference exists."""
    pytest.importorskip("mkdocs", reason="the documentation site needs mkdocs-material")
    for name in ("material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(name, reason="the documentation site needs mkdocs-material")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "site" / "methods.html").read_text(encoding="utf-8")
    assert text.count("<math") > 15 and "$`" not in text
    assert "--save-path" in (tmp_path / "site" / "commands.html").read_text(encoding="utf-8")
    assert "<code>evaluation.interval</code> *" in (tmp_path / "site" / "keys.html").read_text(encoding="utf-8")
