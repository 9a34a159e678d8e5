"""Downloads from a local server that drops, stalls or corrupts, and from the disk."""

import errno
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import pathname2url

import numpy as np
import pytest

from allspark.utils import download
from allspark.utils.download import fetch, file_digest, is_loopback, refusal
from allspark.utils.errors import UserError, user_error_message

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)
SHA = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The path says how the server behaves: /good, /drop, /whole, ..."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        getattr(self, self.path.strip("/").split("/")[0])()

    def asked_before(self) -> bool:
        return [path for path, _ in self.server.asked].count(self.path) > 1

    def answer(self, content=CONTENT, *, ranges=True, tag='"1"', length=None, stop=None, **headers):
        """Send `content` from the asked byte on; `stop`: cut the connection after so many bytes."""
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and ranges else 0
        if self.headers.get("If-Range") not in (None, tag):
            start = 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if tag:
            self.send_header("ETag", tag)
        if length != "none":
            self.send_header("Content-Length", str(length or len(content) - start))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content[start:] if stop is None else content[start : start + stop])
        self.wfile.flush()
        if stop is not None or length is not None:
            self.close_connection = True

    def good(self):
        self.answer()

    def drop(self):
        """70 kB per connection, then it is gone."""
        self.answer(stop=70_000)

    def dead(self):
        """The first connection gives something, no other gives anything."""
        self.answer(stop=0 if self.asked_before() else 100_000)

    def whole(self):
        """No Range: whole files only; the first is cut."""
        self.answer(ranges=False, stop=None if self.asked_before() else 100_000)

    def changes(self):
        """Another file stands there after the first connection was cut."""
        if self.asked_before():
            self.answer(tag='"2"')
        else:
            self.answer(OTHER, stop=100_000)

    def grows(self):
        """The same, on a server without ETag: only the size tells."""
        if self.asked_before():
            self.answer(tag="")
        else:
            self.answer(OTHER[:200_000], tag="", stop=100_000)

    def mixed(self):
        """The same, and nothing tells but the digest."""
        if self.asked_before():
            self.answer(tag="")
        else:
            self.answer(OTHER, tag="", stop=100_000)

    def corrupt(self):
        self.answer(CONTENT[:-1] + b"!")

    def page(self):
        self.answer(b"<html>Sign in</html>", Content_Type="text/html; charset=utf-8")

    def longer(self):
        self.answer(length=len(CONTENT) + 10, ranges=False)

    def shorter(self):
        self.answer(length=len(CONTENT) - 10)

    def untold(self):
        self.answer(length="none")

    def gone(self):
        self.send_error(404)

    def busy(self):
        self.answer() if self.asked_before() else self.send_error(503)

    def stall(self):
        self.answer(stop=0)
        self.close_connection = False
        self.server.stop.wait(10)

    def trickle(self):
        self.answer(stop=0)
        while not self.server.stop.wait(0.05):
            self.wfile.write(b"x")

    def headers_forever(self):
        self.forever(b"HTTP/1.1 100 Continue\r\nX: %d\r\n\r\n")

    def slow_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        self.forever(b"x", wait=0.05)

    def redirect_forever(self):
        self.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: /good\r\n\r\n")
        self.forever(b"body" * 1000)

    def trailers_forever(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n")
        self.forever(b"X: y\r\n" * 1000)

    def escapes(self):
        self.wfile.write(b"HTTP/1.1 404 \x1b]0;title\x07\x9b2J\r\nContent-Length: 0\r\n\r\n")

    def forever(self, content, wait=0.0):
        self.close_connection = True
        while not self.server.stop.wait(wait):
            self.wfile.write(content)

    def leads(self):
        """To the address behind /leads/."""
        self.send_response(302)
        self.send_header("Location", self.path.removeprefix("/leads/"))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class Quiet(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that hung up is what is tested here."""


@pytest.fixture
def server():
    """.url: its address; .asked: (path, Range) of every request."""
    server = Quiet(("127.0.0.1", 0), Handler)
    server.asked, server.stop = [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def get(server, tmp_path):
    """(paths of the server or urls, ...) -> the fetched bytes; nothing may lie beside them."""

    def call(*paths, **options):
        urls = [path if "://" in path else f"{server.url}/{path}" for path in paths]
        target = fetch(urls, tmp_path / "out" / "file.bin", **{"wait": 0.01, "timeout": 5, **options})
        assert [path.name for path in target.parent.iterdir()] == ["file.bin"]
        return target.read_bytes()

    return call


def ranges(server) -> list[str | None]:
    return [wanted for _, wanted in server.asked]


@pytest.mark.parametrize("digest", [None, SHA, SHA[:15], MD5, SHA.upper().replace("SHA", "sha")])
def test_downloads_file(get, server, digest):
    assert get("good", digest=digest) == CONTENT
    assert get("gone", digest=digest) == CONTENT and len(server.asked) == 1  # kept, nobody is asked again


def test_resumes_interrupted_download(get, server, monkeypatch):
    monkeypatch.setattr(download, "PROGRESS", 50_000)  # as long as there is progress, beyond the usual attempts
    assert get("drop") == CONTENT
    assert ranges(server) == [None, "bytes=70000-", "bytes=140000-", "bytes=210000-", "bytes=280000-"]


def test_gives_up_without_progress(get, server):
    with pytest.raises(UserError, match="drop: the connection ended after 280000 of 300000 bytes"):
        get("drop")
    assert len(server.asked) == download.ATTEMPTS


def test_resumes_in_later_call(get, server, tmp_path):
    with pytest.raises(UserError, match="ended after 100000 of 300000 bytes"):
        get("dead")
    assert (tmp_path / "out" / "file.bin.part").stat().st_size == 100_000
    del server.asked[:]
    server.RequestHandlerClass.dead, before = Handler.good, Handler.dead
    try:
        assert get("dead") == CONTENT and ranges(server) == ["bytes=100000-"]
    finally:
        server.RequestHandlerClass.dead = before


@pytest.mark.parametrize("path", ["whole", "changes", "grows", "mixed"])
def test_restarts_when_resume_is_impossible(get, server, path):
    digest = None if path in ("whole", "changes") else SHA
    assert get(path, digest=digest) == CONTENT
    assert None in ranges(server)[1:] or path in ("whole", "changes")  # those two send all in answer to a Range


def test_no_resume_without_validator_or_digest(get, server):
    assert get("mixed") == CONTENT and ranges(server) == [None, None]


def test_part_of_other_source_is_discarded(get, server):
    assert get("dead", "good") == CONTENT
    assert server.asked[-1] == ("/good", None)


def test_falls_back_to_next_source(get, server):
    assert get("gone", "corrupt", "page", "longer", "good", digest=SHA) == CONTENT
    asked = [path for path, _ in server.asked]
    assert asked.count("/gone") == 1 and asked.count("/corrupt") == 1 and asked[-1] == "/good"


def test_corrupt_file_is_discarded(get, tmp_path):
    with pytest.raises(UserError, match=r"corrupt: it is damaged or another file \(sha256:\w+, expected sha256:"):
        get("corrupt", digest=SHA)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("path", ["longer", "page", "untold"])
def test_incomplete_file_without_digest(get, tmp_path, path):
    with pytest.raises(UserError, match=f"{path}: .*(of 300010 bytes|got a web page|does not state the file's length)"):
        get(path)
    assert not (tmp_path / "out" / "file.bin").exists()


def test_digest_overrides_length(get):
    with pytest.raises(UserError, match="shorter: it is damaged"):
        get("shorter", digest=SHA)
    assert get("untold", digest=SHA) == CONTENT


def test_retries_busy_server(get, server):
    assert get("busy") == CONTENT and len(server.asked) == 2


@pytest.mark.parametrize("path", ["stall", "trickle"])
def test_stalled_server_times_out(get, path):
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"{path}: (no response within 0.2 s|stalled at)"):
        get(path, timeout=0.2)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("path", ["headers_forever", "slow_headers", "redirect_forever", "trailers_forever"])
def test_endless_besides_content(get, path):
    begin = time.monotonic()
    with pytest.raises(
        UserError, match=f"{path}: (no response within 0.2 s|more than 1048576 bytes besides the conte)"
    ):
        get(path, digest=SHA, timeout=0.2)
    assert time.monotonic() - begin < 5


def test_terminal_escapes_are_not_printed(get):
    with pytest.raises(UserError) as caught:
        get("escapes")
    message = user_error_message(caught.value)
    assert r"HTTP status 404 \x1b]0;title\x07\x9b2J" in message and not {"\x1b", "\x07", "\x9b"} & set(message)
    missing = FileNotFoundError(errno.EACCES, "Permission denied", "caf\udce9\x1b[2J")
    assert user_error_message(missing).startswith(r"error: caf\udce9\x1b[2J: Permission")


@pytest.mark.parametrize("info", [b"[" * 10**5, b'{"size": ' + b"9" * 5000 + b"}", b'{"url": 1}', b"\xff", b"[]", b""])
def test_damaged_notes_about_a_partial_file(get, server, tmp_path, info):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file.bin.part").write_bytes(CONTENT[:1000])
    (tmp_path / "out" / "file.bin.part.json").write_bytes(info)
    assert get("good") == CONTENT and ranges(server) == [None]


@pytest.mark.parametrize("start", ["http://example.invalid", "file:///etc/hostname", "ftp://example.invalid"])
def test_redirects(get, server, start):
    with pytest.raises(UserError, match=f"{start}/file(, which is refused|' is not allowed)"):
        get(f"{server.url}/leads/{start}/file")
    assert get(f"{server.url}/leads/{server.url}/good") == CONTENT


def test_unencrypted_source_needs_full_hash():
    assert refusal("http://example.org/f", None) and refusal("http://example.org/f", SHA[:20])
    assert not refusal("http://example.org/f", SHA) and not refusal("http://example.org/f", MD5)
    assert not refusal("https://example.org/f", None) and not refusal("http://localhost:1/f", None)
    assert "not a url" in refusal("http://[", SHA) and "not a url" in refusal("file://[", None)
    assert refusal("ftp://example.org/f", SHA) and not refusal("some/path", None)
    assert is_loopback("http://[::1]:80/f") and not is_loopback("http://localhost.example.org/f")


def test_failure_names_every_source(tmp_path, server):
    sources = [f"{server.url}/gone", "http://example.org/file", "no/such", "ftp://a/b", "http://127.0.0.1:1/x"]
    with pytest.raises(UserError) as caught:
        fetch(sources, tmp_path / "file", wait=0.01)
    message = str(caught.value)
    for source, reason in zip(sources, ("404", "full hash", "no such file", "not supported", "refused"), strict=True):
        line = next(line for line in message.splitlines() if line.strip().startswith(f"{source}: "))
        assert reason in line
    assert "download the file manually and put it there" in message and str(tmp_path / "file") in message


def test_file_sources(tmp_path):
    source = tmp_path / "with blank.bin"
    source.write_bytes(CONTENT)
    for index, url in enumerate((str(source), "file://" + pathname2url(str(source)))):
        assert fetch([url], tmp_path / f"{index}", digest=SHA).read_bytes() == CONTENT
    with pytest.raises(UserError, match="is damaged"):
        fetch([str(source)], tmp_path / "x", digest="sha256:00000000")
    with pytest.raises(UserError, match="must name a file on this machine"):
        fetch(["file://elsewhere/file"], tmp_path / "x")
    assert source.read_bytes() == CONTENT and not (tmp_path / "x").exists()


def test_existing_other_file_is_untouched(tmp_path, get):
    target = tmp_path / "out" / "file.bin"
    target.parent.mkdir()
    target.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"file.bin: exists, but it is damaged or another file.*move it away"):
        get("good", digest=SHA)
    assert target.read_bytes() == b"mine" and get("good") == b"mine"
    with pytest.raises(UserError, match="is a folder"):
        fetch(["x"], tmp_path / "out")


def test_custom_check(get, tmp_path):
    seen = []

    def check(path):
        seen.append(path.read_bytes())
        return None if seen[-1] == CONTENT else "is not ours"

    with pytest.raises(UserError, match="corrupt: is not ours"):
        get("corrupt", check=check)
    assert list((tmp_path / "out").iterdir()) == []
    assert get("corrupt", "good", check=check) == CONTENT and len(seen) == 3
    (tmp_path / "out" / "file.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="exists, but is not ours"):
        get("good", check=check)


def test_size_limit(get, tmp_path):
    with pytest.raises(UserError, match="300000 bytes, above the limit of 1000"):
        get("good", size_limit=1000)
    with pytest.raises(UserError, match="above the limit of 1000"):
        get("untold", size_limit=1000, digest=SHA)
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_digest_is_refused_first(tmp_path):
    for digest in ("sha256:123", "md5:12345678", "crc32:12345678", SHA + "0", "12345678"):
        with pytest.raises(UserError, match="neither sha256:"):
            fetch(["x"], tmp_path / "x", digest=digest)


def test_full_disk_then_resume(get, server, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the largest file that may be written
    try:
        with pytest.raises(
            UserError, match=r"file.bin: cannot be written \(the disk is full\); free disk space"
        ) as caught:
            get("good", "good")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and len(server.asked) == 1
    assert 0 < (tmp_path / "out" / "file.bin.part").stat().st_size <= 100_000
    assert get("good") == CONTENT and ranges(server)[1].startswith("bytes=")


def test_file_digest(tmp_path):
    (tmp_path / "f").write_bytes(CONTENT)
    found = file_digest(tmp_path / "f"), file_digest(tmp_path / "f", "md5")
    assert found == (SHA.removeprefix("sha256:"), MD5.removeprefix("md5:"))
