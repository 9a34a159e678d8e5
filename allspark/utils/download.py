"""Downloads: sources tried in turn, resumed, verified, and put in place completely or not at all."""

from __future__ import annotations

import email.message
import hashlib
import http.client
import io
import ipaddress
import json
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from allspark.utils.atomic import os_error_reason
from allspark.utils.errors import UserError

MAX_BYTES = 64 << 30  # default size limit; the largest file that is fetched has 19 GB
BLOCK = 1 << 18  # bytes per read
MAX_HEADER = 1 << 20  # bytes that a server may send besides the content: headers, redirects, trailers
ATTEMPTS = 4  # per url, without PROGRESS bytes in between
PROGRESS = 1 << 20
SLOWEST = 1 << 10  # bytes per timeout period; a slower server counts as stalled
DIGEST = re.compile(r"sha256:[0-9a-f]{8,64}|md5:[0-9a-f]{32}")
STRONG_DIGITS = 32  # minimum for a file that is downloaded unencrypted
BUSY = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses worth a retry


class Unavailable(Exception):
    """Why a source failed. retry: another attempt may succeed; restart: discard the partial file first."""

    def __init__(self, reason: str, *, retry: bool = False, restart: bool = False) -> None:
        super().__init__(reason)
        self.retry, self.restart = retry, restart


@dataclass(frozen=True)
class Requirements:
    """What the file and the server must fulfill; see `fetch`."""

    digest: str | None
    check: Callable[[Path], str | None] | None
    size_limit: int  # bytes
    timeout: float  # seconds without data
    wait: float  # seconds before the second attempt, doubled for each further one


@dataclass(frozen=True)
class PartialFile:
    """Where a partial file comes from; saved beside it, so that a later run can resume."""

    url: str = ""
    size: int | None = None  # bytes of the complete file
    validator: str = ""  # strong ETag or Last-Modified


def fetch(
    urls: Sequence[str],
    target: Path,
    *,
    digest: str | None = None,
    check: Callable[[Path], str | None] | None = None,
    size_limit: int = MAX_BYTES,
    timeout: float = 30.0,
    wait: float = 1.0,
) -> Path:
    """Fetch a file from the first source that has it; an existing target that verifies is not fetched again.

    An interrupted download is left beside the target as <name>.part, and the next call resumes it.

    Args:
        urls: https://, file:// or local paths; http:// only to this machine, or with a digest of at least 32 digits.
        digest: 'sha256:<hex>' (the first 8 digits suffice) or 'md5:<hex>'; None: an existing target is accepted, and
            only the length of a download is verified.
        check: returns what is wrong with a file, or None.
        size_limit: bytes.
        timeout: seconds without data.
        wait: seconds before the second attempt, doubled for each further one.

    Raises:
        UserError: no source had it, the disk is full, or the target is another file (which is never overwritten).
    """
    target, digest = Path(target), digest and digest.lower()
    if digest is not None and not DIGEST.fullmatch(digest):
        raise UserError(f"digest '{digest}': neither sha256:<8 to 64 hex digits> nor md5:<32 hex digits>")
    if target.exists():
        if not target.is_file():
            raise UserError(f"{target}: is a folder, but a file is to be written; choose another path")
        if reason := find_fault(target, digest, check):
            raise UserError(f"{target}: exists, but {reason}; move it away first")
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        reasons = fetch_first(urls, target, Requirements(digest, check, size_limit, timeout, wait))
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({os_error_reason(error)}); free disk space or choose another path, and run "
            "this again (it resumes where it stopped)"
        ) from None
    if target.exists():
        return target
    tried = "\n  ".join(reasons) or "no source given"
    raise UserError(
        f"{target}: could not be fetched\n  {tried}\nTry again later, or download the file manually and put it there"
    )


def fetch_first(urls: Sequence[str], target: Path, terms: Requirements) -> list[str]:
    """Put the file of the first working source in place -> the reasons why the sources before it failed."""
    part, reasons = target.with_name(f"{target.name}.part"), []
    for url in urls:
        try:
            fetch_one(url, part, terms)
        except Unavailable as reason:
            reasons.append(f"{url}: {reason}")
        else:
            os.replace(part, target)
            info_file(part).unlink(missing_ok=True)
            break
    return reasons


