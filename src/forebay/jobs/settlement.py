"""The end of an attempt, or of a job that never ran, in one transaction: state, parent, webhooks, dead letter.

It refuses to settle by halves: what hangs on the end of a job is committed with it or not at all.
"""

from collections.abc import Mapping

from forebay.jobs.kinds import Kind
from forebay.jobs.outcome import Cancelled, Done, Expired, Failed, Outcome, Waiting, Write
from forebay.store.database import Transaction
from forebay.store.dead_letters import DeadLetterStore
from forebay.store.job_state import FINISHED, JobState
from forebay.store.jobs import Job, JobStore, Lease, Verdict
from forebay.store.webhooks import WebhookStore


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

    async def settle(self, lease: Lease, outcome: Outcome, verdict: Verdict) -> None:
        """Close the attempt of `lease`. Raises LeaseLost if another attempt has the job, StoreUnavailable."""
        async with self._jobs.database.begin() as transaction:
            await self._hold_parent(transaction, lease.job)
            await self._jobs.settle(transaction, lease, verdict)
            write = _write(outcome)
            if write is not None:
                await write(transaction)
            await self._follow(transaction, lease.job, verdict)

    async def end(self, transaction: Transaction, job: Job, verdict: Verdict) -> bool:
        """End a job that nobody runs; whether nobody did."""
        await self._hold_parent(transaction, job)
        if not await self._jobs.end_available(transaction, job, verdict):
            return False
        await self._follow(transaction, job, verdict)
        return True

    async def _hold_parent(self, transaction: Transaction, job: Job) -> None:
        if self._kinds[job.kind].waits_for_it and job.parent_id is not None:
            await self._jobs.lock(transaction, job.parent_id)

    async def _follow(self, transaction: Transaction, job: Job, verdict: Verdict) -> None:
        """What hangs on the new state of `job`."""
        kind = self._kinds[job.kind]
        if verdict.error is not None:
            code, message = verdict.error
            await self._jobs.note(transaction, job.id, f"job.{verdict.state}", f"{code}: {message}")
        if verdict.state not in FINISHED:
            await self._join_if_childless(transaction, job, verdict.state)
            return
        await kind.on_finished(transaction, job, verdict.state)
        if kind.waits_for_it and job.parent_id is not None:
            await self.wake(transaction, job.parent_id, kind.name)
        if kind.has_dead_letter and verdict.state is JobState.FAILED:
            await self._dead_letters.add_job(transaction, job, verdict)
        if kind.event is not None:
            await self._webhooks.enqueue(
                transaction,
                job_id=job.id,
                project_id=job.project_id,
                event_type=f"{kind.event}.{verdict.state}",
                object_id=job.id,
                webhook_url=job.webhook_url,
                webhook_secret=job.webhook_secret,
            )

    async def _join_if_childless(self, transaction: Transaction, job: Job, state: JobState) -> None:
        kind = self._kinds[job.kind]
        if state is JobState.WAITING and kind.children is not None:
            await self._jobs.wake_parent(transaction, job.id, kind.children, kind.joins_at)

    async def wake(self, transaction: Transaction, parent_id: str, children: str) -> None:
        """Let a parent that waits for `children` go on if none is left. The caller holds the parent's row."""
        for kind in self._kinds.values():
            if kind.children == children:
                await self._jobs.wake_parent(transaction, parent_id, children, kind.joins_at)


def _write(outcome: Outcome) -> Write | None:
    match outcome:
        case Done(write=write) | Failed(write=write) | Cancelled(write=write) | Expired(write=write):
            return write
        case Waiting(write=write):
            return write
        case _:
            return None
