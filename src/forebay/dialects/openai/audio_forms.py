"""Forms about recordings as the JSON that a batch line or a plain request has for the same.

It refuses nothing by itself: what is no number or no word of truth stays a text, and is refused as one by name.
"""

import math
from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json, to_json

from forebay.dialects.openai.call import Wire

LISTS = frozenset(
    {
        *("timestamp_granularities", "include", "languages", "keywords", "temperatures", "suppress_tokens"),
        *("known_speaker_names", "known_speaker_references"),
    }
)
LARGE = frozenset({"known_speaker_references", "segments", "transcript", "url"})
_NUMBERS = frozenset(
    {
        *("temperature", "temperatures", "beam_size", "best_of", "patience", "length_penalty", "repetition_penalty"),
        *("no_repeat_ngram_size", "compression_ratio_threshold", "log_prob_threshold", "no_speech_threshold"),
        *("suppress_tokens", "vad_onset", "vad_offset", "vad_min_speech_ms", "vad_min_silence_ms", "vad_pad_ms"),
        *("chunk_seconds", "speakers", "speakers_min", "speakers_max", "num_speakers", "min_speakers", "max_speakers"),
        *("threshold", "prefix_padding_ms", "silence_duration_ms"),
    }
)
_FLAGS = frozenset({"background", "diarize", "character_alignments", "stream", "suppress_numerals", "vad"})
_STRATEGY = "chunking_strategy"
_NESTED = ("type", "threshold", "prefix_padding_ms", "silence_duration_ms")
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def fields_of(body: type[Wire]) -> frozenset[str]:
    """The names that the fields of a form for `body` may have."""
    names = frozenset(body.model_fields)
    nested = {f"{_STRATEGY}[{inner}]" for inner in _NESTED} if _STRATEGY in names else set()
    return names | {f"{name}[]" for name in names & LISTS} | nested


def json_of(fields: Iterable[tuple[str, str]]) -> bytes:
    """The body that the fields of a form stand for. An empty field is as if it were not there."""
    body: dict[str, Any] = {}
    for name, text in fields:
        plain, _, inner = name.removesuffix("[]").partition("[")
        if not text:
            continue
        if inner:
            nested = body.setdefault(plain, {})
            if isinstance(nested, dict):
                nested[inner.removesuffix("]")] = _value(inner.removesuffix("]"), text)
        elif plain in LISTS:
            body.setdefault(plain, []).append(_value(plain, text))
        else:
            body[plain] = _value(plain, text)
    return to_json(body)


def _value(name: str, text: str) -> Any:
    if name in _NUMBERS:
        return _number(text)
    if name in _FLAGS:
        return _TRUTH.get(text.lower(), text)
    if name == "segments" or (name == _STRATEGY and text.lstrip().startswith("{")):
        try:
            return from_json(text)
        except ValueError:
            return text
    return text


def _number(text: str) -> int | float | str:
    try:
        number = float(text)
        return int(text) if text.strip().lstrip("+-").isdecimal() else number if math.isfinite(number) else text
    except ValueError:
        return text
