"""What `splits` does with published lists: verify them, fetch them, build what a data set itself gives."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from allspark.data.datasets import DATASETS
from allspark.data.splits import MAX_LIST, Line, read_lines
from allspark.split_lists.layouts import LAYOUTS, Layout, complement, get_layout
from allspark.split_lists.manifest import (
    ListRecord,
    Manifest,
    PublishedSplit,
    SPLITS_ROOT,
    Verdict,
    compare,
    list_hash,
    load_manifest,
    published_name,
)
from allspark.utils.atomic import write_text
from allspark.utils.download import fetch
from allspark.utils.errors import UserError

ListRef = tuple[PublishedSplit, str, ListRecord]  # a list of the manifest: its split, its kind, what is known of it
SAME = (Verdict.IDENTICAL, Verdict.REORDERED)
UNRECORDED = {  # what is accepted of a list whose own hash nobody computed
    Verdict.REORDERED: "the same images, of the published order no hash is recorded",
    Verdict.UNRECORDED: "as many lines, of the published images no hash is recorded",
}


def folder_of(dataset: str) -> str:
    """The folder of splits/ that a data set's lists lie in."""
    if dataset not in DATASETS:
        raise UserError(f"--dataset {dataset}: there is no such data set; there are {', '.join(DATASETS)}")
    return DATASETS[dataset].splits


def read_images(path: Path) -> list[str]:
    """The image column of a list file."""
    return [line.image for line in read_lines(path)]


def verify_lists(args: argparse.Namespace) -> None:
    """A line per list that is there; UserError at the end where one is not what was published under its name."""
    root = Path(args.source or SPLITS_ROOT)
    manifest, folder = load_manifest(), folder_of(args.dataset) if args.dataset else None
    files = {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.glob("*/**/*.txt"))}
    files = {name: path for name, path in files.items() if folder in (None, name.split("/")[0])}
    if not files:
        raise UserError(f"{root}: no lists{f' of {folder}' if folder else ''}; see `splits fetch`, `splits make`")
    known = {split.list_name(kind): (split, kind, facts) for split, kind, facts in manifest.all_lists(folder)}
    wrong = []
    for name, path in files.items():
        verdict, told = check_list(path, known.get(name), partial(expected_images, manifest, root, name))
        wrong += [name] if verdict == "DIFFERS" else []
        print(f"{verdict:10} {name:32} {told}")
    if absent := missing_names(known, files):
        print(f"absent: {', '.join(absent)}")
    if wrong:
        raise UserError(
            f"{root}: {len(wrong)} of {len(files)} lists are not what was published: {', '.join(wrong)}; "
            "`splits fetch --force` replaces a list, or give your own another name"
        )


def missing_names(known: Mapping[str, ListRef], files: Container[str]) -> list[str]:
    """The lists that are not there; a split of which nothing is there stands for its lists."""
    missing = [name for name in known if name not in files]
    whole = {split.name for split, _, _ in known.values() if "/" in split.name}
    whole -= {name.rpartition("/")[0] for name in known if name in files}
    return list(dict.fromkeys(n if (split := n.rpartition("/")[0]) not in whole else split for n in missing))


def check_list(path: Path, listed: ListRef | None, expected: Callable[[], set[str] | None]) -> tuple[str, str]:
    """('identical', 'unknown', 'unrecorded' or 'DIFFERS', what there is to say)."""
    try:
        lines = read_lines(path)
    except UserError as error:
        return "DIFFERS", str(error)
    images = [line.image for line in lines]
    short = f"{len(images):7}  {list_hash(images)[:12]}"
    if listed is None:
        whose = published_name(list_hash(images))
        return "unknown", f"{short}  {f'has the images of {whose}' if whose else 'in no manifest'}"
    split, kind, facts = listed
    verdict = compare(images, facts)
    if not is_accepted(verdict, facts):
        return "DIFFERS", f"{short}  {describe_difference(lines, verdict, facts, expected())}"
    if fault := check_masks(lines, split.name.split("/")[0], kind):
        return "DIFFERS", f"{short}  {fault}"
    if verdict is Verdict.IDENTICAL:
        return "identical", f"{short}  {split.whose}"
    return "unrecorded", f"{short}  {UNRECORDED[verdict]}"


def is_accepted(verdict: Verdict, facts: ListRecord) -> bool:
    return verdict is Verdict.IDENTICAL or (facts.sha256 is None and verdict in UNRECORDED)


