"""A running server measures its engines, learns what they come to, and loads nothing on a machine that is not well."""

from functools import partial
from pathlib import Path
from time import time

import psutil
import pytest

from forebay.config import Settings
from forebay.model_config import FakeModel
from forebay.peaks import Peak
from forebay.replicas.memory import HOST
from forebay.replicas.needs import fingerprint
from forebay.store.database import Database
from forebay.store.model_memory import ModelMemoryStore
from tests.support.answers import ask
from tests.support.server import Server, eventually, serving

MIB = 2**20
JSON_LOG = {"FOREBAY_LOG_FORMAT": "json"}
BASE = """
default_models = false
[memory]
measure_seconds = 0.1
available_min_share = {least}
available_resume_share = 1.0
[models.heavy]
engine = "fake"
options.ballast_bytes = 157_286_400
[models.light]
engine = "fake"
"""


def told(server: Server, model: str) -> int:
    """What the kernel says that the engine of `model` holds, with its guard and whatever it started."""
    guard = psutil.Process(server.guard_pid(model))
    return sum(int(each.memory_full_info().pss) for each in (guard, *guard.children(recursive=True)))


async def host(server: Server, metric: str, model: str) -> float:
    return await server.metric(f"forebay_memory_{metric}_bytes", model=model, device="host")


async def test_engines_are_measured_and_what_they_came_to_is_known_to_the_next_start(tmp_path: Path) -> None:
    async with serving(BASE.format(least=0.0), folder=tmp_path, environment=JSON_LOG) as server:
        for model in ("heavy", "light"):
            assert (await ask(server, "Hello.", model=model)).whole

        async def true(model: str) -> bool:
            """It was measured at work, and is charged with what it holds and no longer with what it was said to need."""
            measured, charged = await host(server, "measured", model), await host(server, "charged", model)
            return await host(server, "peak", model) > 0 and measured <= charged <= 1.1 * measured

        async def agrees(model: str) -> bool:
            """Until the next measurement they differ when somebody who shares memory with it comes or goes."""
            return await host(server, "measured", model) == pytest.approx(told(server, model), rel=0.05)

        for model in ("heavy", "light"):
            await eventually(partial(true, model), what=f"{model} to be charged with what it holds")
            await eventually(partial(agrees, model), what=f"the measure of {model} to be what the kernel says")
        assert await host(server, "measured", "heavy") > 150 * MIB
        assert await host(server, "measured", "light") < 100 * MIB
        peak = await host(server, "peak", "heavy")

        total = await server.metric("forebay_memory_total_bytes", device="host")
        assert total <= psutil.virtual_memory().total * 0.8
        assert await server.metric("forebay_memory_available_bytes", device="host") > 0
        assert await server.metric("forebay_memory_gate_open") == 1
        assert await server.metric("forebay_host_cpu_share") >= 0

        await server.post("/admin/models/heavy/unload")

        async def gone() -> bool:
            return await host(server, "charged", "heavy") == 0

        await eventually(gone, what="what was unloaded to hold nothing")
        assert await server.stop() == 0

    async with serving(BASE.format(least=0.0), folder=tmp_path, environment=JSON_LOG) as server:
        await server.post("/admin/models/heavy/load")

        async def recalled() -> bool:
            return await host(server, "peak", "heavy") > 0

        await eventually(recalled, what="the peak of the last life")
        assert await host(server, "peak", "heavy") == pytest.approx(peak, rel=0.05)


async def test_a_machine_that_is_not_well_loads_nothing_and_says_why() -> None:
    async with serving(BASE.format(least=0.9999), environment=JSON_LOG) as server:
        await server.post("/admin/models/light/load")

        async def waits() -> bool:
            return bool((await server.model("light"))["state"] == "waiting")

        await eventually(waits, what="it to wait")
        assert "of its memory available; it loads again at 100.0%" in (await server.model("light"))["reason"]
        assert await server.metric("forebay_memory_gate_open") == 0
        assert server.named("memory.gate_closed")
        assert not server.named("engine.starting")


CROWD = """
default_models = false
[memory]
host_bytes = 220_000_000
residency_seconds = 0.1
[models.one]
engine = "fake"
preload = true
pinned = {pinned}
[models.two]
engine = "fake"
preload = true
"""


async def remember(data_dir: Path, counts: dict[str, int]) -> None:
    """What an earlier life of a server has learned of such models at work."""
    database = await Database.open(Settings(data_dir=data_dir))
    prints = fingerprint(FakeModel(engine="fake"))
    peaks = [Peak(name, prints, HOST, 11, count, 1.0, time()) for name, count in counts.items()]
    await ModelMemoryStore(database).save(peaks, 0.0)
    await database.close()


@pytest.mark.parametrize("pinned", [False, True])
async def test_a_server_whose_models_came_to_more_than_there_is_starts_again(tmp_path: Path, pinned: bool) -> None:
    await remember(tmp_path / "data", {"one": 150 * MIB, "two": 120 * MIB})
    config = CROWD.format(pinned=str(pinned).lower())
    async with serving(config, folder=tmp_path, environment=JSON_LOG) as server:
        (told,) = server.named("memory.crowded")
        assert told["model"] == "two"
        assert "two needs" in told["reason"]
        states = [(await server.model(name))["state"] for name in ("one", "two")]
        answer = await ask(server, "Hello.", model="two")
        if pinned:
            assert states == ["ready", "failed"]
            assert (answer.status, answer.code) == (503, "model_too_large")
            assert len(server.named("model.refused")) == 1
            assert await server.ready(), "the others are served"
        else:
            assert states == ["stopped", "ready"]
            assert answer.whole
        assert (await ask(server, "Hello.", model="one")).whole
