"""Files from the net or the disk: sources tried in turn, resumed, verified, put in place whole or not at all."""

from __future__ import annotations

import email.message
import hashlib
import http.client
import ipaddress
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from allspark.utils.atomic import os_error_reason
from allspark.utils.errors import UserError

MAX_BYTES = 64 << 30  # of a file of which nothing else is known; the largest that is fetched has 19 GB
BLOCK = 1 << 18  # bytes read at once
ATTEMPTS = 4  # at one url, without a megabyte of progress in between
PROGRESS = 1 << 20
SLOWEST = 1 << 10  # bytes per timeout; below this a server counts as stalled
DIGEST = re.compile(r"sha256:[0-9a-f]{8,64}|md5:[0-9a-f]{32}")
STRONG_DIGITS = 32  # of a digest that vouches for a file which came unencrypted
BUSY = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses that may pass


class Unavailable(Exception):
    """Why a source gave nothing. again: another attempt may succeed; restart: but not on what is there already."""

    def __init__(self, os_error_reason: str, *, again: bool = False, restart: bool = False) -> None:
        super().__init__(os_error_reason)
        self.again, self.restart = again, restart


@dataclass(frozen=True)
class Requirements:
    """What is asked of a file and of a server."""

    digest: str | None
    check: Callable[[Path], str | None] | None
    size_limit: int  # bytes
    timeout: float  # seconds without a sign of life
    wait: float  # seconds before the second attempt, doubled before each further one


@dataclass(frozen=True)
class PartialFile:
    """Whose beginning a partial file is; kept beside it, so that a later run can go on."""

    url: str = ""
    size: int | None = None  # of the whole file
    get_validator: str = ""  # strong ETag, or the date of the last change


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
    """The file at `target`, from the first of `urls` that has it; a target that verifies is kept as it is.

    urls: https://, file:// or a local path; http:// to this machine, or with a digest of 32 digits or more.
    digest: 'sha256:<hex>' (a beginning of 8 digits or more will do) or 'md5:<hex>'; None: a target that exists is
    taken as it is, and a download is verified by its length alone. check: tells of a file what is wrong with it, None
    where it is what is wanted. size_limit: bytes; timeout, wait: seconds.
    An interrupted download lies beside the target as <name>.part and the next call goes on with it.
    UserError: no source had it, no room on the disk, or the target is another file (it is never overwritten).
    """
    target, digest = Path(target), digest and digest.lower()
    if digest is not None and not DIGEST.fullmatch(digest):
        raise UserError(f"digest '{digest}': neither sha256:<8 to 64 hex digits> nor md5:<32 hex digits>")
    if target.exists():
        return check_existing(target, digest, check)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        reasons = fetch_first(urls, target, Requirements(digest, check, size_limit, timeout, wait))
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({os_error_reason(error)}); make room or choose another place, and run this again "
            "(it goes on where it stopped)"
        ) from None
    if target.exists():
        return target
    tried = "\n  ".join(reasons) or "no source was given"
    raise UserError(
        f"{target}: could not be fetched\n  {tried}\nTry again later, or download the file by hand and put it there"
    )


def fetch_first(urls: Sequence[str], target: Path, terms: Requirements) -> list[str]:
    """Put the file of the first source that has it in place; the reasons of those that do not."""
    part, reasons = target.with_name(f"{target.name}.part"), []
    for url in urls:
        try:
            fetch_one(url, part, terms)
        except Unavailable as os_error_reason:
            reasons.append(f"{url}: {os_error_reason}")
        else:
            os.replace(part, target)
            info_file(part).unlink(missing_ok=True)
            break
    return reasons


def check_existing(target: Path, digest: str | None, check: Callable[[Path], str | None] | None) -> Path:
    """A target that is there already: the file that is wanted, or a UserError."""
    if not target.is_file():
        raise UserError(f"{target}: is a folder, but a file is to be put there; choose another place")
    if os_error_reason := find_fault(target, digest, check):
        raise UserError(f"{target}: is there, but {os_error_reason}; move it away first")
    return target


