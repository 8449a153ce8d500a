"""The job kind `chunk`: runs those lines of a chunk that no segment has yet.

It refuses to keep more lines in flight than the replicas of their model can work on, whichever chunks they are from, and
to let go of finished lines: whatever ends an attempt, they are written down first unless the lease is lost.
"""

import asyncio
import itertools
from dataclasses import dataclass
from functools import partial

from forebay.blobs.blobs import Blobs
from forebay.clock import Clock
from forebay.commit_points import reach
from forebay.config import BatchSettings
from forebay.errors import EngineUnavailable, ForebayError, LeaseLost, ModelNotReady, ShuttingDown, StoreUnavailable
from forebay.jobs.kinds import Run
from forebay.jobs.line_runner import LineRunner
from forebay.jobs.lines import LineReader, Place, RunOrder, Turn, Window, unpack_numbers, unpack_places
from forebay.jobs.outcome import Done, Failed, Interruption, Outcome, Snoozed
from forebay.jobs.segments import SegmentStore, SegmentWriter, Unwritten
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import traits_of
from forebay.scheduler.shares import Weights, equal
from forebay.store.batches import Batch, BatchStore
from forebay.store.files import blob_key
from forebay.store.job_records import Job, Lease
from forebay.store.job_state import FINISHED, JobState

_AHEAD = 2  # lines of a model that wait in line, so that no slot is idle between two lines
_PULLING_SECONDS = 15.0  # the wait for a model that is being pulled, or a store that is away
_WAITS = (EngineUnavailable, ModelNotReady, ShuttingDown, StoreUnavailable)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One attempt at a chunk: where its lines come from and where their results go."""

    batch: Batch
    order: RunOrder
    changed: asyncio.Event  # set when another line may go
    window: Window
    turn: Turn
    reader: LineReader
    writer: SegmentWriter


class ChunkWork:
    """Runs the chunks of one worker."""

    def __init__(
        self,
        batches: BatchStore,
        segments: SegmentStore,
        blobs: Blobs,
        lines: LineRunner,
        catalog: Catalog,
        settings: BatchSettings,
        clock: Clock,
        weights: Weights = equal,
    ) -> None:
        self._batches = batches
        self._segments = segments
        self._blobs = blobs
        self._lines = lines
        self._catalog = catalog
        self._settings = settings
        self._clock = clock
        self._weights = weights
        self._unwritten = Unwritten(settings)
        self._windows: dict[str, Window] = {}
        self._turns = itertools.count()

    async def perform(self, lease: Lease, run: Run) -> Outcome:
        """Run what is left of a chunk."""
        reach("chunk.leased")
        attempt = await self._begin(lease, run)
        try:
            trouble = await self._run(attempt)
            if trouble is not None:
                await attempt.writer.flush()
                return _come_back(trouble)
        except asyncio.CancelledError:
            if run.interruption is not Interruption.LEASE_LOST:
                await attempt.writer.flush()
            raise
        except LeaseLost:
            raise
        except ForebayError:
            await attempt.writer.flush()
            raise
        finally:
            await attempt.writer.abandon()
        reach("chunk.finished")
        return Done()

    async def after(self, _job: Job, state: JobState) -> None:
        """Told once an attempt is committed."""
        if state in FINISHED:
            reach("chunk.settled")

    async def _begin(self, lease: Lease, run: Run) -> _Attempt:
        chunk = await self._batches.chunk(lease.id)
        batch = await self._batches.load(chunk.batch_id)
        written = await self._batches.segments(batch.id, chunk.id)
        done = {number for segment in written for number in unpack_numbers(segment.lines)}
        number = max((segment.number for segment in written), default=-1) + 1
        left, model = (place for place in unpack_places(chunk.lines) if place.number not in done), lease.job.model or ""
        return _Attempt(
            batch,
            RunOrder(left, first_alone=traits_of(self._catalog.get(model)).shares_prefixes),
            asyncio.Event(),
            self._window(model),
            Turn(lease.job.priority, lease.job.deadline_at, next(self._turns), lease.job.project_id),
            LineReader(self._blobs, blob_key(batch.input_file_id)),
            SegmentWriter(self._segments, run, batch, number, self._settings, self._clock, self._unwritten),
        )

    def _window(self, model: str) -> Window:
        if model not in self._windows:
            found = self._catalog.get(model)
            self._windows[model] = Window(found.slots * found.processes, _AHEAD, self._weights)
        return self._windows[model]

    async def _run(self, attempt: _Attempt) -> ForebayError | None:
        """Run lines until none is left; why the rest has to wait, if it has to."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(attempt.writer.write())
                await self._run_lines(attempt)
                attempt.writer.close()
        except BaseExceptionGroup as errors:
            error = _first(errors)
            if isinstance(error, _WAITS):
                return error
            raise error from None
        return None

    async def _run_lines(self, attempt: _Attempt) -> None:
        async with asyncio.TaskGroup() as group:
            while not attempt.order.empty:
                await attempt.window.enter(attempt.turn, shares=attempt.order.shares)
                place = attempt.order.take()
                if place is None:
                    attempt.window.leave(attempt.turn, used=False)
                    attempt.changed.clear()
                    await attempt.changed.wait()
                else:
                    running = group.create_task(self._run_line(attempt, place))
                    # Not a `finally` of the line itself: one that is cancelled before its first step has none.
                    running.add_done_callback(partial(_ended, attempt, place))

    async def _run_line(self, attempt: _Attempt, place: Place) -> None:
        def read() -> None:
            attempt.order.read(place)
            attempt.changed.set()

        raw = await attempt.reader.read(place)
        aside = partial(attempt.window.aside, attempt.turn)
        await attempt.writer.add(await self._lines.run(attempt.batch, place, raw, read, aside))


def _ended(attempt: _Attempt, place: Place, _running: "asyncio.Task[None]") -> None:
    attempt.order.ended(place)
    attempt.changed.set()
    attempt.window.leave(attempt.turn)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _come_back(trouble: ForebayError) -> Outcome:
    """A model that cannot be started counts as a failure of the chunk; what will pass by itself does not."""
    if isinstance(trouble, EngineUnavailable):
        return Failed(trouble, retryable=True)
    return Snoozed(0 if isinstance(trouble, ShuttingDown) else _PULLING_SECONDS)
