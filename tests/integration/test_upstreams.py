"""A provider as a model: what it answers well, badly, late or not at all, and what callers and operators then see."""

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.support.answers import ask, first_bytes, read
from tests.support.server import ADMIN_KEY, Server, chat_body, eventually, serving
from tests.support.upstream import Plan, Provider, providing

OWN_KEY = "planted-callers-own-key-7731e0"
DEBUG = {"FOREBAY_LOG_LEVEL": "debug", "FOREBAY_LOG_FORMAT": "json"}
FAR = """
default_models = false
[models.far]
engine = "upstream"
preload = true
{model}
[models.far.options]
base_url = "{url}/v1"
remote_model = "theirs"
{options}
"""
CIRCUIT = """
circuit_cooldown_seconds = {cooldown}
circuit_failures = {failures}
retries_max = 0
first_byte_timeout_seconds = {first_byte}
"""


def far(provider: Provider, options: str = "", model: str = "") -> str:
    return FAR.format(url=provider.url, options=options, model=model)


async def test_a_stream_passes_with_the_headers_and_the_key_of_the_configuration() -> None:
    async with providing() as provider:
        provider.key = "theirs-0123456789"
        config = far(provider, 'key_env = "FAR_KEY"\nheaders = { X-Team = "ours-and-no-others" }')
        async with serving(config, environment={"FAR_KEY": provider.key}) as server:
            answer = await ask(server, "Hello.", model="far")
            assert answer.whole
            assert answer.tokens == 2
            assert answer.headers["x-served-by"] == "far"
            (asked,) = provider.asked
            assert asked.path == "/v1/chat/completions"
            assert asked.body["model"] == "theirs"
            assert asked.headers["X-Team"] == "ours-and-no-others"
            assert ADMIN_KEY not in str(asked)


async def test_a_base_url_without_v1_is_taken_as_it_is() -> None:
    async with providing() as provider:
        config = far(provider).replace("/v1", "/v1beta/openai/")
        async with serving(config) as server:
            assert (await ask(server, "Hello.", model="far")).whole
            assert provider.asked[0].path == "/v1beta/openai/chat/completions"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_short_retry_after_is_waited_out_and_a_long_one_is_passed_on(*, stream: bool) -> None:
    async with providing() as provider, serving(far(provider)) as server:
        provider.plans.extend([Plan(429, {"Retry-After": "1"}), Plan(503, {"Retry-After": "0"})])
        assert (await ask(server, "Hello.", model="far", stream=stream)).whole
        first, second, third = provider.asked
        assert second.at - first.at >= 1
        assert first.body == second.body == third.body
        assert await server.metric("forebay_upstream_retries_total", model="far") == 2
        provider.plans.append(Plan(429, {"Retry-After": "77"}))
        answer = await ask(server, "Hello.", model="far", stream=stream)
        assert (answer.status, answer.code) == (429, "upstream_rate_limited")
        assert answer.headers["retry-after"] == "77"
        assert len(provider.asked) == 4


@pytest.mark.parametrize("plan", [Plan(500), Plan(502), Plan(503), Plan(429), Plan(400)])
async def test_what_may_have_been_worked_on_is_not_sent_again(plan: Plan) -> None:
    async with providing() as provider, serving(far(provider)) as server:
        provider.plans.append(plan)
        assert (await ask(server, "Hello.", model="far")).error
        assert len(provider.asked) == 1


@pytest.mark.parametrize(
    ("plan", "status", "code"),
    [
        (Plan(401), 502, "upstream_refused"),
        (Plan(403), 502, "upstream_refused"),
        (Plan(402), 502, "upstream_refused"),
        (Plan(429, code="insufficient_quota"), 502, "upstream_refused"),
        (Plan(404), 404, "model_not_found"),
        (Plan(400, code="context_length_exceeded"), 400, "context_length_exceeded"),
        (Plan(400), 400, "invalid_request"),
        (Plan(500), 502, "upstream_error"),
        (Plan(307, {"Location": "/elsewhere"}), 502, "upstream_error"),
        (Plan(504), 504, "request_timeout"),
    ],
)
async def test_its_errors_are_not_taken_for_ours(plan: Plan, status: int, code: str) -> None:
    async with providing() as provider, serving(far(provider)) as server:
        provider.plans.append(plan)
        answer = await ask(server, "Hello.", model="far")
        assert (answer.status, answer.code) == (status, code)
        assert len(provider.asked) == 1, "a redirect is not followed"