def describe_difference(lines: Sequence[Line], verdict: Verdict, facts: ListRecord, expected: set[str] | None) -> str:
    """In words, as closely as the lists beside it tell."""
    images = [line.image for line in lines]
    if verdict is Verdict.REORDERED:
        return verdict.value
    told = [f"{len(images)} lines, published: {facts.count}"] if len(images) != facts.count else []
    first: dict[str, int] = {}
    for number, image in enumerate(images):
        if image in first:
            told.append(f"{lines[number].source} repeats {lines[first[image]].source.rpartition('line ')[2]}")
            break
        first[image] = number
    if whose := published_name(list_hash(images)):
        told.append(f"this is {whose}")
    elif expected is not None:
        extra = [line for line in lines if line.image not in expected]
        missing = sorted(expected - set(images))
        if extra:
            told.append(f"{len(extra)} lines differ, first {extra[0].source}: {extra[0].image}")
        if missing:
            told.append(f"missing: {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}")
    return "; ".join(told) or verdict.value


def expected_images(manifest: Manifest, root: Path, name: str) -> set[str] | None:
    """The images that a published list must hold, from the lists beside it that verify: all but its other half's.

    None where they do not tell.
    """
    folder = name.split("/")[0]
    sound: dict[str, set[str]] = {}
    for split, kind, facts in manifest.all_lists(folder):
        path = root / f"{split.list_name(kind)}.txt"
        if split.list_name(kind) != name and path.is_file():
            try:
                images = read_images(path)
            except UserError:
                continue
            if compare(images, facts) in SAME:
                sound[split.list_name(kind)] = set(images)
    split_name, _, kind = name.rpartition("/")
    other = f"{split_name}/{'unlabeled' if kind == 'labeled' else 'labeled'}"
    halves = [n.rpartition("/")[0] for n in sound if n.endswith("/labeled")]
    wholes = [sound[f"{n}/labeled"] | sound[f"{n}/unlabeled"] for n in halves if f"{n}/unlabeled" in sound]
    if folder in LAYOUTS and (train := sound.get(f"{folder}/{LAYOUTS[folder].train}")):
        wholes.append(train)
    if not wholes:
        return None
    if folder in LAYOUTS and name == f"{folder}/{LAYOUTS[folder].train}":
        return wholes[0]
    return wholes[0] - sound[other] if other in sound else None


def check_masks(lines: Sequence[Line], folder: str, kind: str) -> str | None:
    """What is wrong with the mask column, which the hash does not cover; an unlabeled list needs none."""
    for line in lines:
        if line.mask is None:
            if kind != "unlabeled":
                return f"{line.source}: no mask column"
        elif folder in LAYOUTS and line.mask != (mask := LAYOUTS[folder].mask_of(line.image)):
            return f"{line.source}: the mask is {line.mask}, expected {mask}"
    return None


def fetch_lists(args: argparse.Namespace) -> None:
    """Bring published lists to their places below --out, each verified before it is put there."""
    folder = folder_of(args.dataset)
    layout, out = get_layout(folder), Path(args.out or SPLITS_ROOT)
    wanted = select_lists(folder, args.split)
    if is_folder(args.source) and not args.split:
        wanted = [item for item in wanted if any(Path(path).is_file() for path in list_urls(*item[:2], args.source))]
        if not wanted:
            raise UserError(f"--from {args.source}: holds no published list of {folder}; give a checkout or a url")
    states = {split.list_name(kind): list_state(out, (split, kind, facts)) for split, kind, facts in wanted}
    if (clashes := [name for name, state in states.items() if state == "DIFFERS"]) and not args.force:
        raise UserError(
            f"{out / clashes[0]}.txt is there and is not the published list ({len(clashes)} such lists); "
            "--force overwrites, `splits verify` tells the difference"
        )
    for split, kind, facts in sorted(wanted, key=lambda item: item[2].sha256 is None):  # the surest first
        name = split.list_name(kind)
        if states[name] not in ("absent", "DIFFERS"):
            print(f"{name}: there already, {states[name]}")
            continue
        images = fetch_list(list_urls(split, kind, args.source), name, facts, layout)
        write_list(out / f"{name}.txt", images, layout)
        how = "verified" if facts.sha256 or facts.sorted else "NOT verified, no hash of it is recorded"
        print(f"{name}: {len(images)} lines, {how}: sha256 {list_hash(images)[:12]}, of {split.whose}")


def is_folder(source: str | None) -> bool:
    """Whether --from names a folder, which is then there."""
    if source is None or "://" in source:
        return False
    if not Path(source).is_dir():
        raise UserError(f"--from {source}: no such folder; give a checkout, a folder like splits/, or a url")
    return True


def select_lists(folder: str, words: Sequence[str] | None) -> list[ListRef]:
    """The lists of a folder that others publish; words: only these splits (1_8) and lists (val)."""
    lists = [item for item in load_manifest().all_lists(folder) if item[0].places and not item[2].derived]
    by_word: dict[str, list[ListRef]] = {}
    for split, kind, facts in lists:
        by_word.setdefault(split.name.partition("/")[2] or kind, []).append((split, kind, facts))
    if unknown := [word for word in words or () if word not in by_word]:
        there = ", ".join(by_word)
        raise UserError(f"--split {unknown[0]}: not known to be published for {folder}; there are {there}")
    return [item for word in words or by_word for item in by_word[word]]


