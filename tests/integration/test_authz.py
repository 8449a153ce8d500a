"""Every route against every kind of caller: docs/api.md says who may, and the server agrees."""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.gateway.server import create_app
from forebay.inference import Capability
from forebay.store.database import Database
from forebay.store.key_format import Role, make_key
from forebay.store.keys import KeyStore
from tests.support.images import data_url as image_url
from tests.support.images import picture
from tests.support.recordings import data_url, wav
from tests.support.server import ADMIN_KEY, FAKE, Server, eventually, serving
from tests.support.wire import Reply, get, post, wire

CONFIG = FAKE + "[auth]\nkey_cache_seconds = 1\nfailures_per_minute_max = 100000\n"
DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"
CHAT = b'{"model": "fake", "messages": [{"role": "user", "content": "[[fake tokens=1]]"}]}'
RESPONSE = b'{"model": "fake", "input": "[[fake tokens=1]]"}'
COMPLETION = b'{"model": "fake", "prompt": "[[fake tokens=1]]"}'
RANKING = b'{"model": "fake", "query": "a", "documents": ["b"]}'
MESSAGE = b'{"model": "fake", "max_tokens": 5, "messages": [{"role": "user", "content": "[[fake tokens=1]]"}]}'
RECORDING = b'{"model": "fake", "url": "%b"}' % data_url(wav(1)).encode()
BODIES = {
    "/v1/responses": RESPONSE,
    "/v1/messages": MESSAGE,
    "/v1/messages/count_tokens": MESSAGE.replace(b'"max_tokens": 5, ', b""),
    "/tokenize": b'{"model": "fake", "content": "a"}',
    "/detokenize": b'{"model": "fake", "tokens": [97]}',
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/embeddings": b'{"model": "fake", "input": "a"}',
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v2/rerank"), RANKING),
    **dict.fromkeys(("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/diarizations"), RECORDING),
    "/v1/audio/alignments": RECORDING.replace(b"{", b'{"transcript": "a", '),
}
BODIES |= {
    "/v1/images/edits": b'{"model": "fake", "prompt": "a", "images": [{"image_url": "%b"}]}'
    % image_url(picture()).encode(),
    "/v1/images/generations": b'{"model": "fake", "prompt": "a", "size": "64x64"}',
}
BODIES["/admin/projects/{project}"] = b"{}"
FILLED_IN = {"name": "fake", "name:path": "fake", "project": "default"}

# What each caller gets, by what docs/api.md says of the route. 404 is the answer of a route that one may use, for
# what belongs to another project; 400 that of one that makes something out of a body, which is not sent here.
STRANGERS = ("no key", "bad key", "malformed key", "expired", "revoked")
EXPECTED: dict[str, dict[str, frozenset[int]]] = {
    "anybody": dict.fromkeys(
        (*STRANGERS, "read only", "member", "embedding only", "other project", "admin"), frozenset({200})
    ),
    # The signature stands for a key, so that a browser can show the picture. None of these callers has a right one.
    "signed address": dict.fromkeys(
        (*STRANGERS, "read only", "member", "embedding only", "other project", "admin"), frozenset({404})
    ),
    "any key": {
        **dict.fromkeys(STRANGERS, frozenset({401})),
        **dict.fromkeys(("read only", "member", "embedding only", "other project", "admin"), frozenset({200, 404})),
    },
    "member": {
        **dict.fromkeys(STRANGERS, frozenset({401})),
        "read only": frozenset({403}),
        **dict.fromkeys(("member", "embedding only", "other project", "admin"), frozenset({200, 400, 404})),
    },
    "member with the scope": {
        **dict.fromkeys(STRANGERS, frozenset({401})),
        **dict.fromkeys(("read only", "embedding only"), frozenset({403})),
        **dict.fromkeys(("member", "other project", "admin"), frozenset({200})),
    },
    "member with the scope embedding": {
        **dict.fromkeys(STRANGERS, frozenset({401})),
        "read only": frozenset({403}),
        **dict.fromkeys(("member", "embedding only", "other project", "admin"), frozenset({200})),
    },
    "admin": {
        **dict.fromkeys(STRANGERS, frozenset({401})),
        **dict.fromkeys(("read only", "member", "embedding only", "other project"), frozenset({403})),
        "admin": frozenset({200}),
    },
}
CALLERS = tuple(EXPECTED["anybody"])

pytestmark = pytest.mark.asyncio(loop_scope="module")


def documented() -> dict[tuple[str, str], str]:
    """(method, path) -> class of callers, from the table of routes in docs/api.md."""
    found = {}
    table = DOCUMENT.read_text(encoding="utf-8").split("## Routes", 1)[1].split("\n## ", 1)[0]
    for routes, who in re.findall(r"^\| (`[A-Z]+ /.*?) \| (.*?) \|", table, re.MULTILINE):
        for method, path in re.findall(r"`([A-Z]+) (/[^`]*)`", routes):
            found[method, path] = class_of(who)
    return found


