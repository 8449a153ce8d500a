"""The check of a batch's input file, as a stream, and the plan of its chunks.

It refuses the whole file for what would leave a line without an answer of its own; a body that is wrong in another way is
that line's business. It keeps a few bytes of each line, never the line.
"""

import hashlib
from array import array
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from forebay.clock import Clock, Slices
from forebay.config import BatchSettings
from forebay.dialects.openai.batches import InputLine, parse_line, prefix_of
from forebay.errors import InvalidRequest
from forebay.jobs.lines import NO_GROUP, Place, RawLine, raw_lines

ERRORS_MAX = 100
_MARK = b"\xef\xbb\xbf"
_ID_BYTES = 16
_NO_PREFIX = 0


@dataclass(slots=True)
class Index:
    """What is kept of a checked file, a few bytes for each line. Lines are counted from 0 here."""

    models: list[str] = field(default_factory=list)
    offsets: "array[int]" = field(default_factory=lambda: array("Q"))
    lengths: "array[int]" = field(default_factory=lambda: array("I"))
    model_of: "array[int]" = field(default_factory=lambda: array("H"))
    prefix_of: "array[int]" = field(default_factory=lambda: array("Q"))
    errors: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.offsets)


class Check:
    """One pass over one file."""

    def __init__(self, endpoint: str, models: Collection[str], settings: BatchSettings, clock: Clock) -> None:
        self._endpoint = endpoint
        self._known = models
        self._settings = settings
        self._slices = Slices(clock)
        self._ids: set[bytes] = set()
        self._model_numbers: dict[str, int] = {}
        self._index = Index()
        self._blank = 0  # the first of the blank lines that were just seen

    async def run(self, pieces: AsyncIterator[bytes]) -> Index:
        """Check every line until the end, or until there are too many mistakes."""
        number = 0
        async for line in raw_lines(pieces, self._settings.line_bytes_max):
            number += 1
            await self._slices.pause()
            if number > self._settings.lines_max:
                self._note(None, _too_many(self._settings.lines_max))
                break
            try:
                self._take(number, line)
            except InvalidRequest as error:
                self._note(number, error)
            if len(self._index.errors) >= ERRORS_MAX:
                break
        if not len(self._index) and not self._index.errors:
            self._note(None, InvalidRequest("The file has no lines.", code="empty_file"))
        return self._index

    def _take(self, number: int, line: RawLine) -> None:
        offset, data = line.offset, line.data
        if data is None:
            most = self._settings.line_bytes_max
            raise InvalidRequest(f"The line has more than {most} bytes.", code="line_too_long")
        if number == 1 and data.startswith(_MARK):
            offset, data = offset + len(_MARK), data[len(_MARK) :]
        if not data.strip():
            self._blank = self._blank or number
            return
        if self._blank:  # blank lines at the end are fine
            self._note(self._blank, InvalidRequest("The line is blank.", code="invalid_json_line"))
            self._blank = 0
        parsed = parse_line(data, self._endpoint)
        self._check_id(parsed)
        self._add(number, parsed, offset, len(data))

    def _check_id(self, line: InputLine) -> None:
        digest = hashlib.blake2b(line.custom_id.encode(), digest_size=_ID_BYTES).digest()
        if digest in self._ids:
            raise InvalidRequest("Another line has this `custom_id`.", param="custom_id", code="duplicate_custom_id")
        self._ids.add(digest)

    def _add(self, number: int, line: InputLine, offset: int, length: int) -> None:
        if line.model not in self._known:
            raise InvalidRequest(
                "There is no such model. GET /v1/models lists the ones there are.",
                param="body.model",
                code="model_not_found",
            )
        index = self._index
        if line.model not in self._model_numbers:
            self._model_numbers[line.model] = len(index.models)
            index.models.append(line.model)
        assert number == len(index) + 1 or index.errors, "a line that is not in the index is a mistake"
        index.offsets.append(offset)
        index.lengths.append(length)
        index.model_of.append(self._model_numbers[line.model])
        index.prefix_of.append(_fingerprint(prefix_of(line)))

    def _note(self, number: int | None, error: InvalidRequest) -> None:
        entry = {"code": error.code, "message": str(error), "param": error.param, "line": number}
        self._index.errors.append(entry)


def _too_many(most: int) -> InvalidRequest:
    return InvalidRequest(f"The file has more than {most} lines.", code="too_many_lines")


def _fingerprint(prefix: bytes) -> int:
    if not prefix:
        return _NO_PREFIX
    return int.from_bytes(hashlib.blake2b(prefix, digest_size=8).digest(), "little") | 1


def plan_chunks(index: Index, chunk_lines: int) -> Iterator[tuple[str, list[Place]]]:
    """The chunks of a file without mistakes: lines by model, and within a model by prefix, otherwise as they come."""
    for number, model in enumerate(index.models):
        order = _run_order(index, number)
        for start in range(0, len(order), chunk_lines):
            yield model, order[start : start + chunk_lines]


def _run_order(index: Index, model: int) -> list[Place]:
    families: dict[int, list[int]] = {}
    for line in range(len(index)):
        if index.model_of[line] == model:
            # A line of its own kind is a family of one, and keeps its place.
            families.setdefault(index.prefix_of[line] or -line - 1, []).append(line)
    order: list[Place] = []
    for group, lines in enumerate(families.values(), NO_GROUP + 1):
        shared = group if len(lines) > 1 else NO_GROUP
        order += [Place(line + 1, index.offsets[line], index.lengths[line], shared) for line in lines]
    return order
