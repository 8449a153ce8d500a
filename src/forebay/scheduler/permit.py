"""Proof of admission: the only thing that can run a request, made by the scheduler alone.

It refuses to be used twice.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from forebay.errors import InvalidRequest, Preempted
from forebay.inference import Request
from forebay.replicas.connection import EngineStream
from forebay.replicas.replica import Replica
from forebay.scheduler.devices import Ear


class Permit:
    """One admitted request and the replica that it runs on. `waited_seconds` is its time in line.

    `on_left` is called when its block has been left, and `on_stopped` when the engine has stopped: before that, if the
    answer was read to its end. `served`: its block ended without an error. `ear`, if there is one, is told how fast the
    answer comes.
    """

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
        self.held = self.served = False
        self.ear: Ear | None = None
        self.on_left: Callable[[], None] = lambda: None
        self.on_stopped: Callable[[], None] = lambda: None
        self._grace_seconds = grace_seconds
        self._condemn = condemn
        self._preempted = False
        self._runner: asyncio.Task[object] | None = None

    @asynccontextmanager
    async def run(self) -> AsyncIterator[EngineStream]:
        """Run the request; the place is given back when the engine has stopped, not when the block ends.

        Raises InvalidRequest if only this replica could tell that it cannot serve the request. The block of batch work
        can be interrupted at any await and then raises Preempted: what it has read is lost.
        """
        assert not self.held, "a permit runs one request"
        self._check_tools()
        if self._preempted:
            raise Preempted
        self.held = True
        runner = asyncio.current_task()
        assert runner is not None
        self._runner, cancelled_before = runner, runner.cancelling()
        try:
            async with self.replica.run(self.request, self._grace_seconds, self._condemn, self.on_stopped) as stream:
                yield stream
                self.served = True
        except asyncio.CancelledError:
            # As a timeout does with its own: the cancellation that `preempt` has sent ends here, any other goes on.
            if not self._preempted or runner.cancelling() - 1 > cancelled_before:
                raise
            raise Preempted from None
        finally:
            self._runner = None
            if self._preempted:
                runner.uncancel()
            self.on_left()

    def preempt(self) -> None:
        """Interrupt the run, or keep it from beginning. For the scheduler alone, once, while the place is taken."""
        self._preempted = True
        if self._runner is not None:
            self._runner.cancel()

    def _check_tools(self) -> None:
        """Only a running engine says whether its chat template has tools."""
        if self.request.tools and self.replica.tools is False:
            raise InvalidRequest(
                f"The chat template of {self.request.model} has no tools. Choose another model, or give it a chat "
                "template with tools (`chat_template_file`).",
                param="tools",
                code="capability_not_supported",
            )