def class_of(who: str) -> str:
    if who.startswith("anybody"):
        return "anybody"
    if who.startswith("whoever has its signed address"):
        return "signed address"
    if who.startswith("member, admin"):
        if "scope `embedding`" in who:
            return "member with the scope embedding"
        return "member with the scope" if "scope" in who else "member"
    return who


def walk(routes: list[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(method, path) of every route, however deep it is nested; whatever is no plain route is named as it is."""
    for route in routes:
        if isinstance(route, APIRoute):
            for method in sorted(route.methods or ()):
                yield method, prefix + route.path.replace(":path}", "}")
            continue
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        nested = getattr(inner, "routes", None)
        if nested is None:
            yield "OTHER", repr(route)
        else:
            yield from walk(nested, prefix + _prefix_of(route))


def _prefix_of(route: BaseRoute) -> str:
    context = getattr(route, "include_context", None)
    return str(getattr(context, "prefix", "") or getattr(route, "path", "") or "")


def in_the_app() -> set[tuple[str, str]]:
    return set(walk(list(create_app(Settings()).routes)))


async def test_every_route_is_documented_and_every_documented_route_is_there() -> None:
    assert in_the_app() == set(documented())
    assert set(documented().values()) == set(EXPECTED)
    assert len(documented()) >= 13


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG) as running:
        yield running
        assert "request.bug" not in running.log


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def store(server: Server) -> AsyncIterator[KeyStore]:
    database = await Database.open(Settings(data_dir=server.folder / "data"))
    yield KeyStore(database, SystemClock())
    await database.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keys(store: KeyStore) -> dict[str, str]:
    async def make(**fields: Any) -> str:
        return (await store.create_key(**fields))[1]

    revoked, revoked_key = await store.create_key(role=Role.ADMIN)
    await store.revoke(revoked.id)
    return {
        "no key": "",
        "bad key": make_key().plain,
        "malformed key": "Bearer; DROP TABLE api_keys",
        "expired": await make(role=Role.ADMIN, expires_at=time.time() - 1),
        "revoked": revoked_key,
        "read only": await make(role=Role.READ_ONLY),
        "member": await make(),
        "embedding only": await make(scopes=frozenset({Capability.EMBEDDING})),
        "other project": await make(project="other"),
        "admin": ADMIN_KEY,
    }


async def ask(server: Server, method: str, path: str, key: str, host: str = "127.0.0.1") -> Reply:
    """One request, on a connection of its own."""
    address = re.sub(r"{([^}]*)}", lambda match: FILLED_IN.get(match[1], "of_another_project"), path)
    headers = (f"Authorization: Bearer {key}",) if key else ()
    body = BODIES.get(path, b"") if method == "POST" else b""
    data = get(address, *headers, f"Content-Length: {len(body)}", method=method, host=host) + body
    async with wire(server.url) as line:
        await line.send(data)
        return await line.reply()


@pytest.mark.parametrize("caller", CALLERS)
async def test_every_route_answers_as_documented(server: Server, keys: dict[str, str], caller: str) -> None:
    for (method, path), who in documented().items():
        reply = await ask(server, method, path, keys[caller])
        assert reply.status in EXPECTED[who][caller], (caller, method, path, reply)
        if reply.status >= 400:
            fields = (
                {"message", "type", "code"} if path.startswith("/v1/messages") else {"message", "type", "param", "code"}
            )
            assert set(reply.json["error"]) == fields
        if path.endswith(("/restart", "/unload")) and reply.status == 200:
            await ask(server, "POST", "/admin/models/{name}/load", ADMIN_KEY)
            await eventually(server.ready, within_seconds=30, what="the model to be up again")


async def test_paths_beside_the_routes_give_nothing_away(server: Server, keys: dict[str, str]) -> None:
    paths = ["/docs", "/redoc", "/openapi.json", "/v1", "/v1/", "/admin", "/admin/", "/", "//v1/models", "/v1//models"]
    paths += [
        "/V1/models",
        "/v1/%6dodels/../../admin/models",
        "/admin/models/..%2f..%2fetc",
        "/v1/models/../../etc/passwd",
    ]
    paths += ["/health/../admin/models", "/health;/admin/models", "/health%00", "/./metrics", "http://x/admin/models"]
    for path in [*paths, "/admin/models?x=/health", "/metrics/", "/v1/models/", "/health/?key=1", "/%2e%2e/metrics"]:
        for key in ("", keys["read only"]):
            headers = (f"Authorization: Bearer {key}",) if key else ()
            async with wire(server.url) as line:
                await line.send(get(path, *headers))
                reply = await line.reply()
            assert reply.status in {400, 401, 403, 404}, (path, reply)
            assert b"replicas" not in reply.body
            assert b"forebay_" not in reply.body


async def test_the_host_header_decides_nothing(server: Server, keys: dict[str, str]) -> None:
    """A host such as `x/health?` once moved the path that a check saw."""
    chance = random.Random(48710)
    plain = ["", "x", "[::1]", "127.0.0.1:1", "localhost", "/health", "x/health", "x/health?", "x/health#", "a@b/ready"]
    plain += ["x\\health", "//health", "http://x/health", "..", "x:99999", "x:y", "*", "%2fhealth%3f", "[", "a b", "ü"]
    made = [
        "".join(chance.choices("abx/?#@:\\[]%.;, &=\t~{}|^`\"'<>()!$*+-_0é", k=chance.randint(1, 40)))
        for _ in range(179)
    ]
    open_to_all = {"anybody", "signed address"}
    protected = [(method, path, who) for (method, path), who in documented().items() if who not in open_to_all]
    for index, host in enumerate([*plain, *(text.strip() for text in made)]):
        method, path, _ = protected[index % len(protected)]
        for caller in ("no key", "bad key"):
            reply = await ask(server, method, path, keys[caller], host)
            assert reply.status in {400, 401}, (host, method, path, reply)
            assert reply.status == 401 or reply.json["error"]["code"] == "invalid_http"
        reply = await ask(server, "GET", "/admin/models", keys["read only"], host)
        assert reply.status in {400, 403}, (host, reply)


async def test_x_forwarded_and_rewrite_headers_decide_nothing(server: Server, keys: dict[str, str]) -> None:
    for header in (
        "X-Original-URL: /health",
        "X-Rewrite-URL: /health",
        "X-Forwarded-Prefix: /health",
        "X-HTTP-Method-Override: GET",
    ):
        async with wire(server.url) as line:
            await line.send(get("/admin/models", header, f"Authorization: Bearer {keys['member']}"))
            assert (await line.reply()).status == 403


async def test_a_revoked_key_stops_working_in_time(server: Server, store: KeyStore) -> None:
    record, key = await store.create_key(role=Role.ADMIN)
    assert (await ask(server, "GET", "/v1/models", key)).status == 200
    await store.revoke(record.id)
    began = time.monotonic()
    while (await ask(server, "GET", "/v1/models", key)).status == 200:
        assert time.monotonic() - began < 5  # key_cache_seconds is 1
    assert (await ask(server, "GET", "/v1/models", key)).status == 401


async def test_the_request_of_another_project_cannot_be_cancelled(server: Server, keys: dict[str, str]) -> None:
    body = (
        b'{"model": "fake", "messages": [{"role": "user", "content": "[[fake tokens=200 rate=20]]"}], "stream": true}'
    )
    async with wire(server.url) as line:
        await line.send(post(body, "X-Request-ID: mine", key=keys["member"]))
        await line.reader.readuntil(b"tok0")
        for caller, status in (("other project", 404), ("read only", 403), ("no key", 401), ("embedding only", 200)):
            async with wire(server.url) as other:
                await other.send(post(b"", path="/v1/requests/mine/cancel", key=keys[caller] or "x"))
                assert (await other.reply()).status == status, caller
        assert b"client_closed_request" in await asyncio.wait_for(line.reader.readuntil(b"0\r\n\r\n"), 5)


@pytest.mark.parametrize("name", ["nope", "x" * 6_000, "%2e%2e%2fetc%2fpasswd", "/etc/passwd", "fake%00"])
async def test_a_name_that_is_no_model_is_not_found(server: Server, keys: dict[str, str], name: str) -> None:
    reply = await ask(server, "GET", f"/v1/models/{name}", keys["read only"])
    assert (reply.status, reply.json["error"]["code"]) == (404, "model_not_found")
    assert len(reply.json["error"]["message"]) < 500


async def test_requests_per_minute(server: Server, store: KeyStore) -> None:
    _, key = await store.create_key(requests_per_minute=3)
    before = await server.metric("forebay_rejections_total", model="fake", reason="rate_limit_exceeded")
    for left in (2, 1, 0):
        reply = await ask(server, "POST", "/v1/chat/completions", key)
        assert reply.status == 200
        assert reply.headers["x-ratelimit-limit-requests"] == "3"
        assert reply.headers["x-ratelimit-remaining-requests"] == str(left)
        assert re.fullmatch(r"(\d+m)?[\d.]+m?s", reply.headers["x-ratelimit-reset-requests"])
    reply = await ask(server, "POST", "/v1/chat/completions", key)
    assert (reply.status, reply.json["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(reply.headers["retry-after"]) <= 20
    assert reply.headers["x-ratelimit-remaining-requests"] == "0"
    assert await server.metric("forebay_rejections_total", model="fake", reason="rate_limit_exceeded") == before + 1
    assert (await ask(server, "GET", "/v1/models", key)).status == 200


async def test_tokens_per_minute(server: Server, store: KeyStore) -> None:
    _, key = await store.create_key(tokens_per_minute=60)
    body = b'{"model": "fake", "messages": [{"role": "user", "content": "[[fake tokens=80]]"}]}'
    statuses = []
    for _ in range(2):
        async with wire(server.url) as line:
            await line.send(post(body, key=key))
            statuses.append(await line.reply())
    assert [one.status for one in statuses] == [200, 429]
    assert statuses[1].headers["x-ratelimit-limit-tokens"] == "60"
    assert statuses[1].headers["x-ratelimit-remaining-tokens"] == "0"
    assert 1 <= int(statuses[1].headers["retry-after"]) <= 120
