"""A first guess at a batch, from the beginning of its input file: how many lines it has, and of which model.

It refuses to judge the file: that is the check's business, which reads all of it.
"""

from dataclasses import dataclass

from forebay.blobs.blobs import Blobs
from forebay.dialects.openai.batches import parse_line
from forebay.errors import InvalidRequest, NotFound
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
