"""Works on a recording in stretches: what was said, when each word was, and who said it.

Both doors bring their own way to run one stretch, each through a permit of its own, so that short recordings get their turn
beside long ones. It refuses to hold more of a recording than one stretch, and to do again what a job has finished before.
"""

import asyncio
import math
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from forebay.dialects.openai.call import Call
from forebay.dialects.speakers import with_speakers
from forebay.dialects.speech import Align, AudioRef, Diarize, Records, SpeechTask, part_body
from forebay.errors import CallerError, EngineGarbled, InvalidRequest, PayloadTooLarge
from forebay.inference import Capability
from forebay.media.recordings import Recording, Recordings
from forebay.speech import (
    SAMPLE_RATE,
    Segment,
    Transcript,
    Turn,
    segment_from_wire,
    segment_to_wire,
    turn_from_wire,
)

TRANSCRIBING = "transcribing"
ALIGNING = "aligning"
DIARIZING = "diarizing"

_TRANSCRIPTIONS = "/v1/audio/transcriptions"
_ALIGNMENTS = "/v1/audio/alignments"
_VOICES = "/v1/audio/voices"
_SPEAKERS = "/v1/audio/speakers"

_SEGMENT_SECONDS_MAX = 600.0  # of what is aligned at once
_MARGIN_SECONDS = 0.2  # around a segment that is aligned: its own times are rough
_CLIP_SECONDS_MAX = 30  # of a known speaker
_OVERLAP_MAX = 2  # segments to align that overlap last at most so many times as long as the recording
_CLIPS = "known_speaker_references"
_VECTORS_BYTES_MAX = 56 * 2**20  # with their windows they fit into one request to an engine
_VOICES_SHARE = 95.0  # percent of telling speakers apart that is listening

Compute = Callable[[Call], Awaitable[bytes]]
Pair = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Voices:
    """What was heard in a stretch: where somebody spoke, and a vector (float16) of the voice in each window."""

    regions: tuple[Pair, ...] = ()
    windows: tuple[Pair, ...] = ()
    vectors: bytes = b""
    dimensions: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """A finished stretch of one stage, for a job that goes on after a crash. `begin` and `end` are samples."""

    stage: str
    begin: int
    end: int
    language: str | None = None
    language_probability: float | None = None
    segments: tuple[Segment, ...] = ()
    voices: Voices = field(default_factory=Voices)


def kept_to_wire(kept: Kept) -> dict[str, Any]:
    """As JSON."""
    voices = kept.voices
    return {
        "stage": kept.stage,
        "begin": kept.begin,
        "end": kept.end,
        "language": kept.language,
        "language_probability": kept.language_probability,
        "segments": [segment_to_wire(segment) for segment in kept.segments],
        "voices": {
            "regions": voices.regions,
            "windows": voices.windows,
            "vectors": b64encode(voices.vectors).decode(),
            "dimensions": voices.dimensions,
        },
    }


def kept_from_wire(wire: Mapping[str, Any]) -> Kept:
    """From what `kept_to_wire` wrote."""
    return Kept(
        wire["stage"],
        wire["begin"],
        wire["end"],
        wire["language"],
        wire["language_probability"],
        tuple(segment_from_wire(segment) for segment in wire["segments"]),
        _voices(wire["voices"]),
    )


class Listener(Protocol):
    """Who wants to know how it goes on."""

    def stage(self, stage: str, percent: float) -> None:
        """So much of a stage is done."""
        ...

    def segments(self, new: Sequence[Segment]) -> None:
        """What was said next, before it is aligned and before anybody knows who said it."""
        ...

    async def kept(self, stretch: Kept) -> None:
        """A stretch is finished; nothing goes on before this returns."""
        ...


@dataclass(slots=True)
class _Work:
    """One recording on its way through the stages."""

    call: Call
    task: SpeechTask
    recording: Recording
    compute: Compute
    listener: Listener
    done: Sequence[Kept]

    def finished(self, stage: str) -> list[Kept]:
        return [kept for kept in self.done if kept.stage == stage]

    async def run(self, model: str, capability: Capability, path: str, body: bytes, on_record: "_OnRecord") -> None:
        request = replace(self.call.request, model=model, capability=capability, path=path, body=body)
        await self.compute(replace(self.call, request=request, shape=Records(on_record)))


_OnRecord = Callable[[dict[str, Any]], None]