def find_fault(path: Path, digest: str | None, check: Callable[[Path], str | None] | None) -> str | None:
    """What is wrong with a complete file, or None."""
    if digest is not None:
        algorithm = digest.partition(":")[0]
        found = f"{algorithm}:{file_digest(path, algorithm)}"
        if not found.startswith(digest):
            return f"it is damaged or another file ({found}, expected {digest})"
    return check(path) if check else None


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file."""
    digest = hashlib.new(algorithm)  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_one(url: str, part: Path, terms: Requirements) -> None:
    """Get the verified file from one source as `part`; raises Unavailable after the last attempt."""
    if reason := refusal(url, terms.digest):
        raise Unavailable(reason)
    if (local := local_path(url)) is not None:
        remove_part(part)
        copy_local(local, part, terms)
        return
    attempt, position = 0, 0
    while True:
        try:
            download(url, part, terms)
            return
        except Unavailable as reason:
            if reason.restart:
                remove_part(part)
            size = part.stat().st_size if part.exists() else 0
            if size >= position + PROGRESS:
                attempt = 0
            attempt, position = attempt + 1, max(position, size)
            if not reason.retry or attempt == ATTEMPTS:
                raise
            time.sleep(terms.wait * 2 ** (attempt - 1))


def refusal(url: str, digest: str | None) -> str | None:
    """Why a source is not allowed, or None."""
    try:
        scheme = urlsplit(url).scheme.lower() if "://" in url else "file"
    except ValueError as error:
        return f"not a url ({error})"
    if scheme not in ("https", "http", "file"):
        return f"{scheme}:// is not supported; use https://, file:// or a path"
    strong = digest is not None and len(digest.partition(":")[2]) >= STRONG_DIGITS
    if scheme == "http" and not strong and not is_loopback(url):
        return (
            "http:// is refused without a full hash of the file, because the content is not authenticated; use https://"
        )
    return None


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def local_path(url: str) -> Path | None:
    """The path of a file:// url or local path; None for other urls."""
    if "://" not in url:
        return Path(os.path.expanduser(url))
    if not url.lower().startswith("file://"):
        return None
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise Unavailable("file:// must name a file on this machine: file:///folder/name")
    return Path(urllib.request.url2pathname(parts.path))


def copy_local(source: Path, part: Path, terms: Requirements) -> None:
    if not source.is_file():
        raise Unavailable("no such file")
    check_size(source.stat().st_size, terms)
    if not os.access(source, os.R_OK):
        raise Unavailable("permission denied")
    with open(source, "rb") as file, open(part, "wb") as out:
        shutil.copyfileobj(file, out, BLOCK)
        flush_to_disk(out)
    verify(part, terms)


def check_size(size: int | None, terms: Requirements) -> None:
    if size is not None and size > terms.size_limit:
        raise Unavailable(f"{size} bytes, above the limit of {terms.size_limit}", restart=True)


def verify(part: Path, terms: Requirements, resumed: bool = False) -> None:
    """Remove the file and raise Unavailable if it is not the wanted one; a resumed download may be retried."""
    if reason := find_fault(part, terms.digest, terms.check):
        remove_part(part)
        raise Unavailable(reason, retry=resumed)


def flush_to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def info_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def remove_part(part: Path) -> None:
    part.unlink(missing_ok=True)
    info_file(part).unlink(missing_ok=True)


