"""The job kind `batch`: checks the input file, makes the chunks, and puts their results together when they have ended.

It refuses to run lines itself, and to show a result file before the batch has ended.
"""

import asyncio
from collections.abc import Sequence

from forebay.blobs.blobs import Blobs
from forebay.clock import Clock, new_id
from forebay.commit_points import reach
from forebay.config import Settings
from forebay.errors import InsufficientStorage, InvalidRequest, NotFound, StoreUnavailable
from forebay.jobs.checking import Check, Index, plan_chunks
from forebay.jobs.joining import Joined, Joiner, Part
from forebay.jobs.kinds import Run
from forebay.jobs.lines import pack_places
from forebay.jobs.outcome import Cancelled, Done, Expired, Failed, Outcome, Snoozed, Waiting
from forebay.jobs.segments import folder
from forebay.replicas.catalog import Catalog
from forebay.store.batches import CHUNK, JOIN, RUN, Batch, BatchStore
from forebay.store.database import Transaction
from forebay.store.dead_letters import DeadLetterStore
from forebay.store.files import FileStore, blob_key
from forebay.store.job_records import Job, Lease, NewJob
from forebay.store.job_state import FINISHED, JobState
from forebay.store.jobs import JobStore

_AWAY_SECONDS = 5.0  # the wait for a store that is away or full
_RATE_LINES_MIN = 20  # fewer say little about the speed of a model


