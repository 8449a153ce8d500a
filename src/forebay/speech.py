"""The nouns of speech: words, segments, turns and transcripts, and how they are written down as JSON.

It holds values only, and refuses to know formats for people, engines and stores. Times are seconds from the beginning of
the recording.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SAMPLE_RATE = 16_000  # samples a second of what engines are given: mono, signed 16-bit, little-endian
SAMPLE_BYTES = 2


@dataclass(frozen=True, slots=True)
class Character:
    """One character of an aligned word; no times where the aligner could not place it."""

    text: str
    start: float | None = None
    end: float | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Word:
    """One word as it was said. `text` has the space before it, where the language has one."""

    start: float
    end: float
    text: str
    probability: float | None = None
    speaker: str | None = None
    characters: tuple[Character, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """What was said in one breath, and how sure the model was of it."""

    start: float
    end: float
    text: str
    tokens: tuple[int, ...] = ()
    temperature: float = 0.0
    avg_logprob: float = 0.0
    compression_ratio: float = 0.0
    no_speech_prob: float = 0.0
    words: tuple[Word, ...] = ()
    speaker: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """Somebody spoke from `start` to `end`; turns of several speakers may overlap."""

    start: float
    end: float
    speaker: str


@dataclass(frozen=True, slots=True)
class Transcript:
    """All that is known of a recording. `duration` is that of the recording, silence included."""

    task: str
    duration: float
    language: str | None = None
    language_probability: float | None = None
    segments: tuple[Segment, ...] = ()
    turns: tuple[Turn, ...] = ()
    speakers: tuple[str, ...] = field(default=())

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(segment.text for segment in self.segments).strip()


def character_to_wire(character: Character) -> dict[str, Any]:
    """As JSON."""
    return {"text": character.text, "start": character.start, "end": character.end, "score": character.score}


def word_to_wire(word: Word) -> dict[str, Any]:
    """As JSON."""
    wire: dict[str, Any] = {"start": word.start, "end": word.end, "text": word.text, "probability": word.probability}
    if word.speaker is not None:
        wire["speaker"] = word.speaker
    if word.characters:
        wire["characters"] = [character_to_wire(each) for each in word.characters]
    return wire


def word_from_wire(wire: Mapping[str, Any]) -> Word:
    """From what `word_to_wire` wrote. Raises KeyError, TypeError or ValueError."""
    return Word(
        _finite(wire["start"]),
        _finite(wire["end"]),
        str(wire["text"]),
        _number(wire.get("probability")),
        wire.get("speaker"),
        tuple(
            Character(str(each["text"]), _number(each["start"]), _number(each["end"]), _number(each["score"]))
            for each in wire.get("characters", ())
        ),
    )


def segment_to_wire(segment: Segment) -> dict[str, Any]:
    """As JSON."""
    wire: dict[str, Any] = {
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
        "words": [word_to_wire(word) for word in segment.words],
    }
    if segment.speaker is not None:
        wire["speaker"] = segment.speaker
    return wire


def segment_from_wire(wire: Mapping[str, Any]) -> Segment:
    """From what `segment_to_wire` wrote. Raises KeyError, TypeError or ValueError."""
    return Segment(
        _finite(wire["start"]),
        _finite(wire["end"]),
        str(wire["text"]),
        tuple(int(token) for token in wire.get("tokens", ())),
        _finite(wire.get("temperature", 0.0)),
        _finite(wire.get("avg_logprob", 0.0)),
        _finite(wire.get("compression_ratio", 0.0)),
        _finite(wire.get("no_speech_prob", 0.0)),
        tuple(word_from_wire(word) for word in wire.get("words", ())),
        wire.get("speaker"),
    )


def turn_to_wire(turn: Turn) -> dict[str, Any]:
    """As JSON."""
    return {"start": turn.start, "end": turn.end, "speaker": turn.speaker}


def turn_from_wire(wire: Mapping[str, Any]) -> Turn:
    """From what `turn_to_wire` wrote. Raises KeyError, TypeError or ValueError."""
    return Turn(_finite(wire["start"]), _finite(wire["end"]), str(wire["speaker"]))


def transcript_to_wire(transcript: Transcript) -> dict[str, Any]:
    """As JSON."""
    return {
        "task": transcript.task,
        "duration": transcript.duration,
        "language": transcript.language,
        "language_probability": transcript.language_probability,
        "segments": [segment_to_wire(segment) for segment in transcript.segments],
        "turns": [turn_to_wire(turn) for turn in transcript.turns],
        "speakers": list(transcript.speakers),
    }


def transcript_from_wire(wire: Mapping[str, Any]) -> Transcript:
    """From what `transcript_to_wire` wrote. Raises KeyError, TypeError or ValueError."""
    return Transcript(
        str(wire["task"]),
        _finite(wire["duration"]),
        wire.get("language"),
        _number(wire.get("language_probability")),
        tuple(segment_from_wire(segment) for segment in wire["segments"]),
        tuple(turn_from_wire(turn) for turn in wire["turns"]),
        tuple(str(speaker) for speaker in wire.get("speakers", ())),
    )


def _number(value: Any) -> float | None:
    return None if value is None else _finite(value)


def _finite(value: Any) -> float:
    """Raises ValueError for what JSON has no form for."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not a number")
    return number
