"""Models that do not fit into memory together take turns in it: nothing is lost, and nothing is left behind."""

import asyncio
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.faults.test_engine_death import begin
from tests.support.answers import Answer, ask
from tests.support.models import minilm_path, smollm2_path, whisper_tiny
from tests.support.processes import lives
from tests.support.server import Server, eventually, serving
from tests.support.speech import sample_wav

JSON_LOG = {"FOREBAY_LOG_FORMAT": "json"}
MODEL = '[models.{name}]\nengine = "fake"\nmemory_bytes = {mega}_000_000\nslots = 2\n{more}\n'
BASE = """
default_models = false
[memory]
host_bytes = 1_000_000_000
residency_seconds = 0.1
swap_wait_seconds = 0.3
[supervisor]
backoff_seconds_min = 0.05
backoff_seconds_max = 0.2
"""
LONG = "[[fake tokens=150 token_ms=10]]"


def model(name: str, mega: int = 600, more: str = "") -> str:
    return MODEL.format(name=name, mega=mega, more=more)


PAIR = BASE + model("one") + model("two")


def names(server: Server, event: str) -> list[str]:
    """The models of every such event, in order."""
    return [found["model"] for found in server.named(event)]


async def until_state(server: Server, name: str, state: str) -> dict[str, Any]:
    async def reached() -> dict[str, Any] | None:
        found = await server.model(name)
        return found if found["state"] == state else None

    found: dict[str, Any] = await eventually(reached, what=f"{name} to be {state}")
    return found


def stand_still(server: Server, name: str) -> psutil.Process:
    """Stop the engine of a model until it is resumed, so that what it is at lasts as long as a test looks."""
    engine = psutil.Process(server.engine_pid(name))
    engine.suspend()
    return engine


def engines(server: Server) -> dict[str, psutil.Process]:
    """The engine of each model that has one, by the last start of each."""
    found = {}
    for name in dict.fromkeys(names(server, "engine.starting")):
        try:
            found[name] = psutil.Process(server.engine_pid(name))
        except (psutil.NoSuchProcess, IndexError):
            continue
    return {name: process for name, process in found.items() if lives(process)}


async def test_two_models_that_do_not_fit_together_take_turns() -> None:
    async with serving(PAIR + model("huge", 2000), environment=JSON_LOG) as server:
        for name in ("one", "two", "one"):
            assert (await ask(server, f"Hello, {name}.", model=name)).whole
            assert list(engines(server)) == [name], "whoever leaves is gone before the next is launched"
        assert names(server, "engine.starting") == ["one", "two", "one"]
        assert names(server, "model.swapped") == ["one", "two"]
        assert (await server.model("two"))["state"] == "stopped"
        assert await server.metric("forebay_swaps_total", model="one") == 1

        refused = await ask(server, "Hello?", model="huge")
        assert (refused.status, refused.code) == (503, "model_too_large")
        assert refused.headers["x-should-retry"] == "false"
        assert "huge needs 1.9 GiB on host, which has 0.9 GiB." in refused.error["message"]  # type: ignore[index]
        await eventually(lambda: server.named("model.refused"), what="the refusal to be told")
        (told,) = server.named("model.refused")
        assert (told["model"], told["reason"]) == ("huge", "huge needs 1.9 GiB on host, which has 0.9 GiB.")

        both = [ask(server, f"Caller {each}.", model=("one", "two")[each % 2]) for each in range(24)]
        answers = await asyncio.gather(*both)
        assert all(answer.whole for answer in answers)
        assert len(names(server, "engine.starting")) <= 3 + len(both) // 2, (
            "those who come in turns are served together"
        )
        await eventually(lambda: len(engines(server)) == 1, what="one engine alone")
        family = server.family()
        assert await server.stop() == 0
        assert not [process for process in family if lives(process)]