async def test_a_stream_that_is_cut_ends_with_an_error_and_is_not_begun_again() -> None:
    async with providing() as provider, serving(far(provider)) as server:
        provider.plans.append(Plan(cut=True))
        async with await server.chat("Hello.", model="far", stream=True) as response:
            assert b"far " in await first_bytes(response)
            provider.cut.set()
            answer = await read(response)
        assert (answer.status, answer.done, answer.code) == (200, False, "upstream_error")
        assert len(provider.asked) == 1


async def test_a_silence_in_the_middle_does_not_last_for_ever() -> None:
    async with providing() as provider, serving(far(provider) + "[supervisor]\nstall_seconds = 0.5\n") as server:
        provider.plans.append(Plan(cut=True))  # it waits to be told
        async with await server.chat("Hello.", model="far", stream=True) as response:
            assert b"far " in await first_bytes(response)
            answer = await read(response)
        assert (answer.done, answer.code) == (False, "request_timeout")
        assert await server.metric("forebay_upstream_failures_total", model="far", reason="timeout") == 1


async def test_after_failures_in_a_row_it_is_left_alone_until_one_request_comes_through() -> None:
    options = CIRCUIT.format(cooldown=3, failures=2, first_byte=30)
    async with providing() as provider, serving(far(provider, options)) as server:
        provider.usual = Plan(500)
        assert (await ask(server, "One.", model="far")).status == 502
        assert await _circuit(server) == ("closed", 0.0)
        assert (await ask(server, "Two.", model="far")).status == 502
        answer = await ask(server, "Three.", model="far")
        assert (answer.status, answer.code) == (503, "engine_unavailable")
        assert 0 < int(answer.headers["retry-after"]) <= 3
        assert len(provider.asked) == 2, "nobody asked while the circuit was open"
        assert (await _circuit(server))[0] == "open"
        await eventually(lambda: _is(server, "half_open"), what="the end of the cool-down")
        assert (await ask(server, "Four.", model="far")).status == 502
        assert (await _circuit(server)) == ("open", 2.0), "one failure is enough for the probe"
        provider.usual = Plan()
        await eventually(lambda: _is(server, "half_open"), what="the end of the second cool-down")
        assert (await ask(server, "Five.", model="far")).whole
        assert await _circuit(server) == ("closed", 0.0)
        assert await server.metric("forebay_upstream_failures_total", model="far", reason="error") == 3


async def _circuit(server: Server) -> tuple[str, float]:
    """As everybody sees it; the three places have to agree."""
    (model,) = (await server.get("/v1/models"))["data"]
    (state,) = (await server.get("/ready"))["models"]
    assert model["circuit"] == state["circuit"] == (await server.model("far"))["circuit"]
    assert model["state"] == "ready"
    return model["circuit"], await server.metric("forebay_upstream_circuit", model="far")


async def _is(server: Server, state: str) -> bool:
    return bool((await server.model("far"))["circuit"] == state)


async def test_who_waits_when_the_circuit_opens_is_told_at_once() -> None:
    options = CIRCUIT.format(cooldown=60, failures=1, first_byte=0.5)
    async with providing() as provider, serving(far(provider, options, "slots = 1")) as server:
        provider.usual = Plan(hang=True)
        first = await server.send(chat_body("One.", model="far"))
        assert first.status == 504
        assert (await read(first)).code == "request_timeout"
        assert (await ask(server, "Two.", model="far")).status == 503
        assert len(provider.asked) == 1
        await eventually(lambda: provider.hanging == 0, what="the end of the request at the provider")
        assert await server.metric("forebay_upstream_failures_total", model="far", reason="timeout") == 1


async def test_only_one_request_tries_a_provider_that_was_away() -> None:
    options = CIRCUIT.format(cooldown=1, failures=2, first_byte=30)
    async with providing() as provider, serving(far(provider, options)) as server:
        provider.plans.extend([Plan(500), Plan(500), Plan(hang=True)])
        for _ in range(2):
            assert (await ask(server, "Hello.", model="far")).status == 502
        await eventually(lambda: _is(server, "half_open"), what="the end of the cool-down")
        probing = asyncio.create_task(server.send(chat_body("Probe.", model="far")))
        await eventually(lambda: provider.hanging == 1, what="the probe")
        assert (await ask(server, "Me too.", model="far")).status == 503
        probing.cancel()
        await eventually(lambda: _free(server), what="a free place")
        assert (await ask(server, "Next.", model="far")).whole, "a probe whose caller left makes way for another"


async def _free(server: Server) -> bool:
    return await server.load("far") == (0, 0)


