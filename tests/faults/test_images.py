"""Hostile addresses of images, online and in batches: a canary on loopback is never reached."""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.engine_options import FakeOptions
from forebay.errors import InvalidRequest, NotFound
from forebay.inference import Priority
from forebay.media.images import Images
from forebay.model_config import FakeModel
from forebay.outbound import Outbound
from forebay.replicas.calls import CHAT_COMPLETIONS, MESSAGES, RESPONSES, Calls
from forebay.replicas.catalog import Catalog
from tests.support.batches import finished, results, submit
from tests.support.hostile_urls import hostile_urls
from tests.support.images import message, part
from tests.support.receiver import Canary, canary
from tests.support.server import FAKE, Server, serving

OFF = f"{FAKE}\n[models.fake.options]\nvision = true\n"
ON = f'{OFF}\n[media]\nfetch_hosts = ["*"]\nfetch_timeout_seconds = 2\n[batches]\nline_backoff_seconds = 0.01\n'
REFUSED = {"url_not_allowed", "media_invalid"}  # the second for what begins with `data:`


@pytest.fixture
async def bird() -> AsyncIterator[Canary]:
    async with canary() as one:
        yield one
        assert one.connections == 0


class NoFiles:
    async def read(self, project: str, file_id: str, bytes_max: int) -> bytes:
        raise NotFound


def chat(url: str) -> dict[str, Any]:
    return {"messages": [message([part(url)])]}


def responses(url: str) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}


def messages(url: str) -> dict[str, Any]:
    source = {"type": "url", "url": url}
    return {"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}


@pytest.mark.parametrize(
    ("path", "made"),
    [(CHAT_COMPLETIONS, chat), (RESPONSES, responses), (MESSAGES, messages)],
    ids=["chat", "responses", "messages"],
)
@pytest.mark.parametrize("priority", [None, Priority.BATCH])
@pytest.mark.parametrize("answer", [["127.0.0.1"], ["::1"], ["::ffff:127.0.0.1", "127.0.0.1"]])
async def test_no_image_address_reaches_the_canary(
    bird: Canary, answer: list[str], priority: Priority | None, path: str, made: Callable[[str], dict[str, Any]]
) -> None:
    """With a name server on the attacker's side, and every host allowed."""
    asked = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return answer

    models = {"fake": FakeModel(engine="fake", options=FakeOptions(vision=True))}
    settings = Settings.model_validate({"default_models": False, "models": models, "media": {"fetch_hosts": ["*"]}})
    clock = SystemClock()
    calls = Calls(
        Catalog(settings),
        Images(settings.media, Outbound(settings.outbound, clock, resolve), NoFiles(), clock),
        settings.audio.diarization_model,
    )
    for url in hostile_urls(bird.port):
        raw = json.dumps({"model": "fake", **made(url)}).encode()
        with pytest.raises(InvalidRequest) as refused:
            await calls.prepare(path, raw, request_id="req_1", project="web", priority=priority)
        assert refused.value.code in REFUSED, url
    assert len(asked) > 5, "names got as far as the resolver, and no further"


@pytest.mark.parametrize("config", [OFF, ON], ids=["fetching off", "fetching on"])
async def test_no_image_address_leaves_a_server(bird: Canary, config: str) -> None:
    """Whichever dialect names it, online and in batches."""
    urls = hostile_urls(bird.port)
    allowed = REFUSED if config is OFF else {*REFUSED, "url_unreachable"}  # a name that nobody knows
    async with serving(config) as server:
        for path, made in ((CHAT_COMPLETIONS, chat), (RESPONSES, responses), (MESSAGES, messages)):
            codes = [await refusal(server, path, {"model": "fake", **made(url)}) for url in urls]
            wrong = {url: code for url, code in zip(urls, codes, strict=True) if code not in allowed}
            assert not wrong, path
        for path, made in ((CHAT_COMPLETIONS, chat), (RESPONSES, responses)):
            lines = [
                {"custom_id": f"line-{number}", "method": "POST", "url": path, "body": {"model": "fake", **made(url)}}
                for number, url in enumerate(urls)
            ]
            batch = await finished(server, (await submit(server, lines, endpoint=path))["id"])
            output, errors = await results(server, batch)
            assert output == []
            assert len(errors) == len(urls)
            for each in errors:
                error = (each.get("error") or each["response"]["body"]["error"])["code"]
                assert error in allowed
        assert server.log.count("event=started") == 0


async def refusal(server: Server, path: str, body: dict[str, Any]) -> str:
    """The code of a refusal, which every dialect has."""
    async with server.session.post(server.url + path, json=body, headers=server.headers) as response:
        answer = await response.json()
        assert response.status in {400, 502}, answer
        return str(answer["error"]["code"])


async def test_the_canary_is_reached_where_that_is_allowed() -> None:
    """So that the tests above can fail."""
    async with canary() as bird, serving(f'{ON}\n[outbound]\nallowed_networks = ["127.0.0.0/8"]\n') as server:
        body = {"model": "fake", "messages": [message([part(f"http://127.0.0.1:{bird.port}/")])]}
        async with await server.send(body) as response:
            assert response.status == 502
        assert bird.connections >= 1