def read_info(part: Path) -> PartialFile:
    try:
        info = PartialFile(**json.loads(info_file(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return PartialFile()
    valid = isinstance(info.url, str) and isinstance(info.size, int | None) and isinstance(info.validator, str)
    return info if valid and info.validator.isprintable() else PartialFile()


def download(url: str, part: Path, terms: Requirements) -> None:
    """One request: the rest of the file if `part` exists, else all of it."""
    known = read_info(part)
    start = part.stat().st_size if part.is_file() and known.url == url else 0
    if not known.validator and terms.digest is None:
        start = 0  # nothing proves that the rest belongs to the same file
    if start and start == known.size:  # the last run ended just before renaming the complete file
        return verify(part, terms, resumed=True)
    with open_url(url, start, known, terms) as response:
        start = start if response.status == 206 else 0
        size = total_size(response.headers, start)
        if start and (size != known.size or f"bytes {start}-" not in response.headers.get("Content-Range", "")):
            raise Unavailable("the file on the server has changed", retry=True, restart=True)
        chunked = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
        if size is None and not chunked and terms.digest is None:
            raise Unavailable("the server does not state the file's length, and its hash is unknown")
        check_size(size, terms)
        if response.headers.get_content_type() == "text/html" and not part.stem.endswith((".html", ".htm")):
            raise Unavailable("got a web page instead of the file (a login page, or a notice that it has moved)")
        if not start:
            remove_part(part)
            now = PartialFile(url, size, get_validator(response.headers))
            info_file(part).write_text(json.dumps(asdict(now)), encoding="utf-8")
        write_body(response, part, start, size, terms)
    verify(part, terms, resumed=start > 0)


class CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to urls that are allowed themselves: never from https to http without a hash.

    Nor from elsewhere to this machine, whose servers may trust local requests.
    """

    def __init__(self, digest: str | None) -> None:
        self.digest = digest

    def redirect_request(self, request, file, code, message, headers, new_url):
        to_this_machine = is_loopback(new_url) and not is_loopback(request.full_url)
        if not new_url.lower().startswith(("https://", "http://")) or refusal(new_url, self.digest) or to_this_machine:
            file.close()
            raise Unavailable(
                f"redirects to {new_url}, which is refused: this machine, or not https and its full hash is unknown"
            )
        return super().redirect_request(request, file, code, message, headers, new_url)


class BoundedReader(io.RawIOBase):
    """What arrives from a server; `allow` says how much of it, and for how long, before TimeoutError or HTTPException.

    A socket's own timeout ends only a server that is silent, not one whose headers never end.
    """

    def __init__(self, raw: io.RawIOBase, timeout: float) -> None:
        self.raw, self.timeout = raw, timeout
        self.allow(MAX_HEADER)

    def allow(self, size: int) -> None:
        self.left, self.deadline = size, time.monotonic() + self.timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int | None:
        count = self.raw.readinto(buffer)
        self.left -= count or 0
        if self.left < 0:
            raise http.client.HTTPException(f"more than {MAX_HEADER} bytes besides the content")
        if time.monotonic() > self.deadline:
            raise TimeoutError
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class BoundedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.reader = BoundedReader(self.fp.detach(), sock.gettimeout())
        self.fp = io.BufferedReader(self.reader)


class BoundedHTTP(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def do_open(self, kind: Callable, request: urllib.request.Request, **options: Any) -> http.client.HTTPResponse:
        def connect(host: str, **more: Any) -> http.client.HTTPConnection:
            connection = kind(host, **more)
            connection.response_class = BoundedResponse
            return connection

        return super().do_open(connect, request, **options)


def open_url(url: str, start: int, known: PartialFile, terms: Requirements) -> BoundedResponse:
    """Request everything from byte `start` on; raises Unavailable for any other answer."""
    headers = {"User-Agent": "allspark", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if known.validator:
            headers["If-Range"] = known.validator  # if the file has changed, all of it is sent
    handlers: list[urllib.request.BaseHandler] = [CheckedRedirects(terms.digest), BoundedHTTP()]
    if is_loopback(url):
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.build_opener(*handlers).open(request, timeout=terms.timeout)
    except urllib.error.HTTPError as error:
        error.close()
        stale = error.code == 416  # nothing after `start`: the file on the server is shorter
        reason = f"HTTP status {error.code} {error.reason}"
        raise Unavailable(reason, retry=stale or error.code in BUSY, restart=stale) from None
    except ValueError as error:  # including http.client.InvalidURL
        raise Unavailable(f"not a url ({error})") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(network_reason(error, terms), retry=True) from None


def network_reason(error: Exception, terms: Requirements) -> str:
    cause = getattr(error, "reason", error)  # URLError wraps the error of the socket
    if isinstance(cause, TimeoutError):
        return f"no response within {terms.timeout:g} s"
    return str(cause) or type(cause).__name__


def total_size(headers: email.message.Message, start: int) -> int | None:
    """Bytes of the complete file, from Content-Range of a partial response or Content-Length; None: not stated."""
    text = headers.get("Content-Range", "").rpartition("/")[2] if start else headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def get_validator(headers: email.message.Message) -> str:
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "")


def write_body(response: BoundedResponse, part: Path, start: int, size: int | None, terms: Requirements) -> None:
    """Write the response from byte `start` on; raises Unavailable if it ends early, stalls or exceeds the limit."""
    bar = dict(desc=part.stem, unit="B", unit_scale=True, unit_divisor=1024, disable=None)  # on a terminal only
    with open(part, "r+b" if start else "wb") as file, tqdm(initial=start, total=size, **bar) as progress:
        file.seek(start)
        file.truncate()
        done, checked_at, checked_done = start, time.monotonic(), start
        try:
            while block := read_block(response, terms):
                file.write(block)
                done += len(block)
                progress.update(len(block))
                check_size(done, terms)
                if time.monotonic() - checked_at > terms.timeout:
                    if done - checked_done < SLOWEST:
                        raise Unavailable(f"stalled at {done} bytes", retry=True)
                    checked_at, checked_done = time.monotonic(), done
        finally:
            flush_to_disk(file)
    if size is not None and done != size:
        raise Unavailable(f"the connection ended after {done} of {size} bytes", retry=True)


def read_block(response: BoundedResponse, terms: Requirements) -> bytes:
    try:
        response.reader.allow(BLOCK + MAX_HEADER)
        return response.read1(BLOCK)  # returns what has arrived, so that a slow transfer is noticed
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(network_reason(error, terms), retry=True) from None
