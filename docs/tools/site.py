"""Hooks of mkdocs.yml: pages made from files outside of docs/ and from the code, links, formulas.

The pages of docs/ are written for GitHub: links lead to files of the repository, formulas stand in $`...`$ and ```math.
"""

from __future__ import annotations

import argparse
import itertools
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from allspark.arguments import COMMANDS, make_parser
from allspark.config_help import INTRODUCTION, keys_with_help

PAGES = {  # file of the repository -> page
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "pretrained_weights/README.md": "weights.md",
    "splits/README.md": "lists.md",
}
REFERENCE = {  # heading -> objects
    "From Python": [
        "allspark.config_io.load_config",
        "allspark.api.build_model",
        "allspark.api.load_checkpoint",
        "allspark.api.predict",
        "allspark.inference.InferenceModel",
    ],
    "For a method of your own": [
        "allspark.methods.base.Method",
        "allspark.methods.base.TeacherMethod",
        "allspark.methods.base.Progress",
        "allspark.models.student.Student",
        "allspark.data.batch.Views",
        "allspark.data.batch.LabeledBatch",
        "allspark.data.batch.UnlabeledBatch",
        "allspark.methods.ema.EMATeacher",
        "allspark.pseudo_labels.Pseudo",
        "allspark.pseudo_labels.cutmix",
        "allspark.losses.consistency_loss",
    ],
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    made = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in PAGES.items()}
    made["index.md"] = re.sub(r"^\[!\[.*\n", "", made["index.md"], flags=re.MULTILINE)  # badges are on another server
    for page, text in {**made, "commands.md": commands(), "keys.md": keys(), "reference.md": reference()}.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    source = {made: file for file, made in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)  # code blocks stay as they are
    return "".join(
        formula_block(part)
        if part.startswith("```")
        else rewrite(part, page.file.src_uri, source, config.repo_url, files)
        for part in parts
    )


def on_page_content(html: str, page: Page, config: Any, files: Files) -> str:
    parts = re.split(r"(<pre.*?</pre>)", html, flags=re.DOTALL)  # code is copied
    joined = (part if part.startswith("<pre") else part.replace(" ± ", "&nbsp;±&nbsp;") for part in parts)
    return "".join(joined)  # a value and its deviation stay on one line


def rewrite(text: str, page: str, source: str, repository: str | None, files: Files) -> str:
    """Links and formulas of a page outside of its code blocks.

    Args:
        page: its address in the site, as docs-relative file.
        source: its file in the repository.
        repository: address that other files of the repository are linked at; None: they are named, not linked.
    """

    def link(found: re.Match) -> str:
        label, target = found.groups()
        if "://" in target or target.startswith("#"):
            return found[0]
        path, hash_, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        uri = PAGES.get(path, path.removeprefix("docs/"))
        file = files.get_file_from_path(uri) if path in PAGES or path.startswith("docs/") else None
        if file is not None and not file.inclusion.is_excluded():
            return f"[{label}]({os.path.relpath(uri, posixpath.dirname(page) or '.')}{hash_}{anchor})"
        if repository:
            return f"[{label}]({repository.rstrip('/')}/blob/main/{path}{hash_}{anchor})"
        return label if "`" in label or path in label else f"{label} (`{path}`)"

    text = re.sub(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s]+)\)", link, text)
    text = re.sub(r"(!\[[^\]]*\]\()docs/", r"\1", text) if source == "README.md" else text
    return re.sub(r"\$`(.+?)`\$", lambda found: convert(found[1]), text, flags=re.DOTALL)


def formula_block(block: str) -> str:
    return convert(block[7:-3].strip(), display="block") if block.startswith("```math") else block


def commands() -> str:
    """The page of all commands: their --help."""
    os.environ["COLUMNS"] = "90"  # the width of a page
    text = ["# Commands", "", "What `--help` of each command prints.", ""]
    for name, (what, _) in COMMANDS.items():
        text += [f"## {name}", "", f"{what}.", "", "```text"]
        text += ["\n\n".join(help.rstrip() for help in helps(make_parser(name))), "```", ""]
    return "\n".join(text)


def keys() -> str:
    """The page of all keys: what `train.py --keys` prints, section by section."""
    text = ["# Keys of a recipe", "", f"What `train.py --keys` prints. {INTRODUCTION}"]
    for section, group in itertools.groupby(keys_with_help(), lambda key: key.path.rpartition(".")[0]):
        text += ["", f"## {section or 'Other keys'}"]
        for key in group:
            star = " \\*" if key.runtime else ""
            default = key.default if key.default == "required" else f"= `{key.default}`"
            text += ["", f"`{key.path}`{star} {default} ({escape(key.values)})", f":   {escape(key.help, code=True)}"]
    return "\n".join(text) + "\n"


def escape(text: str, code: bool = False) -> str:
    """Text in which the characters of Markdown and HTML stand for themselves; code: but not those around `code`."""
    return re.sub(r"([\\*_\[\]])" if code else r"([\\`*_\[\]])", r"\\\1", text).replace("<", "&lt;")


def helps(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The help of a parser and of its subcommands."""
    yield parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from helps(each)


def reference() -> str:
    text = ["# API reference", "", "See [Python API](api.md) for examples.", ""]
    for heading, names in REFERENCE.items():
        text += [f"## {heading}", "", *(f"::: {name}\n" for name in names)]
    return "\n".join(text)
