"""One aligner behind HTTP, in a process of its own: a recording and what was said in it in, when each word was said out.

It refuses what it cannot place by its form (times outside the recording, texts without an end); a text that was not said
gets times all the same.
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from forebay.engines import reports
from forebay.engines.connection import Answer, Refused, Route, Visit
from forebay.engines.parted import flag, parted
from forebay.engines.reports import one_line
from forebay.engines.serving import Service, run
from forebay.engines.start import check_types, read_spec, refuse_to_start
from forebay.engines.threads import Threads, Wanted, all_ended
from forebay.engines.word_times import Heard, timed, words_of
from forebay.speech import SAMPLE_BYTES, SAMPLE_RATE, Segment, segment_to_wire

_HEADER_BYTES_MAX = 8 * 2**20
_SEGMENTS_MAX = 20_000
_TEXT_CHARS_MAX = 65_536
_TEXTS_CHARS_MAX = 2**20
_TIME_SLACK_SECONDS = 0.5  # by which a time may lie behind the end of the recording; what is behind it is cut
_END = object()
_RULES = ("nearest", "linear", "ignore")

_say = partial(reports.say, "aligner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How this engine is set up, from FOREBAY_ENGINE_SPEC."""

    name: str
    model_path: str = ""
    slots: int = 1
    backend: str = "ctc"
    language: str | None = None
    threads: int = 0
    batch_seconds: int = 60
    oom_cooldown_seconds: float = 300.0
    rehearse_seconds_max: int = 0  # a batch that is longer runs out of memory; 0 never does

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, slots=True)
class Order:
    """What a request asks for, checked."""

    segments: tuple[Segment, ...]
    rule: str
    characters: bool
    samples: memoryview = field(repr=False)


class Backend(Protocol):
    """A way to find words in a recording."""

    segments_at_once: int
    """Of one request: as many as it computes together, and what waits for others meanwhile is little."""

    @property
    def figures(self) -> Mapping[str, float]:
        """What the metrics show of it."""
        ...

    async def place(
        self, words: Sequence[str], samples: memoryview, segment: Segment, wanted: Wanted
    ) -> Sequence[Heard | None]:
        """Where each word of a segment was heard; None for one that has no sound.

        Cancelled, it returns when nothing is computed for it any more. Raises compute.Failed.
        """
        ...


class SphinxBackend:
    """PocketSphinx, one window at a time, of each request in turn: it computes on one core at most."""

    segments_at_once = 1
    figures: Mapping[str, float] = {}

    def __init__(self) -> None:
        from forebay.engines.sphinx import Sphinx

        self._sphinx = Sphinx()
        self._threads = Threads(1)

    async def place(
        self, words: Sequence[str], samples: memoryview, segment: Segment, wanted: Wanted
    ) -> Sequence[Heard | None]:
        """Where each word was heard."""
        first, last = (round(each * SAMPLE_RATE) * SAMPLE_BYTES for each in (segment.start, segment.end))
        part = bytes(samples[first:last])
        found: list[Heard | None] = []
        windows = self._sphinx.place(words, part, segment.start, wanted, found)
        while await self._threads.run(lambda: next(windows, _END), wanted) is not _END:
            pass
        return found


@dataclass(slots=True)
class _Figures:
    """Sums since the start."""

    requests: int = 0
    segments: int = 0
    words: int = 0
    guessed_words: int = 0
    cancelled: int = 0


class Engine:
    """The routes of one loaded backend."""

    def __init__(self, spec: Spec, backend: Backend) -> None:
        self._spec = spec
        self._backend = backend
        self._texts = Threads(1)  # of their own: they do not wait for windows
        self._figures = _Figures()
        self._running = 0

    @property
    def routes(self) -> Mapping[tuple[str, str], Route]:
        """What this engine answers."""
        return {
            ("GET", "/slots"): self._slots,
            ("GET", "/metrics"): self._metrics,
            ("POST", "/v1/audio/alignments"): self._align,
        }

    async def _align(self, visit: Visit) -> Answer:
        try:
            order = read_order(visit.body, self._spec.language)
        except Refused as refused:
            _say(f"event=refused {visit.ids} reason={one_line(str(refused))}")
            raise
        self._figures.requests += 1
        self._running += 1
        begun, ended, reason = time.monotonic(), "cancelled", ""
        try:
            await self._answer(visit, order)
            ended = "finished"
        except Refused as failed:
            ended, reason = "failed", f" reason={one_line(getattr(failed, 'reason', str(failed)))}"
            raise
        finally:
            self._running -= 1
            self._figures.cancelled += ended == "cancelled"
            seconds = time.monotonic() - begun
            _say(f"event={ended} {visit.ids} segments={len(order.segments)} seconds={seconds:.4f}{reason}")
        visit.tell(b'{"type":"done"}')
        return b""

    async def _answer(self, visit: Visit, order: Order) -> None:
        """Tell of each segment, in order. When this ends, none is worked on any more."""
        loop = asyncio.get_running_loop()
        wanted = Wanted(lambda: loop.call_soon_threadsafe(visit.tell, b""))
        pending: deque[asyncio.Task[Segment]] = deque()
        try:
            for segment in order.segments:
                pending.append(asyncio.create_task(self._one(segment, order, wanted)))
                if len(pending) == self._backend.segments_at_once:
                    self._tell(visit, await pending.popleft())
            while pending:
                self._tell(visit, await pending.popleft())
        finally:
            wanted.gone = True
            for each in pending:
                each.cancel()
            await all_ended(pending)

    def _tell(self, visit: Visit, segment: Segment) -> None:
        self._figures.segments += 1
        self._figures.words += len(segment.words)
        self._figures.guessed_words += sum(word.probability is None for word in segment.words)
        visit.tell(json.dumps({"type": "segment", **segment_to_wire(segment)}).encode())

    async def _one(self, segment: Segment, order: Order, wanted: Wanted) -> Segment:
        words = await self._texts.run(lambda: words_of(segment.text), wanted)
        try:
            heard = await self._backend.place(words, order.samples, segment, wanted) if words else ()
        except MemoryError:
            raise Refused(
                500, "This segment needs more memory than there is.", "out_of_memory", "server_error"
            ) from None
        return await self._texts.run(
            lambda: timed(segment, words, heard, order.rule, characters=order.characters), wanted
        )

    async def _slots(self, visit: Visit) -> Answer:
        return reports.slots(self._spec.slots, self._running)

    async def _metrics(self, visit: Visit) -> Answer:
        return reports.metrics(asdict(self._figures), **self._backend.figures, requests_running=self._running)


