"""The server as a person starts it, uses it and stops it."""

import re
import signal
import ssl
from pathlib import Path

import aiohttp
import pytest

from tests.support.models import smollm2_path
from tests.support.server import eventually, serving

NO_ADMIN_KEY = {"FOREBAY_ADMIN_KEY": ""}


async def test_a_chat_is_answered_whole_and_streamed() -> None:
    async with serving() as server:
        client = server.client()
        whole = await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "Hello [[fake tokens=3]]"}]
        )
        assert whole.choices[0].message.content == "tok0 tok1 tok2 "
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 3
        stream = await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "Hello [[fake tokens=3]]"}], stream=True
        )
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "tok0 tok1 tok2 "
        assert await server.stop(signal.SIGTERM) == 0
        assert "server.stopped" in server.log


async def test_a_prompt_that_is_too_long_is_named_as_its_caller_knows_it() -> None:
    long = "word [[fake context_error=1]]"
    messages = [{"role": "user", "content": long}]
    async with serving() as server:
        for path, param, body in (
            ("chat/completions", "messages", {"messages": messages}),
            ("completions", "prompt", {"prompt": long}),
            ("responses", "input", {"input": long}),
        ):
            asked = {"model": "fake", **body}
            async with server.session.post(f"{server.url}/v1/{path}", json=asked, headers=server.headers) as response:
                error = (await response.json())["error"]
            assert (response.status, error["code"], error["param"]) == (400, "context_length_exceeded", param)


async def test_https_with_a_certificate_of_ones_own() -> None:
    folder = Path(__file__).parents[1] / "support" / "tls"  # made for these tests, trusted by nobody
    environment = {
        "FOREBAY_TLS_CERTIFICATE": str(folder / "certificate.pem"),
        "FOREBAY_TLS_KEY": str(folder / "key.pem"),
    }
    trust = ssl.create_default_context(cafile=str(folder / "certificate.pem"))
    async with serving(environment=environment, wait=False) as server:
        assert server.url.startswith("https://127.0.0.1:")

        async def healthy() -> bool:
            try:
                async with server.session.get(f"{server.url}/ready", ssl=trust) as response:
                    return response.status == 200
            except aiohttp.ClientConnectorError:
                return False  # it has told its address, and is about to listen there

        await eventually(healthy, what="readiness over HTTPS")
        body = {"model": "fake", "messages": [{"role": "user", "content": "[[fake tokens=2]]"}], "stream": True}
        async with server.session.post(
            f"{server.url}/v1/chat/completions", json=body, headers=server.headers, ssl=trust
        ) as response:
            assert b"tok1 " in await response.read()


async def test_a_half_of_tls_is_refused() -> None:
    with pytest.raises(AssertionError, match="go together"):
        async with serving(environment={"FOREBAY_TLS_KEY": "key.pem"}):
            pass


async def test_a_certificate_that_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("rubbish", encoding="utf-8")
    for certificate in (tmp_path / "none.pem", key):
        with pytest.raises(AssertionError, match="Check tls_certificate and tls_key") as refused:
            async with serving(environment={"FOREBAY_TLS_CERTIFICATE": str(certificate), "FOREBAY_TLS_KEY": str(key)}):
                pass
        assert "Traceback" not in str(refused.value)


async def test_a_port_that_is_taken_is_a_sentence() -> None:
    async with serving() as server:
        port = server.url.rpartition(":")[2]
        with pytest.raises(AssertionError, match="Choose another with --host or --port"):
            async with serving(environment={"FOREBAY_PORT": port}):
                pass


async def test_beyond_loopback_it_needs_a_key_first() -> None:
    with pytest.raises(AssertionError, match="forebay keys create"):
        async with serving(environment={"FOREBAY_HOST": "0.0.0.0", "FOREBAY_ADMIN_KEY": ""}):
            pass


async def test_the_first_start_shows_a_key_and_the_second_does_not(tmp_path: Path) -> None:
    async with serving(folder=tmp_path, environment=NO_ADMIN_KEY) as server:
        key = re.search(r"^  (fb_\S+)$", server.log, re.MULTILINE)
        assert key is not None
        server.key = key[1]
        async with await server.chat("[[fake tokens=1]]") as response:
            assert response.status == 200
        await server.stop()
    (tmp_path / "server.log").unlink()
    async with serving(folder=tmp_path, environment=NO_ADMIN_KEY) as server:
        assert "fb_" not in server.log
        server.key = key[1]
        async with await server.chat("[[fake tokens=1]]") as response:
            assert response.status == 200


async def test_an_embedding_model_is_not_asked_to_chat() -> None:
    path = smollm2_path()
    config = f"""
default_models = false
[models.embed]
engine = "llama.cpp"
source = "file:{path}"
options = {{ embeddings = true }}
"""
    async with serving(config) as server:
        async with await server.chat("hello", model="embed") as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"], error["param"]) == (400, "capability_not_supported", "model")
        assert server.engine_pids() == [], "it is refused before anything is loaded"
