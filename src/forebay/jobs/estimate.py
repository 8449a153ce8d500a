"""What can be said of a batch before its check: a first guess from the beginning of its input file, or a count of all.

It refuses to judge the file: that is the check's business, which reads every line.
"""

from dataclasses import dataclass

from forebay.blobs.blobs import Blobs
from forebay.clock import Clock, Slices
from forebay.config import BatchSettings
from forebay.dialects.openai.batches import parse_line
from forebay.errors import InvalidRequest, NotFound
from forebay.jobs.lines import raw_lines
from forebay.store.files import File

_SAMPLE_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Guess:
    """What a file seems to hold."""

    model: str
    lines: int


async def guess(blobs: Blobs, file: File, endpoint: str) -> Guess | None:
    """What the first lines say of all; None if they say nothing."""
    try:
        sample = await blobs.read(file.blob_key, 0, _SAMPLE_BYTES)
        whole = sample[: sample.rindex(b"\n") + 1] if b"\n" in sample else sample
        first = parse_line(whole.partition(b"\n")[0], endpoint)
    except (NotFound, InvalidRequest):
        return None
    lines = max(1, whole.count(b"\n"))
    return Guess(first.model, max(1, round(file.bytes * lines / len(whole))))


async def count_lines(blobs: Blobs, file: File, settings: BatchSettings, clock: Clock) -> int:
    """How many lines a file has, blank ones left out; no further than the check would read. Raises NotFound."""
    count, slices = 0, Slices(clock)
    async for line in raw_lines(blobs.stream(file.blob_key), settings.line_bytes_max):
        count += line.data is None or bool(line.data.strip())
        if count > settings.lines_max:
            break
        await slices.pause()
    return count
