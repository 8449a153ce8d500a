"""Models that stand in for others, online and in batches, and how batches treat a provider that asks for patience."""

import asyncio
import socket
from itertools import pairwise

import pytest

from tests.support.answers import ask, first_bytes, read
from tests.support.batches import finished, line, results, submit
from tests.support.server import chat_body, eventually, serving
from tests.support.upstream import Plan, Provider, providing

OPTIONS = "circuit_failures = 2\ncircuit_cooldown_seconds = 60\nretries_max = 0\nfirst_byte_timeout_seconds = 30"
CHAIN = """
default_models = false
[models.far]
engine = "upstream"
{model}
[models.far.options]
base_url = "{url}/v1"
{options}
[models.near]
engine = "fake"
preload = true
slots = 2
"""
BROKEN_FIRST = """
default_models = false
[models.first]
engine = "fake"
fallback = ["vectors", "far"]
options = {{ fail_start = "exit" }}
[models.vectors]
engine = "fake"
options = {{ capabilities = ["embedding", "chat"], tools = false }}
fallback = ["near"]
fallback_on = ["unavailable"]
[models.far]
engine = "upstream"
options = {{ base_url = "{url}/v1" }}
[models.near]
engine = "fake"
preload = true
"""
LOCAL_FIRST = """
default_models = false
[models.first]
engine = "fake"
fallback = ["far"]
options = {{ fail_start = "exit" }}
[models.far]
engine = "upstream"
options = {{ base_url = "{url}/v1" }}
"""
EVERYTHING = 'fallback = ["near"]\nfallback_on = ["unavailable", "circuit_open", "queue_full", "failed"]'


def chain(provider: Provider, model: str, options: str = OPTIONS) -> str:
    return chained(provider.url, model, options)


def chained(url: str, model: str, options: str) -> str:
    return CHAIN.format(url=url, model=model, options=options)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_open_circuit_sends_requests_to_the_next_model(*, stream: bool) -> None:
    async with providing() as provider, serving(chain(provider, 'fallback = ["near"]')) as server:
        provider.usual = Plan(500)
        for _ in range(2):
            assert (await ask(server, "Hello.", model="far", stream=stream)).code == "upstream_error"
        answer = await ask(server, "[[fake tokens=3]]", model="far", stream=stream)
        assert answer.whole
        assert answer.headers["x-served-by"] == "near"
        async with await server.chat("[[fake tokens=3]]", model="far") as response:
            assert (await response.json())["model"] == "near", "the answer says who gave it"
        assert len(provider.asked) == 2
        assert await server.metric("forebay_fallbacks_total", model="far", to="near") == 2


@pytest.mark.parametrize("plan", [Plan(500), Plan(503), Plan(429, {"Retry-After": "9"}), Plan(hang=True), Plan(401)])
async def test_any_trouble_before_the_first_byte_can_be_a_reason(plan: Plan) -> None:
    options = OPTIONS.replace("= 30", "= 2") if plan.hang else OPTIONS
    async with providing() as provider, serving(chain(provider, EVERYTHING, options)) as server:
        provider.usual = plan
        answer = await ask(server, "[[fake tokens=3]]", model="far")
        assert (answer.whole, answer.headers["x-served-by"]) == (True, "near")
        provider.usual = Plan()
        assert (await ask(server, "Hello.", model="far")).headers["x-served-by"] == "far"


async def test_what_has_been_sent_stays_and_what_is_wrong_stays_wrong() -> None:
    async with providing() as provider, serving(chain(provider, EVERYTHING)) as server:
        provider.plans.extend([Plan(cut=True), Plan(400)])
        async with await server.chat("Hello.", model="far", stream=True) as response:
            assert b"far " in await first_bytes(response)
            provider.cut.set()
            assert (await read(response)).code == "upstream_error"
        assert (await ask(server, "Hello.", model="far")).status == 400
        assert await server.metric("forebay_fallbacks_total", model="far", to="near") == 0


