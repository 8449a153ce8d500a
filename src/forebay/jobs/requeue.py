"""Taking up dead letters again: the lines that were given up, as the input file of a new batch.

It refuses to hold more than one line in memory, and to keep a file that no batch was made for.
"""

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

from forebay.blobs.blobs import Blobs
from forebay.errors import NotFound, StoreUnavailable
from forebay.store.dead_letters import DeadLetter
from forebay.store.files import File, FileStore

_FILENAME = "requeued.jsonl"


@dataclass(slots=True)
class Bundle:
    """Lines of one endpoint in a file that nobody sees yet. `letters` are those whose lines are in it."""

    endpoint: str
    file: File
    size: int = 0
    sha256: str = ""
    letters: list[DeadLetter] = field(default_factory=list)

    @property
    def source(self) -> str:
        """Where its lines come from, for the metadata of the batch: the batches, as far as there is room."""
        names = dict.fromkeys(letter.job_id for letter in self.letters)
        return ",".join(list(names)[:13])  # 13 ids fit into the 512 characters of a value


class Requeue:
    """Reads the lines of dead letters and writes them anew."""

    def __init__(self, files: FileStore, blobs: Blobs, bytes_max: int) -> None:
        self._files = files
        self._blobs = blobs
        self._bytes_max = bytes_max

    async def line_of(self, letter: DeadLetter) -> bytes | None:
        """The line that was given up, without its end; None if there was none, or its file is gone."""
        return await self._read(letter, await self._source(letter))

    async def _source(self, letter: DeadLetter) -> File | None:
        if letter.source_file_id is None:
            return None
        try:
            return await self._files.get(letter.project_id, letter.source_file_id)
        except NotFound:
            return None

    async def _read(self, letter: DeadLetter, source: File | None) -> bytes | None:
        if source is None or letter.source_offset is None or letter.source_bytes is None:
            return None
        try:
            data = await self._blobs.read(source.blob_key, letter.source_offset, letter.source_bytes)
        except NotFound:  # removed in this moment
            return None
        return data.strip()

    @asynccontextmanager
    async def bundles(
        self, letters: Sequence[DeadLetter], edited: Mapping[str, bytes] | None = None
    ) -> AsyncIterator[list[Bundle]]:
        """The lines of `letters` in one file for each endpoint; those in `edited`, by id, as they are there.

        A line whose input is gone is left out, and so is one too many for a batch or with the `custom_id` of another.
        Files that are not finished inside the block are removed after it.
        """
        by_endpoint: dict[str, list[DeadLetter]] = {}
        for letter in letters:
            if letter.endpoint is not None:
                by_endpoint.setdefault(letter.endpoint, []).append(letter)
        async with AsyncExitStack() as stack:
            made = []
            for endpoint, chosen in by_endpoint.items():
                bundle = Bundle(endpoint, await self._files.begin(chosen[0].project_id, _FILENAME, "batch"))
                stack.push_async_callback(self._discard, bundle.file)
                await self._write(bundle, chosen, edited or {})
                if bundle.letters:
                    made.append(bundle)
            yield made

    async def _write(self, bundle: Bundle, letters: Sequence[DeadLetter], edited: Mapping[str, bytes]) -> None:
        seen: set[str | None] = set()
        sources: dict[str | None, File | None] = {}
        digest = hashlib.sha256()
        async with self._blobs.write(bundle.file.blob_key) as writer:
            for letter in letters:
                if letter.source_file_id not in sources:
                    sources[letter.source_file_id] = await self._source(letter)
                line = edited.get(letter.id) or await self._read(letter, sources[letter.source_file_id])
                if not line or letter.custom_id in seen or bundle.size + len(line) >= self._bytes_max:
                    continue
                seen.add(letter.custom_id)
                bundle.letters.append(letter)
                bundle.size += len(line) + 1
                digest.update(line + b"\n")
                await writer.write(line + b"\n")
        bundle.sha256 = digest.hexdigest()

    async def _discard(self, file: File) -> None:
        with suppress(StoreUnavailable):  # what cannot be removed now, a sweep removes
            await self._files.discard(self._blobs, file)
