"""The desk: where jobs are handed in, looked at, cancelled and tried again.

It refuses what there is no room for: the number of live jobs is bounded.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from forebay.clock import Clock
from forebay.config import JobSettings
from forebay.errors import Conflict, InsufficientStorage, InvalidRequest, NotFound, Overloaded, StoreUnavailable
from forebay.jobs.kinds import Kind
from forebay.jobs.outcome import Cancelled, verdict
from forebay.jobs.settlement import Settlement
from forebay.store.database import Transaction
from forebay.store.job_records import Job, NewJob
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore

_COUNT_SECONDS = 1.0
_FULL_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Outlook:
    """What can be said of a live job: how many go before it, and how long it will still take, if that is known."""

    queue_position: int | None
    eta_seconds: float | None


UNKNOWN = Outlook(None, None)


class Desk:
    """The front of the back office."""

    def __init__(
        self,
        jobs: JobStore,
        settlement: Settlement,
        kinds: Mapping[str, Kind],
        settings: JobSettings,
        clock: Clock,
    ) -> None:
        self.jobs = jobs
        self._settlement = settlement
        self._kinds = kinds
        self._settings = settings
        self._clock = clock
        self._live = 0
        self._admitted = 0  # since the start
        self._counted_at = float("-inf")

    @property
    def public_kinds(self) -> list[str]:
        """The kinds that callers see; chunks are an inner matter of their batch."""
        return [name for name, kind in self._kinds.items() if not kind.waits_for_it]

    async def check_room(self, count: int = 1) -> None:
        """Raise Overloaded if there are too many live jobs. What other processes add is counted once a second."""
        now = self._clock.monotonic()
        if now - self._counted_at > _COUNT_SECONDS:
            self._counted_at, before = now, self._admitted  # whoever comes during the look does not look as well
            counted = sum((await self.jobs.counts()).values())
            self._live = counted + self._admitted - before
        if self._live + count > self._settings.live_max:
            raise Overloaded(
                "There are too many unfinished jobs. Try again later.",
                code="job_queue_full",
                retry_after_seconds=_FULL_SECONDS,
            )
        self._live += count
        self._admitted += count

    async def submit(self, transaction: Transaction, new: Sequence[NewJob]) -> list[str]:
        """Hand in jobs in the caller's transaction, after `check_room`; their ids."""
        return await self.jobs.insert(transaction, new)

    async def get(self, project_id: str, job_id: str) -> Job:
        """A project's job. Raises NotFound."""
        job = await self.jobs.get(project_id, job_id)
        if job.kind not in self.public_kinds:
            raise NotFound("There is no such job.")
        return job

    async def page(
        self, project_id: str, *, kind: str | None, states: Collection[JobState], after: str | None, limit: int
    ) -> list[Job]:
        """A page of a project's jobs, newest first. Raises NotFound if there is no job `after`, or no such kind."""
        if kind is not None and kind not in self.public_kinds:
            raise InvalidRequest(f"`kind` is one of {', '.join(self.public_kinds)}.", param="kind")
        kinds = self.public_kinds if kind is None else [kind]
        return await self.jobs.list(project_id, kinds=kinds, states=states, after=after, limit=limit)

    def own_pace(self, job: Job) -> Outlook:
        """What a job's own progress says of its end, without a look at the others."""
        done = job.completed + job.failed
        if job.finished or not done or job.started_at is None:
            return UNKNOWN
        spent = max(0.0, self.jobs.now() - job.started_at)
        return Outlook(None, max(0, job.total - done) * spent / done)

    async def outlook(self, job: Job) -> Outlook:
        """When a job gets its turn and when it will be done.

        Until it has made progress that goes by those before it and the rate at which its model was seen to work;
        from then on, by its own pace.
        """
        pace = self.own_pace(job)
        if job.finished or pace.eta_seconds is not None:
            return pace
        position = None if job.state is JobState.RUNNING else await self.jobs.ahead(job)
        rate = None if job.model is None or not job.total else await self.jobs.line_rate(job.model)
        if not rate:
            return Outlook(position, None)
        return Outlook(position, (await self.jobs.lines_ahead(job) + job.total) / rate)

    async def estimate(self, kind: str, model: str, lines: int, priority: int) -> Outlook:
        """The same for a job that is about to be made."""
        rate = await self.jobs.line_rate(model)
        if not rate:
            return UNKNOWN
        return Outlook(None, (await self.jobs.lines_left(kind, model, priority) + lines) / rate)

    async def delete(self, project_id: str, job_id: str) -> None:
        """Remove a finished job and all that hangs on it. Raises NotFound, and Conflict while it is not finished."""
        job = await self.get(project_id, job_id)
        if not await self.jobs.delete(job, self._kinds[job.kind].children):
            raise Conflict(f"The job is {job.state.value}. Cancel it, and delete it once it is finished.")

    async def cancel(self, project_id: str, job_id: str) -> Job:
        """Stop a job: at once if nobody runs it, otherwise as soon as its engines have stopped. Raises NotFound."""
        await self.get(project_id, job_id)
        ended = False
        async with self.jobs.database.begin() as transaction:
            job = await self.jobs.lock(transaction, job_id)
            if job is not None and not job.finished:
                ended = await self._cancel(transaction, job)
        found = await self.jobs.get(project_id, job_id)
        if ended:
            with suppress(StoreUnavailable, InsufficientStorage):  # a sweep will do it
                await self._kinds[found.kind].after(found, found.state)
        return found

    async def _cancel(self, transaction: Transaction, job: Job) -> bool:
        """Whether that has ended it already."""
        kind = self._kinds[job.kind]
        joining = kind.children is not None and job.stage == kind.joins_at
        if joining:
            return False  # its work is done; what is left is to put the results together
        await self.jobs.note(transaction, job.id, "job.cancel_requested")
        if job.state is JobState.AVAILABLE:
            ending = verdict(job, Cancelled(), kind.retry, self.jobs.now())
            return await self._settlement.end(transaction, job, ending)
        if job.state is JobState.WAITING and kind.children is not None:
            await self.jobs.end_available_children(transaction, job.id, kind.children, JobState.CANCELLED)
            await self.jobs.request_cancel(transaction, job.id, children_of=job.id)
            await self._settlement.wake(transaction, job.id, kind.children)
        else:
            await self.jobs.request_cancel(transaction, job.id)
        return False

    async def retry(self, project_id: str, job_id: str) -> Job:
        """Try a job again that was given up, cancelled or too late, with all its attempts before it.

        Raises NotFound, Conflict if it has not ended or has ended well, InvalidRequest for a kind that is not retried.
        """
        job = await self.get(project_id, job_id)
        if not self._kinds[job.kind].has_dead_letter:
            raise InvalidRequest(
                f"A {job.kind} is not tried again as a whole. Requeue its dead letters, or submit a new one.",
                code="not_retryable",
            )
        await self.check_room()
        async with self.jobs.database.begin() as transaction:
            await self.revive(transaction, job)
        return await self.jobs.get(project_id, job_id)

    async def revive(self, transaction: Transaction, job: Job) -> None:
        """The same as part of a transaction, after `check_room`, for a kind that is retried. Raises Conflict."""
        if not await self.jobs.revive(transaction, job):
            raise Conflict(f"The job is {job.state.value}, so there is nothing to try again.")
        await self.jobs.note(transaction, job.id, "job.retried")