async def test_a_full_line_is_a_reason_only_where_the_setting_says_so() -> None:
    for on, served in (('["queue_full"]', "near"), ('["unavailable"]', None)):
        model = f'preload = true\nslots = 1\nqueue_places = 0\nfallback = ["near"]\nfallback_on = {on}'
        async with providing() as provider, serving(chain(provider, model)) as server:
            provider.plans.append(Plan(hang=True))
            first = asyncio.create_task(server.send(chat_body("Wait.", model="far")))
            await eventually(lambda: provider.hanging == 1, what="a request at the provider")
            answer = await ask(server, "[[fake tokens=3]]", model="far")
            first.cancel()
            assert answer.headers.get("x-served-by") == served
            assert answer.status == (200 if served else 429)


async def test_a_model_that_cannot_be_started_gives_way_and_its_chain_goes_on() -> None:
    async with providing() as provider, serving(BROKEN_FIRST.format(url=provider.url)) as server:

        async def served_by() -> str | None:
            answer = await ask(server, "[[fake tokens=3]]", model="first")
            return answer.headers.get("x-served-by")

        assert await eventually(served_by, within_seconds=20, what="an answer") == "vectors"
        body = {"model": "first", "prompt": "[[fake tokens=3]]"}
        async with server.session.post(f"{server.url}/v1/completions", json=body, headers=server.headers) as response:
            assert response.status == 200
            assert response.headers["x-served-by"] == "near", "those that cannot take the request are left out"
        tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
        answer = await ask(server, "Hello.", model="first", tools=[tool])
        assert answer.status == 400, "what only a running engine can tell is not tried elsewhere"


async def test_a_provider_stands_in_for_a_local_model_that_cannot_be_started() -> None:
    async with providing() as provider, serving(LOCAL_FIRST.format(url=provider.url)) as server:

        async def given_up() -> bool:
            answer = await ask(server, "Hello.", model="first")
            return answer.headers.get("x-served-by") == "far"

        await eventually(given_up, within_seconds=20, what="an answer of the provider")
        for stream in (True, False):
            answer = await ask(server, "Hello.", model="first", stream=stream)
            assert (answer.status, answer.whole, answer.headers["x-served-by"]) == (200, True, "far")
        async with await server.chat("Hello.", model="first") as response:
            body = await response.json()
            assert (body["model"], body["choices"][0]["message"]["content"]) == ("far", "far away")
        online = len(provider.asked)
        lines = [line(f"line-{number}", "Hello.", model="first") for number in range(5)]
        output, errors = await results(server, await finished(server, (await submit(server, lines))["id"]))
        assert (len(output), errors) == (5, [])
        for each in output:
            body = each["response"]["body"]
            assert (body["model"], body["choices"][0]["message"]["content"]) == ("far", "far away")
        assert len(provider.asked) == online + 5
        assert await server.metric("forebay_fallbacks_total", model="first", to="far") == len(provider.asked)


async def test_lines_of_a_batch_go_to_the_next_model_while_the_circuit_is_open() -> None:
    async with providing() as provider, serving(chain(provider, 'slots = 2\nfallback = ["near"]')) as server:
        provider.usual = Plan(500)
        for _ in range(2):
            assert (await ask(server, "Hello.", model="far")).status == 502
        lines = [line(f"line-{number}", "[[fake tokens=3]]", model="far") for number in range(20)]
        done = await finished(server, (await submit(server, lines))["id"])
        output, errors = await results(server, done)
        assert len(output) == 20
        assert not errors
        models = {each["response"]["body"]["model"] for each in output}
        assert models == {"near"}
        assert await server.metric("forebay_fallbacks_total", model="far", to="near") >= 20


async def test_all_lines_of_a_model_wait_together_for_a_provider_that_asks_for_it() -> None:
    async with providing() as provider, serving(chain(provider, "slots = 4")) as server:
        provider.plans.extend([Plan(429, {"Retry-After": "2"})] * 2)
        lines = [line(f"line-{number}", "Hello.", model="far") for number in range(12)]
        done = await finished(server, (await submit(server, lines))["id"])
        output, errors = await results(server, done)
        assert (len(output), errors) == (12, [])
        times = sorted(asked.at for asked in provider.asked)
        gaps = [after - before for before, after in pairwise(times)]
        assert max(gaps) > 1.5, "nobody asked meanwhile"
        before = sum(1 for at in times if at < times[gaps.index(max(gaps)) + 1])
        assert before <= 4, "no more than were under way"


