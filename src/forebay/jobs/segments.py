"""The results of a chunk on their way to the store: gathered, written as a blob, committed with the states of their lines.

It refuses to let a worker keep more than one segment of results unwritten, to commit anything once the lease is lost, and
to be cut in two by a cancellation: a commit that has begun comes to its end.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from forebay.blobs.blobs import Blobs
from forebay.clock import Clock
from forebay.commit_points import reach
from forebay.config import BatchSettings
from forebay.errors import InsufficientStorage, LeaseLost, StoreUnavailable
from forebay.inference import Usage
from forebay.jobs.kinds import Run
from forebay.jobs.lines import pack_numbers
from forebay.jobs.outcome import Interruption
from forebay.metering.jobs import JobMeter
from forebay.metering.meter import Reservation
from forebay.quotas import Account, Use
from forebay.store.batches import Batch, BatchStore, Segment
from forebay.store.dead_letters import DeadLetterStore, LostLine
from forebay.store.jobs import JobStore

_AGAIN_SECONDS = 0.5
_AGAIN_SECONDS_MAX = 10.0


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one line: its line of the output file, or of the error file with its dead letter."""

    number: int
    line: bytes
    usage: Usage | None = None
    lost: LostLine | None = None
    used: "Used | None" = None

    def release(self) -> None:
        """It will not be written."""
        if self.used is not None:
            self.used.reservation.release()


@dataclass(frozen=True, slots=True)
class Used:
    """What a line has used, of what was reserved for it."""

    reservation: Reservation
    use: Use


@dataclass(slots=True)
class _Draft:
    """A segment that is about to be written."""

    segment: Segment
    results: Sequence[Result]
    output: bytes
    errors: bytes
    lost: list[LostLine] = field(default_factory=list)

    @property
    def used(self) -> list[tuple[Account, Use]]:
        found = [result.used for result in self.results if result.used is not None]
        return [(each.reservation.account, each.use) for each in found]

    @property
    def usage(self) -> Usage:
        used = [result.usage for result in self.results if result.usage is not None]
        return Usage(
            sum(usage.prompt_tokens for usage in used),
            sum(usage.completion_tokens for usage in used),
            sum(usage.cached_tokens for usage in used),
        )


class SegmentStore:
    """Writes segments: the bytes first, then one transaction that names them."""

    def __init__(
        self,
        jobs: JobStore,
        batches: BatchStore,
        dead_letters: DeadLetterStore,
        blobs: Blobs,
        meter: JobMeter,
        clock: Clock,
    ) -> None:
        self._jobs = jobs
        self._batches = batches
        self._dead_letters = dead_letters
        self._blobs = blobs
        self._meter = meter
        self._clock = clock

    async def write(self, run: Run, batch: Batch, number: int, results: Sequence[Result]) -> None:
        """Make a segment durable, as often as it takes while the stores are away. Raises LeaseLost."""
        draft = _draft(run, batch, number, results)
        pause = _AGAIN_SECONDS
        while True:
            if run.interruption is Interruption.LEASE_LOST:
                raise LeaseLost
            try:
                await self._store(draft)
                reach("chunk.segment_written")
                await self._commit(run, batch, draft)
                run.progressed = True
                _settle(results)
                reach("chunk.segment_committed")
            except (StoreUnavailable, InsufficientStorage):
                await self._clock.sleep(self._clock.jitter(pause))
                pause = min(pause * 2, _AGAIN_SECONDS_MAX)
            else:
                return

    async def _store(self, draft: _Draft) -> None:
        if draft.segment.output_key is not None:
            await self._blobs.put(draft.segment.output_key, draft.output)
        if draft.segment.error_key is not None:
            await self._blobs.put(draft.segment.error_key, draft.errors)

    async def _commit(self, run: Run, batch: Batch, draft: _Draft) -> None:
        async with self._jobs.database.begin() as transaction:
            await self._jobs.lock(transaction, batch.id)
            if await self._batches.has_segment(transaction, draft.segment):
                return  # the answer to an earlier commit was lost on its way
            failed = len(draft.lost)
            await self._jobs.count(transaction, batch.id, completed=len(draft.results) - failed, failed=failed)
            await self._jobs.fence(transaction, run.lease)
            await self._batches.add_segment(transaction, draft.segment, draft.usage)
            await self._dead_letters.add_lines(transaction, batch.job, batch.endpoint, batch.input_file_id, draft.lost)
            await self._meter.write(transaction, draft.used)


def _settle(results: Sequence[Result]) -> None:
    for result in results:
        if result.used is not None:
            result.used.reservation.settled_elsewhere(result.used.use)


def _draft(run: Run, batch: Batch, number: int, results: Sequence[Result]) -> _Draft:
    output = b"".join(result.line for result in results if result.lost is None)
    errors = b"".join(result.line for result in results if result.lost is not None)
    key = f"{folder(batch.id)}{run.lease.id}/{run.lease.attempt}-{number}"
    segment = Segment(
        chunk_id=run.lease.id,
        number=number,
        batch_id=batch.id,
        lines=pack_numbers(result.number for result in results),
        output_key=f"{key}.out" if output else None,
        output_bytes=len(output),
        error_key=f"{key}.err" if errors else None,
        error_bytes=len(errors),
    )
    return _Draft(segment, results, output, errors, [result.lost for result in results if result.lost is not None])


