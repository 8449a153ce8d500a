"""What the fake engine makes of recordings: words, voices, turns and word times that nothing but the samples decides.

Every two seconds that are not silent are a segment of four words, wherever a stretch begins, as long as it begins between two
segments. Loud windows are one voice and quiet ones another. It refuses what a real engine would: no samples, half a sample.

`options.initial_prompt` may hold a directive of `fake_answers`, in which a segment counts as a token, and `echo=1` gives its
words back; so may the texts to align and the names of known speakers.
"""

import json
import struct
import zlib
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from forebay.engines.fake_answers import DIRECTIVE, Directive, Refused, read_directive

_RATE = 16_000
_SEGMENT_SECONDS = 2
_WORDS = 4
_SEGMENT = _RATE * _SEGMENT_SECONDS
_SILENCE = 64  # between the lowest and the highest sample of what counts as silent
_LOUD = 16_384
_WINDOW_SECONDS, _STEP_SECONDS = 1.6, 0.8
_DIMENSIONS = 8
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"

PATHS = {
    "/v1/audio/transcriptions": {"transcription", "translation"},
    "/v1/audio/alignments": {"alignment"},
    "/v1/audio/voices": {"diarization"},
    "/v1/audio/speakers": {"diarization"},
}
Pair = tuple[float, float]


@dataclass(slots=True)
class Recital:
    """One request about a recording, and the records of its answer. It has the parts of a job that the engine asks for."""

    directive: Directive
    before: list[dict[str, Any]]
    words: list[str]
    """The record of each segment: what the directive counts."""
    after: list[dict[str, Any]]
    choices: int = 1
    stream: bool = True
    kind: str = field(default="application/x-ndjson")

    def begin(self) -> bytes:
        """The records before the first segment."""
        return b"".join(self.token(json.dumps(each)) for each in self.before)

    def token(self, word: str) -> bytes:
        """One record on its line."""
        return word.encode() + b"\n"

    def end(self) -> bytes:
        """The records after the last segment."""
        return b"".join(self.token(json.dumps(each)) for each in self.after)


