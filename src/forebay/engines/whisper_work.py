"""The work of the whisper engine: the chunks of all requests, step after step through one compute process.

It refuses to compute on for who has gone: what waits is dropped at once, and a step in which nobody waits any more is
given a moment to end, then its process is killed and started anew. When memory runs out, no step may have more than half
as many chunks; the budget grows back after a cool-down. Whoever was in a step that crashed is computed again alone, and
fails after the second time.

All of it belongs to the event loop's thread.
"""

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay.engines import whisper_child
from forebay.engines.compute import Failed
from forebay.engines.lived import Lived
from forebay.engines.start import CANNOT_START, OUT_OF_MEMORY
from forebay.engines.whisper_child import Child, Ended
from forebay.engines.whisper_chunks import Chunk
from forebay.engines.whisper_line import ENCODE, GENERATE, Entry, Line, Pace
from forebay.engines.whisper_options import Model, Request
from forebay.speech import SAMPLE_RATE, Segment, segment_from_wire

_GRACE_SECONDS = 1.0
_STEP_SECONDS = 4.0
_PROGRESS_SECONDS = 5.0
_STARTS_MAX = 3
_MISHAPS_MAX = 2
_AGAIN_MAX = 8


@dataclass(slots=True)
class Figures:
    """What the metrics show; sums since the start. Batches are those that were written together."""

    batches: int = 0
    items: int = 0
    requests: int = 0
    audio_seconds: float = 0.0
    wait_seconds: float = 0.0
    step_seconds: float = 0.0
    out_of_memory: int = 0
    cancelled: int = 0
    child_restarts: int = 0


class Listener:
    """What is told of a request while it is worked on."""

    def language(self, language: str, probability: float) -> None:
        """The language, found out from its first chunk."""

    def segments(self, segments: Sequence[Segment]) -> None:
        """The next of its segments."""

    def alive(self) -> None:
        """It is worked on or waits for others, with nothing to show yet."""


@dataclass(slots=True)
class _Job:
    """One request: its chunks, their segments so far, and how many of them are in the step that runs."""

    number: int
    request: Request
    pcm: NDArray[np.int16]
    listener: Listener
    language: str | None
    found: list[list[Segment]]
    open: set[int]
    since: float
    held: list[Entry] = field(default_factory=list)
    told: int = 0
    in_step: int = 0
    waited: bool = False
    gone: bool = False
    error: Failed | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ended(self) -> bool:
        return self.told == len(self.found) or self.error is not None