async def test_a_provider_that_keeps_asking_for_patience_uses_up_no_attempt() -> None:
    async with providing() as provider, serving(chain(provider, "slots = 1")) as server:
        provider.plans.extend([Plan(429, {"Retry-After": "0.2"})] * 12)
        done = await finished(server, (await submit(server, [line("one", "Hello.", model="far")]))["id"])
        output, errors = await results(server, done)
        assert (len(output), errors) == (1, [])
        assert len(provider.asked) == 13


QUICK = OPTIONS.replace("cooldown_seconds = 60", "cooldown_seconds = 0.2")


async def test_a_batch_outlasts_a_provider_that_is_away() -> None:
    async with providing() as provider, serving(chain(provider, "slots = 2", QUICK)) as server:
        provider.usual = Plan(500)
        batch = await submit(server, [line(f"line-{number}", "Hello.", model="far") for number in range(6)])
        await eventually(lambda: len(provider.asked) > 15, within_seconds=30, what="many probes by the batch")
        provider.usual = Plan()
        output, errors = await results(server, await finished(server, batch["id"]))
        assert (len(output), errors) == (6, [])


async def test_a_batch_outlasts_a_provider_that_cannot_be_reached() -> None:
    with socket.socket() as held:  # bound, so that nobody else takes the port until the provider listens on it
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        async with serving(chained(f"http://127.0.0.1:{port}", "slots = 2", QUICK)) as server:
            batch = await submit(server, [line(f"line-{number}", "Hello.", model="far") for number in range(6)])

            async def failures() -> bool:
                return await server.metric("forebay_upstream_failures_total", model="far", reason="unavailable") > 8

            await eventually(failures, within_seconds=30, what="many failures")
            async with providing(port) as provider:
                output, errors = await results(server, await finished(server, batch["id"]))
                assert (len(output), errors) == (6, [])
                assert len(provider.asked) == 6


async def test_a_line_that_no_provider_can_bear_is_given_up_in_the_end() -> None:
    async with providing() as provider, serving(chain(provider, "slots = 1", QUICK)) as server:
        provider.usual = Plan(500)
        batch = await submit(server, [line("one", "Hello.", model="far")])
        output, errors = await results(server, await finished(server, batch["id"]))
        assert not output
        assert errors[0]["error"]["code"] == "engine_unavailable"
        assert 20 < len(provider.asked) < 30


async def test_lines_for_a_model_that_takes_the_callers_key_are_refused_with_the_reason() -> None:
    async with providing() as provider, serving(chain(provider, "", "caller_key = true")) as server:
        batch = await submit(
            server, [line("one", "Hello.", model="far"), line("two", "[[fake tokens=2]]", model="near")]
        )
        output, errors = await results(server, await finished(server, batch["id"]))
        assert [each["custom_id"] for each in output] == ["two"]
        (refused,) = errors
        assert refused["response"]["body"]["error"]["code"] == "upstream_key_required"
        assert not provider.asked


async def test_a_response_in_the_background_goes_to_the_next_model_too() -> None:
    async with providing() as provider, serving(chain(provider, EVERYTHING)) as server:
        provider.usual = Plan(500)
        client = server.client()
        made = await client.responses.create(model="far", input="[[fake tokens=3]]", background=True)

        async def ended() -> object:
            found = await client.responses.retrieve(made.id)
            return found if found.status not in {"queued", "in_progress"} else None

        found = await eventually(ended, within_seconds=20, what="the end of the response")
        assert (found.status, found.model, found.output_text) == ("completed", "near", "tok0 tok1 tok2 ")
        kept = await client.responses.create(model="far", input="[[fake tokens=2]]")
        assert (await client.responses.retrieve(kept.id)).model == "near"
