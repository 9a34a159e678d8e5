"""`splits verify`, `fetch` and `build` with own lists, a small manifest, a local server and published lists."""

import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

import helpers
from allspark.__main__ import main
from allspark.data.entries import read_list
from allspark.split_lists import published
from allspark.split_lists.layouts import LAYOUTS
from allspark.split_lists.manifest import SPLITS_ROOT, list_hash, load_manifest
from allspark.utils.errors import UserError

SHARED = helpers.SHARED / "splits"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent: no published lists here")
TRAIN = [f"2007_{number:06}" for number in range(8)]
LABELED = [TRAIN[5], TRAIN[2], TRAIN[3]]
VAL = ["2008_000002", "2008_000001"]


def splits(*words: object) -> None:
    main(["splits", *map(str, words)])


def voc(ids) -> list[str]:
    return [f"JPEGImages/{i}.jpg" for i in ids]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


# verify


@pytest.fixture
def own(tmp_path) -> Path:
    """A copy of this project's lists of shapes, which the manifest knows."""
    shutil.copytree(SPLITS_ROOT / "shapes", tmp_path / "splits" / "shapes")
    return tmp_path / "splits"


def change(path: Path, edit) -> None:
    changed = edit(lines(path))
    path.write_text("\n".join(changed))


def test_published_lists_are_identical(own, capsys):
    change(own / "shapes" / "1_8" / "labeled.txt", lambda old: [f"{line} \r" for line in old])
    change(own / "shapes" / "1_8" / "unlabeled.txt", lambda old: [line.split()[0] for line in old])
    (own / "shapes" / "mine.txt").write_text("a b\n")
    shutil.copy(own / "shapes" / "val.txt", own / "shapes" / "copy.txt")
    splits("verify", "--from", own)
    out = capsys.readouterr().out.splitlines()
    there = {line.split()[1]: line for line in out if not line.startswith("absent")}
    assert len(there) == 12 and sum(line.startswith("identical") for line in there.values()) == 10
    assert there["shapes/mine"].startswith("unknown") and there["shapes/mine"].endswith("not in the manifest")
    assert "same images as shapes/val of this project" in there["shapes/copy"]
    assert out[-1].startswith("absent: pascal/val, pascal/train_aug, pascal/92, ") and "shapes" not in out[-1]
    splits("verify", "--from", own, "--dataset", "shapes")
    assert "pascal" not in capsys.readouterr().out


def swapped(old):
    return [old[1], old[0], *old[2:]]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (swapped, "same images in a different order"),
        (
            lambda old: ["images/train/9999.png labels/train/9999.png", *old[1:]],
            "1 lines differ, first .*line 1: .*9999",
        ),
        (lambda old: old[:-1], r"59 lines, published: 60; missing: images/train/\d+.png$"),
        (lambda old: [*old, old[2]], r"61 lines, published: 60; .*labeled.txt line 61 repeats 3"),
        (lambda old: [old[0].split()[0], *old[1:]], "line 1: no mask column"),
        (lambda old: [f"{old[0]} three columns", *old[1:]], "line 1: 4 columns"),
    ],
)
def test_differences_are_reported(own, capsys, edit, told):
    change(own / "shapes" / "1_8" / "labeled.txt", edit)
    with pytest.raises(UserError, match=r"1 of 10 lists differ from the published ones: shapes/1_8/labeled; .*--force"):
        splits("verify", "--from", own)
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DIFFERS")]
    assert len(wrong) == 1 and wrong[0].split()[1] == "shapes/1_8/labeled"
    assert re.search(told, wrong[0]), wrong[0]


def test_other_published_list_is_recognized(own, capsys):
    shutil.copy(own / "shapes" / "1_16" / "labeled.txt", own / "shapes" / "1_8" / "labeled.txt")
    with pytest.raises(UserError, match="shapes/1_8/labeled"):
        splits("verify", "--from", own)
    assert "30 lines, published: 60; this is shapes/1_16 of this project" in capsys.readouterr().out


def test_no_lists_no_verdict(tmp_path):
    with pytest.raises(UserError, match="no lists"):
        splits("verify", "--from", tmp_path)
    with pytest.raises(UserError, match="--dataset nope"):
        splits("verify", "--dataset", "nope")


def test_verify_process(own, fork_process):
    change(own / "shapes" / "val.txt", swapped)
    process = fork_process(["-m", "allspark", "splits", "verify", "--from", own])
    out, error = process.communicate(timeout=240)
    assert process.returncode == 2 and "same images in a different order" in out and error.count("\n") == 1


