"""The `splits` commands for published lists: verify them, fetch them, build what a data set itself defines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from allspark.data.datasets import DATASETS
from allspark.data.entries import MAX_LIST, Line, read_lines
from allspark.split_lists.layouts import LAYOUTS, Layout, complement, get_layout
from allspark.split_lists.manifest import (
    SPLITS_ROOT,
    ListRecord,
    Manifest,
    PublishedSplit,
    Verdict,
    compare,
    list_hash,
    load_manifest,
    published_name,
)
from allspark.utils.atomic import write_text
from allspark.utils.download import fetch
from allspark.utils.errors import UserError

ListRef = tuple[PublishedSplit, str, ListRecord]  # a list of the manifest: its split, its kind, its record
SAME_IMAGES = (Verdict.IDENTICAL, Verdict.REORDERED)
UNRECORDED = {  # accepted for a list whose own hash is unknown
    Verdict.REORDERED: "same images; no hash of the published order is recorded",
    Verdict.UNRECORDED: "same number of lines; no hash of the published images is recorded",
}


def folder_of(dataset: str) -> str:
    """The folder of splits/ with a data set's lists."""
    if dataset not in DATASETS:
        raise UserError(f"--dataset {dataset}: unknown data set; choose one of {', '.join(DATASETS)}")
    return DATASETS[dataset].splits


def read_images(path: Path) -> list[str]:
    """The image column of a list file."""
    return [line.image for line in read_lines(path)]


def verify_lists(args: argparse.Namespace) -> None:
    """Print a line per existing list; UserError at the end if any differs from what was published under its name."""
    root = Path(args.source or SPLITS_ROOT)
    manifest, folder = load_manifest(), folder_of(args.dataset) if args.dataset else None
    files = {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.glob("*/**/*.txt"))}
    files = {name: path for name, path in files.items() if folder in (None, name.split("/")[0])}
    if not files:
        raise UserError(f"{root}: no lists{f' of {folder}' if folder else ''}; see `splits fetch`, `splits make`")
    known = {split.list_name(kind): (split, kind, record) for split, kind, record in manifest.all_lists(folder)}
    wrong = []
    for name, path in files.items():
        verdict, details = check_list(path, known.get(name), partial(expected_images, manifest, root, name))
        wrong += [name] if verdict == "DIFFERS" else []
        print(f"{verdict:10} {name:32} {details}")
    if absent := missing_names(known, files):
        print(f"absent: {', '.join(absent)}")
    if wrong:
        raise UserError(
            f"{root}: {len(wrong)} of {len(files)} lists differ from the published ones: {', '.join(wrong)}; "
            "`splits fetch --force` replaces a list, or give your own list another name"
        )


def missing_names(known: Mapping[str, ListRef], files: Container[str]) -> list[str]:
    """Names of missing lists; a split with no list at all is named once."""
    missing = [name for name in known if name not in files]
    empty = {split.name for split, _, _ in known.values() if "/" in split.name}
    empty -= {name.rpartition("/")[0] for name in known if name in files}
    return list(dict.fromkeys(n if (split := n.rpartition("/")[0]) not in empty else split for n in missing))


def check_list(path: Path, ref: ListRef | None, expected: Callable[[], set[str] | None]) -> tuple[str, str]:
    """Compare a list file with the manifest.

    Args:
        ref: its entry in the manifest; None if it has none.
        expected: returns the images it should contain, if known.

    Returns:
        'identical', 'unknown', 'unrecorded' or 'DIFFERS', and details.
    """
    try:
        lines = read_lines(path)
    except UserError as error:
        return "DIFFERS", str(error)
    images = [line.image for line in lines]
    summary = f"{len(images):7}  {list_hash(images)[:12]}"
    if ref is None:
        name = published_name(list_hash(images))
        return "unknown", f"{summary}  {f'same images as {name}' if name else 'not in the manifest'}"
    split, kind, record = ref
    verdict = compare(images, record)
    if not is_accepted(verdict, record):
        return "DIFFERS", f"{summary}  {describe_difference(lines, verdict, record, expected())}"
    if error := check_masks(lines, split.name.split("/")[0], kind):
        return "DIFFERS", f"{summary}  {error}"
    if verdict is Verdict.IDENTICAL:
        return "identical", f"{summary}  {split.owner}"
    return "unrecorded", f"{summary}  {UNRECORDED[verdict]}"


def is_accepted(verdict: Verdict, record: ListRecord) -> bool:
    return verdict is Verdict.IDENTICAL or (record.sha256 is None and verdict in UNRECORDED)


