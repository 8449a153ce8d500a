"""Tells voices apart: from vectors of overlapping windows to whose they are, and how many voices there are.

It refuses to grow with the recording: what costs more than a pass is done on at most `_MINIS_MAX` averages. It knows no
sound and no names. `check` is called several times a second, and may raise to end the work.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.intp]
Check = Callable[[], None]

_MINIS_MAX = 500
_MINI_ROUNDS = 3
_ROWS_AT_ONCE = 4096
_WINDOWS_MIN = 6  # fewer are of one voice
_NEIGHBOURS = 0.15  # of all windows, those that one is joined to
_SEEDS = 8
_ROUNDS_MAX = 30
_SMALL = 1e-12

# How many voices: what lasts from one window to the next that shares no sound with it is the voice; what was said does
# not last. Measured with GE2E on one voice: lasting 0.010 to 0.025, persistence below 0.13, spread 0.03 to 0.069; on two
# voices on the telephone: lasting from 0.025, persistence from 0.23.
_STEP_SECONDS = 0.4
_HOLE_SECONDS = 1.0  # windows that are further apart are not of one stretch of speech
_LASTING_SURE = 0.03
_LASTING = 0.0195
_LASTING_FURTHER = 0.01
_NOISE_TIMES = 1.85
_PERSISTENCE = 0.15
_SPREAD_SURE = 0.072


@dataclass(frozen=True, slots=True)
class Windows:
    """What was heard: vectors of length 1, and the middles of the times that they are of, in order, in seconds."""

    middles: npt.NDArray[np.float64]
    vectors: Floats
    seconds: float
    """How long a window is."""


def voices_in(windows: Windows, check: Check) -> int:
    """How many voices there are, as far as that can be told."""
    if len(windows.vectors) < _WINDOWS_MIN:
        return 1
    spread, lasting, persistence = _statistics(windows, check)
    apart = lasting[0] >= _LASTING_SURE or (lasting[0] >= _LASTING and persistence >= _PERSISTENCE)
    if not apart and spread < _SPREAD_SURE:
        return 1
    noise = max(_LASTING_FURTHER, _NOISE_TIMES * -float(lasting[-1]))  # by chance it is below 0 as often as above
    return 2 + int((lasting[1:] >= noise).sum())


def _statistics(windows: Windows, check: Check) -> tuple[float, npt.NDArray[np.float64], float]:
    """The most that vectors spread in a direction; what lasts of it, by direction, the most first; which share lasts."""
    mean = windows.vectors.mean(axis=0)
    lag = max(1, round(windows.seconds / _STEP_SECONDS))
    times = np.arange(windows.middles[0], windows.middles[-1] + _STEP_SECONDS / 2, _STEP_SECONDS)
    width = windows.vectors.shape[1]
    here, later = np.zeros((width, width)), np.zeros((width, width))
    count = pairs = 0
    for first in range(0, len(times), _ROWS_AT_ONCE):
        check()
        rows, known = _at(times[first : first + _ROWS_AT_ONCE + lag], windows)
        rows = (rows - mean) * known[:, None]
        own = slice(0, _ROWS_AT_ONCE)
        here += rows[own].T @ rows[own]
        count += int(known[own].sum())
        later += rows[:-lag].T @ rows[lag:]
        pairs += int((known[:-lag] & known[lag:]).sum())
    here /= max(1, count)
    later = (later + later.T) / (2 * max(1, pairs))
    sizes, directions = np.linalg.eigh(here)
    main = directions[:, -1]
    persistence = float(main @ later @ main) / max(float(sizes[-1]), _SMALL)
    lasting = np.linalg.eigvalsh(later)[::-1].astype(np.float64)
    return float(sizes[-1]), lasting, persistence


def _at(times: npt.NDArray[np.float64], windows: Windows) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """The vectors at `times`, between those of the windows around, and where there are windows around."""
    middles = windows.middles
    after = np.clip(np.searchsorted(middles, times), 1, len(middles) - 1)
    wide = middles[after] - middles[after - 1]
    share = np.clip((times - middles[after - 1]) / np.maximum(wide, _SMALL), 0.0, 1.0).astype(np.float32)[:, None]
    rows = windows.vectors[after - 1] * (1 - share) + windows.vectors[after] * share
    return rows, wide < _HOLE_SECONDS


def told_apart(vectors: Floats, count: int, check: Check) -> Labels:
    """Which of `count` voices each vector is of, by spectral clustering."""
    count = min(count, len(vectors))
    if count <= 1:
        return np.zeros(len(vectors), dtype=np.intp)
    minis = _minis(vectors, check) if len(vectors) > _MINIS_MAX else vectors
    check()
    labels = _spectral(minis, count, check)
    centres = centres_of(minis, labels, count)
    found = nearest(vectors, centres, check)
    for _ in range(_ROUNDS_MAX):
        centres = centres_of(vectors, found, count)
        new = nearest(vectors, centres, check)
        if np.array_equal(new, found):
            break
        found = new
    return found


def centres_of(vectors: Floats, labels: Labels, count: int) -> Floats:
    """The mean vector of each voice at length 1; zeros for a voice that nothing is of."""
    sums = np.zeros((count, vectors.shape[1]), dtype=np.float32)
    order = np.argsort(labels, kind="stable")
    used, begins = np.unique(labels[order], return_index=True)
    if len(used):
        sums[used] = np.add.reduceat(vectors[order], begins, axis=0)
    return unit(sums)


def unit(vectors: Floats) -> Floats:
    """At length 1; zeros stay."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), _SMALL), dtype=np.float32)