@needs_shared
def test_published_lists_verify(tmp_path, capsys):
    splits("verify", "--from", SHARED)
    out = capsys.readouterr().out
    assert out.count("identical ") == 43 and "DIFFERS" not in out
    shutil.copytree(SHARED, tmp_path / "copy")
    change(tmp_path / "copy" / "coco" / "1_512" / "labeled.txt", lambda old: [*old[:-1], "train2017/1.jpg masks/1.png"])
    path = tmp_path / "copy" / "cityscapes" / "1_16" / "labeled.txt"
    change(path, lambda old: [old[0].replace("_labelTrainIds", "_color"), *old[1:]])
    with pytest.raises(UserError, match="2 of 45 lists differ .*: cityscapes/1_16/labeled, coco/1_512/labeled"):
        splits("verify", "--from", tmp_path / "copy")
    out = capsys.readouterr().out
    assert "the mask is gtFine" in out and "different images" in out


# fetch


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """A manifest of small lists for PASCAL's folder, published in two repositories."""

    def facts(images, sha256=True):
        return {"count": len(images), "sha256": list_hash(images) if sha256 else None, "sorted": None}

    rest = [i for i in TRAIN if i not in LABELED]
    places = [{"source": name, "path": f"{name}/3"} for name in ("first", "second")]
    content = {
        "sources": {n: {"repository": f"x/{n}", "revision": "1" * 40, "license": "MIT"} for n in ("first", "second")},
        "splits": [
            {"name": "pascal", "lists": {"val": facts(voc(VAL)), "train_aug": {**facts(voc(TRAIN)), "derived": True}}}
            | {"places": [{"source": "first", "path": "first"}]},
            {"name": "pascal/3", "lists": {"labeled": facts(voc(LABELED)), "unlabeled": facts(voc(rest), False)}}
            | {"places": places},
        ],
    }
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(published, "load_manifest", lambda: load_manifest(path))


