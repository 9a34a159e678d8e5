"""Malicious files: they run no code and exhaust no memory or disk; each is refused with one message."""

import gzip
import io
import json
import os
import re
import resource
import struct
import tarfile
import threading
import time
import tracemalloc
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from allspark.__main__ import main
from allspark.config_io import load_config, parse_overrides
from allspark.data.image_io import BadSample, read_image
from allspark.engine.checkpoint import load_checkpoint
from allspark.prepare.archives import iter_entries
from allspark.utils import download
from allspark.utils.download import fetch
from allspark.utils.errors import UserError
from allspark.utils.safe_load import check_tensors, load_tensors
from allspark.utils.safe_yaml import parse_yaml
from allspark.weights.loading import read_weights
from helpers import archives as mini

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


@pytest.fixture(autouse=True)
def little_memory():
    """Nothing here needs more than 2 GiB beyond what the process has; a bomb that goes off is then a MemoryError."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# Checkpoints and weights


class Code:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


READERS = [load_checkpoint, read_weights]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "pickle"])
def test_checkpoint_with_code(read, old, tmp_path):
    file, made = tmp_path / "x.pth", tmp_path / "made"
    torch.save({"model": {"w": Code(made)}}, file, _use_new_zipfile_serialization=not old)
    with pytest.raises(UserError, match=r"x\.pth: not a readable .*only tensors"):
        read(file)
    assert not made.exists()


def rezipped(file, **changes):
    """The zip that torch wrote, compressed."""
    with zipfile.ZipFile(file) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return file


@pytest.mark.parametrize("read", READERS)
def test_checkpoint_bomb(read, tmp_path):
    """A hundred megabytes of zeros in a hundred kilobytes; thousand times that would do the same."""
    file = tmp_path / "x.pth"
    torch.save({"w": torch.zeros(25 << 20)}, file)
    rezipped(file)
    assert file.stat().st_size < 1 << 20
    with pytest.raises(UserError, match="compressed, which torch.save never does"):
        read(file)


@pytest.mark.parametrize("read", READERS)
def test_checkpoint_claims_too_much(read, tmp_path):
    """The size of a tensor is a number in a pickle: it must not be believed."""
    file = tmp_path / "x.pth"
    torch.save({"w": torch.zeros(8)}, file)
    with zipfile.ZipFile(file) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data.replace(b"K\x08", b"J" + struct.pack("<i", 10**9)))
    with pytest.raises(UserError, match=r"x\.pth: not a readable"):
        read(file)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"w": torch.zeros(1).expand(10**12)}, "larger than the file"),
        ({"w": [{"deep": (torch.zeros(1).expand(10**12),)}]}, "larger than the file"),
        ({"w": torch.empty(10, device="meta")}, "_rebuild_meta_tensor_no_storage, but only"),
        ({"w": torch.eye(3).to_sparse()}, "_rebuild_sparse_tensor, but only"),
    ],
    ids=["expanded", "hidden", "meta", "sparse"],
)
def test_malformed_tensors(content, told, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    for read in READERS:
        with pytest.raises(UserError, match=told):
            read(tmp_path / "x.pth")


def test_storages_are_counted_once():
    weight = torch.zeros(1000)
    check_tensors({"a": weight, "b": weight[:10], "c": [weight]}, 4000)
    with pytest.raises(ValueError, match="take more bytes than the file has"):
        check_tensors({"a": weight, "b": weight.clone()}, 7999)


def test_recursive_values():
    nested = [torch.zeros(3)]
    for _ in range(200):
        nested = [nested, nested]
    loop = {"w": nested}
    loop["again"] = loop
    check_tensors(loop, 12)


@pytest.mark.parametrize("content", [b"", b"ustar", b"PK\x03\x04", b"\x80\x02.", b"<html>", b"torch"])
def test_not_a_checkpoint(content, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    for read in READERS:
        with pytest.raises(UserError, match="not a readable"):
            read(tmp_path / "x.pth")


def test_old_tar_format(tmp_path):
    mini.write_tar(tmp_path / "x.pth", {"storages": b"x", "tensors": b"x", "pickle": b"x"})
    with pytest.raises(ValueError, match="neither a zip nor a pickle"):
        load_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "header",
    [b"\xff" * 8, struct.pack("<Q", 1 << 40), struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 90_000_000) + b"{"],
)
def test_safetensors_false_header(header, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(header)
    with pytest.raises(UserError, match=r"x\.safetensors: (not a readable|contains no named tensors)"):
        read_weights(tmp_path / "x.safetensors")
    claim = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(claim)) + claim)
    with pytest.raises(UserError, match="not a readable"):
        read_weights(tmp_path / "x.safetensors")


# YAML


def test_yaml_runs_nothing(tmp_path):
    made = tmp_path / "made"
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"):
        with pytest.raises(ValueError, match="could not determine a constructor"):
            parse_yaml(f"x: {tag} ['{made}']")
    with pytest.raises(UserError, match="not YAML"):
        parse_overrides(["seed=!!python/name:os.system"])
    assert not made.exists()


def test_yaml_bombs(tmp_path):
    """Ten aliases of ten aliases of ten: a kilobyte that is written out as terabytes, in a message, too."""
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else 'x'}]" for i in range(15)]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"r\.yaml: not valid YAML: its aliases"):
        load_config(tmp_path / "r.yaml")
    assert time.monotonic() - begin < 2
    with pytest.raises(ValueError, match="nested too deep"):
        parse_yaml("[" * 1100)
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: {<<: {d: 1}}") == {"a": [1, 2], "b": [1, 2], "c": {"d": 1}}
    with pytest.raises(ValueError, match="line 3: the key lr is given twice"):
        parse_yaml("optim:\n  lr: 1\n  lr: 2")


# Images


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(path, width, height, *chunks, depth=8, color=0):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (251_000_000, 1), (2**31 - 1, 2**31 - 1)])
def test_image_bomb(width, height, tmp_path):
    rows = zlib.compress(bytes(10 << 20))
    path = png(tmp_path / "x.png", width, height, chunk(b"IDAT", rows))
    tracemalloc.start()
    with pytest.raises(BadSample, match=r"x\.png: (more than 250 megapixels|truncated)"):
        read_image(path)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_image_limit_variable(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    Image.new("1", (1500, 1000)).save(path)
    assert read_image(path).shape == (1000, 1500, 3)
    monkeypatch.setenv("ALLSPARK_MAX_MEGAPIXELS", "1")
    with pytest.raises(BadSample, match="more than 1 megapixels.*ALLSPARK_MAX_MEGAPIXELS"):
        read_image(path)


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_png_text_bomb(name, tmp_path):
    bomb = zlib.compress(bytes(200 << 20))
    between = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\x01\0\0\0", b"iCCP": b"a\0\0"}[name]
    pixels = chunk(b"IDAT", zlib.compress(bytes(65 * 64)))
    path = png(tmp_path / "x.png", 64, 64, chunk(name, between + bomb), pixels)
    tracemalloc.start()
    try:
        assert read_image(path).shape == (64, 64, 3)  # what it says of itself is nobody's business
    except BadSample as error:
        assert str(path) in str(error)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_huge_exif(tmp_path):
    tags = b"".join(struct.pack(">HHII", 0x9000 + n % 999, 4, 1 << 30, 8) for n in range(5000))
    exif = b"MM\0*\0\0\0\x08" + struct.pack(">H", 5000) + tags
    pixels = chunk(b"IDAT", zlib.compress(bytes(65 * 64)))
    path = png(tmp_path / "x.png", 64, 64, chunk(b"eXIf", exif), pixels)
    begin = time.monotonic()
    try:
        assert read_image(path).shape == (64, 64, 3)
    except BadSample as error:
        assert str(path) in str(error)
    assert time.monotonic() - begin < 2


def test_postscript_named_as_image(tmp_path, monkeypatch):
    made = tmp_path / "made"
    tool = tmp_path / "bin" / "gs"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\ntouch {made}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 64\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(BadSample, match="truncated or not an image"):
        read_image(path)
    assert not made.exists()


# Archives; what leads out of them: test_prepare_archives.py


def test_tar_header_bomb(tmp_path):
    """A long name of a gigabyte in a megabyte of gzip: tarfile reads it before it says anything of a file."""
    zeros = gzip.compress(bytes(96 << 20), compresslevel=1)
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 4 << 30
        path = tmp_path / "x.tgz"
        path.write_bytes(gzip.compress(info.tobuf()) + zeros)
        tracemalloc.start()
        with pytest.raises(UserError, match=r"x\.tgz: truncated, damaged or not readable .*a header of 4294967296"):
            list(iter_entries(path))
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
        tracemalloc.stop()


def test_sparse_tar_member(tmp_path):
    info = tarfile.TarInfo("x")
    info.type = tarfile.GNUTYPE_SPARSE
    (tmp_path / "x.tar").write_bytes(info.tobuf() + bytes(1024))
    with pytest.raises(UserError, match="a sparse file"):
        list(iter_entries(tmp_path / "x.tar"))
    with tarfile.open(tmp_path / "y.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("y")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "y"}
        info.size = 512
        archive.addfile(info, io.BytesIO(b"9" * 512))
    with pytest.raises(UserError, match="a sparse file"):
        list(iter_entries(tmp_path / "y.tar"))


def test_deeply_nested_annotations(tmp_path):
    names = "annotations/instances_train2017.json", "annotations/instances_val2017.json"
    path = mini.write_zip(tmp_path / "annotations_trainval2017.zip", dict.fromkeys(names, b"[" * 200_000))
    with pytest.raises(UserError, match="instances_"):
        main(["prepare", "coco", "--from", str(path), "--out", str(tmp_path / "out"), "--allow-partial"])


# Downloads; http, hashes and lengths: test_download.py


class Endless(BaseHTTPRequestHandler):
    """Chunks without end, or on to where the path says."""

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
        except OSError:
            return None

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_endless_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "__kwdefaults__", fetch.__kwdefaults__ | {"size_limit": 1 << 20})
    assert download.MAX_BYTES <= 1 << 36
    with pytest.raises(UserError, match="above the limit of 1048576"):
        fetch([f"{server}/x"], tmp_path / "x", digest="sha256:" + "0" * 64, wait=0.01)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["file:///etc/passwd", "http://example.invalid/x", "ftp://example.invalid/x", "data:,x"])
def test_redirect_to_unvouched_host(to, server, tmp_path):
    with pytest.raises(UserError, match="refused|not allowed"):
        fetch([f"{server}/to/{to}"], tmp_path / "x", wait=0.01)


def test_redirect_to_localhost():
    """It would make this machine's own servers answer to a stranger's wish."""
    request = download.urllib.request.Request("https://example.org/x")
    with pytest.raises(download.Unavailable, match="this machine"):
        download.CheckedRedirects(None).redirect_request(request, io.BytesIO(), 302, "", {}, "http://localhost:1/x")


def test_no_unpickling_in_package():
    """Nothing that could run what it reads appears anywhere; torch.load once, with weights_only."""
    root = Path(download.__file__).parent
    texts = {path: path.read_text(encoding="utf-8") for path in (*root.rglob("*.py"), *root.parent.glob("*.py"))}
    loaders = r"\b(import pickle\b|from pickle\b|pickle\.loads?\(|marshal|shelve|yaml\.load\(|allow_pickle|extractall)"
    words = re.compile(loaders + r"|(?<![\w.])eval\(")
    for path, text in texts.items():
        assert not words.search(text), path
    loads = [text for text in texts.values() if "torch.load(" in text]
    assert len(loads) == 1 and "weights_only=True" in loads[0]