class Transcriber:
    """Owns nothing but the length of a stretch: everything else is the caller's."""

    def __init__(self, recordings: Recordings, stretch_seconds: int) -> None:
        self._recordings = recordings
        self._stretch = stretch_seconds * SAMPLE_RATE

    async def run(
        self, call: Call, recording: Recording, compute: Compute, listener: Listener, done: Sequence[Kept] = ()
    ) -> Transcript:
        """All that `call` wants to know of `recording`; `done` are the stretches that were finished before.

        Raises whatever `compute` and `listener.kept` do.
        """
        task = call.speech
        assert task is not None, "only a call about a recording is worked on"
        work = _Work(call, task, recording, compute, listener, done)
        said = _Said(segments=list(_clamped(task.transcript, recording.seconds)))
        known = [] if task.diarize is None else await self._known(work, task.diarize)
        if task.task in {"transcribe", "translate"}:
            said = await self._transcribe(work)
        segments = tuple(said.segments)
        if task.align is not None:
            segments = await self._align(work, task.align, segments, said.language)
        turns: tuple[Turn, ...] = ()
        speakers: tuple[str, ...] = ()
        if task.diarize is not None:
            turns, speakers = await self._diarize(work, task.diarize, known)
            segments = await asyncio.to_thread(with_speakers, segments, turns)  # hours of it take seconds
        return Transcript(task.task, recording.seconds, said.language, said.probability, segments, turns, speakers)

    async def _transcribe(self, work: _Work) -> "_Said":
        said, position = _Said(), 0
        for kept in work.finished(TRANSCRIBING):
            said.add(kept)
            position = kept.end
            work.listener.segments(kept.segments)
        samples = work.recording.samples
        work.listener.stage(TRANSCRIBING, _percent(position, samples))
        while position < samples:
            kept = await self._stretch_of_text(work, said, position)
            await work.listener.kept(kept)
            said.add(kept)
            position = kept.end
            work.listener.stage(TRANSCRIBING, _percent(position, samples))
        return said

    async def _stretch_of_text(self, work: _Work, said: "_Said", begin: int) -> Kept:
        samples, last = await self._read(work.recording, begin)
        header = {
            "task": work.task.task,
            "language": said.language or work.task.options.get("language"),
            "words": work.task.words or work.task.diarize is not None,
            "last": last,
            "options": {name: value for name, value in work.task.options.items() if name != "language"},
        }
        heard, offset = _Stretch(begin, samples, last=last), begin / SAMPLE_RATE

        def take(record: dict[str, Any]) -> None:
            match record["type"]:
                case "language":
                    heard.language, heard.probability = str(record["language"]), float(record["probability"])
                case "segment":
                    segment = _moved(segment_from_wire(record), offset, work.recording.seconds)
                    heard.segments.append(segment)
                    work.listener.segments((segment,))
                    work.listener.stage(TRANSCRIBING, 100 * segment.end / work.recording.seconds)
                case "done":
                    heard.finish(record)

        capability = Capability.TRANSLATION if work.task.task == "translate" else Capability.TRANSCRIPTION
        body = part_body(header, samples)
        await work.run(work.call.request.model, capability, _TRANSCRIPTIONS, body, take)
        return Kept(TRANSCRIBING, begin, heard.end, heard.language, heard.probability, segments=tuple(heard.segments))

    async def _read(self, recording: Recording, begin: int) -> tuple[bytes, bool]:
        """The next stretch, and whether it is the last."""
        count = min(self._stretch, recording.samples - begin)
        return await recording.read(begin, count), begin + count >= recording.samples

    async def _align(
        self, work: _Work, align: Align, segments: tuple[Segment, ...], language: str | None
    ) -> tuple[Segment, ...]:
        aligned = [segment for kept in work.finished(ALIGNING) for segment in kept.segments]
        work.listener.stage(ALIGNING, _percent(len(aligned), len(segments)))
        for group in self._groups(segments[len(aligned) :]):
            kept = await self._align_group(work, align, group, language)
            await work.listener.kept(kept)
            aligned += kept.segments
            work.listener.stage(ALIGNING, _percent(len(aligned), len(segments)))
        return tuple(aligned)

    def _groups(self, segments: Sequence[Segment]) -> Iterator[list[Segment]]:
        """Neighbours that fit into one stretch. Raises EngineGarbled for a segment longer than any that an engine hears."""
        group: list[Segment] = []
        most = self._stretch / SAMPLE_RATE
        for segment in segments:
            if segment.end - segment.start > _SEGMENT_SECONDS_MAX:
                raise EngineGarbled  # those that somebody sent were looked at before
            if group and segment.end - group[0].start > most:
                yield group
                group = []
            group.append(segment)
        if group:
            yield group

    async def _align_group(self, work: _Work, align: Align, group: list[Segment], language: str | None) -> Kept:
        recording = work.recording
        begin = _sample(min(each.start for each in group) - _MARGIN_SECONDS, recording)
        end = _sample(max(each.end for each in group) + _MARGIN_SECONDS, recording)
        offset, found = begin / SAMPLE_RATE, list[Segment]()
        wanted = [{"start": each.start - offset, "end": each.end - offset, "text": each.text} for each in group]
        header = {
            "language": language or work.task.options.get("language"),
            "segments": wanted,
            "interpolate": align.interpolate,
            "characters": align.characters,
        }

        def take(record: dict[str, Any]) -> None:
            if record["type"] == "segment":
                words = _moved(segment_from_wire(record), offset, recording.seconds).words
                found.append(replace(group[len(found)], words=words) if len(found) < len(group) else _refused())

        samples = await recording.read(begin, end - begin)
        await work.run(align.model, Capability.ALIGNMENT, _ALIGNMENTS, part_body(header, samples), take)
        if len(found) != len(group):
            raise EngineGarbled
        return Kept(ALIGNING, begin, end, segments=tuple(found))

    async def _known(self, work: _Work, diarize: Diarize) -> list[dict[str, str]]:
        """The voices of known speakers, before anything else: a clip that cannot be used is not to be found out last."""
        try:
            return [
                {"name": name, "vectors": b64encode((await self._clip(work, diarize, clip)).vectors).decode()}
                for name, clip in zip(diarize.names, diarize.clips, strict=True)
            ]
        except CallerError as error:
            error.param = _CLIPS
            raise

    async def _diarize(
        self, work: _Work, diarize: Diarize, known: list[dict[str, str]]
    ) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
        voices = await self._listen(work, diarize)
        body, windows = await asyncio.to_thread(_order, diarize, voices, known)
        turns, speakers = list[Turn](), list[str]()

        def take(record: dict[str, Any]) -> None:
            if record["type"] == "turns":
                turns.extend(turn_from_wire(turn) for turn in record["turns"])
                speakers.extend(str(speaker) for speaker in record["speakers"])

        if windows:
            await work.run(diarize.model, Capability.DIARIZATION, _SPEAKERS, body, take)
        work.listener.stage(DIARIZING, 100.0)
        return tuple(turns), tuple(speakers)

    async def _listen(self, work: _Work, diarize: Diarize) -> list[Voices]:
        """The voices of the whole recording."""
        finished = work.finished(DIARIZING)
        voices, position = [kept.voices for kept in finished], finished[-1].end if finished else 0
        samples = work.recording.samples
        while position < samples:
            work.listener.stage(DIARIZING, _percent(position, samples) * _VOICES_SHARE / 100)
            pcm, last = await self._read(work.recording, position)
            heard = await self._voices(work, diarize.model, pcm, position, last=last)
            kept = Kept(DIARIZING, position, heard.end, voices=heard.voices)
            await work.listener.kept(kept)
            voices.append(kept.voices)
            position = kept.end
        return voices

    async def _voices(self, work: _Work, model: str, pcm: bytes, begin: int, *, last: bool) -> "_Stretch":
        heard = _Stretch(begin, pcm, last=last)

        def take(record: dict[str, Any]) -> None:
            if record["type"] == "voices":
                heard.voices = _joined(heard.voices, _voices(record, begin / SAMPLE_RATE))
            elif record["type"] == "done":
                heard.finish(record)

        await work.run(model, Capability.DIARIZATION, _VOICES, part_body({"last": last}, pcm), take)
        return heard

    async def _clip(self, work: _Work, diarize: Diarize, clip: str) -> Voices:
        """The voice of a known speaker."""
        async with self._recordings.spool() as spool:
            await self._recordings.fetch(spool, AudioRef(url=clip), work.call.request.project)
            async with self._recordings.decode(spool, seconds_max=_CLIP_SECONDS_MAX) as recording:
                pcm = await recording.read(0, recording.samples)
        voices = (await self._voices(work, diarize.model, pcm, 0, last=True)).voices
        if not voices.vectors:
            raise InvalidRequest("Nobody speaks in one of the reference clips.", code="media_invalid")
        return voices


