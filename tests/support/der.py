"""The diarization error rate, computed apart from everything under test: missed, invented and confused speech.

Speakers are mapped one to one so that the error is least, by trying every mapping.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from pathlib import Path

Turn = tuple[float, float, str]


@dataclass(frozen=True)
class Errors:
    """Seconds of speech that were missed, invented and given to somebody else, and of speech in all."""

    missed: float
    invented: float
    confused: float
    total: float

    @property
    def rate(self) -> float:
        return (self.missed + self.invented + self.confused) / self.total


def der(reference: Sequence[Turn], found: Sequence[Turn], collar: float = 0.0) -> Errors:
    """How wrong `found` is; nothing counts within `collar` seconds of a boundary of the reference."""
    pieces = list(_pieces(reference, found, collar))
    theirs = sorted({speaker for _, _, speaker in reference})
    ours = sorted({speaker for _, _, speaker in found})
    ours += [""] * (len(theirs) - len(ours))  # nobody
    together = {
        (a, b): sum(length for length, said, heard in pieces if a in said and b in heard) for a in theirs for b in ours
    }
    correct = max(
        sum(together[pair] for pair in zip(theirs, each, strict=True)) for each in permutations(ours, len(theirs))
    )
    missed = sum(length * max(0, len(said) - len(heard)) for length, said, heard in pieces)
    invented = sum(length * max(0, len(heard) - len(said)) for length, said, heard in pieces)
    both = sum(length * min(len(said), len(heard)) for length, said, heard in pieces)
    return Errors(missed, invented, both - correct, sum(length * len(said) for length, said, _ in pieces))


def read_rttm(path: Path) -> list[Turn]:
    """The turns of a file in the format RTTM."""
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return [(float(row[3]), float(row[3]) + float(row[4]), row[7]) for row in rows if row and row[0] == "SPEAKER"]


def _pieces(
    reference: Sequence[Turn], found: Sequence[Turn], collar: float
) -> Iterable[tuple[float, frozenset[str], frozenset[str]]]:
    """Stretches in which nobody begins or ends: how long, who speaks, and who was found to."""
    edges = {edge for start, end, _ in reference for edge in (start, end)}
    around = [(edge - collar, edge + collar) for edge in edges] if collar else []
    times = {edge for start, end, _ in (*reference, *found) for edge in (start, end)}
    times |= {edge for pair in around for edge in pair}
    for start, end in pairwise(sorted(times)):
        middle = (start + end) / 2
        if not any(low < middle < high for low, high in around):
            said, heard = (
                frozenset(who for low, high, who in turns if low < middle < high) for turns in (reference, found)
            )
            yield end - start, said, heard