async def test_a_provider_that_cannot_be_reached_is_tried_again_and_then_named() -> None:
    config = far(Provider(), "retries_max = 1").replace('"/v1"', '"http://127.0.0.1:9/v1"')
    async with serving(config) as server:
        answer = await ask(server, "Hello.", model="far")
        assert (answer.status, answer.code) == (503, "engine_unavailable")
        assert await server.metric("forebay_upstream_retries_total", model="far") == 1
        assert await server.metric("forebay_upstream_failures_total", model="far", reason="unavailable") == 1


async def test_the_callers_own_key_goes_to_the_provider_and_nowhere_else() -> None:
    async with providing() as provider:
        provider.key = OWN_KEY
        async with serving(far(provider, "caller_key = true"), environment=DEBUG) as server:
            body = chat_body("Hello.", model="far")
            for value in (OWN_KEY, f"Bearer {OWN_KEY}"):
                async with await server.send(body, **{"X-Upstream-Authorization": value}) as response:
                    assert (await read(response)).whole
            assert not any("X-Upstream-Authorization" in asked.headers for asked in provider.asked)
            assert not any(ADMIN_KEY in str(asked) for asked in provider.asked)
            refusals = [
                ({}, 400, "upstream_key_required"),
                ({"X-Upstream-Authorization": "two words"}, 400, "upstream_key_required"),
                ({"X-Upstream-Authorization": ADMIN_KEY}, 400, "upstream_key_required"),
                ({"X-Upstream-Authorization": OWN_KEY + "x"}, 401, "upstream_key_refused"),
            ]
            shown = []
            for headers, status, code in refusals:
                async with await server.send(body, **headers) as response:
                    answer = await read(response)
                assert (answer.status, answer.code) == (status, code)
                shown.append(str(answer))
            background = {"model": "far", "input": "Hello.", "background": True}
            headers = {**server.headers, "X-Upstream-Authorization": OWN_KEY}
            async with server.session.post(f"{server.url}/v1/responses", json=background, headers=headers) as response:
                assert (await response.json())["error"]["code"] == "upstream_key_required"
            for path in ("/admin/models", "/ready", "/metrics", "/v1/models"):
                async with server.session.get(server.url + path, headers=server.headers) as response:
                    shown.append(await response.text())
            assert await server.stop() == 0
            stored = b"".join(path.read_bytes() for path in server.folder.rglob("*") if path.is_file())
            assert OWN_KEY.encode() not in stored, "log and database are among these files"
            assert not [text for text in shown if OWN_KEY in text]


async def test_what_one_key_has_paid_for_is_for_that_key_alone() -> None:
    served = 'caller_key = true\ncapabilities = ["embedding"]'
    async with providing() as provider, serving(far(provider, served)) as server:
        for key in ("key-of-one", "key-of-one", "key-of-another"):
            client = server.client(default_headers={"X-Upstream-Authorization": f"Bearer {key}"})
            await client.embeddings.create(model="far", input="one text", encoding_format="float")
        assert [asked.headers["Authorization"] for asked in provider.asked] == [
            "Bearer key-of-one",
            "Bearer key-of-another",
        ]


async def test_a_key_that_nobody_asked_for_is_not_passed_on() -> None:
    async with providing() as provider, serving(far(provider)) as server:
        headers = {"X-Upstream-Authorization": OWN_KEY}
        async with await server.send(chat_body("Hello.", model="far"), **headers) as response:
            assert (await read(response)).whole
        assert OWN_KEY not in str(provider.asked)


async def test_vectors_scores_and_the_other_dialects_come_through_too() -> None:
    served = 'capabilities = ["chat", "completion", "embedding", "rerank"]'
    async with providing() as provider, serving(far(provider, served)) as server:
        client = server.client()
        made = await client.embeddings.create(model="far", input=["one", "two"], encoding_format="float")
        assert [each.embedding for each in made.data] == [[0.5, 0.25]] * 2
        ranked = await _post(server, "/v1/rerank", {"query": "q", "documents": ["a", "b"]})
        assert [each["index"] for each in ranked["results"]] == [1, 0]
        response = await client.responses.create(model="far", input="Hello.")
        assert response.output_text == "far away"
        message = await _post(
            server, "/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "Hello."}]}
        )
        assert message["content"][0]["text"] == "far away"
        provider.plans.append(Plan(401))
        with pytest.raises(openai.InternalServerError) as refused:
            await client.embeddings.create(model="far", input="three")
        assert refused.value.code == "upstream_refused"


async def _post(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    content = {"model": "far", **body}
    async with server.session.post(server.url + path, json=content, headers=server.headers) as response:
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = json.loads(await response.read())
        return answer