def nearest(vectors: Floats, centres: Floats, check: Check) -> Labels:
    """Which centre each vector is most like."""
    found = np.empty(len(vectors), dtype=np.intp)
    for first in range(0, len(vectors), _ROWS_AT_ONCE):
        check()
        part = slice(first, first + _ROWS_AT_ONCE)
        found[part] = np.argmax(vectors[part] @ centres.T, axis=1)
    return found


def _minis(vectors: Floats, check: Check) -> Floats:
    """Averages of vectors that are alike, taken from all over the recording."""
    places = np.linspace(0, len(vectors) - 1, _MINIS_MAX).astype(np.intp)
    centres = vectors[places]
    for _ in range(_MINI_ROUNDS):
        labels = nearest(vectors, centres, check)
        used = np.unique(labels)
        centres = centres_of(vectors, labels, len(centres))[used]
    return centres


def _spectral(vectors: Floats, count: int, check: Check) -> Labels:
    """Cluster by the eigenvectors of a graph that joins each vector to those that are most like it."""
    likeness = vectors @ vectors.T
    kept = min(len(vectors), max(_WINDOWS_MIN, int(len(vectors) * _NEIGHBOURS)))
    least = np.partition(likeness, -kept, axis=1)[:, -kept, None]
    joined = np.where(likeness >= least, np.maximum(likeness, 0.0), 0.0).astype(np.float64)
    joined = (joined + joined.T) / 2
    check()
    scale = 1.0 / np.sqrt(np.maximum(joined.sum(axis=1), _SMALL))
    _, directions = np.linalg.eigh(joined * scale[:, None] * scale)
    check()
    rows = unit(directions[:, -count:].astype(np.float32))
    tries = [_k_means(rows, count, seed, check) for seed in range(_SEEDS)]
    return min(tries, key=lambda each: each[0])[1]


def _k_means(rows: Floats, count: int, seed: int, check: Check) -> tuple[float, Labels]:
    """The squared distances that are left, and the labels, beginning with rows that are far from each other."""
    chosen = [int(np.random.default_rng(seed).integers(len(rows)))]
    distances = _distances(rows, rows[chosen])[:, 0]
    for _ in range(count - 1):
        chosen.append(int(np.argmax(distances)))
        distances = np.minimum(distances, _distances(rows, rows[chosen[-1:]])[:, 0])
    centres = rows[chosen]
    labels = np.argmin(_distances(rows, centres), axis=1)
    for _ in range(_ROUNDS_MAX):
        check()
        for label in np.unique(labels):
            centres[label] = rows[labels == label].mean(axis=0)
        new = np.argmin(_distances(rows, centres), axis=1)
        if np.array_equal(new, labels):
            break
        labels = new
    return float(_distances(rows, centres).min(axis=1).sum()), labels


def _distances(rows: Floats, centres: Floats) -> Floats:
    squares = np.square(rows).sum(axis=1)[:, None] + np.square(centres).sum(axis=1)
    return np.asarray(np.maximum(squares - 2 * rows @ centres.T, 0.0), dtype=np.float32)
