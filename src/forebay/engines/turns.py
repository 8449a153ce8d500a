"""Who spoke when: turns from the vectors of windows, and names for those whose voices are known.

It refuses to change where speech is: every region ends up in turns, and nothing else does. Unknown speakers are A, B, C and
so on, in the order in which they first speak.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from forebay.engines.clustering import Check, Floats, Labels, Windows, centres_of, told_apart, unit, voices_in
from forebay.speech import Turn

_FRAME_SECONDS = 0.05
_TURN_SECONDS_MIN = 0.25
_KNOWN_LIKENESS = 0.87  # the same voice elsewhere in a call has 0.9 or more; another one on the same line up to 0.88

Region = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Known:
    """Somebody whose voice is known, by the vectors of windows in which nobody else speaks."""

    name: str
    vectors: Floats


@dataclass(frozen=True, slots=True)
class Count:
    """How many speakers there are, if that is known, or how few and many there can be."""

    speakers: int | None
    least: int
    most: int


def turns(
    regions: Sequence[Region], windows: Windows, wanted: Count, known: Sequence[Known], check: Check
) -> list[Turn]:
    """Who spoke when, in order of time."""
    if not regions or not len(windows.vectors):
        return []
    count = wanted.speakers or min(max(voices_in(windows, check), wanted.least), wanted.most)
    labels = told_apart(windows.vectors, count, check)
    count = int(labels.max()) + 1
    centres = centres_of(windows.vectors, labels, count)
    check()
    pieces = list(_pieces(regions, windows, windows.vectors @ centres.T, check))
    names = _names([label for _, _, label in pieces], centres, known)
    return [Turn(round(start, 3), round(end, 3), names[label]) for start, end, label in pieces]


def _pieces(
    regions: Sequence[Region], windows: Windows, scores: Floats, check: Check
) -> Iterator[tuple[float, float, int]]:
    """Each region in parts in which one voice is the most likely; parts of one voice that touch are one."""
    open_piece: tuple[float, float, int] | None = None
    for piece in _parts(regions, windows, scores, check):
        if open_piece is not None and (open_piece[1], open_piece[2]) == (piece[0], piece[2]):
            open_piece = (open_piece[0], *piece[1:])
            continue
        if open_piece is not None:
            yield open_piece
        open_piece = piece
    if open_piece is not None:
        yield open_piece


def _parts(
    regions: Sequence[Region], windows: Windows, scores: Floats, check: Check
) -> Iterator[tuple[float, float, int]]:
    for start, end in regions:
        check()
        count = max(1, round((end - start) / _FRAME_SECONDS))
        edges = np.linspace(start, end, count + 1)
        low = max(0, int(np.searchsorted(windows.middles, start)) - 1)
        high = max(low + 1, int(np.searchsorted(windows.middles, end)) + 1)
        at = (edges[1:] + edges[:-1]) / 2
        around = windows.middles[low:high]
        likely = np.stack([np.interp(at, around, each) for each in scores[low:high].T])
        labels = _without_short(np.argmax(likely, axis=0), likely)
        begins = [0, *(np.flatnonzero(np.diff(labels)) + 1), count]
        yield from ((float(edges[a]), float(edges[b]), int(labels[a])) for a, b in pairwise(begins))


def _without_short(labels: Labels, likely: npt.NDArray[np.float64]) -> Labels:
    """`labels` with those turns that are too short given to the likelier voice beside them, the shortest first."""
    least = round(_TURN_SECONDS_MIN / _FRAME_SECONDS)
    labels = labels.copy()
    while True:
        begins = np.concatenate([[0], np.flatnonzero(np.diff(labels)) + 1, [len(labels)]])
        lengths = np.diff(begins)
        place = int(np.argmin(lengths))
        if len(lengths) == 1 or lengths[place] >= least:
            return labels
        part = slice(int(begins[place]), int(begins[place + 1]))
        beside = {int(labels[each]) for each in (part.start - 1, part.stop) if 0 <= each < len(labels)}
        labels[part] = max(sorted(beside), key=lambda label: float(likely[label, part].sum()))


def _names(spoken: Sequence[int], centres: Floats, known: Sequence[Known]) -> dict[int, str]:
    """A name for each voice: its own where it is known, else the next letter."""
    order = list(dict.fromkeys(spoken))
    found = _matched(order, centres, known)
    taken = {each.name for each in known}
    letters = (name for name in _letters() if name not in taken)
    return {label: found.get(label) or next(letters) for label in order}


def _matched(labels: Sequence[int], centres: Floats, known: Sequence[Known]) -> dict[int, str]:
    """Voices and known speakers one to one, the most alike first."""
    if not known:
        return {}
    references = np.stack([unit(each.vectors.mean(axis=0)) for each in known])
    likeness = centres[labels] @ references.T
    found: dict[int, str] = {}
    for flat in np.argsort(-likeness, axis=None):
        row, column = divmod(int(flat), len(known))
        if likeness[row, column] < _KNOWN_LIKENESS:
            break
        if labels[row] not in found and known[column].name not in found.values():
            found[labels[row]] = known[column].name
    return found


def _letters() -> Iterator[str]:
    """A to Z, then AA, AB and so on."""
    number = 0
    while True:
        number += 1
        name, rest = "", number
        while rest:
            rest, digit = divmod(rest - 1, 26)
            name = chr(ord("A") + digit) + name
        yield name
