"""Recordings that tests make up, and forms that they are sent in."""

import io
import json
import wave
from array import array
from base64 import b64encode
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

RATE = 16_000
LOUD, QUIET, SILENT = 12_000, 2_000, 0


def wav(seconds: float, *levels: int) -> bytes:
    """A recording of hums, in which each of `levels` has an equal share of the time."""
    levels = levels or (LOUD,)
    borders = [round(seconds * RATE * place / len(levels)) for place in range(len(levels) + 1)]
    shares = [end - begin for begin, end in pairwise(borders)]
    hums = (hum(shares[place], level, period=20 + place) for place, level in enumerate(levels))
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE)
        sound.writeframes(array("h", chain.from_iterable(hums)).tobytes())
    return file.getvalue()


def hum(count: int, level: int, period: int = 20) -> Sequence[int]:
    """Samples that go up and down."""
    wave_of_one = [level * (2 * place - period) // period for place in range(period)]
    return (wave_of_one * (count // period + 1))[:count]


def data_url(content: bytes, kind: str = "audio/wav") -> str:
    """`content` as a `data:` URL."""
    return f"data:{kind};base64,{b64encode(content).decode()}"


def form_of(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The fields of a form for `body`, as the official client writes them."""
    found = []
    for name, value in body.items():
        if isinstance(value, Mapping):
            found += [(f"{name}[{inner}]", _text(each)) for inner, each in value.items()]
        elif isinstance(value, Sequence) and not isinstance(value, str) and name != "segments":
            found += [(f"{name}[]", _text(each)) for each in value]
        else:
            found.append((name, _text(value)))
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
