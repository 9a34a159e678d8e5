"""Models as folders of model.safetensors, config.yaml and a model card, on disk or on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from allspark.engine.checkpoint import FORMAT, check_content
from allspark.utils.atomic import atomic_path, write_text
from allspark.utils.errors import UserError, reason_of
from allspark.utils.markdown import escape_cell
from allspark.utils.safe_load import check_tensors
from allspark.utils.safe_yaml import parse_yaml

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.yaml", "README.md"
PREFIX = "hf://"
MAX_CONFIG = 1 << 20  # bytes
REMEDY = "free disk space or choose another folder"


def is_model(path: str | Path) -> bool:
    """Whether the path is an address on the Hub or a folder of write_model_folder."""
    return str(path).startswith(PREFIX) or (Path(path) / WEIGHTS).is_file()


def write_model_folder(folder: Path, content: Mapping[str, Any], card: str) -> None:
    """Write a model.

    Args:
        folder: created if needed; a model of this program in it is replaced.
        content: of a checkpoint without optimizer, as `weights export` writes it.
        card: text of the model card.

    Raises:
        UserError: the folder has files of the same names that are not those of such a model.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder for the model")
    if not is_own(folder / CONFIG):
        for name in (WEIGHTS, CONFIG, CARD):
            if (folder / name).exists():
                raise UserError(
                    f"{folder / name}: exists, and is not of a model of this program; choose another folder"
                )
    folder.mkdir(parents=True, exist_ok=True)
    about = {"format": FORMAT, **{key: value for key, value in content.items() if key != "model"}}
    write_text(folder / CONFIG, yaml.safe_dump(about, sort_keys=False), REMEDY)  # first: it marks the folder as ours
    with atomic_path(folder / WEIGHTS, errors=(RuntimeError, SafetensorError)) as temporary:
        save_file({name: value.contiguous() for name, value in content["model"].items()}, temporary, {"format": "pt"})
    write_text(folder / CARD, card, REMEDY)


def is_own(config: Path) -> bool:
    """Whether a config.yaml is that of a model folder, not of a run or another program."""
    try:
        about = parse_yaml(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and about.get("format") == FORMAT


def read_model(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of the weights and the content of a checkpoint, from a path that is_model accepts.

    Raises:
        UserError: a file is damaged, or the folder holds a model of another program.
    """
    folder = download(str(path)) if str(path).startswith(PREFIX) else Path(path)
    try:
        if (folder / CONFIG).stat().st_size > MAX_CONFIG:
            raise ValueError("it is too large")
        about = parse_yaml((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read ({reason_of(error)}); download the model again") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UserError(f"{folder}: holds no model of this program; give a folder of `weights push`")
    try:
        state = load_file(folder / WEIGHTS)
        check_tensors(state, (folder / WEIGHTS).stat().st_size)
    except Exception as error:  # safetensors and torch raise many types
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({reason_of(error)}); download the model again") from None
    content = {**about, "model": state}
    check_content(content, None, folder)
    return folder / WEIGHTS, content


def repository(address: str) -> tuple[str, str | None]:
    """hf://user/name or hf://user/name@revision -> repository and revision."""
    name, _, revision = address.removeprefix(PREFIX).partition("@")
    if len(parts := name.split("/")) != 2 or not all(parts):
        raise UserError(f"{address}: write {PREFIX}USER/NAME, or {PREFIX}USER/NAME@REVISION")
    return name, revision or None


def download(address: str) -> Path:
    """The folder of a model on the Hub, in the client's cache; offline, what the cache has."""
    name, revision = repository(address)
    client = hub_client(address)
    try:
        return Path(client.snapshot_download(name, revision=revision, allow_patterns=[WEIGHTS, CONFIG]))
    except Exception as error:  # of the client, of its HTTP library, of the system
        raise UserError(
            f"{address}: cannot be downloaded ({reason_of(error)}); compare the name, log in with `hf auth login` if "
            "it is private, or give a folder"
        ) from None


def upload(folder: Path, address: str, private: bool) -> str:
    """Upload a folder of write_model_folder -> its address on the web."""
    name, revision = repository(address)
    client = hub_client(address)
    try:
        api = client.HfApi()
        url = api.create_repo(name, private=private, exist_ok=True)
        files = [WEIGHTS, CONFIG, CARD]
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files, revision=revision)
    except Exception as error:
        raise UserError(
            f"{address}: cannot be uploaded ({reason_of(error)}); log in with `hf auth login`, or give a folder"
        ) from None
    return str(url)


def hub_client(address: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{address}: needs the client of the Hub: pip install huggingface_hub") from None
    return huggingface_hub


def model_card(content: Mapping[str, Any], name: str, scores: Mapping[str, Any] | None, license: str) -> str:
    """The README.md of a model: what it predicts, how it was trained, how to use it.

    Args:
        content: see write_model_folder.
        name: how the model is given to --checkpoint; of a folder only its own name is recorded.
        scores: the last line of an evaluation in metrics.jsonl, if there is one.
        license: of the weights, in a sentence.
    """
    recipe, split = content.get("recipe"), content.get("split", {})
    title = name.rstrip("/").rpartition("/")[2]
    head = {"library_name": "allspark", "pipeline_tag": "image-segmentation", "tags": ["semi-supervised-learning"]}
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {title}",
        "",
    ]
    if recipe is None:
        source = ", ".join(f"{key} {value}" for key, value in content["source"].items())
        lines += [f"A semantic segmentation model with {content['architecture']['num_classes']} classes: {source}."]
    else:
        data, model = recipe["data"], recipe["model"]
        rows = {
            "data set": data["dataset"],
            "split": f"{split.get('name')}, labeled list sha256 {str(split.get('labeled'))[:12]}",
            "method": recipe["method"]["name"],
            "network": f"{model['encoder']}, decoder {model['decoder']}, bottleneck {model['bottleneck']['name']}",
            "pretrained weights": model["pretrained"],
            "training": f"{content['step']} steps of {recipe['batch_size']} labeled images, seed {recipe['seed']}",
        }
        if scores is not None:
            rows["mIoU on val"] = f"{scores['miou']:.2f} % after epoch {scores['epoch'] + 1}"
        lines += ["A semantic segmentation model.", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {escape_cell(str(value))} |" for key, value in rows.items()]
        if scores is not None:
            lines += ["", "| class | IoU % |", "|---|---|"]
            lines += [
                f"| {escape_cell(key)} | {value:.2f} |"
                for key, value in scores.get("iou", {}).items()
                if value is not None
            ]
    address = name if name.startswith(PREFIX) else title
    lines += ["", "```sh", f"python -m allspark predict --checkpoint {address} --out predictions IMAGES", "```", ""]
    return "\n".join([*lines, f"License: {license}", ""])
