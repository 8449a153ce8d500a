"""Models that do not start, and models that are loaded, unloaded and restarted while they work."""

import asyncio
import os
import sys
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest

from tests.faults.test_engine_death import begin
from tests.support.answers import ask
from tests.support.measuring import within
from tests.support.models import smollm2_path
from tests.support.processes import lives
from tests.support.server import Server, eventually, serving

JSON_LOG = {"FOREBAY_LOG_FORMAT": "json"}
BASE = """
default_models = false
[supervisor]
backoff_seconds_min = 0.05
backoff_seconds_max = 0.2
start_timeout_seconds = 30
cancel_grace_seconds = 0.5
[models.good]
engine = "fake"
preload = true
slots = 2
"""
LONG = "[[fake tokens=150 token_ms=10]]"
LONGER = "[[fake tokens=300 token_ms=10]]"  # for a state that is looked for while it lasts


def _bad(what: str, folder: Path) -> str:
    """A model that cannot start."""
    if what == "wrong_gguf":
        (folder / "wrong.gguf").write_bytes(b"GGUF" + b"\xff" * 4096)
        return f'[models.bad]\nengine = "llama.cpp"\nsource = "file:{folder}/wrong.gguf"\n'
    if what == "missing_file":
        return f'[models.bad]\nengine = "llama.cpp"\nsource = "file:{folder}/missing.gguf"\n'
    if what == "missing_program":
        return '[models.bad]\nengine = "command"\noptions.argv = ["no-such-program-here"]\n'
    if what == "missing_template":
        options = f'options.chat_template_file = "{folder}/missing.jinja"\n'
        return f'[models.bad]\nengine = "llama.cpp"\nsource = "file:{smollm2_path()}"\n{options}'
    return f'[models.bad]\nengine = "fake"\noptions.fail_start = "{what}"\n'


def _config(what: str, folder: Path) -> str:
    base = BASE.replace("start_timeout_seconds = 30", "start_timeout_seconds = 2") if what == "never_ready" else BASE
    return base + _bad(what, folder)


WAYS = ["exit", "oom", "never_ready", "wrong_gguf", "missing_file", "missing_program", "missing_template"]


@pytest.mark.parametrize("what", WAYS)
async def test_a_preloaded_model_that_cannot_start_ends_serve_with_the_reason(what: str, tmp_path: Path) -> None:
    (tmp_path / "forebay.toml").write_text(_config(what, tmp_path) + "preload = true\n", encoding="utf-8")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FOREBAY_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "forebay.cli", "serve", "--port", "0",
        cwd=tmp_path, env={**inherited, "FOREBAY_ADMIN_KEY": "x" * 40},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    began = monotonic()
    try:
        async with asyncio.timeout(30):
            _, complaint = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    took = monotonic() - began
    last = complaint.decode().splitlines()[-1]
    print(f"{what}: status {process.returncode} after {took:.1f} s: {last}")
    assert process.returncode == 1
    assert last.startswith("forebay: The model bad ")
    assert last.endswith(".")
    assert "Traceback" not in complaint.decode()
    assert took < 15


@pytest.mark.parametrize("what", WAYS)
async def test_a_model_that_cannot_start_on_demand_is_its_callers_trouble_alone(what: str, tmp_path: Path) -> None:
    async with serving(_config(what, tmp_path), folder=tmp_path, environment=JSON_LOG) as server:
        beside, _ = await begin(server, LONG, model="good")
        began = monotonic()

        async def failed() -> bool:
            answer = await ask(server, "Hello?", model="bad")
            assert answer.status == 503
            assert answer.code in {"engine_unavailable", "model_not_ready"}
            assert 1 <= int(answer.headers["retry-after"]) <= 120
            return answer.code == "engine_unavailable"

        await eventually(failed, within_seconds=15, what="the failure")
        took = monotonic() - began
        found = await server.model("bad")
        print(f"{what}: 503 after {took:.2f} s; reason: {found['reason']}")
        assert found["state"] == "failed"
        assert len(found["reason"]) > 10
        listed = {model["id"]: model for model in (await server.get("/v1/models"))["data"]}
        assert (listed["bad"]["state"], listed["good"]["state"]) == ("failed", "ready")
        assert str(tmp_path) not in listed["bad"]["reason"]
        assert await server.ready()
        assert (await beside).whole


async def test_the_states_of_a_model_and_who_may_see_what() -> None:
    config = BASE + '[models.lazy]\nengine = "fake"\noptions.start_delay_seconds = 2\n'
    async with serving(config, environment=JSON_LOG) as server:
        member = await server.create_key("somebody")
        assert (await server.model("lazy"))["state"] == "stopped"
        asked = asyncio.create_task(ask(server, "Hello.", model="lazy"))
        await _until_state(server, "lazy", "starting")
        assert (await asked).whole
        assert (await server.model("lazy"))["state"] == "ready"
        stream, _ = await begin(server, LONGER, model="lazy")
        await server.post("/admin/models/lazy/unload")
        await _until_state(server, "lazy", "draining")
        assert (await stream).whole
        await _until_state(server, "lazy", "stopped")

        assert await _ready(server, None) == {"status": "ready"}
        assert await _ready(server, member) == {"status": "ready"}
        details = await _ready(server, server.key)
        assert {model["id"] for model in details["models"]} == {"good", "lazy"}
        for path in ("/admin/models", "/admin/models/good", "/metrics"):
            for key, status in ((None, 401), (member, 403)):
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                async with server.session.get(server.url + path, headers=headers) as response:
                    assert response.status == status
        for verb in ("load", "unload", "restart"):
            assert (await server.post(f"/admin/models/good/{verb}", member))[0] == 403
            assert (await server.post(f"/admin/models/none/{verb}"))[0] == 404