@pytest.fixture
def server():
    """.files: path -> text; .url; .asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            text = server.files.get(self.path)
            if text is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    rest = [i for i in TRAIN if i not in LABELED]
    pairs = [f"JPEGImages/{i}.jpg SegmentationClass/{i}.png" for i in rest]
    server.files = {
        "/base/first/val.txt": "\n".join(f"{i} other/{i}.png" for i in voc(VAL)),
        "/base/first/3/labeled.txt": "\n".join(LABELED),  # bare ids
        "/base/second/3/unlabeled.txt": "\r\n".join(pairs) + "\r\n",
    }
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}/base/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetch_and_write_pairs(manifest, server, tmp_path, capsys):
    out = tmp_path / "out"
    splits("fetch", "--dataset", "pascal", "--from", server.url, "--out", out)
    shown = capsys.readouterr().out
    assert lines(out / "pascal" / "3" / "labeled.txt") == [
        f"{i} SegmentationClass/{Path(i).stem}.png" for i in voc(LABELED)
    ]
    assert [line.split()[1] for line in lines(out / "pascal" / "val.txt")] == [
        f"SegmentationClass/{i}.png" for i in VAL
    ]
    assert len(lines(out / "pascal" / "3" / "unlabeled.txt")) == 5 and "NOT verified" in shown.splitlines()[-1]
    assert sorted(path.name for path in out.rglob("*.*")) == ["labeled.txt", "unlabeled.txt", "val.txt"]
    server.asked.clear()
    splits("fetch", "--dataset", "pascal", "--from", server.url, "--out", out)
    assert capsys.readouterr().out.count("already exists") == 3 and not server.asked


def test_wrong_list_is_not_installed(manifest, server, tmp_path):
    server.files["/base/first/3/labeled.txt"] = "\n".join(reversed(LABELED))
    server.files["/base/second/3/labeled.txt"] = "\n".join([*LABELED[:2], TRAIN[0]])
    out, words = tmp_path / "out", ["fetch", "--dataset", "pascal", "--split", "3", "--from", server.url]
    with pytest.raises(UserError) as caught:
        splits(*words, "--out", out)
    message = str(caught.value)
    assert "pascal/3/labeled: no source has the published list" in message and not list(out.rglob("*.txt"))
    assert "first/3/labeled.txt: it is not the published list: different images (3 lines" in message
    assert "pascal/3/labeled.txt: HTTP status 404" in message and "--from DIR" in message
    server.files["/base/second/3/labeled.txt"] = "\n".join(LABELED)  # the next place is asked when the first is wrong
    splits(*words, "--out", out)
    assert len(lines(out / "pascal" / "3" / "labeled.txt")) == 3


@pytest.mark.parametrize("bad", ["../up.jpg", "/etc/passwd", f"JPEGImages/{TRAIN[0]}.jpg"])
def test_unhashed_list_must_be_plain(manifest, server, tmp_path, bad):
    rest = voc(i for i in TRAIN if i not in LABELED)
    server.files["/base/second/3/unlabeled.txt"] = "\n".join([*rest[:4], bad if bad not in rest else rest[1]])
    with pytest.raises(UserError, match="unlabeled.txt: it is not the published list"):
        splits("fetch", "--dataset", "pascal", "--split", "3", "--from", server.url, "--out", tmp_path)


def test_overwrite_needs_force(manifest, server, tmp_path, capsys):
    path = tmp_path / "pascal" / "3" / "labeled.txt"
    path.parent.mkdir(parents=True)
    path.write_text("my own\n")
    words = ["fetch", "--dataset", "pascal", "--from", server.url, "--out", tmp_path]
    with pytest.raises(UserError, match="labeled.txt exists and is not the published list.*--force"):
        splits(*words)
    assert path.read_text() == "my own\n" and not server.asked and not (tmp_path / "pascal" / "val.txt").exists()
    splits(*words, "--force")
    assert len(lines(path)) == 3


def test_unwritable_place(manifest, server, tmp_path):
    (tmp_path / "pascal").write_text("a file where a folder has to be")
    with pytest.raises(UserError, match="pascal/val.txt: cannot be written .*another --out"):
        splits("fetch", "--dataset", "pascal", "--split", "val", "--from", server.url, "--out", tmp_path)


def test_fetch_from_checkout(manifest, tmp_path, capsys):
    (tmp_path / "checkout" / "second" / "3").mkdir(parents=True)
    (tmp_path / "checkout" / "second" / "3" / "labeled.txt").write_text("\n".join(LABELED))
    words = ["fetch", "--dataset", "pascal", "--out", tmp_path / "out", "--from"]
    splits(*words, tmp_path / "checkout")
    assert capsys.readouterr().out.count("\n") == 1 and (tmp_path / "out" / "pascal" / "3" / "labeled.txt").is_file()
    with pytest.raises(UserError, match="val.txt: no such file"):
        splits(*words, tmp_path / "checkout", "--split", "val")
    with pytest.raises(UserError, match="contains no published list of pascal"):
        splits(*words, tmp_path / "out" / "pascal" / "3")
    with pytest.raises(UserError, match="nope: no such folder"):
        splits(*words, "nope")
    with pytest.raises(UserError, match="--split 1_3: not published for pascal; choose one of val, 3"):
        splits(*words, tmp_path / "checkout", "--split", "1_3")


def test_unencrypted_address_is_refused(manifest, tmp_path):
    with pytest.raises(UserError, match="http://example.org/first/val.txt: http:// is refused"):
        splits("fetch", "--dataset", "pascal", "--from", "http://example.org", "--out", tmp_path, "--split", "val")


def test_own_datasets_are_not_fetched():
    for name in ("camvid", "shapes"):
        with pytest.raises(UserError, match=f"--dataset {name}: its lists are this project's own"):
            splits("fetch", "--dataset", name)
        with pytest.raises(UserError, match=f"this project's own, in splits/{name}"):
            splits("build", "--dataset", name, "--data-root", "nowhere")


@needs_shared
def test_fetch_from_folder(tmp_path, capsys):
    for name in ("pascal", "cityscapes", "coco"):
        splits("fetch", "--dataset", name, "--from", SHARED, "--out", tmp_path)
    assert "NOT" not in capsys.readouterr().out
    splits("verify", "--from", tmp_path)
    assert capsys.readouterr().out.count("identical ") == 43


# build


def touch(root: Path, names) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def voc_root(root: Path, train, val, train_aug) -> Path:
    for name, ids in (("train", train), ("val", val)):
        path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{i}\n" for i in ids))
    touch(root, [f"SegmentationClass/{i}.png" for i in (*val, *train_aug)])
    return root


def test_build_derived_lists(manifest, tmp_path, capsys):
    root, out = voc_root(tmp_path / "data", TRAIN[:2], VAL, TRAIN), tmp_path / "out"
    (out / "pascal" / "3").mkdir(parents=True)
    (out / "pascal" / "3" / "labeled.txt").write_text("".join(f"{image} x\n" for image in voc(LABELED)))
    words = ["build", "--dataset", "pascal", "--data-root", root, "--out", out]
    splits(*words)
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert shown["pascal/val"].endswith("identical") and shown["pascal/train_aug"].endswith("identical")
    assert "not a published list" in shown["pascal/1464/unlabeled"]
    expected = {"val": VAL, "1464/labeled": TRAIN[:2], "1464/unlabeled": TRAIN[2:], "train_aug": TRAIN}
    expected["3/unlabeled"] = [i for i in TRAIN if i not in LABELED]
    for name, ids in expected.items():
        pairs = [f"JPEGImages/{i}.jpg SegmentationClass/{i}.png" for i in ids]
        assert lines(out / "pascal" / f"{name}.txt") == pairs
    splits(*words)
    assert capsys.readouterr().out.count("already exists") == 5
    (out / "pascal" / "1464" / "unlabeled.txt").write_text("a b\n")
    with pytest.raises(UserError, match="1464/unlabeled.txt exists with different images.*--force"):
        splits(*words)
    splits(*words, "--force")
    assert len(lines(out / "pascal" / "1464" / "unlabeled.txt")) == 6


def test_build_refuses_incomplete_data(manifest, tmp_path):
    out = tmp_path / "out"
    words = ["build", "--dataset", "pascal", "--out", out, "--data-root"]
    with pytest.raises(UserError, match="nope is not a folder.*ALLSPARK_DATA_PASCAL"):
        splits(*words, tmp_path / "nope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="ImageSets/Segmentation/train.txt: does not exist.*prepare"):
        splits(*words, tmp_path / "empty")
    root = voc_root(tmp_path / "data", TRAIN[:2], VAL, TRAIN[:-1])
    with pytest.raises(UserError, match="pascal/train_aug: the data gives 7 images, the published list has 8"):
        splits(*words, root)
    shutil.rmtree(root / "SegmentationClass")
    with pytest.raises(UserError, match=r"SegmentationClass: contains no \*.png"):
        splits(*words, root)
    assert not out.exists()
    root = voc_root(tmp_path / "data", TRAIN[:2], VAL, TRAIN)
    (out / "pascal" / "3").mkdir(parents=True)
    (out / "pascal" / "3" / "labeled.txt").write_text("JPEGImages/other.jpg x\n")
    with pytest.raises(
        UserError, match="3/labeled.txt: JPEGImages/other.jpg is not one of the 8 training images.*prepare the rest"
    ):
        splits(*words, root)


def test_own_list_of_published_name_gets_complement(manifest, tmp_path, capsys):
    root, out = voc_root(tmp_path / "data", TRAIN[:2], VAL, TRAIN), tmp_path / "out"
    (out / "pascal" / "3").mkdir(parents=True)
    (out / "pascal" / "3" / "labeled.txt").write_text("".join(f"{image} x\n" for image in voc(TRAIN[:6])))
    splits("build", "--dataset", "pascal", "--data-root", root, "--out", out)
    assert len(lines(out / "pascal" / "3" / "unlabeled.txt")) == 2
    assert re.search("pascal/3/unlabeled .*not a published list\n", capsys.readouterr().out)


def test_mask_names_match_published():
    image = "leftImg8bit/train/a/a_000001_000019_leftImg8bit.png"
    assert LAYOUTS["cityscapes"].mask_of(image) == "gtFine/train/a/a_000001_000019_gtFine_labelTrainIds.png"
    assert LAYOUTS["coco"].mask_of("train2017/000000000009.jpg") == "masks/000000000009.png"
    assert LAYOUTS["pascal"].mask_of(LAYOUTS["pascal"].image_of("2007_000032")) == "SegmentationClass/2007_000032.png"


def published_pairs(name: str) -> list[tuple[str, str]]:
    return [(s.image.as_posix(), s.mask.as_posix()) for s in read_list(SHARED / f"{name}.txt", Path())]


@needs_shared
def test_build_voc_lists(tmp_path, capsys):
    train, val, aug = (
        [Path(image).stem for image, _ in published_pairs(f"pascal/{name}")]
        for name in ("1464/labeled", "val", "train_aug")
    )
    root, out = voc_root(tmp_path / "data", train, val, aug), tmp_path / "out"
    shutil.copytree(SHARED / "pascal" / "1_8", out / "pascal" / "1_8", ignore=shutil.ignore_patterns("unl*"))
    splits("build", "--dataset", "pascal", "--data-root", root, "--out", out)
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name in ("val", "train_aug", "1464/labeled", "1_8/unlabeled"):
        assert shown[f"pascal/{name}"].endswith("identical")
        assert lines(out / "pascal" / f"{name}.txt") == lines(SHARED / "pascal" / f"{name}.txt")
    assert shown["pascal/1464/unlabeled"].endswith("same images in a different order")


@needs_shared
def test_build_cityscapes_and_coco_lists(tmp_path, capsys):
    names = [f"cityscapes/{name}" for name in ("val", "1_2/labeled", "1_2/unlabeled")]
    touch(tmp_path / "city", [image for name in names for image, _ in published_pairs(name)])
    splits("build", "--dataset", "cityscapes", "--data-root", tmp_path / "city", "--out", tmp_path / "out")
    out = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=2)[2] for line in out] == ["identical", "same images in a different order"]
    touch(tmp_path / "coco", [image for image, _ in published_pairs("coco/val")])
    touch(tmp_path / "coco", ["train2017/000000000009.jpg"])
    with pytest.raises(UserError, match="coco/train: the data gives 1 images, the published list has 118287"):
        splits("build", "--dataset", "coco", "--data-root", tmp_path / "coco", "--out", tmp_path / "out")