def folder(batch_id: str) -> str:
    """Where the segments of a batch are."""
    return f"segments/{batch_id}/"


class Unwritten:
    """The results of one worker that no segment has yet, over all its chunks: what a crash would make run again.

    It refuses more than one segment of them: whoever brings a further one waits. From half a segment on, the writer
    that has most is told to write.
    """

    def __init__(self, settings: BatchSettings) -> None:
        self._lines_max = settings.segment_lines
        self._bytes_max = 2 * settings.segment_bytes
        self._writers: set[SegmentWriter] = set()
        self._room = asyncio.Event()

    async def room(self) -> None:
        """Wait until there is room for one more."""
        while self._fill(lambda writer: (writer.lines, writer.bytes)) >= 1:
            self._room.clear()
            await self._room.wait()

    def added(self, writer: "SegmentWriter") -> None:
        """Told by a writer that it has one more."""
        self._writers.add(writer)
        self._relieve()

    def written(self, writer: "SegmentWriter") -> None:
        """Told by a writer that it has fewer, or that it gives up what it has."""
        if not writer.lines:
            self._writers.discard(writer)
        self._room.set()
        self._relieve()

    def _relieve(self) -> None:
        if self._fill(lambda writer: (writer.idle_lines, writer.idle_bytes)) >= 1 / 2:
            max(self._writers, key=lambda writer: (writer.idle_lines, writer.idle_bytes)).hurry()

    def _fill(self, of: "Callable[[SegmentWriter], tuple[int, int]]") -> float:
        counts = [of(writer) for writer in self._writers]
        lines, size = sum(each[0] for each in counts), sum(each[1] for each in counts)
        return max(lines / self._lines_max, size / self._bytes_max)


class SegmentWriter:
    """Collects the results of one attempt at a chunk and writes them when it is told to, or after a while."""

    def __init__(
        self,
        store: SegmentStore,
        run: Run,
        batch: Batch,
        number: int,
        settings: BatchSettings,
        clock: Clock,
        unwritten: Unwritten,
    ) -> None:
        self._store = store
        self._run = run
        self._batch = batch
        self._number = number
        self._settings = settings
        self._clock = clock
        self._unwritten = unwritten
        self._results: list[Result] = []
        self._closed = False
        self._some, self._enough = asyncio.Event(), asyncio.Event()
        self._writing: asyncio.Task[None] | None = None
        self._taken = 0  # how many results are being written
        self._taken_bytes = 0
        self.bytes = 0

    @property
    def lines(self) -> int:
        """Results that are not written."""
        return len(self._results)

    @property
    def idle_lines(self) -> int:
        """Results that are not being written either."""
        return len(self._results) - self._taken

    @property
    def idle_bytes(self) -> int:
        """Their size."""
        return self.bytes - self._taken_bytes

    async def add(self, result: Result) -> None:
        """Hand in a result; waits while a whole segment is not written."""
        try:
            await self._unwritten.room()
        except asyncio.CancelledError:
            result.release()
            raise
        self._results.append(result)
        self.bytes += len(result.line)
        self._some.set()
        self._unwritten.added(self)

    def hurry(self) -> None:
        """Write what is there, without waiting for more."""
        self._enough.set()

    def close(self) -> None:
        """Nothing more will come."""
        self._closed = True
        self._some.set()
        self._enough.set()

    async def write(self) -> None:
        """Write segments until it is closed and everything is written. Raises LeaseLost."""
        while True:
            await self._some.wait()
            if not self._results:
                return
            await self._wait_for_enough()
            await self._write_one()

    async def flush(self) -> None:
        """After an interruption: finish what is being written, and write the rest. Raises LeaseLost."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
            self._writing.result()
            self._written()
        while self._results:
            await self._write_one()

    async def abandon(self) -> None:
        """The attempt is over: write nothing more, and give up what is left."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait([self._writing])
            if not self._writing.cancelled():
                with suppress(LeaseLost):  # which may be why it is abandoned
                    self._writing.result()
        # Whether those that were being written are in the database is not known; the next look at it tells.
        _settle(self._results[: self._taken])
        for result in self._results:
            result.release()
        self._results.clear()
        self._taken = self._taken_bytes = self.bytes = 0
        self._unwritten.written(self)

    async def _wait_for_enough(self) -> None:
        try:
            async with self._clock.timeout(self._settings.segment_seconds):
                await self._enough.wait()
        except TimeoutError:
            pass  # long enough for those that are there

    async def _write_one(self) -> None:
        taken = self._results[: self._settings.segment_lines]
        self._taken, self._taken_bytes = len(taken), sum(len(result.line) for result in taken)
        if not self._closed:
            self._enough.clear()
        self._writing = asyncio.create_task(self._store.write(self._run, self._batch, self._number, taken))
        # On a cancellation the write goes on; `flush` waits for it and `abandon` ends it.
        await asyncio.shield(self._writing)
        self._written()

    def _written(self) -> None:
        self._writing = None
        self._number += 1
        self.bytes -= self._taken_bytes
        del self._results[: self._taken]
        self._taken = self._taken_bytes = 0
        if not self._results and not self._closed:
            self._some.clear()
        self._unwritten.written(self)