def list_state(out: Path, listed: ListRef) -> str:
    path = out / f"{listed[0].list_name(listed[1])}.txt"
    return check_list(path, listed, lambda: None)[0] if path.is_file() else "absent"


def list_urls(split: PublishedSplit, kind: str, source: str | None) -> list[str]:
    """The urls or paths that may hold a list."""
    if source is None:
        return [place.url(kind) for place in split.places]
    files = [place.file(kind) for place in split.places]
    return list(dict.fromkeys(f"{source.rstrip('/')}/{file}" for file in (*files, f"{split.list_name(kind)}.txt")))


def fetch_list(places: Sequence[str], name: str, facts: ListRecord, layout: Layout) -> list[str]:
    """The images of the first place whose list is the published one."""
    images: list[str] = []

    def check(path: Path) -> str | None:
        try:
            images[:] = [layout.image_of(image) for image in read_images(path)]
        except UserError:
            return "is no list"
        verdict = compare(images, facts)
        if is_accepted(verdict, facts) and is_plain(images):
            return None
        return f"is not the published list: {verdict.value} ({len(images)} lines, sha256 {list_hash(images)[:12]})"

    with TemporaryDirectory() as folder:
        try:
            fetch(places, Path(folder) / "list.txt", check=check, size_limit=MAX_LIST)
        except UserError as error:
            reasons = "\n".join(line for line in str(error).splitlines() if line.startswith("  ")) or error
            raise UserError(
                f"{name}: no place has the published list:\n{reasons}\nWhat came before it is in place. Run this again "
                "later, give a checkout with --from DIR, or derive what the data itself gives: `splits build`"
            ) from None
    return images


def is_plain(images: Sequence[str]) -> bool:
    """Whether all are paths below the data root, none of them twice."""
    below = all(not image.startswith("/") and ".." not in image.split("/") and ":" not in image for image in images)
    return below and len(set(images)) == len(images)


def write_list(path: Path, images: Sequence[str], layout: Layout) -> None:
    """Lines `image mask`."""
    write_text(path, "".join(f"{i} {layout.mask_of(i)}\n" for i in images), "make room or choose another --out")


def build_lists(args: argparse.Namespace, root: Path) -> None:
    """Write what the data under `root` tells: its own lists, and beside every labeled list the unlabeled one."""
    folder = folder_of(args.dataset)
    layout, out = get_layout(folder), Path(args.out or SPLITS_ROOT) / folder
    lists = derive_lists(layout, root, out)
    notes = {name: compare_with_published(folder, name, images, lists[layout.train]) for name, images in lists.items()}
    there = {name: out / f"{name}.txt" for name in lists if (out / f"{name}.txt").is_file()}
    clashes = [path for name, path in there.items() if sorted(read_images(path)) != sorted(lists[name])]
    if clashes and not args.force:
        raise UserError(f"{clashes[0]} is there and holds other images ({len(clashes)} such lists); --force overwrites")
    for name, images in lists.items():
        kept = name in there and there[name] not in clashes
        if not kept:
            write_list(out / f"{name}.txt", images, layout)
        print(f"{f'{folder}/{name}':32} {len(images):7}  {'there already' if kept else notes[name]}")


def derive_lists(layout: Layout, root: Path, out: Path) -> dict[str, list[str]]:
    """Name below `out` -> images: the data set's own lists, and what each labeled list leaves unlabeled."""
    lists = layout.own_lists(root)
    train = lists[layout.train]
    labeled = {path.parent.name: read_images(path) for path in sorted(out.glob("*/labeled.txt"))}
    labeled |= {name.partition("/")[0]: images for name, images in lists.items() if name.endswith("/labeled")}
    for split, images in labeled.items():
        if strange := sorted(set(images) - set(train)):
            raise UserError(
                f"{out / split / 'labeled.txt'}: {strange[0]} is none of the {len(train)} training images under "
                f"{root}; prepare the rest of the data, or move the list away if it is of other data"
            )
        lists[f"{split}/unlabeled"] = complement(train, images)
    return lists


def compare_with_published(folder: str, name: str, images: Sequence[str], train: Sequence[str]) -> str:
    """How a derived list stands to the published one; UserError where the data cannot be the official set."""
    listed = load_manifest().find(f"{folder}/{name}")
    if name.endswith("/unlabeled"):
        half = load_manifest().find(f"{folder}/{name.replace('/unlabeled', '/labeled')}")
        if half is not None and compare(complement(train, images), half[2]) not in SAME:
            listed = None  # beside somebody's own list of a published name
    if listed is None:
        return f"sha256 {list_hash(images)[:12]}, not a published list"
    verdict = compare(images, listed[2])
    if verdict in (Verdict.COUNT, Verdict.OTHER):
        raise UserError(
            f"{folder}/{name}: the data gives {len(images)} images, the list has {listed[2].count}, not the same ones; "
            "the data is not complete, or not the official one: see `prepare`"
        )
    return verdict.value