class BatchWork:
    """Works on the batches of one worker."""

    def __init__(
        self,
        jobs: JobStore,
        batches: BatchStore,
        files: FileStore,
        dead_letters: DeadLetterStore,
        blobs: Blobs,
        catalog: Catalog,
        settings: Settings,
        clock: Clock,
    ) -> None:
        self._jobs = jobs
        self._batches = batches
        self._files = files
        self._dead_letters = dead_letters
        self._blobs = blobs
        self._catalog = catalog
        self._settings = settings
        self._clock = clock
        self._joiner = Joiner(batches, blobs, clock)

    async def perform(self, lease: Lease, _run: Run) -> Outcome:
        """Check the file, or join the results."""
        try:
            batch = await self._batches.load(lease.id)
            return await (self._join(batch) if lease.job.stage == JOIN else self._check(batch))
        except (StoreUnavailable, InsufficientStorage):
            return Snoozed(_AWAY_SECONDS)  # the results are worth waiting for

    async def after(self, job: Job, state: JobState) -> None:
        """Remove what a finished batch leaves behind."""
        if state is JobState.WAITING:
            reach("batch.chunks_committed")
        elif state in FINISHED:
            reach("batch.settled")
            await self._clear(job.id)
            reach("batch.swept")

    async def sweep(self, _now: float, limit: int) -> int:
        """Remove what finished batches have left behind where a crash kept `after` from doing so; how many batches."""
        left = set(await self._batches.unswept(limit))
        seen = sorted({key.split("/")[1] async for key in self._blobs.list("segments/")})
        for start in range(0, len(seen), limit):
            some = set(seen[start : start + limit])
            left |= some - await self._batches.live(some)
        for batch_id in sorted(left)[:limit]:
            await self._clear(batch_id)
        return min(len(left), limit)

    async def _clear(self, batch_id: str) -> None:
        await self._blobs.delete_prefix(folder(batch_id))
        try:
            await self._joiner.discard(await self._batches.load(batch_id))
        except NotFound:
            return  # pruned long ago
        await self._batches.sweep(batch_id)

    # Checking.

    async def _check(self, batch: Batch) -> Outcome:
        index = await self._index(batch)
        if index.errors:
            return _refused(index, self._batches, batch)
        # In a thread, since the order of many lines takes longer than requests should wait.
        chunks = await asyncio.to_thread(_cut, index, self._settings.batches.chunk_lines)
        reach("batch.checked")

        async def write(transaction: Transaction) -> None:
            await self._create_chunks(transaction, batch, index, chunks)

        return Waiting(RUN, write)

    async def _index(self, batch: Batch) -> Index:
        check = Check(batch.endpoint, self._catalog.names(), self._settings.batches, self._clock)
        try:
            return await check.run(self._blobs.stream(blob_key(batch.input_file_id)))
        except NotFound:
            gone = {"code": "file_not_found", "message": "The input file was removed.", "param": None, "line": None}
            return Index(errors=[gone])

    async def _create_chunks(
        self, transaction: Transaction, batch: Batch, index: Index, chunks: Sequence[tuple[str, bytes, int]]
    ) -> None:
        job = await self._jobs.lock(transaction, batch.id)
        if job is None or job.cancel_requested_at is not None:
            return  # without chunks it goes on to its end at once
        new = [
            NewJob(
                CHUNK,
                job.project_id,
                id=new_id("chunk"),
                parent_id=job.id,
                priority=job.priority,
                model=model,
                deadline_at=job.deadline_at,
                total=lines,
            )
            for model, _, lines in chunks
        ]
        ids = await self._jobs.insert(transaction, new)
        await self._batches.add_chunks(
            transaction, job.id, [(each, row[1]) for each, row in zip(ids, chunks, strict=True)]
        )
        only = index.models[0] if len(index.models) == 1 else None
        await self._jobs.measure(transaction, job.id, len(index), only)
        await self._batches.begin(transaction, job.id, only, self._jobs.now())

    # Joining.

    async def _join(self, batch: Batch) -> Outcome:
        async with self._jobs.database.begin() as transaction:
            await self._batches.finalize(transaction, batch.id, self._jobs.now())
        batch = await self._batches.load(batch.id)
        joined = await self._joiner.join(batch)
        reach("batch.joined")

        async def write(transaction: Transaction) -> None:
            await self._finish(transaction, batch, joined)

        if batch.job.cancel_requested_at is not None:
            return Cancelled(write)
        return Expired(write) if joined.expired else Done(write)

    async def _finish(self, transaction: Transaction, batch: Batch, joined: Joined) -> None:
        output = await self._add_file(transaction, batch, joined.output, "output")
        errors = await self._add_file(transaction, batch, joined.errors, "errors")
        await self._batches.finish(transaction, batch.id, output, errors)
        await self._jobs.count(transaction, batch.id, failed=joined.missing)
        await self._dead_letters.add_lines(transaction, batch.job, batch.endpoint, batch.input_file_id, joined.lost)
        await self._learn(transaction, batch, joined)

    async def _add_file(self, transaction: Transaction, batch: Batch, part: Part | None, which: str) -> str | None:
        if part is None:
            return None
        keep = batch.output_expires_after_seconds or self._settings.files.batch_keep_seconds
        file = await self._files.create_ready(
            transaction,
            batch.job.project_id,
            file_id=part.file_id,
            filename=f"{batch.id}_{which}.jsonl",
            purpose="batch_output",
            size=part.size,
            sha256=part.sha256,
            keep_seconds=keep,
        )
        return file.id

    async def _learn(self, transaction: Transaction, batch: Batch, joined: Joined) -> None:
        """Remember how fast the model was, for estimates."""
        lines = batch.job.total - joined.missing
        if (
            batch.model is None
            or batch.in_progress_at is None
            or batch.finalizing_at is None
            or lines < _RATE_LINES_MIN
        ):
            return
        seconds = max(batch.finalizing_at - batch.in_progress_at, 0.001)
        await self._batches.learn_rate(transaction, batch.model, lines / seconds)


def _cut(index: Index, chunk_lines: int) -> list[tuple[str, bytes, int]]:
    """Of each chunk the model, the packed places and how many there are."""
    return [(model, pack_places(places), len(places)) for model, places in plan_chunks(index, chunk_lines)]


def _refused(index: Index, batches: BatchStore, batch: Batch) -> Failed:
    async def write(transaction: Transaction) -> None:
        await batches.refuse(transaction, batch.id, index.errors)

    first = index.errors[0]
    where = "" if first["line"] is None else f" (line {first['line']})"
    error = InvalidRequest(f"The input file is not valid: {first['message']}{where}", code=first["code"])
    return Failed(error, retryable=False, write=write)
