"""allspark masks: the files of annotation tools -> masks of class indices."""

from __future__ import annotations

import argparse

from allspark.data.entries import image_files
from allspark.prepare.jobs import show_progress, write_file
from allspark.prepare.masks import FORMATS, NOT_DRAWN, Labels, make_mask
from allspark.utils.errors import UserError, short_repr


def main(args: argparse.Namespace) -> None:
    classes = tuple(name.strip() for name in args.classes.split(","))
    if len(classes) > NOT_DRAWN:
        raise UserError(f"--classes: {len(classes)} classes, can be {NOT_DRAWN} at most")
    if args.background not in (None, *classes):
        raise UserError(f"--background {short_repr(args.background)} is not among --classes {args.classes}")
    for path in (args.source, args.images):
        if not path.exists():
            raise UserError(f"{path}: does not exist; give the annotations, and the folder of the images")
    background = None if args.background is None else classes.index(args.background)
    labels = Labels(classes, background, args.ignore_unknown, args.nested)
    images = image_files(args.images)[0]
    draw = FORMATS[args.format](args.source, images, labels)
    names = {image: image.name if args.format == "coco" else image.stem for image in images}
    drawn = {image: draw[name] for image, name in names.items() if name in draw}
    if not drawn:
        raise UserError(f"{args.source}: has annotations of none of the {len(images)} images in {args.images}")
    targets = {image: args.out / image.relative_to(args.images).with_suffix(".png") for image in drawn}
    if not args.force and (existing := [target for target in targets.values() if target.exists()]):
        raise UserError(f"{existing[0]}: exists already; choose another --out, or overwrite with --force")
    for image, target in show_progress(targets.items(), "masks", len(targets)):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, make_mask(image, drawn[image], labels))
    print(f"{args.out}: {len(drawn)} masks; pixels without annotation are '{classes[background or 0]}'")
    if left := [image.name for image in images if image not in drawn]:
        print(f"{len(left)} of {len(images)} images have no annotation and no mask, such as {left[0]}")
    if unused := sorted(draw.keys() - set(names.values())):
        print(f"WARNING: annotations of {len(unused)} names without an image are not used, such as {unused[0]}")
    print(f"for the recipe: data.custom.classes: [{', '.join(classes)}], and the folder of masks: {args.out}")
