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

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
from allspark.__main__ import main
from allspark.config import BottleneckConfig, ModelConfig
from allspark.config_io import load_config, load_recipe, parse_overrides, to_plain
from allspark.data.image_files import BadSample
from allspark.data.image_io import read_image
from allspark.data.worker_pool import evaluation_workers, worker_count
from allspark.engine.checkpoint import load_checkpoint, save_checkpoint
from allspark.inference import load_for_inference
from allspark.models.segmentor import build_model
from allspark.prepare import archives
from allspark.prepare.archives import iter_entries
from allspark.utils import download
from allspark.utils.download import fetch
from allspark.utils.errors import UserError
from allspark.utils.safe_load import check_tensors, load_tensors
from allspark.utils.safe_yaml import parse_yaml
from allspark.weights.loading import WeightFile, read_weights
from allspark.weights.recognize import recognize
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


def pickled(path, *instructions):
    """A checkpoint whose pickle has these instructions."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"".join((b"\x80\x02}q\0X\1\0\0\0w", *instructions, b"s.")))
        archive.writestr("x/version", b"3\n")
    return path


def text(content):
    return b"X" + struct.pack("<I", len(content)) + content


HUGE = b"\x8a\x05" + struct.pack("<Q", 5_600_000_000)[:5]  # as LONG1


DEMANDS = {
    "bytearray": [b"c__builtin__\nbytearray\n", HUGE, b"\x85R"],
    "storage": [b"ctorch\nUntypedStorage\n", HUGE, b"\x85R"],
    "new_storage": [b"ctorch\nUntypedStorage\n", HUGE, b"\x85\x81"],
    "tensor": [b"ctorch\nTensor\n", HUGE, b"\x85R"],
    "float_tensor": [b"ctorch\nFloatTensor\n", HUGE, b"\x85R"],
    "void": [b"cnumpy.core.multiarray\nscalar\n", b"cnumpy\ndtype\n", text(b"V2000000000"), b"\x89\x88\x87R", b"\x85R"],
    "hex_chain": [b"c_codecs\nencode\nq\1", text(b"x" * 64), text(b"hex"), b"q\2\x86R", *[b"q\3h\1h\3h\2\x86R"] * 26],
    "long_bytes": [b"c_codecs\nencode\nq\1", text(b"x" * 50_000), b"q\2", b"0h\1h\2X\6\0\0\0latin1\x86Rq\3"],
    "copied_dict": [b"(", b"ccollections\nOrderedDict\n", b"h\0\x85R", b"l"],
    "expand": [b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n", b")R"],
}


@pytest.mark.parametrize("name", DEMANDS)
def test_checkpoint_asks_for_memory(name, tmp_path):
    """torch's safe functions include some that allocate what a number says; 386 bytes took 5.6 GB."""
    file = pickled(tmp_path / "x.pth", *DEMANDS[name])
    with pytest.raises(
        ValueError, match="only tensors and plain values|a call that torch.save does not write|NumPy values"
    ):
        load_tensors(file)


def test_legacy_storage_claims_too_much(tmp_path):
    file = tmp_path / "x.pth"
    torch.save({"w": torch.zeros(8)}, file, _use_new_zipfile_serialization=False)
    assert torch.equal(load_tensors(file)["w"], torch.zeros(8))
    file.write_bytes(file.read_bytes().replace(b"cpuq\x06K\x08", b"cpuq\x06J" + struct.pack("<i", 10**9)))
    with pytest.raises(ValueError, match="more memory than a file of its size needs"):
        load_tensors(file)


def test_two_directories(tmp_path):
    """zipfile reads the directory before its end record, torch the one that the record gives the position of."""
    file = tmp_path / "x.pth"
    torch.save({"w": torch.zeros(8)}, file)
    with zipfile.ZipFile(file) as archive:
        start = archive.start_dir
    content = file.read_bytes()
    for end in (len(content) - 22, content.rindex(b"PK\6\6")):
        file.write_bytes(content[:end] + content[start:end] + content[end:])
        with pytest.raises(ValueError, match="more than one directory"):
            load_tensors(file)
    file.write_bytes(content[:-2] + struct.pack("<H", 22) + content[-22:])  # as a comment
    with pytest.raises(ValueError, match="more than one directory"):
        load_tensors(file)


@pytest.mark.parametrize("value", [1j, torch.zeros(2, dtype=torch.float8_e4m3fn), torch.zeros(2, dtype=torch.cfloat)])
def test_types_that_no_weights_have(value, tmp_path):
    torch.save({"w": value}, tmp_path / "x.pth")
    for read in READERS:
        with pytest.raises(UserError, match="not a readable"):
            read(tmp_path / "x.pth")


