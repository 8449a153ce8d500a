"""Runs a permit to the whole answer, for whoever does not relay it as it comes.

It refuses to wait for ever: the whole answer has a deadline, and so has every step of it after the first. While the engine
is paused, neither comes nearer.
"""

from collections.abc import Callable
from dataclasses import dataclass

from forebay.clock import Clock
from forebay.dialects.openai.call import Call
from forebay.errors import EngineTimeout
from forebay.inference import Usage
from forebay.quotas import Use
from forebay.replicas.connection import EngineStream
from forebay.replicas.pauses import Pauses
from forebay.scheduler.permit import Permit


@dataclass(frozen=True, slots=True)
class Gathered:
    """A whole answer as JSON, and what it used; an estimate where the engine does not say."""

    body: bytes
    usage: Usage | None  # none where tokens say nothing of it
    media: Use | None = None  # of a recording or of pictures, which count for other than tokens

    @property
    def use(self) -> Use:
        """What it counts for."""
        if self.media is not None or self.usage is None:
            return self.media or Use(1)
        return Use(1, self.usage.prompt_tokens, self.usage.completion_tokens, self.usage.cached_tokens)


def _nobody_listens() -> None:
    return


async def gather(
    permit: Permit,
    call: Call,
    *,
    timeout_seconds: float,
    stall_seconds: float,
    clock: Clock,
    on_first: Callable[[], None] = _nobody_listens,
) -> Gathered:
    """The answer to `call`, which `permit` was given for. `on_first` is told when the engine has read the prompt.

    Before the first bytes only `timeout_seconds` counts: a long prompt looks like a hang. Raises EngineTimeout at
    either limit, and whatever else becomes of the run.
    """
    gatherer = call.shape.gatherer(call)
    pauses = permit.replica.pauses
    try:
        async with pauses.limit(clock.timeout(timeout_seconds)), permit.run() as stream:
            data = await stream.read()
            on_first()
            while data:
                gatherer.feed(data)
                data = await read_on(stream, pauses, stall_seconds, clock)
    except TimeoutError:
        raise EngineTimeout from None
    return Gathered(gatherer.body(), gatherer.progress.used)


async def read_on(stream: EngineStream, pauses: Pauses, stall_seconds: float, clock: Clock) -> bytes:
    """The next bytes of a stream that has begun. Raises EngineTimeout when none come for so long."""
    try:
        return await pauses.within(stall_seconds, clock, stream.read)
    except TimeoutError:
        raise EngineTimeout("The engine stopped making progress on this request.") from None