def read_recital(path: str, body: bytes) -> Recital:
    """Check the request and decide its whole answer, or raise Refused."""
    head, _, data = body.partition(b"\n")
    try:
        header = json.loads(head)
        match path:
            case "/v1/audio/transcriptions":
                recital = _transcription(header, _samples(data))
            case "/v1/audio/alignments":
                _samples(data)
                recital = _alignment(header)
            case "/v1/audio/voices":
                recital = _voices(_samples(data), last=bool(header.get("last")))
            case _:
                recital = _speakers(header, data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        raise Refused(400, "The body is not a request about a recording.") from None
    if recital.directive.status:
        raise Refused(recital.directive.status, f"Asked to answer {recital.directive.status}.", "server_error")
    return recital


def _samples(data: bytes) -> "array[int]":
    samples = array("h", data)
    if not samples:
        raise ValueError("no samples")
    return samples


def _transcription(header: dict[str, Any], samples: "array[int]") -> Recital:
    prompt = str(header.get("options", {}).get("initial_prompt") or "")
    directive = read_directive(prompt)
    said = cycle(DIRECTIVE.sub("", prompt).split() or [""]) if directive.echo else None
    segments, spoken = list[str](), list[Pair]()
    consumed = _consumed(len(samples), last=bool(header.get("last")))
    for begin in range(0, consumed, _SEGMENT):
        heard = samples[begin : min(begin + _SEGMENT, consumed)]
        if _silent(heard):
            continue
        own = _heard(heard) if said is None else list(islice(said, _WORDS))
        words = [word.upper() for word in own] if header.get("task") == "translate" else own
        start, end = begin / _RATE, (begin + len(heard)) / _RATE
        segments.append(json.dumps(_segment(start, end, words, timed=bool(header.get("words")))))
        spoken.append((start, end))
    language = {"type": "language", "language": header.get("language") or "en", "probability": 0.98}
    done = {"type": "done", "consumed": consumed, "speech": _merged(spoken)}
    return Recital(directive, [language], segments, [done])


def _consumed(count: int, *, last: bool) -> int:
    """Up to a border between two segments, unless nothing comes after."""
    return count if last or count < _SEGMENT else count - count % _SEGMENT


def _silent(samples: Sequence[int]) -> bool:
    return max(samples) - min(samples) < _SILENCE


def _heard(samples: "array[int]") -> list[str]:
    """A word for each part of the samples, made of their checksum."""
    part = max(1, -(-len(samples) // _WORDS))
    words = []
    for begin in range(0, len(samples), part):
        number = zlib.crc32(samples[begin : begin + part].tobytes())
        word = ""
        for _ in range(2):
            number, consonant = divmod(number, len(_CONSONANTS))
            number, vowel = divmod(number, len(_VOWELS))
            word += _CONSONANTS[consonant] + _VOWELS[vowel]
        words.append(word)
    return words


def _segment(start: float, end: float, words: Sequence[str], *, timed: bool) -> dict[str, Any]:
    return {
        "type": "segment",
        "start": start,
        "end": end,
        "text": "".join(f" {word}" for word in words),
        "tokens": [zlib.crc32(word.encode()) % 50_000 for word in words],
        "temperature": 0.0,
        "avg_logprob": -0.1,
        "compression_ratio": 1.0,
        "no_speech_prob": 0.01,
        "words": list(_timed(start, end, [f" {word}" for word in words], "probability")) if timed else [],
    }


def _timed(start: float, end: float, texts: Sequence[str], sureness: str) -> Iterator[dict[str, Any]]:
    """The texts one after the other, all of one length."""
    each = (end - start) / max(1, len(texts))
    for place, text in enumerate(texts):
        yield {"text": text, "start": start + place * each, "end": start + (place + 1) * each, sureness: 0.9}


def _merged(spans: Sequence[Pair]) -> list[Pair]:
    merged: list[Pair] = []
    for start, end in spans:
        if merged and merged[-1][1] >= start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def _alignment(header: dict[str, Any]) -> Recital:
    segments = []
    for each in header["segments"]:
        start, end, texts = float(each["start"]), float(each["end"]), str(each["text"]).split()
        segment = _segment(start, end, texts, timed=True) | {"text": each["text"]}
        for word in segment["words"] if header.get("characters") else ():
            word["characters"] = list(_timed(word["start"], word["end"], word["text"].strip(), "score"))
        segments.append(json.dumps(segment))
    directive = read_directive(" ".join(str(each["text"]) for each in header["segments"]))
    return Recital(directive, [], segments, [{"type": "done"}])


def _voices(samples: "array[int]", *, last: bool) -> Recital:
    consumed = _consumed(len(samples), last=last)
    begins = [begin for begin in range(0, consumed, _SEGMENT) if not _silent(samples[begin : begin + _SEGMENT])]
    regions = _merged([(begin / _RATE, min(begin + _SEGMENT, consumed) / _RATE) for begin in begins])
    windows = [window for region in regions for window in _windows(region)]
    vectors = b"".join(_vector(samples, window) for window in windows)
    record = {
        "type": "voices",
        "regions": regions,
        "windows": windows,
        "vectors": b64encode(vectors).decode(),
        "dimensions": _DIMENSIONS,
    }
    return Recital(Directive(), [], [json.dumps(record)], [{"type": "done", "consumed": consumed}])


def _windows(region: Pair) -> Iterator[Pair]:
    start, end = region
    for step in range(max(1, round((end - start) / _STEP_SECONDS))):
        begin = start + step * _STEP_SECONDS
        yield begin, min(begin + _WINDOW_SECONDS, end)


def _vector(samples: "array[int]", window: Pair) -> bytes:
    """A direction for each voice: the loud one and the quiet one."""
    heard = samples[round(window[0] * _RATE) : round(window[1] * _RATE)] or array("h", [0])
    voice = 0 if max(heard) - min(heard) >= _LOUD else 1
    return struct.pack(f"<{_DIMENSIONS}e", *(float(place == voice) for place in range(_DIMENSIONS)))


def _speakers(header: dict[str, Any], data: bytes) -> Recital:
    width = 2 * int(header["dimensions"])
    windows, vectors = header["windows"], [data[place : place + width] for place in range(0, len(data), width)]
    if len(vectors) != len(windows) or (vectors and len(vectors[-1]) != width):
        raise ValueError("another number of vectors than of windows")
    known = {b64decode(each["vectors"])[:width]: str(each["name"]) for each in header.get("known", ())}
    most = header.get("speakers") or header.get("speakers_max") or 26
    names, order, turns = dict(known), list[str](), list[dict[str, Any]]()
    for (start, end), vector in zip(windows, vectors, strict=True):
        if vector not in names:
            unknown = len(names) - len(known)
            names[vector] = chr(ord("A") + min(unknown, max(0, most - len(known) - 1)))
        speaker = names[vector]
        if turns and turns[-1]["speaker"] == speaker and start <= turns[-1]["end"]:
            turns[-1]["end"] = max(end, turns[-1]["end"])
        else:
            if turns:
                turns[-1]["end"] = min(turns[-1]["end"], start)
            turns.append({"start": start, "end": end, "speaker": speaker})
        order += [] if speaker in order else [speaker]
    directive = read_directive(" ".join(known.values()))
    record = {"type": "turns", "turns": turns, "speakers": order}
    return Recital(directive, [], [json.dumps(record)], [{"type": "done"}])