@dataclass(slots=True)
class _Said:
    """What is known of the text so far."""

    language: str | None = None
    probability: float | None = None
    segments: list[Segment] = field(default_factory=list)

    def add(self, kept: Kept) -> None:
        """Go on after a stretch. The language is that of the first one in which somebody spoke."""
        if self.language is None:
            self.language, self.probability = kept.language, kept.language_probability
        self.segments += kept.segments


class _Stretch:
    """What an engine tells of one stretch while it works on it."""

    def __init__(self, begin: int, samples: bytes, *, last: bool) -> None:
        self._begin = begin
        self._count = len(samples) // 2
        self._last = last
        self.end = begin + self._count
        self.language: str | None = None
        self.probability: float | None = None
        self.segments: list[Segment] = []
        self.voices = Voices()

    def finish(self, record: Mapping[str, Any]) -> None:
        """Take in where the next one begins. Raises ValueError."""
        consumed = record["consumed"]
        if not isinstance(consumed, int) or not 0 < consumed <= self._count or (self._last and consumed != self._count):
            raise ValueError
        self.end = self._begin + consumed


def _refused() -> Segment:
    raise ValueError


def _clamped(segments: Sequence[Segment], seconds: float) -> Iterator[Segment]:
    """Segments of a transcript that somebody sent; one without an end lasts to that of the recording.

    Raises InvalidRequest for one that begins after it or is too long to be aligned, and for so many on top of one another
    that they would be work without end.
    """
    whole = 0.0
    for number, each in enumerate(segments):
        if each.start > seconds:
            raise InvalidRequest(
                f"This segment begins after the recording has ended, which lasts {seconds:g} seconds.",
                param=f"segments[{number}].start",
                code="invalid_value",
            )
        end = seconds if each.end <= each.start else min(each.end, seconds)
        _check_length(number, each, end)
        whole += end - each.start
        if whole > _OVERLAP_MAX * seconds + _SEGMENT_SECONDS_MAX:
            raise InvalidRequest(
                f"The segments last more than {_OVERLAP_MAX} times as long as the recording. Let fewer of them overlap.",
                param="segments",
                code="invalid_value",
            )
        yield replace(each, end=end)


