"""What the bodies of requests to the `speakers` engine ask for.

It refuses what is too much, not finite, out of order or of the wrong shape, naming the field.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from forebay.engines.clustering import Floats, Windows, unit
from forebay.engines.connection import Refused
from forebay.engines.parted import flag, parted
from forebay.engines.turns import Count, Known, Region
from forebay.speech import SAMPLE_BYTES, SAMPLE_RATE

STRETCH_SECONDS_MAX = 660
SPEAKERS_MAX = 100
_HEADER_BYTES_MAX = 16 * 2**20
_WINDOWS_MAX = 500_000
_KNOWN_MAX = 32
_KNOWN_VECTORS_MAX = 4096
_NAME_CHARS_MAX = 200
_SECONDS_MAX = 1_000_000.0
_VALUE_MAX = 1000.0
_ROUNDING_SECONDS = 0.01
_NUMBER = np.dtype("<f2")

Times = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Sound in which voices are wanted; `last` where its recording ends with it."""

    pcm: npt.NDArray[np.int16]
    last: bool


@dataclass(frozen=True, slots=True)
class Order:
    """Vectors of a whole recording that are to become turns."""

    regions: list[Region]
    windows: Windows
    count: Count
    known: list[Known]


def read_stretch(body: bytes) -> Stretch:
    """The body of a request for voices. Raises Refused."""
    header, samples = parted(body, _HEADER_BYTES_MAX)
    last = flag(header, "last", otherwise=True)
    if not samples or len(samples) % SAMPLE_BYTES:
        raise Refused(400, "The samples have to be signed 16-bit numbers, and at least one.")
    if len(samples) > STRETCH_SECONDS_MAX * SAMPLE_RATE * SAMPLE_BYTES:
        raise Refused(413, f"A stretch may have {STRETCH_SECONDS_MAX} seconds.")
    return Stretch(np.frombuffer(samples, "<i2"), last)


def read_order(body: bytes, dimensions: int, most: int) -> Order:
    """The body of a request for speakers; `most` of them are told apart where it does not say. Raises Refused."""
    header, payload = parted(body, _HEADER_BYTES_MAX)
    if header.get("dimensions", dimensions) != dimensions:
        raise Refused(400, f"Vectors of this model have {dimensions} dimensions.", param="dimensions")
    spans = _spans(header, "windows")
    vectors = _vectors(payload, dimensions, "The vectors")
    if len(vectors) != len(spans):
        raise Refused(400, f"There are {len(spans)} windows and {len(vectors)} vectors.", param="windows")
    middles = spans.mean(axis=1)
    order = np.argsort(middles, kind="stable")
    length = float(np.median(spans[:, 1] - spans[:, 0])) if len(spans) else 0.0
    windows = Windows(middles[order], vectors[order], length)
    return Order(_regions(header), windows, _count(header, most), _known(header.get("known"), dimensions))


def _spans(header: Mapping[str, Any], name: str) -> Times:
    """Pairs of seconds, each with its end behind its beginning."""
    found = header.get(name)
    if not isinstance(found, list) or len(found) > _WINDOWS_MAX:
        raise Refused(400, f"`{name}` has to be a list of at most {_WINDOWS_MAX} pairs.", param=name)
    try:
        spans = np.array(found, dtype=np.float64).reshape(len(found), 2)
    except (ValueError, TypeError, OverflowError):
        raise Refused(400, f"`{name}` has to be a list of pairs of numbers.", param=name) from None
    if not (np.isfinite(spans).all() and (spans[:, 0] < spans[:, 1]).all() and (np.abs(spans) <= _SECONDS_MAX).all()):
        raise Refused(400, f"Every one of `{name}` has to begin before it ends.", param=name)
    return spans


def _regions(header: Mapping[str, Any]) -> list[Region]:
    """Where speech is. What overlaps by no more than rounding, where two stretches meet, is parted."""
    found: list[Region] = []
    for start, end in _spans(header, "regions").tolist():
        before = found[-1][1] if found else start
        if start < before - _ROUNDING_SECONDS:
            raise Refused(400, "`regions` have to be in order and must not overlap.", param="regions")
        if end > before:
            found.append((max(start, before), end))
    return found


def _vectors(data: bytes | memoryview, dimensions: int, what: str) -> Floats:
    if len(data) % (dimensions * _NUMBER.itemsize):
        raise Refused(400, f"{what} have to be 16-bit floats, {dimensions} in each.")
    found = np.frombuffer(data, _NUMBER).reshape(-1, dimensions).astype(np.float32)
    # A comparison with NaN is false as well.
    if found.size and not float(np.abs(found).max()) <= _VALUE_MAX:
        raise Refused(400, f"{what} have to be finite and small.")
    return unit(found)


def _count(header: Mapping[str, Any], most: int) -> Count:
    speakers, least, greatest = (_number(header, name) for name in ("speakers", "speakers_min", "speakers_max"))
    greatest = greatest or max(most, least or 1)
    if (least or 1) > greatest:
        raise Refused(400, "`speakers_min` is larger than `speakers_max`.", param="speakers_min")
    return Count(speakers, least or 1, greatest)


def _number(header: Mapping[str, Any], name: str) -> int | None:
    found = header.get(name)
    if found is None:
        return None
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= SPEAKERS_MAX:
        raise Refused(400, f"`{name}` has to be a number from 1 to {SPEAKERS_MAX}.", param=name)
    return found


def _known(found: Any, dimensions: int) -> list[Known]:
    if found is None:
        return []
    if not isinstance(found, list) or len(found) > _KNOWN_MAX:
        raise Refused(400, f"`known` has to be a list of at most {_KNOWN_MAX} speakers.", param="known")
    known = [_one_known(each, dimensions) for each in found]
    if len({each.name for each in known}) != len(known):
        raise Refused(400, "Two of `known` have the same name.", param="known")
    return known


def _one_known(found: Any, dimensions: int) -> Known:
    fields: Mapping[str, Any] = found if isinstance(found, dict) else {}
    name, text = fields.get("name"), fields.get("vectors")
    if not isinstance(name, str) or not 0 < len(name) <= _NAME_CHARS_MAX or not isinstance(text, str):
        raise Refused(400, "Every one of `known` needs a `name` and its `vectors` in base64.", param="known")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, "The vectors of a known speaker are not base64.", param="known") from None
    vectors = _vectors(data, dimensions, "The vectors of a known speaker")
    if not 0 < len(vectors) <= _KNOWN_VECTORS_MAX:
        raise Refused(400, f"A known speaker needs 1 to {_KNOWN_VECTORS_MAX} vectors.", param="known")
    return Known(name, vectors)
