"""Proof of admission: the only thing that can run a request, made by the scheduler alone.

It refuses to be used twice.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from forebay.inference import Request
from forebay.replicas.connection import EngineStream
from forebay.replicas.replica import Replica


class Permit:
    """One admitted request and the replica that it runs on. `waited_seconds` is its time in line."""

    def __init__(
        self,
        request: Request,
        replica: Replica,
        position: int,
        waited_seconds: float,
        grace_seconds: float,
        condemn: Callable[[Replica], None],
    ) -> None:
        self.request = request
        self.replica = replica
        self.position = position
        self.waited_seconds = waited_seconds
        self.held = False
        self.on_stopped: Callable[[], None] = lambda: None
        self._grace_seconds = grace_seconds
        self._condemn = condemn

    @asynccontextmanager
    async def run(self) -> AsyncIterator[EngineStream]:
        """Run the request; the place is given back when the engine has stopped, not when the block ends."""
        assert not self.held, "a permit runs one request"
        self.held = True
        async with self.replica.run(self.request, self._grace_seconds, self._condemn, self._stopped) as stream:
            yield stream

    def _stopped(self) -> None:
        self.on_stopped()
