"""Inputs that engines die of."""

import pytest

from tests.support.answers import Answer, ask
from tests.support.server import Server, eventually, serving

JSON_LOG = {"FOREBAY_LOG_FORMAT": "json"}
QUARANTINE_SECONDS = 3
CONFIG = f"""
default_models = false
[supervisor]
backoff_seconds_min = 0.05
backoff_seconds_max = 0.1
quarantine_seconds = {QUARANTINE_SECONDS}
[models.fake]
engine = "fake"
preload = true
slots = 4
"""
POISON = "Poison. [[fake crash_at=3 crash=segv token_ms=20]]"


async def _deaths(server: Server) -> float:
    return await server.metric("forebay_engine_deaths_total", model="fake", kind="crash")


def _refused(answer: Answer) -> bool:
    if answer.status != 422:
        return False
    assert answer.code == "quarantined"
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers
    return True


@pytest.mark.parametrize("stream", [True, False])
async def test_an_input_that_two_engines_died_of_is_refused_for_a_while(stream: bool) -> None:
    async with serving(CONFIG, environment=JSON_LOG) as server:
        neighbour = await server.create_key("neighbour")
        assert (await ask(server, POISON, stream=stream)).code == "engine_crashed"
        second = await ask(server, POISON, stream=stream)
        assert second.code == "quarantined"
        assert second.status == (200 if stream else 422)
        assert await _deaths(server) == 2

        assert _refused(await ask(server, POISON, stream=stream))
        assert _refused(await ask(server, POISON, stream=not stream))
        assert await _deaths(server) == 2
        assert (await ask(server, "Harmless.")).whole
        assert (await ask(server, POISON, key=neighbour)).code == "engine_crashed"
        assert await _deaths(server) == 3
        assert await server.metric("forebay_quarantined_inputs_total", model="fake") == 1
        assert len(server.named("input.quarantined")) == 1

        async def accepted() -> bool:
            return not _refused(await ask(server, POISON, stream=stream))

        await eventually(accepted, within_seconds=QUARANTINE_SECONDS + 5, what="the end of the quarantine")
        assert await _deaths(server) == 4


async def test_who_was_there_at_one_death_is_not_refused() -> None:
    async with serving(CONFIG, environment=JSON_LOG) as server:
        innocent = "Innocent. [[fake tokens=20]]"
        assert (await ask(server, POISON, stream=False)).status == 502
        for _ in range(3):
            assert (await ask(server, innocent)).whole
        assert (await ask(server, POISON, stream=False)).status == 422
        assert (await ask(server, innocent)).whole
