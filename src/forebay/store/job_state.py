"""The states of a job and the moves between them: the one state machine of the back office.

It refuses every move that is not drawn here. Statements ask `sources` which states they may start from, so that a row
can only move along an edge.

    available ──lease──> running ──┬──> completed
        ^                  │       ├──> failed        given up, or wrong from the start
        │                  │       ├──> cancelled     somebody asked for it
        ├──retry, rescue───┤       └──> expired       the deadline has passed
        │                  v
        └──last child── waiting       for its children to end

An available job can be cancelled, and it expires, without having run. A finished one is made available again by `retry`
alone, and only a failed, cancelled or expired one.
"""

from enum import StrEnum


class JobState(StrEnum):
    """Where a job is."""

    AVAILABLE = "available"  # to be leased once `run_at` has come
    RUNNING = "running"  # leased: `node` works on it until `lease_expires_at`
    WAITING = "waiting"  # until its children have ended
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


LIVE = frozenset({JobState.AVAILABLE, JobState.RUNNING, JobState.WAITING})
FINISHED = frozenset(JobState) - LIVE

_MOVES = {
    JobState.AVAILABLE: {JobState.RUNNING, JobState.CANCELLED, JobState.EXPIRED},
    JobState.RUNNING: {JobState.AVAILABLE, JobState.WAITING, *FINISHED},
    JobState.WAITING: {JobState.AVAILABLE},
    JobState.COMPLETED: set[JobState](),
    JobState.FAILED: {JobState.AVAILABLE},
    JobState.CANCELLED: {JobState.AVAILABLE},
    JobState.EXPIRED: {JobState.AVAILABLE},
}


def may_move(old: JobState, new: JobState) -> bool:
    """Whether there is an edge from `old` to `new`."""
    return new in _MOVES[old]


def sources(new: JobState) -> frozenset[JobState]:
    """The states from which `new` can be reached in one move."""
    return frozenset(old for old, targets in _MOVES.items() if new in targets)