async def test_whoever_has_waited_long_enough_gets_the_memory_of_one_that_is_at_work() -> None:
    async with serving(PAIR, environment=JSON_LOG) as server:
        streams = [(await begin(server, f"{each} {LONG}", model="one"))[0] for each in range(2)]
        engine = stand_still(server, "one")
        behind = [asyncio.create_task(ask(server, f"Behind {each}.", model="one")) for each in range(4)]
        other = asyncio.create_task(ask(server, "Hello, two.", model="two"))
        found = await until_state(server, "two", "waiting")
        assert "one" in found["reason"]
        assert found["waiting"] == 1
        listed = {each["id"]: each for each in (await server.get("/v1/models"))["data"]}
        assert (listed["two"]["state"], listed["two"]["reason"]) == ("waiting", found["reason"])
        await until_state(server, "one", "draining")
        assert (await server.load("one"))[1] == 4, "it gets nothing new, and its line is held"
        engine.resume()
        assert all([(await stream).whole for stream in streams])
        assert (await other).whole
        assert all(answer.whole for answer in await asyncio.gather(*behind))
        assert names(server, "engine.starting") == ["one", "two", "one"]
        assert await server.metric("forebay_engine_deaths_total") == 0

        last, _ = await begin(server, LONG, model="one")
        engine = stand_still(server, "one")
        waiting = asyncio.create_task(ask(server, "Hello, two.", model="two"))
        await until_state(server, "two", "waiting")
        await server.post("/admin/models/two/unload")
        assert (await waiting).code == "engine_unavailable"
        assert (await server.model("two"))["state"] == "stopped"
        engine.resume()
        assert (await last).whole

        last, _ = await begin(server, LONG, model="one")
        engine = stand_still(server, "one")
        waiting = asyncio.create_task(ask(server, "Hello, two.", model="two"))
        await until_state(server, "two", "waiting")
        engine.resume()
        ended = await server.stop()
        told: Answer = await waiting
        assert (ended, told.code) == (0, "shutting_down")


async def test_engines_that_die_while_they_leave_or_come_hold_no_memory() -> None:
    config = PAIR + model("bad", more='options.fail_start = "exit"') + model("small", 300)
    async with serving(config, environment=JSON_LOG) as server:
        stream, _ = await begin(server, LONG, model="one")
        stand_still(server, "one")
        other = asyncio.create_task(ask(server, "Hello, two.", model="two"))
        await until_state(server, "one", "draining")
        os.kill(server.engine_pid("one"), signal.SIGKILL)
        assert (await stream).code == "engine_crashed"
        assert (await other).whole
        assert (await ask(server, "And again.", model="one")).whole

        assert (await ask(server, "Hello?", model="bad")).code == "engine_unavailable"
        assert (await ask(server, "Hello, small.", model="small")).whole
        assert (await ask(server, "Hello, one.", model="one")).whole
        await eventually(lambda: set(engines(server)) == {"one", "small"}, what="two engines alone")
        os.kill(server.engine_pid("one"), signal.SIGKILL)
        assert (await ask(server, "Hello, two.", model="two")).whole
        assert "one" not in engines(server), "the memory of the dead went to the next"


SLEEPER = """
default_models = false
[memory]
host_bytes = 400_000_000
residency_seconds = 0.1
swap_wait_seconds = 0.3
measure_seconds = 0.2
[models.one]
engine = "fake"
options.ballast_bytes = 200_000_000
options.sleep_level = {level}
[models.two]
engine = "fake"
options.ballast_bytes = 200_000_000
"""


@pytest.mark.parametrize("level", [1, 2])
async def test_an_engine_that_can_sleep_keeps_its_process_while_another_has_its_memory(level: int) -> None:
    async with serving(SLEEPER.format(level=level), environment=JSON_LOG) as server:

        async def is_measured(name: str) -> bool:
            """Before that nobody knows how much its ballast is."""
            return await server.metric("forebay_memory_measured_bytes", model=name, device="host") > 200_000_000

        for name in ("one", "two", "one"):
            assert (await ask(server, f"Hello, {name}.", model=name)).whole
            await eventually(partial(is_measured, name), what="its measure")
        assert names(server, "engine.starting") == ["one", "two"], "it was woken, not started"
        assert (names(server, "engine.asleep"), names(server, "engine.woken")) == (["one"], ["one"])
        assert list(engines(server)) == ["one"], "whoever cannot sleep is gone"
        sleeper = engines(server)["one"]
        assert sleeper.memory_info().rss > 200_000_000

        assert (await ask(server, "Hello, two.", model="two")).whole
        assert (await server.model("one"))["state"] == "asleep"
        assert sleeper.memory_info().rss < 100_000_000
        if level == 1:
            await server.post("/admin/models/one/unload")
        else:
            sleeper.kill()
        await eventually(lambda: not lives(sleeper), what="the end of the sleeper")
        await until_state(server, "one", "stopped")
        assert (await ask(server, "Hello, one.", model="one")).whole
        assert names(server, "engine.starting") == ["one", "two", "two", "one"]
        family = server.family()
        assert await server.stop() == 0
        assert not [process for process in family if lives(process)]