def find_fault(path: Path, digest: str | None, check: Callable[[Path], str | None] | None) -> str | None:
    """What is wrong with a whole file, None where it is what is wanted."""
    if digest is not None:
        algorithm = digest.partition(":")[0]
        found = f"{algorithm}:{file_digest(path, algorithm)}"
        if not found.startswith(digest):
            return f"is damaged or another file ({found}, expected {digest})"
    return check(path) if check else None


def file_digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hex digits of the hash of a file's bytes."""
    digest = hashlib.new(algorithm)  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_one(url: str, part: Path, terms: Requirements) -> None:
    """The verified content of one source as the file `part`; Unavailable after the last attempt."""
    if refusal := refusal(url, terms.digest):
        raise Unavailable(refusal)
    if (local := local_path(url)) is not None:
        remove_part(part)
        copy_local(local, part, terms)
        return
    attempt, reached = 0, 0
    while True:
        try:
            download(url, part, terms)
            return
        except Unavailable as os_error_reason:
            if os_error_reason.restart:
                remove_part(part)
            size = part.stat().st_size if part.exists() else 0
            if size >= reached + PROGRESS:
                attempt = 0
            attempt, reached = attempt + 1, max(reached, size)
            if not os_error_reason.again or attempt == ATTEMPTS:
                raise
            time.sleep(terms.wait * 2 ** (attempt - 1))


def refusal(url: str, digest: str | None) -> str | None:
    """Why a source is not even asked; None where it is."""
    scheme = url.partition("://")[0].lower() if "://" in url else "file"
    if scheme not in ("https", "http", "file"):
        return f"{scheme}:// is not supported; give https://, file:// or a path"
    strong = digest is not None and len(digest.partition(":")[2]) >= STRONG_DIGITS
    if scheme == "http" and not strong and not is_loopback(url):
        return "http:// is refused without a full hash of the file, nobody vouches for what arrives; use https://"
    return None


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def local_path(url: str) -> Path | None:
    """The file that a file:// url or a path names; None for a url of the net."""
    if "://" not in url:
        return Path(os.path.expanduser(url))
    if not url.lower().startswith("file://"):
        return None
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise Unavailable("file:// names a file of this machine: file:///folder/name")
    return Path(urllib.request.url2pathname(parts.path))


def copy_local(source: Path, part: Path, terms: Requirements) -> None:
    if not source.is_file():
        raise Unavailable("there is no such file")
    check_size(source.stat().st_size, terms)
    if not os.access(source, os.R_OK):
        raise Unavailable("may not be read")
    with open(source, "rb") as file, open(part, "wb") as out:
        shutil.copyfileobj(file, out, BLOCK)
        flush_to_disk(out)
    verify(part, terms)


def check_size(size: int | None, terms: Requirements) -> None:
    if size is not None and size > terms.size_limit:
        raise Unavailable(f"{size} bytes, more than the {terms.size_limit} that are plausible", restart=True)