class Work:
    """The compute process and what waits for it. `start` before anything else."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        chunks_at_once: int,
        encode_at_once: int,
        cooldown_seconds: float,
        hung_seconds: float,
    ) -> None:
        self.figures = Figures()
        self.budget = chunks_at_once
        self._lived = Lived()
        self._spec = spec
        self._chunks_at_once = chunks_at_once
        self._encode_at_once = encode_at_once
        self._cooldown_seconds = cooldown_seconds
        self._hung_seconds = hung_seconds
        self._moved = 0.0
        self._halved_at = 0.0
        self._pace = Pace()
        self._line = Line(self._most)
        self._jobs: dict[int, _Job] = {}
        self._numbers = itertools.count(1)
        self._forget: list[int] = []
        self._arrived = asyncio.Event()
        self._step: list[Entry] = []
        self._child: Child

    async def start(self) -> Model:
        """Load the model and begin to work. Raises Ended."""
        self._child = await whisper_child.start({**self._spec, "warm_up": True}, self._lived)
        self._worker = asyncio.create_task(self._work())
        self._teller = asyncio.create_task(self._tell_of_life())
        for each in (self._worker, self._teller):
            each.add_done_callback(_die)
        return self._child.model

    @property
    def waiting(self) -> int:
        """Chunks that no step has now."""
        return self._line.waiting + sum(len(job.held) for job in self._jobs.values())

    async def run(self, request: Request, pcm: NDArray[np.int16], chunks: Sequence[Chunk], listener: Listener) -> None:
        """Write what is said in `chunks`. Cancelled, it returns when the compute process has none of them. Raises Failed."""
        job = self._admit(request, pcm, chunks, listener)
        try:
            await self._until_ended(job)
        finally:
            job.gone = True
            self._drop(job)
            if not job.ended:
                self.figures.cancelled += 1
            try:
                await self._out_of_step(job)
            finally:  # it raises when whoever waits is cancelled again
                del self._jobs[job.number]
        if job.error is not None:
            raise job.error

    def _admit(self, request: Request, pcm: NDArray[np.int16], chunks: Sequence[Chunk], listener: Listener) -> _Job:
        number = next(self._numbers)
        now = self._lived.seconds()
        job = _Job(number, request, pcm, listener, request.language, [[] for _ in chunks], set(range(len(chunks))), now)
        self._jobs[number] = job
        self._line.join(number, sum(chunk.samples for chunk in chunks))
        entries = [Entry(next(self._numbers), number, place, chunk, place == 0) for place, chunk in enumerate(chunks)]
        ready = 1 if job.language is None else len(entries)
        self._line.add(entries[:ready])
        job.held = entries[ready:]  # they wait until it is known in which language
        self._arrived.set()
        return job

    async def _until_ended(self, job: _Job) -> None:
        while not job.ended:
            job.changed.clear()
            await job.changed.wait()

    async def _tell_of_life(self) -> None:
        """Tell everybody now and then that there is progress: on a busy machine their own turn may be long in coming.

        A step that takes too long is none: who waits for it is to find out. It sleeps by the clock all the
        time, as the clock wants somebody to.
        """
        while True:
            await self._lived.sleep(min(_PROGRESS_SECONDS, self._hung_seconds / 4))
            if self._lived.seconds() - self._moved < self._hung_seconds:
                for job in self._jobs.values():
                    if not job.ended and not job.gone:
                        job.listener.alive()

    def _drop(self, job: _Job) -> None:
        """Let nothing of a job wait, and see to it that no step runs for nobody."""
        self._forget += (entry.number for entry in self._line.leave(job.number))
        job.held.clear()
        step = self._step
        if step and all(self._jobs[entry.request].gone for entry in step):
            asyncio.get_running_loop().call_later(_GRACE_SECONDS, self._kill, step)

    def _kill(self, step: list[Entry]) -> None:
        if self._step is step:
            self._child.kill()

    async def _out_of_step(self, job: _Job) -> None:
        """Wait until no step holds a chunk of the job, however often whoever waits is cancelled."""
        cancelled = False
        while job.in_step:
            job.changed.clear()
            try:
                await job.changed.wait()
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError

    def _most(self, stage: str) -> int:
        """How many chunks may be in a step now; after a shortage that doubles once in each cool-down."""
        now = self._lived.seconds()
        if self.budget < self._chunks_at_once and now - self._halved_at >= self._cooldown_seconds:
            self.budget = min(2 * self.budget, self._chunks_at_once)
            self._halved_at = now
        limit = min(self.budget, self._encode_at_once) if stage == ENCODE else self.budget
        return self._pace.most(stage, limit, _STEP_SECONDS)

    async def _work(self) -> None:
        while True:
            entries = self._line.take()
            if entries:
                await self._compute(entries)
            else:
                self._arrived.clear()
                await self._arrived.wait()

    async def _compute(self, entries: list[Entry]) -> None:
        """One step. Nothing may be awaited between `take` and this."""
        begun = self._moved = self._lived.seconds()
        stage = entries[0].stage
        self._note(entries, begun)
        self._step = entries
        try:
            answer = await self._child.ask(*self._message(stage, entries))
        except Ended as ended:
            self._leave_step(entries)
            await self._child_ended(entries, ended.code)
            return
        self._leave_step(entries)
        if "error" in answer:
            self._mishap(entries, answer["error"], str(answer.get("reason", "")))
            return
        seconds = self._lived.seconds() - begun
        self.figures.step_seconds += seconds
        if not entries[0].alone:
            self._pace.note(
                stage, len(entries), min(seconds, answer["seconds"])
            )  # it does not know when it stood still
        for entry, told in zip(entries, answer["chunks"], strict=True):
            self._take(entry, told)

    def _message(self, stage: str, entries: Sequence[Entry]) -> tuple[dict[str, Any], bytes]:
        forget, self._forget = self._forget, []
        if stage != ENCODE:
            return {"do": stage, "ids": [entry.number for entry in entries], "forget": forget}, b""
        chunks, sound = [], []
        for entry in entries:
            job = self._jobs[entry.request]
            request = job.request
            chunks.append(
                {
                    "id": entry.number,
                    "samples": entry.chunk.samples,
                    "task": request.task,
                    "language": job.language,
                    "words": request.words or request.options.logprobs,
                    "options": request.decoding(first=entry.first),
                }
            )
            sound.append(entry.chunk.cut(job.pcm).tobytes())
        return {"do": ENCODE, "chunks": chunks, "forget": forget}, b"".join(sound)

    def _note(self, entries: Sequence[Entry], begun: float) -> None:
        figures = self.figures
        if entries[0].stage == GENERATE:
            figures.batches += 1
            figures.items += len(entries)
        for entry in entries:
            job = self._jobs[entry.request]
            job.in_step += 1
            if not job.waited:
                job.waited = True
                figures.wait_seconds += begun - job.since
                figures.requests += 1

    def _leave_step(self, entries: Sequence[Entry]) -> None:
        self._step = []
        self._moved = self._lived.seconds()
        for entry in entries:
            job = self._jobs[entry.request]
            job.in_step -= 1
            job.changed.set()

    def _take(self, entry: Entry, told: Mapping[str, Any]) -> None:
        """What a step has told of one chunk."""
        job = self._jobs[entry.request]
        if job.gone or job.error is not None:
            self._forget.append(entry.number)
            return
        if "language" in told and job.language is None:
            self._know_language(job, told["language"], told["probability"])
        if told["next"] != "done":
            entry.stage, entry.key, entry.alone = told["next"], told["key"], told.get("alone", False)
            self._line.add([entry])
            return
        self._forget.append(entry.number)
        job.found[entry.place] += (entry.chunk.placed(segment_from_wire(each)) for each in told["segments"])
        done = entry.chunk.samples
        if told["rest"] is not None and entry.again < _AGAIN_MAX:
            rest = entry.chunk.rest(told["rest"])
            done -= rest.samples
            self._line.add([Entry(next(self._numbers), job.number, entry.place, rest, again=entry.again + 1)])
        else:
            job.open.discard(entry.place)
        self._line.finished(job.number, done)
        self.figures.audio_seconds += done / SAMPLE_RATE
        self._tell(job)

    def _know_language(self, job: _Job, language: str, probability: float) -> None:
        job.language = language
        self._line.add(job.held)
        job.held = []
        job.listener.language(language, probability)

    def _tell(self, job: _Job) -> None:
        """Hand on the segments of the chunks that are done, in order."""
        while job.told < len(job.found) and job.told not in job.open:
            if job.found[job.told]:
                job.listener.segments(job.found[job.told])
            job.told += 1
        job.changed.set()

    def _mishap(self, entries: list[Entry], code: str, reason: str) -> None:
        """A step failed, and the process lives on."""
        if code == "out_of_memory":
            self._shrink(len(entries))
        else:
            _suspect(entries)
        self._again(entries, code, reason)

    def _shrink(self, count: int) -> None:
        """Let no step have more than half as many chunks as one for which there was not enough memory."""
        self.figures.out_of_memory += 1
        self._halved_at = self._lived.seconds()
        budget = max(1, min(self.budget, count // 2))
        if budget < self.budget:
            self.budget = budget
            sys.stderr.write(f"event=batch_halved budget_chunks={budget}\n")

    async def _child_ended(self, entries: list[Entry], code: int) -> None:
        """The process ended, by us or by itself; have a new one."""
        self.figures.child_restarts += 1
        self._forget = []
        for entry in entries:
            entry.begin_again()
        self._line.begin_again()
        if self._child.killed:
            self._again(entries, "", "")
        else:
            sys.stderr.write(f"event=compute_ended code={code} chunks={len(entries)}\n")
            if code in (-signal.SIGKILL, OUT_OF_MEMORY):  # by the kernel, when memory was short
                self._shrink(len(entries))
            _suspect(entries)
            self._again(entries, "engine_error", f"the compute process ended with {code}")
        await self._start_again()

    def _again(self, entries: Iterable[Entry], code: str, reason: str) -> None:
        """Let chunks wait again; what has failed twice alone fails its request."""
        entries = list(entries)
        if len(entries) == 1 and code:
            entries[0].mishaps += 1
        for entry in entries:
            job = self._jobs[entry.request]
            if job.gone:
                self._forget.append(entry.number)
            elif entry.mishaps >= _MISHAPS_MAX:
                self._forget.append(entry.number)
                job.error = Failed(_MESSAGES[code], code, reason)
                job.changed.set()
            else:
                self._line.add([entry])

    async def _start_again(self) -> None:
        for number in range(_STARTS_MAX):
            try:
                self._child = await whisper_child.start({**self._spec, "warm_up": False}, self._lived)
            except Ended as ended:
                sys.stderr.write(f"event=compute_not_started code={ended.code} attempt={number + 1}\n")
                code = ended.code
            else:
                return
        os._exit(code if code in (CANNOT_START, OUT_OF_MEMORY) else 1)


_MESSAGES = {
    "out_of_memory": "This recording needs more memory than there is.",
    "engine_error": "The engine failed on this recording.",
}


def _suspect(entries: Iterable[Entry]) -> None:
    for entry in entries:
        entry.suspect = True


def _die(worker: "asyncio.Task[None]") -> None:
    """End the process: an engine whose worker has ended would let everybody wait for ever."""
    if not worker.cancelled():
        worker.print_stack(file=sys.stderr)
        os._exit(1)