async def wake_frozen(server: Server) -> tuple[psutil.Process, asyncio.Task[Answer]]:
    """An engine that froze in its sleep and is asked to wake, and who waits for it."""
    for name in ("one", "two"):
        assert (await ask(server, f"Hello, {name}.", model=name)).whole
    sleeper = engines(server)["one"]
    sleeper.suspend()
    waiting = asyncio.create_task(ask(server, "Hello, one.", model="one"))
    await until_state(server, "one", "starting")
    return sleeper, waiting


async def test_an_engine_that_dies_while_it_wakes_or_need_not_wake_any_longer_holds_nobody_up() -> None:
    async with serving(SLEEPER.format(level=1), environment=JSON_LOG) as server:
        sleeper, waiting = await wake_frozen(server)
        sleeper.kill()
        assert (await waiting).whole
        assert names(server, "engine.starting") == ["one", "two", "one"]

        sleeper, waiting = await wake_frozen(server)
        await server.post("/admin/models/one/unload")
        assert (await waiting).code == "engine_unavailable"
        await eventually(lambda: not lives(sleeper), what="the end of the sleeper")


async def test_an_engine_that_hangs_while_it_wakes_is_started_anew() -> None:
    limits = "[supervisor]\nstall_seconds = 2\nbackoff_seconds_min = 0.05\n"
    async with serving(SLEEPER.format(level=1) + limits, environment=JSON_LOG) as server:
        sleeper, waiting = await wake_frozen(server)
        assert (await asyncio.wait_for(waiting, 30)).whole
        assert not lives(sleeper)
        assert [each["cause"] for each in server.named("engine.died")] == ["stall"]


async def test_models_that_are_loaded_at_the_start_and_do_not_fit_together_end_serve(tmp_path: Path) -> None:
    (tmp_path / "forebay.toml").write_text(
        BASE + model("one", more="preload = true") + model("two", more="preload = true")
    )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FOREBAY_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "forebay.cli", "serve", "--port", "0",
        cwd=tmp_path, env={**inherited, "FOREBAY_ADMIN_KEY": "x" * 40},
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(30):
            _, complaint = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    last = complaint.decode().splitlines()[-1]
    assert process.returncode == 1
    assert last.startswith(
        "forebay: The models that are loaded at the start do not fit into memory together: two needs "
    )
    assert "Take `preload` from two or another" in last


async def test_a_preloaded_model_that_left_is_no_reason_to_call_the_server_unready() -> None:
    config = BASE + model("one", more="preload = true\nidle_unload_seconds = 0.5")
    async with serving(config, environment=JSON_LOG) as server:
        await until_state(server, "one", "stopped")
        assert names(server, "model.idle") == ["one"]
        assert await server.ready()
        assert (await ask(server, "Hello again.", model="one")).whole
        await server.post("/admin/models/one/unload")
        assert not await server.ready(), "an operator's unload is another matter"


async def test_real_models_of_three_kinds_take_turns_and_answer_after_each_swap_as_before() -> None:
    """Chat, vectors and speech, of which two never fit; all that ask at once get what they got of a model by itself."""
    config = BASE + "".join(
        f'[models.{name}]\nengine = "{engine}"\nsource = "file:{path}"\nmemory_bytes = 600_000_000\n'
        for name, engine, path in (
            ("talks", "llama.cpp", smollm2_path()),
            ("embeds", "onnx", minilm_path()),
            ("hears", "whisper", whisper_tiny() / "model.bin"),
        )
    )

    async def talk(client: openai.AsyncOpenAI) -> Any:
        messages: Any = [{"role": "user", "content": "What is a river?"}]
        said = await client.chat.completions.create(model="talks", messages=messages, max_tokens=12, temperature=0)
        return said.choices[0].message.content

    async def embed(client: openai.AsyncOpenAI) -> Any:
        found = await client.embeddings.create(model="embeds", input="A river runs.", encoding_format="float")
        return [round(each, 4) for each in found.data[0].embedding]

    async def hear(client: openai.AsyncOpenAI) -> Any:
        return (await client.audio.transcriptions.create(model="hears", file=sample_wav())).text

    async with serving(config, environment=JSON_LOG) as server, server.client(timeout=120) as client:
        asked = (talk, embed, hear)
        alone = [await each(client) for each in asked]
        assert names(server, "model.swapped") == ["talks", "embeds"]
        swaps = len(names(server, "engine.starting"))
        for _ in range(2):
            assert await asyncio.gather(*(each(client) for each in asked * 2)) == alone * 2
        assert len(names(server, "engine.starting")) >= swaps + 4
        assert len(engines(server)) == 1, "two never fit"
        assert not server.named("engine.died")