def read_order(body: bytes, language: str | None) -> Order:
    """What a body asks for. Raises Refused where that cannot be; `language` is the model's."""
    header, samples = parted(body, _HEADER_BYTES_MAX)
    if len(samples) % SAMPLE_BYTES:
        raise Refused(400, "The samples have to be signed 16-bit numbers.")
    spoken = header.get("language")
    if not isinstance(spoken, str | None):
        raise Refused(400, "`language` has to be a text.", param="language")
    if spoken and language and spoken.lower().partition("-")[0] != language:
        raise Refused(
            400,
            f"This model aligns the language `{language}` alone. Take another `align_model`, or leave it out.",
            param="language",
        )
    rule = header.get("interpolate", "nearest")
    if rule not in _RULES:
        raise Refused(400, f"`interpolate` has to be one of {', '.join(_RULES)}.", param="interpolate")
    segments = _segments(header.get("segments"), len(samples) / SAMPLE_BYTES / SAMPLE_RATE)
    return Order(segments, rule, flag(header, "characters"), samples)


def _segments(found: Any, seconds: float) -> tuple[Segment, ...]:
    if not isinstance(found, list) or not found or len(found) > _SEGMENTS_MAX:
        raise Refused(400, f"`segments` has to be a list of 1 to {_SEGMENTS_MAX} objects.", param="segments")
    segments, chars, before = [], 0, 0.0
    for index, each in enumerate(found):
        segment = _segment(index, each, seconds)
        if segment.start < before:
            raise Refused(400, f"Segment {index} begins before the one in front of it. Sort them.", param="segments")
        before = segment.start
        chars += len(segment.text)
        segments.append(segment)
    if chars > _TEXTS_CHARS_MAX:
        raise Refused(400, f"The texts have more than {_TEXTS_CHARS_MAX} characters.", param="segments")
    return tuple(segments)


def _segment(index: int, found: Any, seconds: float) -> Segment:
    fields: dict[str, Any] = found if isinstance(found, dict) else {}
    start, end, text = (fields.get(name) for name in ("start", "end", "text"))
    if not isinstance(text, str) or not _is_time(start) or not _is_time(end):
        raise Refused(400, f"Segment {index} needs the numbers `start` and `end` and a `text`.", param="segments")
    if len(text) > _TEXT_CHARS_MAX:
        raise Refused(400, f"The text of segment {index} has more than {_TEXT_CHARS_MAX} characters.", param="segments")
    if not 0 <= start <= end <= seconds + _TIME_SLACK_SECONDS:
        raise Refused(400, f"Segment {index} does not lie inside the recording.", param="segments")
    return Segment(min(float(start), seconds), min(float(end), seconds), text)


def _is_time(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def main() -> None:
    """Load the model and serve until SIGTERM."""
    spec, key = read_spec(Spec, "The aligner")
    if min(spec.slots, spec.batch_seconds) < 1:
        refuse_to_start(f"{spec.name} needs at least 1 for slots and batch_seconds.")
    if spec.backend not in {"ctc", "pocketsphinx"}:
        refuse_to_start(f"{spec.name} has an unknown backend. Set `backend` to `ctc` or `pocketsphinx`.")

    def load(loop: asyncio.AbstractEventLoop) -> Service:
        engine = Engine(spec, _backend(spec, loop))
        _say(f"event=ready model={spec.name} backend={spec.backend}")
        return engine

    run(key, load)


def _backend(spec: Spec, loop: asyncio.AbstractEventLoop) -> Backend:
    if spec.backend == "pocketsphinx":
        return SphinxBackend()
    from forebay.engines.aligner_ctc import CtcBackend

    settings = (spec.threads, spec.batch_seconds, spec.oom_cooldown_seconds, spec.rehearse_seconds_max)
    return CtcBackend(Path(spec.model_path), *settings, loop)


if __name__ == "__main__":
    main()