def _gone(process: psutil.Process) -> bool:
    return not lives(process)


async def _ready(server: Server, key: str | None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with server.session.get(f"{server.url}/ready", headers=headers) as response:
        found: dict[str, Any] = await response.json()
        return found


async def _until_state(server: Server, model: str, state: str) -> None:
    async def reached() -> bool:
        return bool((await server.model(model))["state"] == state)

    await eventually(reached, what=f"{model} to be {state}")


async def test_callers_of_a_model_that_is_not_loaded_wait_in_its_line() -> None:
    config = BASE + '[models.lazy]\nengine = "fake"\nslots = 2\nqueue_places = 6\noptions.start_delay_seconds = 0.7\n'
    async with serving(config, environment=JSON_LOG) as server:
        answers = await asyncio.gather(*(ask(server, f"Caller {each}.", model="lazy") for each in range(8)))
        served = [answer for answer in answers if answer.whole]
        refused = [answer for answer in answers if answer.status == 429]
        assert (len(served), len(refused)) == (6, 2)
        assert len(server.named("engine.starting", model="lazy")) == 1


@pytest.mark.parametrize("verb", ["unload", "restart"])
async def test_no_stream_is_cut_when_its_model_is_taken_out(verb: str) -> None:
    async with serving(BASE, environment=JSON_LOG) as server:
        engine = psutil.Process(server.engine_pid("good"))
        streams = [(await begin(server, f"{each} {LONGER}", model="good"))[0] for each in range(2)]
        status, told = await server.post(f"/admin/models/good/{verb}")
        assert (status, told["id"]) == (200, "good")
        await _until_state(server, "good", "draining")
        assert not await server.ready()
        for answer in await asyncio.gather(*streams):
            assert answer.whole
            assert answer.tokens == 300
        await eventually(lambda: not lives(engine), what="the end of the old engine")
        assert (await ask(server, "And again.", model="good")).whole
        assert server.engine_pid("good") != engine.pid
        assert await server.metric("forebay_engine_deaths_total") == 0


async def test_whoever_waits_for_a_model_that_is_restarted_is_served_by_the_new_engine() -> None:
    async with serving(BASE, environment=JSON_LOG) as server:
        streams = [(await begin(server, f"{each} {LONGER}", model="good"))[0] for each in range(2)]
        waiting = asyncio.create_task(ask(server, "Wait.", model="good"))
        await server.until_load(2, 1, "good")
        await server.post("/admin/models/good/restart")
        assert all(answer.whole for answer in await asyncio.gather(*streams))
        assert (await waiting).whole
        assert len(server.named("engine.starting", model="good")) == 2


async def test_a_model_that_was_just_unloaded_can_be_asked_for_at_once() -> None:
    async with serving(BASE, environment=JSON_LOG) as server:
        for number in range(5):
            engine = psutil.Process(server.engine_pid("good"))
            await server.post("/admin/models/good/unload")
            await eventually(partial(_gone, engine), what="the end of the engine")
            assert (await ask(server, f"Again {number}.", model="good")).whole


async def test_whoever_waits_for_a_model_that_is_unloaded_is_told_at_once() -> None:
    async with serving(BASE, environment=JSON_LOG) as server:

        async def told(_number: int) -> float:
            streams = [(await begin(server, f"{each} {LONGER}", model="good"))[0] for each in range(2)]
            waiting = asyncio.create_task(ask(server, "Wait.", model="good"))
            await server.until_load(2, 1, "good")
            await server.post("/admin/models/good/unload")
            unloaded_at = monotonic()
            answer = await waiting
            assert (answer.status, answer.code) == (503, "engine_unavailable")
            assert int(answer.headers["retry-after"]) >= 1
            assert all(answer.whole for answer in await asyncio.gather(*streams))
            return answer.ended_at - unloaded_at

        await within(1, told)


async def test_a_model_is_unloaded_while_it_starts() -> None:
    config = BASE + '[models.lazy]\nengine = "fake"\noptions.start_delay_seconds = 30\n'
    async with serving(config, environment=JSON_LOG) as server:
        waiting = asyncio.create_task(ask(server, "Wait.", model="lazy"))
        await server.until_load(0, 1, "lazy")
        await eventually(lambda: server.named("engine.starting", model="lazy"), what="the start")
        await server.post("/admin/models/lazy/unload")
        assert (await waiting).status == 503
        await _until_state(server, "lazy", "stopped")


async def test_an_engine_that_stops_turning_while_it_drains_is_replaced() -> None:
    config = BASE.replace("[supervisor]", "[supervisor]\nstall_seconds = 1")
    async with serving(config, environment=JSON_LOG) as server:
        silent = asyncio.create_task(ask(server, "[[fake delay_ms=60000]]", model="good"))
        await server.until_load(1, 0, "good")
        psutil.Process(server.engine_pid("good")).suspend()
        await server.post("/admin/models/good/restart")
        next_one = asyncio.create_task(ask(server, "Next.", model="good"))
        async with asyncio.timeout(6):
            assert (await silent).code == "request_timeout"
            assert (await next_one).whole
