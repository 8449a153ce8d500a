"""Pulls a model that is a folder of many files: from a repository of a model hub to a folder under its final name.

It refuses to give the folder its name before every file in it is whole and checked; whoever calls holds the lock.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from forebay.clock import Clock
from forebay.config import PullSettings
from forebay.errors import SetupError
from forebay.replicas.download import (
    Progress,
    Remote,
    check_room,
    discard,
    download,
    fetch_page,
    flush,
    hub_of,
    in_thread,
)
from forebay.replicas.repository import (
    INDEX,
    INDEX_BYTES_MAX,
    MANIFEST,
    Entry,
    Wanted,
    choose,
    manifest,
    parts_of,
    read_page,
)
from forebay.replicas.sources import HubSource

_PAGES_MAX = 100
_PAGE_BYTES_MAX = 16 * 2**20
_ENTRIES_MAX = 20_000


@dataclass(frozen=True, slots=True)
class FolderOrder:
    """All that the pull of a folder needs to know."""

    source: HubSource
    wanted: Wanted
    target: Path
    settings: PullSettings
    clock: Clock
    progress: Progress

    @property
    def part(self) -> Path:
        """Where the files lie until all of them are there."""
        return part_path(self.target)


def part_path(target: Path) -> Path:
    """Where the files of a folder lie until all of them are there."""
    return target.with_name(target.name + ".part")


async def bring_folder(order: FolderOrder) -> None:
    """1. List the repository. 2. Read which parts the model has. 3. Fetch their files, but for those that an earlier
    attempt has left. 4. Give the folder its name. Raises SetupError. Cancelled, it leaves what the next call takes up.
    """
    found = await _entries(order.source, order.settings, order.clock)
    index = next((entry for entry in found if entry.path == INDEX), None)
    if index is None or index.size_bytes > INDEX_BYTES_MAX:
        raise SetupError(
            f"The repository {order.source.repository} has no {INDEX}, so it is no folder of diffusers. Check the "
            "model's `source`."
        )
    order.part.mkdir(parents=True, exist_ok=True)
    known = {entry.path: entry for entry in await in_thread(manifest, order.part) or ()}
    left = {entry.path for entry in found if known.get(entry.path) == entry}
    if INDEX not in left:
        (order.part / INDEX).unlink(missing_ok=True)
    await _bring_file(order, index, 0, index.size_bytes)
    parts = parts_of(await in_thread((order.part / INDEX).read_bytes), order.source.repository)
    chosen = choose(found, parts, order.wanted, order.settings.folder_bytes_max)
    await in_thread(_clear, order.part, {entry.path for entry in chosen if entry.path in left} | {INDEX, MANIFEST})
    await in_thread(_write_manifest, order.part, chosen)
    await _bring_files(order, chosen)
    await in_thread(flush, order.part)
    if order.target.is_dir():  # something of that name, but not a whole model
        await in_thread(shutil.rmtree, order.target)
    order.part.replace(order.target)
    await in_thread(flush, order.target.parent)


async def _bring_files(order: FolderOrder, chosen: Sequence[Entry]) -> None:
    total = sum(entry.size_bytes for entry in chosen)
    here = sum(path.stat().st_size for path in order.part.rglob("*") if path.is_file())
    check_room(order.part, max(0, total - here), order.settings)
    before = 0
    for entry in chosen:
        await _bring_file(order, entry, before, total)
        before += entry.size_bytes


async def _bring_file(order: FolderOrder, entry: Entry, before: int, total: int) -> None:
    """Fetch one file, unless it is there."""
    path = order.part / entry.path
    if path.is_file() and path.stat().st_size == entry.size_bytes:
        order.progress(before + entry.size_bytes, total)
        return
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(path.name + ".part")
    hub, token = hub_of(order.settings)
    remote = Remote(
        url=f"{hub}/{order.source.repository}/resolve/{order.source.revision}/{quote(entry.path)}",
        sha256=entry.sha256,
        token=token,
        size_bytes=entry.size_bytes,
        bytes_max=entry.size_bytes,
    )
    await download(remote, part, order.settings, order.clock, lambda done, _: order.progress(before + done, total))
    if (size := part.stat().st_size) != entry.size_bytes:
        discard(part)
        raise SetupError(
            f"The file {entry.path} has {size} bytes and not the {entry.size_bytes} that its hub tells, so it was "
            "deleted. Pull the model again."
        )
    part.replace(path)
    discard(part)


def _write_manifest(folder: Path, chosen: Sequence[Entry]) -> None:
    path = folder / MANIFEST
    fresh = path.with_name(MANIFEST + ".new")
    fresh.write_text(json.dumps([asdict(entry) for entry in chosen]), encoding="utf-8")
    flush(fresh)
    fresh.replace(path)


def _clear(folder: Path, keep: set[str]) -> None:
    """Drop what an earlier attempt has left of files that are others now, or are not wanted any more."""
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif name.removesuffix(".json").removesuffix(".part") not in keep and name not in keep:
            path.unlink()


def remove_folder(target: Path) -> bool:
    """Delete a pulled folder and what is left of its pulls; whether there was one."""
    was_there = target.is_dir()
    for folder in (target, part_path(target)):
        if folder.is_dir():
            shutil.rmtree(folder)
    return was_there


async def _entries(source: HubSource, settings: PullSettings, clock: Clock) -> list[Entry]:
    """Every file of the repository. Raises SetupError."""
    hub, token = hub_of(settings)
    url: str | None = f"{hub}/api/models/{source.repository}/tree/{source.revision}?recursive=true"
    found: list[Entry] = []
    for _ in range(_PAGES_MAX):
        if url is None:
            return found
        body, link = await fetch_page(Remote(url, token=token), _PAGE_BYTES_MAX, settings, clock)
        found += read_page(body, source.repository)
        if len(found) > _ENTRIES_MAX:
            break
        url = None if link is None else _same_hub(urljoin(url, link), hub)
    raise SetupError(
        f"The repository {source.repository} has too many files to be a model. Check the model's `source`."
    )


def _same_hub(url: str, hub: str) -> str:
    """The next page, which has to be of the same hub: it gets the token."""
    if urlsplit(url)[:2] != urlsplit(hub)[:2]:
        raise SetupError("The list of files of the repository goes on at another host. Check FOREBAY_PULL_HUB_URL.")
    return url