def verify(part: Path, terms: Requirements, resumed: bool = False) -> None:
    """Unavailable, and no file any more, where it is not what is wanted; one joined from two runs gets a second try."""
    if os_error_reason := find_fault(part, terms.digest, terms.check):
        remove_part(part)
        raise Unavailable(os_error_reason, again=resumed)


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
        return PartialFile(**json.loads(info_file(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return PartialFile()


def download(url: str, part: Path, terms: Requirements) -> None:
    """One request: the rest of what `part` begins, or all of it."""
    known = read_info(part)
    start = part.stat().st_size if part.is_file() and known.url == url else 0
    if not known.validator and terms.digest is None:
        start = 0  # nothing would tell whether the rest belongs to the same file
    if start and start == known.size:  # the last run ended between the last byte and the renaming
        return verify(part, terms, resumed=True)
    with open_url(url, start, known, terms) as response:
        start = start if response.status == 206 else 0
        size = total_size(response.headers, start)
        if start and (size != known.size or f"bytes {start}-" not in response.headers.get("Content-Range", "")):
            raise Unavailable("the file there has changed", again=True, restart=True)
        chunked = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
        if size is None and not chunked and terms.digest is None:
            raise Unavailable("the server does not tell the file's length, and no hash of it is known")
        check_size(size, terms)
        if response.headers.get_content_type() == "text/html" and not part.stem.endswith((".html", ".htm")):
            raise Unavailable("a web page came instead of the file (a login, or a notice that it has moved)")
        if not start:
            remove_part(part)
            now = PartialFile(url, size, get_validator(response.headers))
            info_file(part).write_text(json.dumps(asdict(now)), encoding="utf-8")
        write_body(response, part, start, size, terms)
    verify(part, terms, resumed=start > 0)


class CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to where a url itself might lead: never from https to http without a hash.

    Nor from elsewhere to this machine, whose servers take it for one of their own.
    """

    def __init__(self, digest: str | None) -> None:
        self.digest = digest

    def redirect_request(self, request, file, code, message, headers, new_url):
        inward = is_loopback(new_url) and not is_loopback(request.full_url)
        if not new_url.lower().startswith(("https://", "http://")) or refusal(new_url, self.digest) or inward:
            file.close()
            raise Unavailable(
                f"leads on to {new_url}, which is refused: this machine, or not https, and no full hash of it is known"
            )
        return super().redirect_request(request, file, code, message, headers, new_url)


def open_url(url: str, start: int, known: PartialFile, terms: Requirements) -> http.client.HTTPResponse:
    """The answer to a request for everything from byte `start` on; Unavailable says what else it was."""
    headers = {"User-Agent": "allspark", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if known.validator:
            headers["If-Range"] = known.validator  # a file that has changed comes whole
    handlers: list[urllib.request.BaseHandler] = [CheckedRedirects(terms.digest)]
    if is_loopback(url):
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.build_opener(*handlers).open(request, timeout=terms.timeout)
    except urllib.error.HTTPError as error:
        error.close()
        stale = error.code == 416  # nothing behind `start`: the file there is a shorter one
        os_error_reason = f"HTTP status {error.code} {error.reason}"
        raise Unavailable(os_error_reason, again=stale or error.code in BUSY, restart=stale) from None
    except ValueError as error:  # http.client.InvalidURL is one, too
        raise Unavailable(f"not a url ({error})") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(network_reason(error, terms), again=True) from None


def network_reason(error: Exception, terms: Requirements) -> str:
    cause = getattr(error, "reason", error)  # URLError wraps the error of the socket
    if isinstance(cause, TimeoutError):
        return f"no answer within {terms.timeout:g} s"
    return str(cause) or type(cause).__name__


def total_size(headers: email.message.Message, start: int) -> int | None:
    """Bytes of the whole file, by Content-Range for a rest, by Content-Length otherwise; None: not told."""
    told = headers.get("Content-Range", "").rpartition("/")[2] if start else headers.get("Content-Length", "")
    return int(told) if told.isdecimal() else None


def get_validator(headers: email.message.Message) -> str:
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "")


def write_body(response: http.client.HTTPResponse, part: Path, start: int, size: int | None, terms: Requirements) -> None:
    """Write what arrives behind byte `start`; Unavailable where it ends too early, stalls or does not end."""
    with open(part, "r+b" if start else "wb") as file, progress_bar(part, start, size) as progress:
        file.seek(start)
        file.truncate()
        done, last_look, last_done = start, time.monotonic(), start
        try:
            while block := read_block(response, terms):
                file.write(block)
                done += len(block)
                progress.update(len(block))
                check_size(done, terms)
                if time.monotonic() - last_look > terms.timeout:
                    if done - last_done < SLOWEST:
                        raise Unavailable(f"stalled at {done} bytes", again=True)
                    last_look, last_done = time.monotonic(), done
        finally:
            flush_to_disk(file)
    if size is not None and done != size:
        raise Unavailable(f"the connection ended after {done} of {size} bytes", again=True)


def read_block(response: http.client.HTTPResponse, terms: Requirements) -> bytes:
    try:
        return response.read1(BLOCK)  # what is there, so that a trickle is seen as one
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(network_reason(error, terms), again=True) from None


def progress_bar(part: Path, start: int, size: int | None) -> tqdm:
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(desc=part.stem, initial=start, total=size, unit="B", unit_scale=True, unit_divisor=1024, disable=None)
