"""Writes a transcript in each of the formats: JSON in OpenAI's shapes, plain text, subtitles, and turns of speakers.

Pure functions. It refuses a format that the transcript has nothing for, such as speakers where nobody told them apart.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from forebay.dialects.languages import name_of
from forebay.dialects.openai.audio_subtitles import srt, vtt
from forebay.dialects.speakers import by_speaker
from forebay.errors import InvalidRequest
from forebay.speech import Character, Segment, Transcript, Turn, Word

JSON, PLAIN = "application/json", "text/plain; charset=utf-8"
UNKNOWN_SPEAKER = "unknown"  # of words that were said in nobody's turn
TOKENS_PER_SECOND = 10  # that a recording counts for, where tokens are counted: one for a tenth of a second
_FRAMES_PER_SECOND = 100
_LOGPROB_MIN = -100.0


@dataclass(frozen=True, slots=True)
class Look:
    """What of a transcript is shown where a format leaves it open."""

    words: bool = False
    segments: bool = True
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """A transcript as it is sent."""

    content_type: str
    body: bytes


def written(transcript: Transcript, form: str, look: Look) -> Written:
    """`transcript` in one of the formats of its task. Raises InvalidRequest."""
    formats = _FORMATS[transcript.task]
    if form not in formats:
        raise InvalidRequest(
            f"This result can be written as {', '.join(formats)}.", param="response_format", code="invalid_value"
        )
    if form in _OF_TURNS and transcript.task != "diarize" and not transcript.turns and transcript.segments:
        raise InvalidRequest(
            f"Nobody told the speakers of this recording apart, so it cannot be written as {form}.",
            param="response_format",
            code="invalid_value",
        )
    content_type, write = formats[form]
    return Written(content_type, write(transcript, look))


def usage_of(transcript: Transcript) -> dict[str, Any]:
    """What was used, by time."""
    return {"type": "duration", "seconds": _rounded(transcript.duration)}


def logprobs_of(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """How sure the model was, word by word: of the pieces of words it does not tell."""
    return [
        {"token": word.text, "bytes": list(word.text.encode()), "logprob": _logprob(word.probability)}
        for segment in segments
        for word in segment.words
        if word.probability is not None
    ]


def segments_of_speakers(transcript: Transcript) -> list[dict[str, Any]]:
    """The segments of a diarized transcript, each of one speaker."""
    return [
        {
            "type": "transcript.text.segment",
            "id": f"seg_{place:03d}",
            "speaker": segment.speaker or UNKNOWN_SPEAKER,
            "start": _rounded(segment.start),
            "end": _rounded(segment.end),
            "text": segment.text.strip(),
        }
        for place, segment in enumerate(by_speaker(transcript.segments))
    ]


def _json(transcript: Transcript, look: Look) -> bytes:
    body: dict[str, Any] = {"text": transcript.text}
    if transcript.language is not None:
        body["languages"] = [{"code": transcript.language}]
    if look.logprobs:
        body["logprobs"] = logprobs_of(transcript.segments)
    return to_json({**body, "usage": usage_of(transcript)})


def _text(transcript: Transcript, _look: Look) -> bytes:
    return _whole_text(transcript).encode() + b"\n"


def _whole_text(transcript: Transcript) -> str:
    """A model brings its own spaces; whoever sends what was said need not."""
    if transcript.task != "align":
        return transcript.text
    return " ".join(filter(None, (segment.text.strip() for segment in transcript.segments)))


def _srt(transcript: Transcript, _look: Look) -> bytes:
    return srt(transcript.segments).encode()


def _vtt(transcript: Transcript, _look: Look) -> bytes:
    return vtt(transcript.segments).encode()


def _verbose(transcript: Transcript, look: Look) -> bytes:
    spoken = "english" if transcript.task == "translate" else name_of(transcript.language)
    body: dict[str, Any] = {
        "task": transcript.task,
        "language": spoken,
        "duration": _rounded(transcript.duration),
        "text": transcript.text,
    }
    if look.segments:
        body["segments"] = [_segment(place, segment) for place, segment in enumerate(transcript.segments)]
    if look.words:
        body["words"] = [_word(word) for segment in transcript.segments for word in segment.words]
    if transcript.speakers:
        body["speakers"] = list(transcript.speakers)
    return to_json({**body, "usage": usage_of(transcript)})


def _segment(place: int, segment: Segment) -> dict[str, Any]:
    told = {} if segment.speaker is None else {"speaker": segment.speaker}
    return {
        "id": place,
        "seek": int(segment.start * _FRAMES_PER_SECOND),
        "start": _rounded(segment.start),
        "end": _rounded(segment.end),
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
        **told,
    }


def _word(word: Word) -> dict[str, Any]:
    shown: dict[str, Any] = {"word": word.text.strip(), "start": _rounded(word.start), "end": _rounded(word.end)}
    if word.probability is not None:
        shown["score"] = _rounded(word.probability)
    if word.speaker is not None:
        shown["speaker"] = word.speaker
    if word.characters:
        shown["characters"] = [_character(each) for each in word.characters]
    return shown


def _character(character: Character) -> dict[str, Any]:
    times = {"start": character.start, "end": character.end, "score": character.score}
    return {"text": character.text, **{name: _rounded(each) for name, each in times.items() if each is not None}}


def _diarized(transcript: Transcript, _look: Look) -> bytes:
    return to_json(
        {
            "task": transcript.task,
            "duration": _rounded(transcript.duration),
            "text": transcript.text,
            "segments": segments_of_speakers(transcript),
            "usage": usage_of(transcript),
        }
    )


def _aligned(transcript: Transcript, _look: Look) -> bytes:
    words = [[_word(word) for word in segment.words] for segment in transcript.segments]
    segments = [
        {
            "id": place,
            "start": _rounded(segment.start),
            "end": _rounded(segment.end),
            "text": segment.text,
            "words": words[place],
        }
        for place, segment in enumerate(transcript.segments)
    ]
    return to_json(
        {
            "task": transcript.task,
            "duration": _rounded(transcript.duration),
            "text": _whole_text(transcript),
            "segments": segments,
            "words": [word for each in words for word in each],
            "usage": usage_of(transcript),
        }
    )


def _turns(transcript: Transcript, _look: Look) -> bytes:
    return to_json(_turns_body(transcript))


def _turns_body(transcript: Transcript) -> dict[str, Any]:
    return {
        "task": transcript.task,
        "duration": _rounded(transcript.duration),
        "num_speakers": len(_names(transcript)),
        "segments": [
            {"id": place, "speaker": turn.speaker, "start": _rounded(turn.start), "end": _rounded(turn.end)}
            for place, turn in enumerate(transcript.turns)
        ],
        "usage": usage_of(transcript),
    }


def _verbose_turns(transcript: Transcript, _look: Look) -> bytes:
    speakers = []
    for name in _names(transcript):
        own = [turn for turn in transcript.turns if turn.speaker == name]
        seconds = _rounded(math.fsum(turn.end - turn.start for turn in own))
        speakers.append({"id": name, "total_speech_duration": seconds, "segment_count": len(own)})
    return to_json({**_turns_body(transcript), "speakers": speakers})


def _names(transcript: Transcript) -> Sequence[str]:
    """The speakers, in the order in which they first speak."""
    return transcript.speakers or tuple(dict.fromkeys(turn.speaker for turn in transcript.turns))


def _rttm(transcript: Transcript, _look: Look) -> bytes:
    return "".join(_rttm_lines(transcript.turns)).encode()


def _rttm_lines(turns: Sequence[Turn]) -> Iterator[str]:
    names = _columns(dict.fromkeys(turn.speaker for turn in turns))
    for turn in turns:
        start, seconds = round(turn.start, 3), round(turn.end - turn.start, 3)
        if seconds > 0:
            yield f"SPEAKER recording 1 {start:.3f} {seconds:.3f} <NA> <NA> {names[turn.speaker]} <NA> <NA>\n"


def _columns(speakers: Iterable[str]) -> Mapping[str, str]:
    """A column for each name: a space would begin the next one, and two names are not to become one."""
    columns = {name: name for name in speakers if name.split() == [name]}
    for name in speakers:
        column, number = "_".join(name.split()), 1
        while name not in columns:
            shown = column if number == 1 else f"{column}_{number}"
            if shown not in columns.values():
                columns[name] = shown
            number += 1
    return columns


def _rounded(number: float) -> float:
    return round(number, 3)


def _logprob(probability: float) -> float:
    return max(_LOGPROB_MIN, round(math.log(probability), 4)) if probability > 0 else _LOGPROB_MIN


_Write = Callable[[Transcript, Look], bytes]
_SUBTITLES: dict[str, tuple[str, _Write]] = {"srt": (PLAIN, _srt), "vtt": (PLAIN, _vtt)}
_SPOKEN: dict[str, tuple[str, _Write]] = {
    "json": (JSON, _json),
    "text": (PLAIN, _text),
    **_SUBTITLES,
    "verbose_json": (JSON, _verbose),
    "rttm": (PLAIN, _rttm),
}
_FORMATS: Mapping[str, Mapping[str, tuple[str, _Write]]] = {
    "transcribe": _SPOKEN | {"diarized_json": (JSON, _diarized)},
    "translate": _SPOKEN,
    "align": {"json": (JSON, _aligned), "text": (PLAIN, _text), **_SUBTITLES},
    "diarize": {"json": (JSON, _turns), "verbose_json": (JSON, _verbose_turns), "rttm": (PLAIN, _rttm)},
}
_OF_TURNS = frozenset({"rttm", "diarized_json"})
