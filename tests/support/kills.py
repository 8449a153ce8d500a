"""Kills in the midst of long jobs about media, whose finished parts are kept."""

import os
import signal
from functools import partial

from tests.support.jobs import rows
from tests.support.server import Server, eventually


async def kept_parts(server: Server, job_id: str) -> int:
    """How many parts of a job are finished."""
    return len([kept for (kept,) in await rows(server, "SELECT job_id FROM media_parts") if kept == job_id])


async def until_working(server: Server, job_id: str, model: str, finished: int) -> None:
    """Wait until so many parts of a job are finished, or more, and the engine is at the next."""

    async def working() -> bool:
        return await kept_parts(server, job_id) >= finished and await server.load(model) == (1, 0)

    await eventually(working, within_seconds=20, what=f"part {finished} of {job_id}")


async def kill_engine(server: Server, job_id: str, model: str) -> int:
    """Kill the engine of a model and wait for the next one; how many parts are finished once nobody tries that one again.

    Whoever kills again waits for them: two deaths on one part are a part that is given up.
    """
    came_up = len(server.named("engine.ready", model=model))
    os.kill(server.engine_pid(model), signal.SIGKILL)
    finished = await kept_parts(server, job_id) + 1
    await eventually(partial(_came_up_again, server, model, came_up), what=f"another engine of {model}")
    return finished


def _came_up_again(server: Server, model: str, before: int) -> bool:
    return len(server.named("engine.ready", model=model)) > before
