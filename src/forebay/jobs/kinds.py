"""What a kind of job is: who performs it, how many at once, how it is tried again, and what hangs on its end.

It refuses to know any kind by name: they are listed in `forebay.app`, and do not know each other.
"""

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from forebay.jobs.outcome import Interruption, Outcome
from forebay.jobs.retry import Delay
from forebay.store.job_records import Job, Lease
from forebay.store.job_state import JobState


@dataclass(slots=True)
class Run:
    """One attempt while it lasts. `interruption` is set before the attempt's asyncio task is cancelled.

    `performing` is true while the kind is at work: only then does an interruption cancel anything.
    `progressed` that the attempt has fenced a write, so that earlier failures are forgiven.
    `at_end` is closed when its outcome is written down, or never will be.
    """

    lease: Lease
    interruption: Interruption | None = None
    performing: bool = False
    progressed: bool = False
    at_end: ExitStack = field(default_factory=ExitStack)


Perform = Callable[[Lease, Run], Awaitable[Outcome]]
After = Callable[[Job, JobState], Awaitable[None]]


async def _nothing_more(_job: Job, _state: JobState) -> None:
    return


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of job.

    `perform` makes one attempt. When it is cancelled it has `jobs.drain_seconds` to write down what it has, unless the
    interruption is LEASE_LOST, and then lets the cancellation go on.
    `retry` gives the wait after so many failures in a row, None for no more.
    `children` is the kind of the jobs that it waits for, `joins_at` its stage when they have ended.
    `waits_for_it` says that its parent does.
    `event` is the first word of its webhook events, such as `batch` in `batch.completed`; none tells nobody.
    `has_dead_letter` says that a job given up becomes a dead letter itself.
    `takes_turns` that no project holds the places of a worker while another one waits, however many are due before;
    `groups_models` that a worker still stays with a loaded model for a while; `spare` how many places there are beside
    `at_once` for projects of which none runs, and for models of which none does where these are grouped.
    `after` follows the commit of an attempt in the same process, with the state it left: for what a sweep does as well.
    """

    name: str
    perform: Perform
    at_once: int
    retry: Delay
    children: str | None = None
    joins_at: str = ""
    waits_for_it: bool = False
    event: str | None = None
    has_dead_letter: bool = False
    takes_turns: bool = False
    groups_models: bool = False
    spare: int = 0
    after: After = field(default=_nothing_more)
