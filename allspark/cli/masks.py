"""allspark masks: the files of annotation tools -> masks of class indices."""

from __future__ import annotations

import argparse
from pathlib import Path

from allspark.data.entries import image_files
from allspark.prepare.jobs import show_progress, write_file
from allspark.prepare.masks import FORMATS, NOT_DRAWN, Labels, make_mask, match_images
from allspark.utils.errors import UserError, short_repr


def main(args: argparse.Namespace) -> None:
    classes = tuple(name.strip() for name in args.classes.split(","))
    if len(set(classes)) < len(classes) or not all(classes):
        raise UserError(f"--classes {args.classes}: a name is empty or given twice; class names must be unique")
    if len(classes) > NOT_DRAWN:
        raise UserError(f"--classes: {len(classes)} classes, can be {NOT_DRAWN} at most")
    if args.background not in (None, *classes):
        raise UserError(f"--background {short_repr(args.background)} is not among --classes {args.classes}")
    for path in (args.source, args.images):
        if not path.exists():
            raise UserError(f"{path}: does not exist; give the annotations, and the folder of the images")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file; give a folder for the masks")
    background = None if args.background is None else classes.index(args.background)
    labels = Labels(classes, background, args.ignore_unknown, args.nested, args.crowds)
    images = image_files(args.images)[0]
    draw = FORMATS[args.format](args.source, images, labels)
    names = match_images(images, args.images, draw, suffix=args.format == "coco")
    if not names:
        raise UserError(f"{args.source}: has annotations of none of the {len(images)} images in {args.images}")
    targets = {image: args.out / image.relative_to(args.images).with_suffix(".png") for image in names}
    owners: dict[Path, Path] = {}
    annotated = image_files(args.source)[0] if args.format == "per-class" else []
    inputs = {path.resolve() for path in (*images, *annotated)}
    for image, target in targets.items():
        if owners.setdefault(target, image) != image:
            raise UserError(f"{owners[target]} and {image} would have the same mask {target}; rename one")
        if target.resolve() in inputs:
            raise UserError(f"{target}: is an image or annotation, which its mask would replace; choose another --out")
    if not args.force and (existing := [target for target in targets.values() if target.exists()]):
        raise UserError(f"{existing[0]}: exists already; choose another --out, or overwrite with --force")
    for image, target in show_progress(targets.items(), "masks", len(targets)):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, make_mask(image, draw[names[image]], labels))
    print(f"{args.out}: {len(names)} masks; pixels without annotation are '{classes[background or 0]}'")
    if left := [image.name for image in images if image not in names]:
        print(f"{len(left)} of {len(images)} images have no annotation and no mask, such as {left[0]}")
    if unused := sorted(draw.keys() - set(names.values())):
        print(f"WARNING: annotations of {len(unused)} names without an image are not used, such as {unused[0]}")
    print(f"for the recipe: data.custom.classes: [{', '.join(classes)}], and the folder of masks: {args.out}")
