"""One resumable download: bytes from an address into a `.part` file, checked and flushed to disk.

It refuses plain text from elsewhere than this machine, sends the token to its own host only, and never writes more
than was announced or than the disk can spare.
"""

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar
from urllib.parse import urljoin

import aiohttp

from forebay.clock import Clock
from forebay.config import PullSettings
from forebay.errors import SetupError
from forebay.replicas import sources

Progress = Callable[[int, int | None], None]

_FRESH_START_BYTES = 16 * 2**20
_BUFFER_BYTES = 2**16  # small, for what is in it when the connection breaks is lost
_HASH_BYTES = 8 * 2**20
_NOTE_BYTES_MAX = 8192
_REDIRECTS_MAX = 5
_BACKOFF_SECONDS_MIN = 0.25
_BACKOFF_SECONDS_MAX = 30.0
_ROOM_CHECK_BYTES = 64 * 2**20

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Remote:
    """What to fetch, which has at most `bytes_max`. `spare_bytes` is room that the caller needs beside the download itself."""

    url: str
    sha256: str | None = None
    token: str | None = None
    size_bytes: int | None = None
    spare_bytes: int = 0
    bytes_max: int | None = None

    @property
    def shown(self) -> str:
        """The address for people: without a query, which may be signed."""
        return self.url.partition("?")[0]


class _Cut(Exception):
    """The transfer stopped before its end; going on may help."""


@dataclass(slots=True)
class _Part:
    """The bytes so far. Owned by one download under the file lock; only `in_thread` calls touch the disk."""

    path: Path
    digest: Any
    done: int
    url: str
    etag: str | None = None
    total: int | None = None

    @property
    def note(self) -> Path:
        return note_path(self.path)

    @classmethod
    async def open(cls, path: Path, url: str) -> Self:
        """Take up what an earlier download of the same address has left, and hash it again."""
        part = cls(path, hashlib.sha256(), 0, url)
        note = await in_thread(_read_note, part.note)
        size = await in_thread(_size, path)
        if note.get("url") != url or size is None:
            await part.start_over()
            return part
        part.etag, part.total = note.get("etag"), note.get("total")
        while part.done < size:
            part.done += await in_thread(_hash_from, path, part.done, part.digest)
        return part

    async def start_over(self) -> None:
        self.digest, self.done, self.etag, self.total = hashlib.sha256(), 0, None, None
        await in_thread(_truncate, self.path)

    async def expect(self, etag: str | None, total: int | None) -> None:
        """Remember what the server says this is, for the next attempt."""
        if (etag, total) != (self.etag, self.total) or not self.note.exists():
            self.etag, self.total = etag, total
            text = json.dumps({"url": self.url, "etag": etag, "total": total})
            await in_thread(self.note.write_text, text, encoding="utf-8")

    async def write(self, chunk: bytes) -> None:
        await in_thread(_append, self.path, self.done, chunk, self.digest)
        self.done += len(chunk)

    @property
    def complete(self) -> bool:
        return self.total is not None and self.done == self.total


def note_path(part: Path) -> Path:
    """Where the facts about a `.part` file are kept."""
    return part.with_name(part.name + ".json")


def hub_of(settings: PullSettings) -> tuple[str, str | None]:
    """The address of the model hub, to which paths are added, and the token for it."""
    token = settings.hub_token
    return settings.hub_url.rstrip("/"), None if token is None else token.get_secret_value()


