"""Asks a running engine whether it is well, whether it still turns, and what its chat template can do.

It refuses to judge: what follows from an answer, or from none, is the keeper's.
"""

import contextlib
from typing import Any

import aiohttp

from forebay.clock import Clock
from forebay.replicas.replica import Replica

_TOOLS_SECONDS = 5.0


async def answers(session: aiohttp.ClientSession, replica: Replica, path: str, seconds: float | None = 1.0) -> bool:
    """Whether the engine says 200 to a GET of `path` within `seconds`."""
    timeout = aiohttp.ClientTimeout(total=seconds)
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
        async with session.get(replica.address + path, headers=replica.headers, timeout=timeout) as response:
            return response.status == 200
    return False


async def stalled(session: aiohttp.ClientSession, replica: Replica, stall_seconds: float, clock: Clock) -> None:
    """Return once the engine has answered no probe for `stall_seconds`, those left out in which it stood still.

    A probe counts for no longer than it may take: what this server was held up is no silence of the engine.
    """
    pauses, period = replica.pauses, min(5.0, stall_seconds / 4)
    silent = 0.0
    while silent < stall_seconds:
        asked_at, stood = clock.monotonic(), pauses.seconds
        await clock.sleep(period)
        answered = False
        with contextlib.suppress(TimeoutError):
            async with pauses.limit(clock.timeout(period)):
                answered = await answers(session, replica, replica.traits.probe_path, seconds=None)
        passed = clock.monotonic() - asked_at - (pauses.seconds - stood)
        silent = 0.0 if answered else silent + min(max(0.0, passed), 2 * period)


async def supports_tools(session: aiohttp.ClientSession, replica: Replica) -> bool | None:
    """Whether the chat template has tools; None if the engine does not say."""
    timeout = aiohttp.ClientTimeout(total=_TOOLS_SECONDS)
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, ValueError):
        async with session.get(replica.address + "/props", headers=replica.headers, timeout=timeout) as response:
            if response.status == 200:
                return _tools_in(await response.json(content_type=None))
    return None


def _tools_in(props: Any) -> bool | None:
    caps = props.get("chat_template_caps") if isinstance(props, dict) else None
    tools = caps.get("supports_tools") if isinstance(caps, dict) else None
    return tools if isinstance(tools, bool) else None
