"""Proof of admission: the only thing that can run a request, made by the scheduler alone.

It refuses to be used twice.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from forebay.errors import InvalidRequest
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
        """Run the request; the place is given back when the engine has stopped, not when the block ends.

        Raises InvalidRequest if only this replica could tell that it cannot serve the request.
        """
        assert not self.held, "a permit runs one request"
        self._check_tools()
        self.held = True
        async with self.replica.run(self.request, self._grace_seconds, self._condemn, self._stopped) as stream:
            yield stream

    def _check_tools(self) -> None:
        """Only a running engine says whether its chat template has tools."""
        if self.request.tools and self.replica.tools is False:
            raise InvalidRequest(
                f"The chat template of {self.request.model} has no tools. Choose another model, or give it a chat "
                "template with tools (`chat_template_file`).",
                param="tools",
                code="capability_not_supported",
            )

    def _stopped(self) -> None:
        self.on_stopped()