async def in_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run a short blocking call in a thread, and when cancelled wait for its end: no write outlives its lock."""
    call = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        await asyncio.gather(call, return_exceptions=True)  # what goes wrong now is nobody's business
        raise


async def download(remote: Remote, path: Path, settings: PullSettings, clock: Clock, progress: Progress) -> None:
    """Bring all of `remote` into `path`, going on where an earlier attempt stopped. Raises SetupError.

    1. Take up what is there. 2. Fetch the rest, again and again while it is cut, with growing pauses. 3. Check the
    checksum; a wrong file is deleted. 4. Flush it to disk. Cancelled, it leaves a part that the next call takes up.
    """
    part = await _Part.open(path, remote.url)
    attempt = 0
    async with _session(remote, settings) as session:
        while not part.complete:
            attempt, before = attempt + 1, part.done
            try:
                await _fetch(session, remote, part, settings, progress)
                break
            except (_Cut, aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                if part.done - before >= _FRESH_START_BYTES:
                    attempt = 0  # a large file over a bad line gets on; only attempts that bring little count
                elif attempt >= settings.attempts_max:
                    raise SetupError(
                        f"The download of {remote.shown} stopped at {part.done} bytes after {attempt} attempts "
                        f"({_reason(error)}). Run the pull again: it goes on from there."
                    ) from None
                await _pause(attempt, clock)
    await _check_sum(part, remote)
    await in_thread(flush, path)


async def fetch_page(remote: Remote, bytes_max: int, settings: PullSettings, clock: Clock) -> tuple[bytes, str | None]:
    """A small answer whole, and the address of the page that comes after it, if there is one. Raises SetupError."""
    async with _session(remote, settings) as session:
        for attempt in range(1, settings.attempts_max + 1):
            try:
                async with _get(session, remote, {"Accept-Encoding": "identity"}) as response:
                    _refuse(response, remote)
                    body = b"".join([chunk async for chunk in _bounded(response, bytes_max, remote)])
                    link = response.links.get("next")
                    return body, None if link is None else str(link["url"])
            except (_Cut, aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                reason = _reason(error)
            await _pause(attempt, clock)
    raise SetupError(f"{remote.shown} did not answer in {settings.attempts_max} attempts ({reason}). Try again later.")


async def _bounded(response: aiohttp.ClientResponse, bytes_max: int, remote: Remote) -> AsyncIterator[bytes]:
    size = 0
    while chunk := await response.content.readany():
        size += len(chunk)
        if size > bytes_max:
            raise SetupError(f"{remote.shown} answers with more than {bytes_max} bytes. Check the model's `source`.")
        yield chunk


async def _pause(attempt: int, clock: Clock) -> None:
    await clock.sleep(clock.jitter(min(_BACKOFF_SECONDS_MIN * 2 ** max(0, attempt - 1), _BACKOFF_SECONDS_MAX)))


def discard(path: Path) -> None:
    """Delete a `.part` file and what is known of it."""
    path.unlink(missing_ok=True)
    note_path(path).unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Make what was written to a file or a folder last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_room(folder: Path, needed_bytes: int, settings: PullSettings) -> None:
    """Raise SetupError, with the figures, unless the disk takes `needed_bytes` and keeps its reserve."""
    free = shutil.disk_usage(folder).free
    if needed_bytes + settings.free_bytes_min > free:
        raise SetupError(
            f"There is not enough disk space in {folder}: {needed_bytes} bytes are needed and {settings.free_bytes_min} "
            f"must stay free, but only {free} are free. Make room, or choose another folder with FOREBAY_MODELS_DIR."
        )


@asynccontextmanager
async def _session(remote: Remote, settings: PullSettings) -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(
        total=None, connect=settings.timeout_seconds, sock_connect=settings.timeout_seconds,
        sock_read=settings.timeout_seconds,
    )  # fmt: skip
    # Proxies come from the environment, as for every download tool, but not on the way to this machine itself.
    proxies = sources.check_address(remote.url).scheme == "https"
    async with aiohttp.ClientSession(
        timeout=timeout, auto_decompress=False, trust_env=proxies, read_bufsize=_BUFFER_BYTES
    ) as session:
        yield session


async def _fetch(
    session: aiohttp.ClientSession, remote: Remote, part: _Part, settings: PullSettings, progress: Progress
) -> None:
    """One attempt at the rest of the file. Returns only when all of it is there."""
    async with _get(session, remote, _range_headers(part, remote)) as response:
        if response.status == 416:
            await part.start_over()
            raise _Cut("the server has less than was fetched before")
        _refuse(response, remote)
        total = await _agree(response, part)
        _check_size(total or 0, part, remote)
        room = remote.spare_bytes + (total or remote.size_bytes or part.done) - part.done
        check_room(part.path.parent, room, settings)
        progress(part.done, total)
        await _receive(response, remote, part, total, settings, progress)


def _range_headers(part: _Part, remote: Remote) -> dict[str, str]:
    """Ask for the rest only where a mix of two versions would be noticed: by the ETag or by the checksum."""
    headers = {"Accept-Encoding": "identity"}
    if part.done and part.etag:
        headers |= {"Range": f"bytes={part.done}-", "If-Range": part.etag}
    elif part.done and remote.sha256:
        headers |= {"Range": f"bytes={part.done}-"}
    return headers


@asynccontextmanager
async def _get(
    session: aiohttp.ClientSession, remote: Remote, headers: dict[str, str]
) -> AsyncIterator[aiohttp.ClientResponse]:
    """GET through a few redirects; each hop is checked, and the token goes to the first origin alone."""
    first = sources.check_address(remote.url)
    url = remote.url
    for _ in range(_REDIRECTS_MAX + 1):
        parts = sources.check_address(url)
        if first.scheme == "https" and parts.scheme != "https":
            raise SetupError(f"{remote.shown} leads to an address without TLS. Use another source.")
        own = (parts.scheme, parts.hostname, parts.port) == (first.scheme, first.hostname, first.port)
        secret = {"Authorization": f"Bearer {remote.token}"} if remote.token and own else {}
        async with session.get(url, headers=headers | secret, allow_redirects=False) as response:
            target = response.headers.get("Location")
            if response.status not in {301, 302, 303, 307, 308} or target is None:
                yield response
                return
            url = urljoin(url, target).partition("#")[0]
    raise SetupError(f"{remote.shown} leads through more than {_REDIRECTS_MAX} redirects. Check the source.")


def _refuse(response: aiohttp.ClientResponse, remote: Remote) -> None:
    """Turn a status that is no file into what to do about it."""
    status = response.status
    if status in {401, 403}:
        raise SetupError(
            f"{remote.shown} needs permission (status {status}). For a model hub set FOREBAY_PULL_HUB_TOKEN to a token "
            "of an account that may read it."
        )
    if status in {404, 410}:
        raise SetupError(f"There is no file at {remote.shown} (status {status}). Check the model's `source`.")
    if status in {408, 425, 429} or status >= 500:
        raise _Cut(f"status {status}")
    if status not in {200, 206}:
        raise SetupError(f"{remote.shown} answered with status {status}. Check the model's `source`.")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise SetupError(f"{remote.shown} is sent compressed, so its bytes cannot be checked. Use another source.")


async def _agree(response: aiohttp.ClientResponse, part: _Part) -> int | None:
    """Settle where the body begins and how long the whole file is; start over when it is not the rest of ours."""
    etag = response.headers.get("ETag")
    strong = etag if etag and not etag.startswith("W/") else None
    if response.status == 206:
        start, total = _content_range(response.headers.get("Content-Range", ""))
        if (
            start != part.done
            or (part.total is not None and total != part.total)
            or (part.etag and strong != part.etag)
        ):
            await part.start_over()
            raise _Cut("the server sent another range than was asked for")
    else:
        if part.done or not part.path.exists():
            await part.start_over()
        total = response.content_length
    await part.expect(strong, total)
    return total


def _content_range(value: str) -> tuple[int, int | None]:
    """`bytes 5-9/10` -> (5, 10)."""
    try:
        unit, _, rest = value.partition(" ")
        span, _, total = rest.partition("/")
        if unit != "bytes":
            raise ValueError(unit)
        return int(span.partition("-")[0]), None if total == "*" else int(total)
    except ValueError:
        raise _Cut("the server sent a range that cannot be read") from None


def _check_size(size: int, part: _Part, remote: Remote) -> None:
    """Refuse more than there may be; going on from such a part would never help."""
    if remote.bytes_max is not None and size > remote.bytes_max:
        discard(part.path)
        raise SetupError(
            f"{remote.shown} has more than the {remote.bytes_max} bytes that were told of it, so it was deleted. Pull it "
            "again; if that does not help, check the model's `source`."
        )


async def _receive(
    response: aiohttp.ClientResponse,
    remote: Remote,
    part: _Part,
    total: int | None,
    settings: PullSettings,
    progress: Progress,
) -> None:
    room_checked = part.done
    # Not `iter_chunked`: it raises the reader's buffer to twice the chunk, and a cut loses what is in it.
    while chunk := await response.content.readany():
        if total is not None and part.done + len(chunk) > total:
            raise _Cut("the server sent more than it announced")
        _check_size(part.done + len(chunk), part, remote)
        await part.write(chunk)
        progress(part.done, total)
        if part.done - room_checked > _ROOM_CHECK_BYTES:
            room_checked = part.done
            check_room(part.path.parent, 0, settings)
    if total is not None and part.done != total:
        raise _Cut(f"{part.done} of {total} bytes came")
    await part.expect(part.etag, part.done)


async def _check_sum(part: _Part, remote: Remote) -> None:
    found = part.digest.hexdigest()
    if remote.sha256 is not None and found != remote.sha256:
        await in_thread(discard, part.path)
        raise SetupError(
            f"{remote.shown} has the checksum {found} and not {remote.sha256}, so it was deleted. "
            "Pull it again; if that does not help, check the model's `source` and `sha256`."
        )


def _reason(error: BaseException) -> str:
    return "no bytes for too long" if isinstance(error, TimeoutError) else str(error) or type(error).__name__


def _read_note(note: Path) -> dict[str, Any]:
    """What is known of a part; nothing when the note is missing or damaged, and then the part is not trusted."""
    try:
        with note.open(encoding="utf-8") as file:
            found = json.loads(file.read(_NOTE_BYTES_MAX))
    except (OSError, ValueError):
        return {}
    sound = (
        isinstance(found, dict)
        and isinstance(found.get("etag"), str | None)
        and isinstance(found.get("total"), int | None)
    )
    return found if sound else {}


def _hash_from(path: Path, start: int, digest: Any) -> int:
    with path.open("rb") as file:
        file.seek(start)
        chunk = file.read(_HASH_BYTES)
    digest.update(chunk)
    return len(chunk)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _truncate(path: Path) -> None:
    path.open("wb").close()


def _append(path: Path, position: int, chunk: bytes, digest: Any) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(chunk)
    digest.update(chunk)
