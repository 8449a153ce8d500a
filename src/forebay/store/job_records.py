"""What a job is, and who may write about it: records, and how they become rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from forebay.clock import new_id
from forebay.store.job_state import FINISHED, JobState
from forebay.store.tables import NO_DEADLINE


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to be made. `priority`: the lower value goes first."""

    kind: str
    project_id: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""
    parent_id: str | None = None
    stage: str = ""
    priority: int = 0
    model: str | None = None
    deadline_at: float = NO_DEADLINE
    run_at: float | None = None
    total: int = 0
    webhook_url: str | None = None
    webhook_secret: str | None = field(default=None, repr=False)
    key_id: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A row of the table. Times are seconds since the epoch."""

    id: str
    kind: str
    project_id: str
    parent_id: str | None
    state: JobState
    stage: str
    priority: int
    model: str | None
    attempt: int
    failures: int
    rescues: int
    run_at: float
    deadline_at: float
    node: str | None
    lease_expires_at: float | None
    cancel_requested_at: float | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    progress_at: float | None
    total: int
    completed: int
    failed: int
    step: int | None
    steps: int | None
    payload: dict[str, Any]
    errors: list[dict[str, Any]]
    error_code: str | None
    error_message: str | None
    webhook_url: str | None
    webhook_secret: str | None = field(repr=False)
    key_id: str | None = None

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.state in FINISHED


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on `job` and to write about it, as long as it is the job's last attempt.

    With `unless_renewed` it also ends as soon as whoever works on the job renews it: the right to give up a lost one.
    """

    job: Job
    unless_renewed: bool = False

    @property
    def id(self) -> str:
        """The job's id."""
        return self.job.id

    @property
    def attempt(self) -> int:
        """The number of this attempt: the fence."""
        return self.job.attempt


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an attempt, or a job that never ran, is written down.

    `error` is (code, message) of a failure; `counts_as_failure` that it uses up one of the attempts. `event` is what its
    webhooks tell, where that is not the state.
    """

    state: JobState
    run_at: float
    stage: str | None = None
    error: tuple[str, str] | None = None
    counts_as_failure: bool = False
    event: str | None = None


@dataclass(frozen=True, slots=True)
class Renewed:
    """What a heartbeat brings back of one job."""

    attempt: int
    cancel_requested: bool


def new_row(new: NewJob, now: float) -> dict[str, Any]:
    """The row of a job that is made now."""
    return {
        "id": new.id or new_id("job"),
        "kind": new.kind,
        "project_id": new.project_id,
        "parent_id": new.parent_id,
        "state": JobState.AVAILABLE,
        "stage": new.stage,
        "priority": new.priority,
        "model": new.model,
        "run_at": now if new.run_at is None else new.run_at,
        "deadline_at": new.deadline_at,
        "created_at": now,
        "total": new.total,
        "payload": dict(new.payload),
        "errors": [],
        "webhook_url": new.webhook_url,
        "webhook_secret": new.webhook_secret,
        "key_id": new.key_id,
    }


def job_of(row: sa.Row[Any]) -> Job:
    """The job that the whole row tells of."""
    values = dict(row._mapping)  # noqa: SLF001  # SQLAlchemy's documented name
    values["state"] = JobState(values["state"])
    return Job(**values)
