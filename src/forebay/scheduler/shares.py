"""Whose turn it is among projects: start-time fair queuing, where each gets places by its weight as long as it waits.

Places count by how long a project holds them: long requests would get most of them otherwise. What that comes to is guessed
when they are given, and put right when they are given back. It refuses to give credit for time in which a project asked for
nothing, and to remember the turn of one that runs nothing and has had no more than that.
"""

from collections import Counter, defaultdict
from collections.abc import Callable

Weights = Callable[[str], float]

_UNKNOWN = 1.0  # seconds; while nothing is known, all count the same
_LATEST = 0.2  # the weight of the latest in a mean
_PROJECTS_MAX = 1_024  # whose means are kept


def equal(_project: str) -> float:
    """The weight of every project where nobody has said otherwise."""
    return 1.0


class Shares:
    """The tags of the projects that wait in one line, and how many seconds each lately held a place.

    Virtual time is the start tag of what was served last. What is served begins at the end of what its project was
    served before, but not before `now`, and ends so much later as it costs, divided by the weight of the project. Between
    that end and `now` a project that runs something has left others its turns: these pay for what runs longer than guessed.
    """

    def __init__(self, weights: Weights = equal) -> None:
        self._weights = weights
        self.now = 0.0
        self._ends: dict[str, float] = {}
        self._running: Counter[str] = Counter()
        self._left: dict[str, float] = defaultdict(float)  # virtual time left to others since a project ran nothing
        self._held: dict[str, float] = {}  # the latest last
        self._held_by_all: float | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def weight(self, project: str) -> float:
        """How much of what there is a project gets, beside those of others."""
        return self._weights(project)

    def start(self, project: str) -> float:
        """The start tag of what a project is served next: the lowest goes first."""
        return max(self.now, self._ends.get(project, self.now))

    def cost(self, project: str, places: int) -> float:
        """What so many places come to, in seconds of one, as far as can be guessed."""
        return places * (self._held.get(project, self._held_by_all) or _UNKNOWN)

    def learn(self, project: str, seconds: float) -> None:
        """A project has held its places for so long, which is more than nothing."""
        self._held_by_all = _mean(self._held_by_all, seconds)
        self._held[project] = _mean(self._held.pop(project, None), seconds)
        if len(self._held) > _PROJECTS_MAX:
            del self._held[next(iter(self._held))]

    def serve(self, project: str, cost: float = 1, *, ahead_of: str | None = None) -> None:
        """A project is served what costs so much; before its turn, if it goes `ahead_of` the one whose turn it is."""
        start = self.start(project)
        if project in self._running:
            self._left[project] += start - self._ends[project]
        self.now = start if ahead_of is None else self.start(ahead_of)
        self._ends[project] = start + cost / self._weights(project)
        self._running[project] += 1
        self._ends = {each: end for each, end in self._ends.items() if end > self.now or each in self._running}

    def end(self, project: str, *, unused: float = 0) -> None:
        """One that was served has given its places back; of what they cost so much is unused, or was missing if negative."""
        missing = -unused / self._weights(project)
        paid = max(0.0, min(missing, self._left[project]))
        self._left[project] -= paid
        self._ends[project] += missing - paid
        self._running[project] -= 1
        if not self._running[project]:
            del self._running[project]
            self._left.pop(project, None)

    def forget(self) -> None:
        """Nobody waits: what projects have had that run nothing is no matter any longer."""
        self._ends = {each: end for each, end in self._ends.items() if each in self._running}
        if not self._ends:
            self.now = 0.0


def _mean(before: float | None, latest: float) -> float:
    return latest if before is None else before + _LATEST * (latest - before)
