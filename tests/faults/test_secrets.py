"""What a request's id and a secret look like from outside: the first is everywhere, the second nowhere."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web

from tests.support.answers import ask, read
from tests.support.processes import command_line
from tests.support.server import ADMIN_KEY, Server, chat_body, eventually, serving

DEBUG = {"FOREBAY_LOG_LEVEL": "debug", "FOREBAY_LOG_FORMAT": "json"}
HUB_TOKEN = "planted-hub-token-5b1f0a77c2"
KEY_FROM_ENV = "planted-upstream-key-env-91c3e6"
KEY_FROM_FILE = "planted-upstream-key-file-04ad7b"
DATABASE_PASSWORD = "planted-database-password-c81d"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def test_one_id_names_a_request_in_both_logs_and_its_trace_goes_on() -> None:
    config = 'default_models = false\n[models.fake]\nengine = "fake"\npreload = true\n'
    async with serving(config, environment=DEBUG) as server:
        headers = {"X-Request-ID": "order-4711", "traceparent": TRACE}
        async with await server.send(chat_body("Hello.", stream=True), **headers) as response:
            assert response.headers["x-request-id"] == "order-4711"
            assert (await read(response)).whole
        await eventually(lambda: server.named("request.finished", request_id="order-4711"), what="the server's line")
        await eventually(lambda: _lines(server, "event=finished request_id=order-4711"), what="the engine's line")
        started = _lines(server, "event=started request_id=order-4711")[0]
        assert started["requests"] == ["order-4711"]
        assert f"traceparent={TRACE}" in started["line"]
        async with await server.send(chat_body("Hello."), **{"X-Request-ID": "two words\t"}) as response:
            assert re.fullmatch("req_[0-9a-f]{32}", response.headers["x-request-id"])
        async with await server.send(chat_body("[[fake crash_at=1]]"), **{"X-Request-ID": "order-4712"}) as response:
            assert response.status == 502
        assert server.named("request.failed", request_id="order-4712", code="engine_crashed")


def _lines(server: Server, text: str) -> list[dict[str, Any]]:
    return [event for event in server.named("engine.line") if text in event["line"]]


async def _telltale(request: web.Request) -> web.Response:
    """An upstream that puts the key that it was given into every error."""
    message = f"Incorrect API key provided: {request.headers.get('Authorization')}."
    asked = (await request.json())["messages"][-1]["content"]
    status = int(asked) if asked.isdigit() else 400
    return web.json_response({"error": {"message": message, "type": "invalid_request_error"}}, status=status)


async def _start_telltale() -> tuple[web.AppRunner, str]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", _telltale)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/v1"


async def test_no_secret_shows_anywhere(tmp_path: Path) -> None:
    (tmp_path / "upstream.key").write_text(KEY_FROM_FILE + "\n", encoding="utf-8")
    upstream, url = await _start_telltale()
    config = f"""
default_models = false
[models.fake]
engine = "fake"
preload = true
[models.by-env]
engine = "upstream"
options = {{ base_url = "{url}", key_env = "PLANTED_KEY" }}
[models.by-file]
engine = "upstream"
options = {{ base_url = "{url}", key_file = "{tmp_path}/upstream.key" }}
[models.gated]
engine = "llama.cpp"
source = "hf:nobody/nothing@{"0" * 40}/nothing.gguf"
"""
    environment = {
        **DEBUG,
        "FOREBAY_PULL_HUB_TOKEN": HUB_TOKEN,
        "FOREBAY_PULL_HUB_URL": url.removesuffix("/v1"),
        "PLANTED_KEY": KEY_FROM_ENV,
    }
    secrets = [ADMIN_KEY, HUB_TOKEN, KEY_FROM_ENV, KEY_FROM_FILE]
    async with serving(config, folder=tmp_path, environment=environment) as server:
        seen = _command_lines(server)
        assert len(seen) > 2
        told = str(psutil.Process(server.engine_pid()).environ())
        assert not [secret for secret in secrets if secret in told]
        answers = []
        for model in ("by-env", "by-file"):
            for status in ("400", "401", "403", "404", "422", "429", "500", "503"):
                for stream in (True, False):
                    answers.append(await ask(server, status, model=model, stream=stream))
        answers.append(await ask(server, "[[fake crash_at=1]]"))
        answers.append(await ask(server, "Hello.", key=ADMIN_KEY[:-1] + "x"))
        answers.append(await ask(server, "Hello.", model="gated"))
        await eventually(lambda: server.named("model.pull_failed"), within_seconds=20, what="the end of the pull")
        answers.append(await ask(server, "Hello.", model="gated"))
        assert all(answer.error for answer in answers)
        shown = [str(answer) for answer in answers]
        for path in ("/admin/models", "/ready", "/metrics", "/v1/models", "/v1/openapi.json"):
            async with server.session.get(server.url + path, headers=server.headers) as response:
                assert response.status == 200
                shown.append(await response.text())
        seen += _command_lines(server)
        assert await server.stop() == 0
        shown += [server.log, *seen]
        for secret in secrets:
            assert not [text for text in shown if secret in text], secret
    await upstream.cleanup()


def _command_lines(server: Server) -> list[str]:
    """The command lines of the server and of everything that it has started, as the process list shows them."""
    return [command_line(process) for process in (psutil.Process(server.pid), *server.family())]


async def test_the_key_of_an_engine_is_in_no_command_line_and_no_log() -> None:
    config = 'default_models = false\n[models.fake]\nengine = "fake"\npreload = true\n'
    async with serving(config, environment=DEBUG) as server:
        engine = psutil.Process(server.engine_pid())
        keys = [value for name, value in engine.environ().items() if name == "FOREBAY_ENGINE_KEY"]
        if not keys:
            pytest.skip("this system does not show the environment that a process was started with")
        assert len(keys[0]) >= 32
        assert (await ask(server, "Hello.")).whole
        shown = [*_command_lines(server), server.log, str(await server.get("/admin/models"))]
        assert not [text for text in shown if keys[0] in text]
        assert not [name for name in engine.environ() if name in {"FOREBAY_ADMIN_KEY", "FOREBAY_PULL_HUB_TOKEN"}]
        assert ADMIN_KEY not in str(engine.environ())


@pytest.mark.parametrize("level", ["debug", "info"])
def test_a_database_that_cannot_be_reached_does_not_give_its_password_away(level: str, tmp_path: Path) -> None:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FOREBAY_")}
    url = f"postgresql+asyncpg://somebody:{DATABASE_PASSWORD}@127.0.0.1:1/forebay"
    ended = subprocess.run(
        [sys.executable, "-m", "forebay.cli", "serve", "--port", "0"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env={**inherited, "FOREBAY_DATABASE_URL": url, "FOREBAY_ADMIN_KEY": ADMIN_KEY, "FOREBAY_LOG_LEVEL": level},
    )  # fmt: skip
    assert ended.returncode == 1
    assert "database" in ended.stderr
    for secret in (DATABASE_PASSWORD, ADMIN_KEY):
        assert secret not in ended.stdout + ended.stderr
