"""Speech to text with a Whisper model behind HTTP, in a process of its own with one more to compute.

It refuses what the model cannot do, naming the parameter, and it opens no recordings: it is given samples.
"""

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay.engines import reports
from forebay.engines.compute import Failed
from forebay.engines.connection import Answer, Refused, Route, Visit
from forebay.engines.reports import one_line
from forebay.engines.serving import Service, run
from forebay.engines.start import CANNOT_START, OUT_OF_MEMORY, check_types, read_spec, refuse_to_start
from forebay.engines.threads import cores
from forebay.engines.vad import Vad, regions
from forebay.engines.whisper_child import Ended
from forebay.engines.whisper_chunks import Chunk, Region, collect, consumed, quietest, until, windows
from forebay.engines.whisper_options import Model, Request, read
from forebay.engines.whisper_work import Listener, Work
from forebay.speech import SAMPLE_RATE, Segment, segment_to_wire

_ENCODE_AT_ONCE_CPU = 2  # more are no faster
_FINAL_SECONDS = 5
_VAD_THREADS = 2

_say = partial(reports.say, "whisper")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How this engine is set up, from FOREBAY_ENGINE_SPEC."""

    name: str
    model_path: str
    slots: int = 1
    device: str = "cpu"
    device_index: int = 0
    compute_type: str = "auto"
    threads: int = 0
    chunks_at_once: int = 8
    oom_cooldown_seconds: float = 300.0
    hung_seconds: float = 120.0  # a step that takes longer is no progress any more
    rehearse: bool = False  # a prompt may ask for mishaps: [[crash]], [[hang]], [[refuse]], [[out of memory]]

    def __post_init__(self) -> None:
        check_types(self)

    def for_compute(self) -> dict[str, Any]:
        """What the compute process has to know."""
        numbers = self.compute_type
        if numbers == "auto":
            numbers = "int8" if self.device == "cpu" else "float16"
        return {
            "name": self.name,
            "model_path": self.model_path,
            "device": self.device,
            "device_index": self.device_index,
            "compute_type": numbers,
            "threads": self.threads or cores(),
            "rehearse": self.rehearse,
        }


@dataclass(frozen=True, slots=True)
class _Plan:
    """What of a stretch is worked on: chunks with speech, the regions that they come from, and up to where that is."""

    chunks: list[Chunk]
    speech: list[Region]
    consumed: int


class Engine:
    """The routes of one loaded model. Made in the loading thread; the routes run in the event loop."""

    def __init__(self, spec: Spec, loop: asyncio.AbstractEventLoop) -> None:
        self._spec = spec
        self._vad = Vad()
        self._vad.probabilities(np.zeros(SAMPLE_RATE, np.int16))
        self._threads = ThreadPoolExecutor(_VAD_THREADS, "vad")
        self._visits = 0
        self._work, self.model = asyncio.run_coroutine_threadsafe(self._start(), loop).result()

    async def _start(self) -> tuple[Work, Model]:
        spec = self._spec
        encode_at_once = _ENCODE_AT_ONCE_CPU if spec.device == "cpu" else spec.chunks_at_once
        limits = spec.oom_cooldown_seconds, spec.hung_seconds
        work = Work(spec.for_compute(), spec.chunks_at_once, encode_at_once, *limits)
        try:
            return work, await work.start()
        except Ended as ended:  # it has said why
            os._exit(ended.code if ended.code in (CANNOT_START, OUT_OF_MEMORY) else 1)

    @property
    def routes(self) -> Mapping[tuple[str, str], Route]:
        """What this engine answers."""
        return {
            ("GET", "/slots"): self._slots,
            ("GET", "/metrics"): self._metrics,
            ("POST", "/v1/audio/transcriptions"): self._transcribe,
        }

    async def _transcribe(self, visit: Visit) -> Answer:
        begun, samples, ended, reason = time.monotonic(), 0, "cancelled", ""
        self._visits += 1
        try:
            request = read(visit.body, self.model)
            pcm = np.frombuffer(request.samples, "<i2")
            samples = len(pcm)
            plan = await self._planned(request, pcm)
            await self._answer(visit, request, pcm, plan)
            ended = "finished"
        except Failed as failed:
            ended, reason = "failed", f" reason={one_line(failed.reason)}"
            raise
        except Refused as refused:
            ended, reason = "refused", f" reason={one_line(str(refused))}"
            raise
        finally:
            self._visits -= 1
            seconds, audio = time.monotonic() - begun, samples / SAMPLE_RATE
            _say(f"event={ended} {visit.ids} audio_seconds={audio:.2f} seconds={seconds:.4f}{reason}")
        return b""

    async def _answer(self, visit: Visit, request: Request, pcm: NDArray[np.int16], plan: _Plan) -> None:
        teller = _Teller(visit)
        if request.language is not None:
            teller.language(request.language, 1.0)
        await self._work.run(request, pcm, plan.chunks, teller)
        speech = [[round(begin / SAMPLE_RATE, 3), round(end / SAMPLE_RATE, 3)] for begin, end in plan.speech]
        teller.tell({"type": "done", "consumed": plan.consumed, "speech": speech})

    async def _planned(self, request: Request, pcm: NDArray[np.int16]) -> _Plan:
        """What to work on. Cancelled, it returns when no thread is busy with that."""
        plan = self._threads.submit(self._plan, request, pcm)
        try:
            return await asyncio.wrap_future(plan)
        except asyncio.CancelledError:
            if not plan.cancel():
                await asyncio.wait([asyncio.wrap_future(plan)])
            raise

    def _plan(self, request: Request, pcm: NDArray[np.int16]) -> _Plan:
        """Find out what to work on, in a thread."""
        samples, longest = len(pcm), request.options.chunk_seconds * SAMPLE_RATE
        if not request.options.vad:
            end = samples if request.last else _quiet_end(pcm)
            return _Plan(windows(pcm[:end], longest), [(0, end)] if end else [], end)
        probabilities = self._vad.probabilities(pcm)
        options = request.options.regions()
        end = samples
        if not request.last:
            end = consumed(probabilities, options.offset, samples) or _quiet_end(pcm)
        speech = until(regions(probabilities, options, samples), end)
        return _Plan(collect(speech, longest), _joined(speech), end)

    async def _slots(self, visit: Visit) -> Answer:
        return reports.slots(self._spec.slots, self._visits)

    async def _metrics(self, visit: Visit) -> Answer:
        now = {
            "items_waiting": self._work.waiting,
            "requests_running": self._visits,
            "batch_budget_chunks": self._work.budget,
        }
        return reports.metrics(asdict(self._work.figures), **now)


class _Teller(Listener):
    """Writes records for one visit."""

    def __init__(self, visit: Visit) -> None:
        self._visit = visit

    def tell(self, record: Mapping[str, Any]) -> None:
        self._visit.tell(json.dumps(record, ensure_ascii=False).encode())

    def language(self, language: str, probability: float) -> None:
        self.tell({"type": "language", "language": language, "probability": round(probability, 4)})

    def segments(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            self.tell({"type": "segment", **segment_to_wire(segment)})

    def alive(self) -> None:
        self._visit.tell(b"")


def _quiet_end(pcm: NDArray[np.int16]) -> int:
    """Where a stretch without a silence may end: where its last seconds are quietest; a short one as a whole."""
    final = len(pcm) - _FINAL_SECONDS * SAMPLE_RATE
    return len(pcm) if final < len(pcm) // 2 else quietest(pcm, final, len(pcm))


def _joined(speech: Sequence[Region]) -> list[Region]:
    """Regions that touch one another as one."""
    found: list[Region] = []
    for begin, end in speech:
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return found


def main() -> None:
    """Load the model and serve until SIGTERM."""
    spec, key = read_spec(Spec, "The engine")
    if min(spec.slots, spec.chunks_at_once) < 1:
        refuse_to_start(f"{spec.name} needs at least 1 for slots and chunks_at_once.")

    def load(loop: asyncio.AbstractEventLoop) -> Service:
        engine = Engine(spec, loop)
        _say(f"event=ready model={spec.name} device={spec.device} languages={len(engine.model.languages)}")
        return engine

    run(key, load)


if __name__ == "__main__":
    main()
