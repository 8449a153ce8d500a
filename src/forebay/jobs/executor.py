"""One attempt at one job, as a row of small steps: perform -> outcome -> verdict -> settle.

It refuses to write anything once the lease is lost, and to lose an outcome because the database is away or full for
a while.
"""

import asyncio
from dataclasses import replace

from forebay.clock import Clock
from forebay.errors import ForebayError, InsufficientStorage, LeaseLost, ServerError, StoreUnavailable
from forebay.jobs.kinds import Kind, Run
from forebay.jobs.outcome import Failed, Interruption, Outcome, Snoozed, interrupted, verdict
from forebay.jobs.settlement import Settlement
from forebay.store.job_records import Lease
from forebay.store.job_state import JobState
from forebay.store.jobs import JobStore
from forebay.telemetry import Log, Metrics

_SETTLE_PAUSE_SECONDS = 0.5
_AWAY_SECONDS = 1.0  # the wait for a store that was away or full in the middle of an attempt


class Executor:
    """Makes attempts."""

    def __init__(self, jobs: JobStore, settlement: Settlement, clock: Clock, metrics: Metrics) -> None:
        self._jobs = jobs
        self._settlement = settlement
        self._clock = clock
        self._metrics = metrics
        self._log = Log()

    async def execute(self, kind: Kind, run: Run) -> None:
        """Make the attempt and write down how it ended."""
        with run.at_end:
            outcome = await self._perform(kind, run)
            if outcome is not None:
                await self._settle(kind, run, outcome)
            elif run.interruption is Interruption.LEASE_LOST:
                self._report_lost(kind, run.lease)

    async def _perform(self, kind: Kind, run: Run) -> Outcome | None:
        """The outcome; None where nothing may be written."""
        if run.interruption is not None:
            return interrupted(run.interruption)
        run.performing = True
        try:
            return await kind.perform(run.lease, run)
        except asyncio.CancelledError:
            why = run.interruption
            _uncancel()
            return None if why is None else interrupted(why)
        except LeaseLost:
            run.interruption = Interruption.LEASE_LOST
            return None
        except (StoreUnavailable, InsufficientStorage):
            return Snoozed(_AWAY_SECONDS)  # not the job's fault, so it uses up no attempt
        except ForebayError as error:
            return Failed(error, error.retryable)
        except Exception:  # noqa: BLE001  # a bug in a kind becomes an outcome
            self._note_bug(kind, run.lease)
            return Failed(ServerError(), retryable=True)
        finally:
            run.performing = False

    async def _settle(self, kind: Kind, run: Run, outcome: Outcome) -> None:
        """Settle, again and again while the database is away or full: until it is done, or the lease is another's."""
        lease, bug = run.lease, Failed(ServerError(), retryable=True)
        while run.interruption is not Interruption.LEASE_LOST:
            job = replace(lease.job, failures=0) if run.progressed else lease.job
            decided = verdict(job, outcome, kind.retry, self._jobs.now())
            try:
                await self._settlement.settle(lease, outcome, decided)
            except LeaseLost:
                break
            except (StoreUnavailable, InsufficientStorage):
                await self._clock.sleep(self._clock.jitter(_SETTLE_PAUSE_SECONDS))
            except Exception:  # noqa: BLE001  # a bug in what it writes is a failed attempt that writes nothing
                self._note_bug(kind, lease)
                if outcome is bug:
                    return  # not even that: its lease runs out, and somebody else tries
                outcome = bug
            else:
                self._report(lease, decided.state, outcome)
                await self._follow(kind, lease, decided.state)
                return
        self._report_lost(kind, lease)

    async def _follow(self, kind: Kind, lease: Lease, state: JobState) -> None:
        try:
            await kind.after(lease.job, state)
        except ForebayError as error:  # a sweep will do it
            self._log.warning("pruner.failed", reason=str(error))

    def _note_bug(self, kind: Kind, lease: Lease) -> None:
        self._log.error("job.bug", exc_info=True, job=lease.id, kind=kind.name)

    def _report_lost(self, kind: Kind, lease: Lease) -> None:
        self._metrics.jobs_settled.labels(kind.name, "lease_lost").inc()
        self._log.warning("job.lease_lost", job=lease.id, kind=kind.name, attempt=lease.attempt)

    def _report(self, lease: Lease, state: JobState, outcome: Outcome) -> None:
        self._metrics.jobs_settled.labels(lease.job.kind, state.value).inc()
        if isinstance(outcome, Failed):
            self._log.warning(
                "job.attempt_failed",
                job=lease.id,
                kind=lease.job.kind,
                attempt=lease.attempt,
                code=outcome.error.code,
                state=state.value,
            )


def _uncancel() -> None:
    current = asyncio.current_task()
    while current is not None and current.cancelling():
        current.uncancel()