def test_numpy_numbers_are_read(tmp_path):
    """Which the released code saves."""
    content = {"best": np.float64(3.5), "zero": np.float32(0), "count": np.int64(7), "w": torch.ones(2)}
    torch.save(content, tmp_path / "x.pth")
    found = load_tensors(tmp_path / "x.pth")
    assert {name: found[name] for name in ("best", "zero", "count")} == {"best": 3.5, "zero": 0, "count": 7}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.crop_size", 2**14),
        ("model.decoder_channels", 2**14),
        ("model.encoder", "timm:eva_giant_patch14_560"),
    ],
)
def test_recipe_asks_for_memory(key, value, tmp_path):
    """6 KB whose network would take 68 GB: shapes are compared before it is built."""
    recipe = load_recipe("shapes", "allspark", {"model.encoder": "mit_b0", "data.crop_size": 64, key: value})
    small = build_model(ModelConfig(encoder="mit_b0", decoder_channels=8), 5, 64).state_dict()
    content = {"model": small, "method": {}, "epoch": 0, "step": 0, "recipe": to_plain(recipe), "split": {}}
    save_checkpoint(tmp_path / "x.pth", content)
    with pytest.raises(UserError, match=r"x\.pth: does not match the model of this recipe"):
        load_for_inference(tmp_path / "x.pth", torch.device("cpu"))


def test_eval_follows_no_stranger(tmp_path):
    """The recipe in a checkpoint names a folder, which is not filled, and a number of processes."""
    recipe = load_recipe("shapes", "supervised", {"model.encoder": "mit_b0", "data.data_root": str(tmp_path / "home")})
    model = build_model(recipe.model, 7, recipe.data.crop_size).state_dict()
    content = {"model": model, "method": {}, "epoch": 0, "step": 0, "recipe": to_plain(recipe), "split": {}}
    save_checkpoint(tmp_path / "x.pth", content)
    with pytest.raises(
        UserError, match=f"{tmp_path / 'home'} is not a folder; set ALLSPARK_DATA_SHAPES=DIR, or give --data-root$"
    ):
        eval_script.main(["--checkpoint", str(tmp_path / "x.pth"), "--device", "cpu"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]
    assert evaluation_workers(1024) == worker_count(None) and evaluation_workers(0) == 0


def test_shapes_ask_for_memory(tmp_path):
    """The classes of one tensor, the slots of another: together a memory of terabytes."""
    model = build_model(ModelConfig(encoder="mit_b0", bottleneck=BottleneckConfig(name="allspark")), 21, 64)
    state = {**model.state_dict(), "bottleneck.memory.queue": torch.zeros(1, 1, 1000**2)}
    state["decoder.classifier.weight"] = torch.zeros(255, 4000, 1, 1)
    with pytest.raises(UserError, match="tensors do not fit"):
        recognize(WeightFile(tmp_path / "x.pth", state, {})).state()


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
    with pytest.raises(ValueError, match="the key 0x0 is given twice"):
        parse_yaml("{0: 0, 0x0: 1}")


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


def tar_blocks(*parts):
    """Members of a tar: (type, size, content)."""
    for kind, size, content in parts:
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, size
        yield info.tobuf() + content.ljust(-len(content) % 512 + len(content), b"\0")


@pytest.mark.parametrize(
    ("limit", "parts", "told"),
    [
        ("MAX_FILES", [(tarfile.REGTYPE, 0, b"")] * 30, "or 20 files"),
        ("MAX_HEADERS", [(tarfile.XGLTYPE, 9, b"9 %02d=xy\n" % i) for i in range(30)], "a header of 9|invalid header"),
        ("MAX_END", [], "more than 20 bytes after its last file"),
    ],
)
def test_endless_tar(limit, parts, told, tmp_path, monkeypatch):
    """A megabyte of gzip holds two million files, or gigabytes of attributes of the whole archive.

    Python 3.11.2 stops at such attributes by itself.
    """
    monkeypatch.setattr(archives, limit, 20)
    (tmp_path / "x.tgz").write_bytes(gzip.compress(b"".join(tar_blocks(*parts)) + bytes(10240)))
    with pytest.raises(UserError, match=told):
        list(iter_entries(tmp_path / "x.tgz"))


def test_tar_of_zeros(tmp_path):
    """lzma, which tarfile tries first, takes ten seconds for these."""
    with open(tmp_path / "x.tar", "wb") as file:
        file.truncate(60 << 20)
    begin = time.monotonic()
    assert list(iter_entries(tmp_path / "x.tar")) == []
    assert time.monotonic() - begin < 3


def test_pipe_as_archive(tmp_path):
    os.mkfifo(tmp_path / "x.zip")
    with pytest.raises(UserError, match=r"x\.zip: is neither a folder nor a regular file"):
        main(["prepare", "voc", "--from", str(tmp_path / "x.zip"), "--out", str(tmp_path / "out")])


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
