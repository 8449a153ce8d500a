"""Runs calls as batch work: each waits for a place as long as it takes, and all of a model wait when a provider says so.

It refuses to decide what becomes of a call that had to give its place back.
"""

from collections.abc import Callable, Iterable

from forebay.clock import Clock
from forebay.config import Settings
from forebay.dialects.openai.call import Call
from forebay.errors import CircuitOpen, Overloaded
from forebay.jobs.pauses import Pauses
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import traits_of
from forebay.scheduler.gather import Gathered, gather
from forebay.scheduler.scheduler import Scheduler


def _nobody() -> None:
    return


class Admission:
    """The way of batch work to the models of one process."""

    def __init__(self, catalog: Catalog, scheduler: Scheduler, settings: Settings, clock: Clock) -> None:
        self.pauses = Pauses(clock)
        self._catalog = catalog
        self._scheduler = scheduler
        self._stall_seconds = settings.supervisor.stall_seconds
        self._clock = clock

    def continues(self, model: str) -> bool:
        """Whether the engine of `model` can go on with a text from its cache."""
        return traits_of(self._catalog.get(model)).continues

    def expect(self, models: Iterable[str]) -> None:
        """Have `models` up for what comes. Raises ModelNotReady and EngineUnavailable if nobody should wait for one."""
        self._scheduler.expect(models)

    async def run(
        self,
        call: Call,
        *,
        yields: bool = False,
        on_read: Callable[[], None] = _nobody,
        on_opened: Callable[[], None] = _nobody,
    ) -> Gathered:
        """The answer to `call`. `on_read` is told when the engine has read it, `on_opened` when it has opened a circuit.

        One that `yields` goes on, when it is run again, from where its place was taken back.
        Raises Preempted where the place was taken back, and whatever else becomes of the run.
        """
        name = call.request.model
        timeout_seconds = self._catalog.get(name).request_timeout_seconds
        while True:
            await self.pauses.wait(name)
            admitted = False
            try:
                async with self._scheduler.admit_when_room(call.request, yields=yields) as permit:
                    if self.pauses.held(name):
                        continue
                    admitted = True
                    gathered = await gather(
                        permit,
                        call,
                        timeout_seconds=timeout_seconds,
                        stall_seconds=self._stall_seconds,
                        clock=self._clock,
                        on_first=on_read,
                    )
                    self.pauses.succeeded(name)
                    return gathered
            except CircuitOpen:
                if admitted:
                    on_opened()
                raise
            except Overloaded as error:
                if admitted:  # a provider's: all of the model wait, and no attempt is used up
                    self.pauses.hold(name, error.retry_after_seconds)
                else:
                    await self._clock.sleep(self._clock.jitter(error.retry_after_seconds or 1.0))