def describe_difference(lines: Sequence[Line], verdict: Verdict, record: ListRecord, expected: set[str] | None) -> str:
    images = [line.image for line in lines]
    if verdict is Verdict.REORDERED:
        return verdict.value
    parts = [f"{len(images)} lines, published: {record.count}"] if len(images) != record.count else []
    first: dict[str, int] = {}
    for number, image in enumerate(images):
        if image in first:
            parts.append(f"{lines[number].source} repeats {lines[first[image]].source.rpartition('line ')[2]}")
            break
        first[image] = number
    if name := published_name(list_hash(images)):
        parts.append(f"this is {name}")
    elif expected is not None:
        extra = [line for line in lines if line.image not in expected]
        missing = sorted(expected - set(images))
        if extra:
            parts.append(f"{len(extra)} lines differ, first {extra[0].source}: {extra[0].image}")
        if missing:
            parts.append(f"missing: {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}")
    return "; ".join(parts) or verdict.value


def expected_images(manifest: Manifest, root: Path, name: str) -> set[str] | None:
    """The images a published list must contain, derived from other verified lists; None if they do not determine it.

    It is the whole training set without the images of the split's other half.
    """
    folder = name.split("/")[0]
    verified: dict[str, set[str]] = {}
    for split, kind, record in manifest.all_lists(folder):
        path = root / f"{split.list_name(kind)}.txt"
        if split.list_name(kind) != name and path.is_file():
            try:
                images = read_images(path)
            except UserError:
                continue
            if compare(images, record) in SAME_IMAGES:
                verified[split.list_name(kind)] = set(images)
    split_name, _, kind = name.rpartition("/")
    other = f"{split_name}/{'unlabeled' if kind == 'labeled' else 'labeled'}"
    splits = [n.rpartition("/")[0] for n in verified if n.endswith("/labeled")]
    train_sets = [verified[f"{n}/labeled"] | verified[f"{n}/unlabeled"] for n in splits if f"{n}/unlabeled" in verified]
    train_list = f"{folder}/{LAYOUTS[folder].train}" if folder in LAYOUTS else None
    if train_list in verified:
        train_sets.append(verified[train_list])
    if not train_sets:
        return None
    if name == train_list:
        return train_sets[0]
    return train_sets[0] - verified[other] if other in verified else None


def check_masks(lines: Sequence[Line], folder: str, kind: str) -> str | None:
    """What is wrong with the mask column, which the hash does not cover; optional in unlabeled lists."""
    for line in lines:
        if line.mask is None:
            if kind != "unlabeled":
                return f"{line.source}: no mask column"
        elif folder in LAYOUTS and line.mask != (mask := LAYOUTS[folder].mask_of(line.image)):
            return f"{line.source}: the mask is {line.mask}, expected {mask}"
    return None


def fetch_lists(args: argparse.Namespace) -> None:
    """Fetch published lists to --out; each is verified before it is put in place."""
    folder = folder_of(args.dataset)
    layout, out = get_layout(folder), Path(args.out or SPLITS_ROOT)
    wanted = select_lists(folder, args.split)
    if is_folder(args.source) and not args.split:
        wanted = [ref for ref in wanted if any(Path(path).is_file() for path in list_urls(*ref[:2], args.source))]
        if not wanted:
            raise UserError(f"--from {args.source}: contains no published list of {folder}; give a checkout or a url")
    states = {}
    for ref in wanted:
        path = out / f"{ref[0].list_name(ref[1])}.txt"
        states[ref[0].list_name(ref[1])] = check_list(path, ref, lambda: None)[0] if path.is_file() else "absent"
    if (clashes := [name for name, state in states.items() if state == "DIFFERS"]) and not args.force:
        raise UserError(
            f"{out / clashes[0]}.txt exists and is not the published list ({len(clashes)} such lists); "
            "--force overwrites, `splits verify` shows the difference"
        )
    for split, kind, record in sorted(wanted, key=lambda ref: ref[2].sha256 is None):  # lists with a hash first
        name = split.list_name(kind)
        if states[name] not in ("absent", "DIFFERS"):
            print(f"{name}: already exists, {states[name]}")
            continue
        images = fetch_list(list_urls(split, kind, args.source), name, record, layout)
        write_list(out / f"{name}.txt", images, layout)
        how = "verified" if record.sha256 or record.sorted else "NOT verified, no hash is recorded"
        print(f"{name}: {len(images)} lines, {how}: sha256 {list_hash(images)[:12]}, of {split.owner}")


def is_folder(source: str | None) -> bool:
    """Whether --from is a folder; UserError if it looks like one but does not exist."""
    if source is None or "://" in source:
        return False
    if not Path(source).is_dir():
        raise UserError(f"--from {source}: no such folder; give a checkout, a folder like splits/, or a url")
    return True


def select_lists(folder: str, names: Sequence[str] | None) -> list[ListRef]:
    """The published lists of a folder; only these splits (1_8) and lists (val) if `names` is given."""
    lists = [ref for ref in load_manifest().all_lists(folder) if ref[0].places and not ref[2].derived]
    by_name: dict[str, list[ListRef]] = {}
    for split, kind, record in lists:
        by_name.setdefault(split.name.partition("/")[2] or kind, []).append((split, kind, record))
    if unknown := [name for name in names or () if name not in by_name]:
        raise UserError(f"--split {unknown[0]}: not published for {folder}; choose one of {', '.join(by_name)}")
    return [ref for name in names or by_name for ref in by_name[name]]


