"""Bounds how many requests of one kind are received or worked on at once, and how much memory they take.

It refuses one more than that, and lets no project take the last quarter of either from the others.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from forebay.errors import Overloaded

_FULL_SECONDS = 5.0


def of_one_project(most: int) -> int:
    """How much of what there is the requests of one project may hold: they leave a quarter to the others."""
    return most - most // 4


class Room:
    """Counts the bytes that requests about `what` hold. One that is alone may hold more than there are.

    A further one of a project that holds its share has to wait; what is let in may come to hold more.
    """

    def __init__(self, bytes_max: int, what: str) -> None:
        self._bytes_max = bytes_max
        self._what = what
        self._held: Counter[str] = Counter()

    @contextmanager
    def held(self, size: int, project: str) -> Iterator["Share"]:
        """Count so many bytes while the block lasts. Raises Overloaded where the others leave no room for them."""
        of_project = self._held[project]
        if of_project and of_project + size > of_one_project(self._bytes_max):
            raise self._full()
        share = Share(self, project)
        with share.more(size):
            yield share

    def count(self, size: int, own: int, project: str) -> None:
        """Count so many bytes more, or less, of a request that has its `own` already. Raises as `held` does."""
        in_all = self._held.total()
        if size > 0 and in_all > own and in_all + size > self._bytes_max:
            raise self._full()
        self._held[project] += size
        if not self._held[project]:
            del self._held[project]

    def _full(self) -> Overloaded:
        return Overloaded(
            f"Too many {self._what} are being worked on. Try again later.", retry_after_seconds=_FULL_SECONDS
        )


class Share:
    """What one request holds of a room."""

    def __init__(self, room: Room, project: str) -> None:
        self._room = room
        self._project = project
        self._own = 0

    @contextmanager
    def more(self, size: int) -> Iterator[None]:
        """Count so many bytes more while the block lasts. Raises as `Room.held` does."""
        self._room.count(size, self._own, self._project)
        self._own += size
        try:
            yield
        finally:
            self._room.count(-size, self._own, self._project)
            self._own -= size


class Places:
    """Counts the requests about `what`."""

    def __init__(self, most: int, what: str) -> None:
        self._most = most
        self._what = what
        self._of_one_max = of_one_project(most)
        self._taken: Counter[str] = Counter()

    @contextmanager
    def entered(self, project: str) -> Iterator[None]:
        """Count one of the project while the block lasts. Raises Overloaded if there are as many as there may be."""
        if self._taken.total() >= self._most or self._taken[project] >= self._of_one_max:
            raise Overloaded(
                f"Too many {self._what} are being received or worked on. Try again later.",
                retry_after_seconds=_FULL_SECONDS,
            )
        self._taken[project] += 1
        try:
            yield
        finally:
            self._taken[project] -= 1
            if not self._taken[project]:
                del self._taken[project]
