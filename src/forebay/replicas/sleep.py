"""Has an engine give its device's memory back and take it again while its process goes on: the sleep of vLLM.

It refuses to decide who sleeps, and to take an engine's word for it: it asks whether it does.
"""

from typing import Any

import aiohttp

from forebay.clock import Clock
from forebay.replicas.replica import Replica

# An engine that has thrown its weights away reads them again between its two kinds of memory.
_WAYS_UP = {
    1: (("/wake_up", None),),
    2: (
        ("/wake_up?tags=weights", None),
        ("/collective_rpc", {"method": "reload_weights"}),
        ("/wake_up?tags=kv_cache", None),
    ),
}


async def fall_asleep(session: aiohttp.ClientSession, replica: Replica, seconds: float, clock: Clock) -> bool:
    """Whether the engine sleeps, within `seconds`. Nothing may be in flight on it."""
    return await _go(session, replica, ((f"/sleep?level={replica.traits.sleep_level}", None),), True, seconds, clock)


async def wake(session: aiohttp.ClientSession, replica: Replica, seconds: float, clock: Clock) -> bool:
    """Whether the engine is awake, within `seconds`."""
    return await _go(session, replica, _WAYS_UP[replica.traits.sleep_level], False, seconds, clock)


async def _go(
    session: aiohttp.ClientSession,
    replica: Replica,
    steps: tuple[tuple[str, dict[str, str] | None], ...],
    asleep: bool,
    seconds: float,
    clock: Clock,
) -> bool:
    try:
        async with clock.timeout(seconds):
            for path, body in steps:
                async with session.post(replica.address + path, json=body, headers=replica.headers) as response:
                    if response.status != 200:
                        return False
            async with session.get(replica.address + "/is_sleeping", headers=replica.headers) as response:
                said: Any = await response.json(content_type=None)
                return isinstance(said, dict) and said.get("is_sleeping") is asleep
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return False