def list_urls(split: PublishedSplit, kind: str, source: str | None) -> list[str]:
    """Urls or paths that may have a list."""
    if source is None:
        return [place.url(kind) for place in split.places]
    files = [place.file(kind) for place in split.places]
    return list(dict.fromkeys(f"{source.rstrip('/')}/{file}" for file in (*files, f"{split.list_name(kind)}.txt")))


def fetch_list(urls: Sequence[str], name: str, record: ListRecord, layout: Layout) -> list[str]:
    """The images of the list from the first url where it is the published one."""
    images: list[str] = []

    def check(path: Path) -> str | None:
        try:
            images[:] = [layout.image_of(image) for image in read_images(path)]
        except UserError:
            return "it is not a list"
        verdict = compare(images, record)
        if is_accepted(verdict, record) and has_safe_paths(images):
            return None
        details = f"{verdict.value} ({len(images)} lines, sha256 {list_hash(images)[:12]})"
        return f"it is not the published list: {details}"

    with TemporaryDirectory() as folder:
        try:
            fetch(urls, Path(folder) / "list.txt", check=check, size_limit=MAX_LIST)
        except UserError as error:
            reasons = "\n".join(line for line in str(error).splitlines() if line.startswith("  ")) or error
            raise UserError(
                f"{name}: no source has the published list:\n{reasons}\nLists fetched before it are in place. Run this "
                "again later, give a checkout with --from DIR, or derive what the data itself defines: `splits build`"
            ) from None
    return images


def has_safe_paths(images: Sequence[str]) -> bool:
    """Whether all paths are below the data root and unique."""
    below = all(not image.startswith("/") and ".." not in image.split("/") and ":" not in image for image in images)
    return below and len(set(images)) == len(images)


def write_list(path: Path, images: Sequence[str], layout: Layout) -> None:
    lines = "".join(f"{image} {layout.mask_of(image)}\n" for image in images)
    write_text(path, lines, "free disk space or choose another --out")


def build_lists(args: argparse.Namespace, root: Path) -> None:
    """Write the lists that the data under `root` defines, and the unlabeled list for each labeled one."""
    folder = folder_of(args.dataset)
    layout, out = get_layout(folder), Path(args.out or SPLITS_ROOT) / folder
    lists = derive_lists(layout, root, out)
    notes = {name: compare_with_published(folder, name, images, lists[layout.train]) for name, images in lists.items()}
    existing = {name: out / f"{name}.txt" for name in lists if (out / f"{name}.txt").is_file()}
    clashes = [name for name, path in existing.items() if sorted(read_images(path)) != sorted(lists[name])]
    if clashes and not args.force:
        raise UserError(
            f"{existing[clashes[0]]} exists with different images ({len(clashes)} such lists); --force overwrites"
        )
    for name, images in lists.items():
        unchanged = name in existing and name not in clashes
        if not unchanged:
            write_list(out / f"{name}.txt", images, layout)
        print(f"{f'{folder}/{name}':32} {len(images):7}  {'already exists' if unchanged else notes[name]}")


def derive_lists(layout: Layout, root: Path, out: Path) -> dict[str, list[str]]:
    """Name below `out` -> images: the data set's own lists, and the complement of each labeled list."""
    lists = layout.own_lists(root)
    train = lists[layout.train]
    labeled = {path.parent.name: read_images(path) for path in sorted(out.glob("*/labeled.txt"))}
    labeled |= {name.partition("/")[0]: images for name, images in lists.items() if name.endswith("/labeled")}
    for split, images in labeled.items():
        if unknown := sorted(set(images) - set(train)):
            raise UserError(
                f"{out / split / 'labeled.txt'}: {unknown[0]} is not one of the {len(train)} training images under "
                f"{root}; prepare the rest of the data, or move the list away if it belongs to other data"
            )
        lists[f"{split}/unlabeled"] = complement(train, images)
    return lists


def compare_with_published(folder: str, name: str, images: Sequence[str], train: Sequence[str]) -> str:
    """How a derived list compares to the published one; UserError if the data cannot be the official set."""
    ref = load_manifest().find(f"{folder}/{name}")
    if name.endswith("/unlabeled"):
        half = load_manifest().find(f"{folder}/{name.replace('/unlabeled', '/labeled')}")
        if half is not None and compare(complement(train, images), half[2]) not in SAME_IMAGES:
            ref = None  # belongs to the user's own labeled list with a published name
    if ref is None:
        return f"sha256 {list_hash(images)[:12]}, not a published list"
    verdict = compare(images, ref[2])
    if verdict in (Verdict.COUNT, Verdict.OTHER):
        raise UserError(
            f"{folder}/{name}: the data gives {len(images)} images, the published list has {ref[2].count}, and they "
            "differ; the data is incomplete, or not the official data: see `prepare`"
        )
    return verdict.value
