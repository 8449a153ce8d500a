"""How an attempt at a job ends, as values, and what each means for the job: the decisions of the back office.

It refuses to do anything: `verdict` is matched exhaustively, and the settlement writes it down.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from forebay.errors import ForebayError
from forebay.jobs.retry import Delay
from forebay.store.database import Transaction
from forebay.store.job_records import Job, Verdict
from forebay.store.job_state import JobState

Write = Callable[[Transaction], Awaitable[None]]


class Interruption(StrEnum):
    """Why an attempt is ended from outside."""

    CANCELLED = "cancelled"  # somebody asked for it
    EXPIRED = "expired"  # the job's deadline has passed
    LEASE_LOST = "lease_lost"  # another worker has the job, or may have it
    SHUTDOWN = "shutdown"  # this worker stops; another one goes on


@dataclass(frozen=True, slots=True)
class Done:
    """The job is finished. `write` joins the transaction that says so; `event` is told where `completed` is not the word."""

    write: Write | None = None
    event: str | None = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """The job goes on at `stage` when its children have ended; `write` makes them."""

    stage: str
    write: Write


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt failed. With `retryable` the job is tried again, after `retry_in_seconds` or as its kind says."""

    error: ForebayError
    retryable: bool
    retry_in_seconds: float | None = None
    write: Write | None = None


@dataclass(frozen=True, slots=True)
class Snoozed:
    """Nothing went wrong, but the job cannot go on now. It uses up no attempt."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The job was stopped because somebody asked for it."""

    write: Write | None = None


@dataclass(frozen=True, slots=True)
class Expired:
    """The job was stopped because its deadline has passed."""

    write: Write | None = None


Outcome = Done | Waiting | Failed | Snoozed | Cancelled | Expired


def verdict(job: Job, outcome: Outcome, retry: Delay, now: float) -> Verdict:
    """The whole state machine on one screen: what `outcome` makes of a running `job`."""
    match outcome:
        case Done(event=event):
            return Verdict(JobState.COMPLETED, now, event=event)
        case Waiting(stage=stage):
            return Verdict(JobState.WAITING, now, stage=stage)
        case Snoozed(seconds=seconds):
            return Verdict(JobState.AVAILABLE, now + seconds)
        case Cancelled():
            return Verdict(JobState.CANCELLED, now, error=("job_cancelled", "The job was cancelled."))
        case Expired():
            return Verdict(JobState.EXPIRED, now, error=("job_expired", "The job was not finished by its deadline."))
        case Failed(error=error, retryable=retryable, retry_in_seconds=given):
            planned = retry(job.failures + 1) if retryable else None
            facts = (error.code, str(error))
            if planned is None:
                return Verdict(JobState.FAILED, now, error=facts, counts_as_failure=True)
            wait = planned if given is None else given
            return Verdict(JobState.AVAILABLE, now + wait, error=facts, counts_as_failure=True)
        case _:
            assert_never(outcome)


def interrupted(why: Interruption) -> Outcome | None:
    """What an attempt that was ended from outside comes to; None where nothing may be written."""
    match why:
        case Interruption.CANCELLED:
            return Cancelled()
        case Interruption.EXPIRED:
            return Expired()
        case Interruption.SHUTDOWN:
            return Snoozed(0)
        case Interruption.LEASE_LOST:
            return None
        case _:
            assert_never(why)
