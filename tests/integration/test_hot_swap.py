"""Models that do not fit into memory together take turns in it: nothing is lost, and nothing is left behind."""

import asyncio

from tests.support.answers import ask
from tests.support.processes import lives
from tests.support.server import eventually, serving

JSON_LOG = {"FOREBAY_LOG_FORMAT": "json"}
MODEL = '[models.{name}]\nengine = "fake"\nmemory_bytes = {mib}_000_000\nslots = 2\n{more}\n'


def model(name: str, mib: int = 600, more: str = "") -> str:
    return MODEL.format(name=name, mib=mib, more=more)


BASE = """
default_models = false
[memory]
host_bytes = 1_000_000_000
residency_seconds = 0.1
swap_wait_seconds = 0.5
"""


async def test_two_models_that_do_not_fit_together_take_turns() -> None:
    async with serving(BASE + model("one") + model("two"), environment=JSON_LOG) as server:
        for name in ("one", "two", "one"):
            assert (await ask(server, f"Hello, {name}.", model=name)).whole
            assert len(server.engine_pids()) <= 2
        assert [event["model"] for event in server.named("engine.starting")] == ["one", "two", "one"]
        assert [event["model"] for event in server.named("model.swapped")] == ["one", "two"]
        await eventually(lambda: len(server.engine_pids()) == 1, what="one engine alone")
        assert (await server.model("two"))["state"] == "stopped"
        assert await server.metric("forebay_swaps_total", model="one") == 1
        family = server.family()
        assert await server.stop() == 0
        assert not [process for process in family if lives(process)]
        _ = asyncio
