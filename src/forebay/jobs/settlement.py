"""The end of attempts, and of jobs that never ran, in one transaction: state, parent, webhooks, dead letter.

Attempts that ended well and have nothing of their own to write share a transaction with all others that are there.

It refuses to settle by halves: what hangs on the end of a job is committed with it or not at all. And it keeps nobody
waiting for company: what is there when the last transaction has ended goes into the next.
"""

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from forebay.errors import LeaseLost
from forebay.jobs.kinds import Kind
from forebay.jobs.outcome import Cancelled, Done, Expired, Failed, Outcome, Waiting, Write
from forebay.store.database import Transaction
from forebay.store.dead_letters import DeadLetterStore
from forebay.store.job_records import Job, Lease, Verdict
from forebay.store.job_state import FINISHED, JobState
from forebay.store.jobs import JobStore
from forebay.store.webhooks import NewEvent, WebhookStore

_GROUP_ENDS_MAX = 500


@dataclass(frozen=True, slots=True, eq=False)
class _End:
    """An attempt that ends. `settled` is for one in line: whether a group has settled it."""

    lease: Lease
    verdict: Verdict
    write: Write | None
    settled: "asyncio.Future[bool]" = field(default_factory=asyncio.Future)

    @property
    def shares(self) -> bool:
        """Whether it may go with others: what it writes itself may take long or fail, and is for it alone."""
        return self.verdict.state is JobState.COMPLETED and self.write is None


class Settlement:
    """Writes down how jobs end."""

    def __init__(
        self,
        jobs: JobStore,
        webhooks: WebhookStore,
        dead_letters: DeadLetterStore,
        kinds: Mapping[str, Kind],
    ) -> None:
        self._jobs = jobs
        self._webhooks = webhooks
        self._dead_letters = dead_letters
        self._kinds = kinds
        self._line: list[_End] = []
        self._serving: asyncio.Task[None] | None = None

    async def settle(self, lease: Lease, outcome: Outcome, verdict: Verdict) -> None:
        """Close the attempt of `lease`. Raises LeaseLost if another attempt has the job, StoreUnavailable."""
        end = _End(lease, verdict, _write(outcome))
        if end.shares and await self._settle_with_others(end):
            return
        # Whom its group has left out, or whose group has failed, tries alone and is told the reason alone.
        if not await self._settle([end]):
            raise LeaseLost

    async def end(self, transaction: Transaction, job: Job, verdict: Verdict) -> bool:
        """End a job that nobody runs; whether nobody did."""
        await self._hold_parents(transaction, [job])
        if not await self._jobs.end_available(transaction, job, verdict):
            return False
        await self._follow(transaction, [(job, verdict)])
        return True

    async def wake(self, transaction: Transaction, parent_id: str, children: str) -> None:
        """Let a parent that waits for `children` go on if none is left. The caller holds the parent's row."""
        for kind in self._kinds.values():
            if kind.children == children:
                await self._jobs.wake_parent(transaction, parent_id, children, kind.joins_at)

    # The line of those who share.

    async def _settle_with_others(self, end: _End) -> bool:
        self._line.append(end)
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve(), name="settlement")
        return await end.settled

    async def _serve(self) -> None:
        try:
            while self._line:
                group, self._line = self._line[:_GROUP_ENDS_MAX], self._line[_GROUP_ENDS_MAX:]
                (settled,) = await asyncio.gather(self._settle(group), return_exceptions=True)
                for end in group:
                    if not end.settled.done():  # as it is when whoever waited for it has been cancelled
                        end.settled.set_result(not isinstance(settled, BaseException) and end in settled)
        finally:
            self._serving = None

    # One transaction.

    async def _settle(self, group: Sequence[_End]) -> frozenset[_End]:
        """Settle one end, or several that share; those whose leases still held."""
        async with self._jobs.database.begin() as transaction:
            await self._hold_parents(transaction, [end.lease.job for end in group])
            settled = await self._close(transaction, group)
            for end in settled:
                if end.write is not None:
                    await end.write(transaction)
            await self._follow(transaction, [(end.lease.job, end.verdict) for end in settled])
        return frozenset(settled)

    async def _hold_parents(self, transaction: Transaction, jobs: Iterable[Job]) -> None:
        for parent_id, _ in self._waiting_parents(jobs):
            await self._jobs.lock(transaction, parent_id)

    async def _close(self, transaction: Transaction, group: Sequence[_End]) -> Sequence[_End]:
        """Write down the new states; the ends whose leases still held."""
        if group[0].verdict.state is not JobState.COMPLETED:
            (end,) = group
            await self._jobs.settle(transaction, end.lease, end.verdict)
            return group
        assert not any(end.lease.unless_renewed for end in group), "such a lease is there to give up, not to complete"
        held = await self._jobs.settle_completed(transaction, [end.lease for end in group])
        return [end for end in group if (end.lease.id, end.lease.attempt) in held]

    async def _follow(self, transaction: Transaction, ends: Collection[tuple[Job, Verdict]]) -> None:
        """What hangs on the new states."""
        for job, verdict in ends:
            await self._follow_one(transaction, job, verdict)
        finished = [(job, verdict) for job, verdict in ends if verdict.state in FINISHED]
        for parent_id, children in self._waiting_parents(job for job, _ in finished):
            await self.wake(transaction, parent_id, children)
        await self._webhooks.enqueue(transaction, list(self._events(finished)))

    async def _follow_one(self, transaction: Transaction, job: Job, verdict: Verdict) -> None:
        kind = self._kinds[job.kind]
        if verdict.error is not None:
            code, message = verdict.error
            await self._jobs.note(transaction, job.id, f"job.{verdict.state}", f"{code}: {message}")
        if verdict.state is JobState.WAITING and kind.children is not None:  # it may have no child at all
            await self._jobs.wake_parent(transaction, job.id, kind.children, kind.joins_at)
        if verdict.state is JobState.FAILED and kind.has_dead_letter:
            await self._dead_letters.add_job(transaction, job, verdict)

    def _waiting_parents(self, jobs: Iterable[Job]) -> list[tuple[str, str]]:
        """The parents that wait for these jobs, each with the kind that it waits for, in the order of all who lock."""
        waited_for = (job for job in jobs if self._kinds[job.kind].waits_for_it)
        return sorted({(job.parent_id, job.kind) for job in waited_for if job.parent_id is not None})

    def _events(self, finished: Iterable[tuple[Job, Verdict]]) -> Iterable[NewEvent]:
        for job, verdict in finished:
            event = self._kinds[job.kind].event
            if event is not None:
                told = f"{event}.{verdict.event or verdict.state}"
                yield NewEvent(told, job.id, job.id, job.project_id, job.webhook_url, job.webhook_secret)


def _write(outcome: Outcome) -> Write | None:
    match outcome:
        case Done(write=write) | Failed(write=write) | Cancelled(write=write) | Expired(write=write):
            return write
        case Waiting(write=write):
            return write
        case _:
            return None
