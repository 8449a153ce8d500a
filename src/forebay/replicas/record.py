"""What the supervisor knows of one model: what is wanted of it, its keepers, and why it is not up.

It refuses to decide anything: the supervisor and the residency write it, others read.
"""

from dataclasses import dataclass, field

from forebay.errors import SetupError
from forebay.model_config import Model
from forebay.replicas.keeper import Keeper


@dataclass(slots=True)
class ModelRecord:
    """One model. Times are of the supervisor's monotonic clock.

    `wanted`: it is to be up, or as soon as there is memory for it. `ordered_at`: an operator or the configuration wanted
    it, and it has not been started since; `asked_at`: when somebody last asked for it. `waiting`: for whose memory it
    waits, as a sentence; where it is not wanted, why it can have none. `left_at`: when it last left for another;
    `swapped`: it has left for another, or because nobody asked for it, or gave way to others at the start of the server,
    and was not started since. `awaited_since`: callers have waited for its memory since then, one after the other, the last
    of whom was seen at `awaited_at`.
    """

    name: str
    settings: Model
    wanted: bool = False
    keepers: list[Keeper] = field(default_factory=list)
    failure: SetupError | None = None
    failed_at: float = 0.0
    pull_ordered: bool = False
    halvings: int = 0
    halved_until: float = 0.0
    ordered_at: float | None = None
    asked_at: float = 0.0
    waiting: str | None = None
    left_at: float = 0.0
    swapped: bool = False
    awaited_since: float | None = None
    awaited_at: float = 0.0

    @property
    def slots(self) -> int:
        """Places of one process; half as many for each time that it ran out of memory and has not recovered from."""
        return max(1, self.settings.slots >> self.halvings)

    @property
    def reason(self) -> str | None:
        """Why it failed, or for what it waits, for operators."""
        reasons = [keeper.failure for keeper in self.keepers if keeper.failure]
        return str(self.failure) if self.failure else next(iter(reasons), self.waiting)

    @property
    def retry_at(self) -> float | None:
        """When a failed start is tried again, in seconds since the Unix epoch."""
        times = [keeper.retry_at_epoch for keeper in self.keepers if keeper.retry_at_epoch is not None]
        return min(times, default=None)

    @property
    def missing(self) -> int:
        """How many more keepers it is to have."""
        return self.settings.processes - len(self.awake) if self.wanted and self.failure is None else 0

    @property
    def awake(self) -> list[Keeper]:
        """Its keepers without those that sleep."""
        return [keeper for keeper in self.keepers if keeper.asleep_at is None]

    @property
    def sleepers(self) -> list[Keeper]:
        """Those that sleep and may be woken."""
        return [keeper for keeper in self.keepers if keeper.asleep_at is not None and keeper.sleeps]

    def want(self, now: float) -> None:
        """Somebody asks for it."""
        self.wanted, self.asked_at, self.failure = True, now, None

    def refuse(self, reason: str) -> None:
        """There will be no memory for it."""
        self.let_go()
        self.waiting = reason

    def let_go(self) -> None:
        """Nobody wants it any longer."""
        self.wanted, self.waiting, self.ordered_at = False, None, None