def _check_length(number: int, segment: Segment, end: float) -> None:
    """Raises InvalidRequest for what is more than an aligner takes at once."""
    if end - segment.start > _SEGMENT_SECONDS_MAX:
        alone = segment.end <= segment.start
        raise InvalidRequest(
            f"At most {_SEGMENT_SECONDS_MAX:g} seconds are aligned at once. Send shorter `segments`, with their times.",
            param="transcript" if alone else f"segments[{number}]",
            code="invalid_value",
        )


def _order(diarize: Diarize, voices: Sequence[Voices], known: list[dict[str, str]]) -> tuple[bytes, int]:
    """The body that asks who spoke when, and of how many windows. Raises PayloadTooLarge."""
    if sum(len(each.vectors) for each in voices) > _VECTORS_BYTES_MAX:
        raise PayloadTooLarge(
            "The recording is too long to tell its speakers apart. Send it in parts.", code="media_too_large"
        )
    header = {
        "regions": [pair for each in voices for pair in each.regions],
        "windows": [pair for each in voices for pair in each.windows],
        "dimensions": max((each.dimensions for each in voices), default=0),
        "speakers": diarize.speakers,
        "speakers_min": diarize.speakers_min,
        "speakers_max": diarize.speakers_max,
        "known": known,
    }
    return part_body(header, b"".join(each.vectors for each in voices)), sum(len(each.windows) for each in voices)


def _moved(segment: Segment, offset: float, most: float) -> Segment:
    """From the times of a stretch to those of the recording."""

    def moved(seconds: float) -> float:
        return round(min(max(seconds + offset, 0.0), most), 3)

    words = tuple(
        replace(
            word,
            start=moved(word.start),
            end=moved(word.end),
            characters=tuple(
                replace(
                    each,
                    start=None if each.start is None else moved(each.start),
                    end=None if each.end is None else moved(each.end),
                )
                for each in word.characters
            ),
        )
        for word in segment.words
    )
    return replace(segment, start=moved(segment.start), end=moved(segment.end), words=words)


def _voices(wire: Mapping[str, Any], offset: float = 0.0) -> Voices:
    """Raises KeyError, TypeError and ValueError."""
    voices = Voices(
        tuple(_pair(start, end, offset) for start, end in wire["regions"]),
        tuple(_pair(start, end, offset) for start, end in wire["windows"]),
        b64decode(wire["vectors"], validate=True),
        int(wire["dimensions"]),
    )
    if len(voices.vectors) != 2 * voices.dimensions * len(voices.windows):
        raise ValueError
    return voices


def _pair(start: Any, end: Any, offset: float) -> Pair:
    """Rounded, so that regions which meet where two stretches do still meet. Raises TypeError and ValueError."""
    begin, stop = float(start) + offset, float(end) + offset
    if not math.isfinite(begin + stop):
        raise ValueError("not a number")
    return round(begin, 3), round(stop, 3)


def _joined(before: Voices, more: Voices) -> Voices:
    return Voices(
        before.regions + more.regions,
        before.windows + more.windows,
        before.vectors + more.vectors,
        more.dimensions or before.dimensions,
    )


def _sample(seconds: float, recording: Recording) -> int:
    return min(max(round(seconds * SAMPLE_RATE), 0), recording.samples)


def _percent(done: int, whole: int) -> float:
    return 100.0 * done / whole if whole else 100.0
