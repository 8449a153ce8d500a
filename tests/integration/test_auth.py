"""Keys at the front door: the memory of them, what they may do, and what the time tells."""

import asyncio
import socket
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import aiohttp
import pytest
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import SecretStr

from forebay.config import Settings
from forebay.errors import (
    ForebayError,
    PermissionDenied,
    RateLimited,
    SetupError,
    StoreUnavailable,
    Unauthorized,
)
from forebay.gateway.auth import Authenticator, Principal, may_create, principal, role_at_least
from forebay.inference import Capability
from forebay.server_config import AuthSettings
from forebay.store.database import Database
from forebay.store.key_format import Role, _checksum, make_key
from forebay.store.keys import KeyRecord, KeyStore
from tests.support import postgres
from tests.support.clock import FakeClock

ADMIN = SecretStr("an-admin-key-of-32-characters-or-more")


class CountingStore(KeyStore):
    """The real store; it counts look-ups and can hold them back."""

    found = 0

    def __init__(self, database: Database, clock: FakeClock) -> None:
        super().__init__(database, clock)
        self.gate = asyncio.Event()
        self.gate.set()

    async def find(self, prefix: str) -> KeyRecord | None:
        self.found += 1
        await self.gate.wait()
        return await super().find(prefix)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def store(tmp_path: Path, clock: FakeClock) -> AsyncIterator[CountingStore]:
    database = await Database.open(Settings(data_dir=tmp_path))
    yield CountingStore(database, clock)
    await database.close()


@pytest.fixture
def door(store: CountingStore, clock: FakeClock) -> Authenticator:
    return Authenticator(store, AuthSettings(), ADMIN, clock)


def bearer(plain: str) -> dict[str, str]:
    return {"authorization": f"Bearer {plain}"}


def with_wrong_secret(plain: str) -> str:
    """A key with the prefix of another and a checksum that is right."""
    kind, prefix, _, _ = plain.split("_")
    payload = f"{kind}_{prefix}_{make_key().plain.split('_')[2]}_"
    return payload + _checksum(payload)


async def test_a_key_is_taken_from_either_header(door: Authenticator, store: CountingStore) -> None:
    record, plain = await store.create_key(requests_per_minute=3, scopes=frozenset({Capability.CHAT}))
    expected = Principal(record.id, "default", Role.MEMBER, frozenset({Capability.CHAT}), 3, None)
    basic = {"authorization": "Basic abc", "x-api-key": plain}
    for headers in (bearer(plain), {"authorization": f"bearer  {plain} "}, {"x-api-key": plain}, basic):
        assert await door.authenticate(headers) == expected
    assert store.found == 1


async def test_the_admin_key_needs_no_row(door: Authenticator, store: CountingStore) -> None:
    found = await door.authenticate(bearer(ADMIN.get_secret_value()))
    assert (found.role, found.project_id) == (Role.ADMIN, "default")
    assert store.found == 0


@pytest.mark.parametrize("key", ["x" * 600, "ключ" * 10, "with a line\nbreak" * 3])
def test_an_admin_key_that_cannot_travel_is_refused(store: CountingStore, clock: FakeClock, key: str) -> None:
    with pytest.raises(SetupError, match="admin key cannot travel"):
        Authenticator(store, AuthSettings(), SecretStr(key), clock)


async def test_whatever_is_wrong_with_a_key_the_answer_is_the_same(
    door: Authenticator, store: CountingStore, clock: FakeClock
) -> None:
    _, good = await store.create_key()
    _, expired = await store.create_key(expires_at=clock.now())
    revoked, revoked_plain = await store.create_key()
    await store.revoke(revoked.id)
    typo = good[:-1] + ("0" if good[-1] != "0" else "1")
    wrong = [expired, revoked_plain, typo, with_wrong_secret(good), make_key().plain, "x", "x" * 100_000, " ", "é" * 65]
    headers = [bearer(plain) for plain in wrong] + [{}, {"authorization": good}, {"authorization": f"Basic {good}"}]
    messages = set()
    for each in headers:
        with pytest.raises(Unauthorized) as refused:
            await door.authenticate(each)
        messages.add(str(refused.value))
    assert len(messages) == 1
    assert store.found == 4  # expired, revoked, good's prefix, unknown: nothing else reached the store


async def test_a_key_is_trusted_for_its_time_and_no_longer(
    door: Authenticator, store: CountingStore, clock: FakeClock
) -> None:
    record, plain = await store.create_key()
    await door.authenticate(bearer(plain))
    await store.revoke(record.id)
    clock.advance(4.99)
    await door.authenticate(bearer(plain))
    assert store.found == 1
    clock.advance(0.01)
    with pytest.raises(Unauthorized):
        await door.authenticate(bearer(plain))
    assert store.found == 2


async def test_expiry_counts_at_once(door: Authenticator, store: CountingStore, clock: FakeClock) -> None:
    _, plain = await store.create_key(expires_at=clock.now() + 2)
    await door.authenticate(bearer(plain))
    clock.advance(1.99)
    await door.authenticate(bearer(plain))
    clock.advance(0.01)
    with pytest.raises(Unauthorized):
        await door.authenticate(bearer(plain))
    assert store.found == 1


async def test_a_key_made_after_it_was_tried_works_within_the_time(
    store: CountingStore, clock: FakeClock, door: Authenticator
) -> None:
    _, plain = await store.create_key()
    unknown = make_key().plain
    for _ in range(10):
        with pytest.raises(Unauthorized):
            await door.authenticate(bearer(unknown))
    assert store.found == 1
    clock.advance(5)
    with pytest.raises(Unauthorized):
        await door.authenticate(bearer(unknown))
    assert store.found == 2
    await door.authenticate(bearer(plain))


async def test_the_memory_is_bounded_and_a_flood_does_not_push_out_good_keys(
    store: CountingStore, clock: FakeClock
) -> None:
    door = Authenticator(store, AuthSettings(key_cache_entries_max=40), None, clock)
    plain = [(await store.create_key())[1] for _ in range(50)]
    await door.authenticate(bearer(plain[0]))
    for _ in range(100):
        with pytest.raises(Unauthorized):
            await door.authenticate(bearer(make_key().plain))
    assert (len(door._known), len(door._unknown)) == (1, 10)
    before = store.found
    await door.authenticate(bearer(plain[0]))
    assert store.found == before
    for each in plain:
        await door.authenticate(bearer(each))
    assert (len(door._known), len(door._unknown)) == (30, 10)


async def test_many_at_once_make_one_look_up(door: Authenticator, store: CountingStore) -> None:
    _, plain = await store.create_key()
    store.gate.clear()
    callers = [asyncio.create_task(door.authenticate(bearer(plain))) for _ in range(50)]
    await asyncio.sleep(0)
    callers[0].cancel()  # the one that began the look-up
    store.gate.set()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert all(isinstance(result, Principal) for result in results[1:])
    assert store.found == 1
    assert not door._lookups


async def test_look_ups_under_way_are_bounded(door: Authenticator, store: CountingStore) -> None:
    _, plain = await store.create_key()
    await door.authenticate(bearer(plain))
    store.gate.clear()
    callers = [
        asyncio.create_task(door.authenticate(bearer(make_key().plain), f"10.0.{n // 256}.{n % 256}"))
        for n in range(300)
    ]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(door._lookups) == 256
    await door.authenticate(bearer(plain))  # who is known does not stand in that line
    store.gate.set()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["StoreUnavailable"] * 44 + ["Unauthorized"] * 256


async def test_failures_of_an_address_are_bounded(store: CountingStore, clock: FakeClock) -> None:
    door = Authenticator(store, AuthSettings(failures_per_minute_max=60), None, clock)
    _, plain = await store.create_key()
    _, other = await store.create_key()
    await door.authenticate(bearer(plain), "10.0.0.1")
    for attempt in range(60):
        with pytest.raises(Unauthorized):
            await door.authenticate(bearer(f"wrong-{attempt}"), "10.0.0.1")
    lookups = store.found
    for bad in ({}, bearer("typo"), bearer(make_key().plain), bearer(with_wrong_secret(plain))):
        with pytest.raises(RateLimited) as refused:
            await door.authenticate(bad, "10.0.0.1")
        assert 0 < (refused.value.retry_after_seconds or 0) <= 120
    assert store.found == lookups  # nothing of that reached the store
    await door.authenticate(bearer(plain), "10.0.0.1")  # a key in use goes on
    clock.advance(0.5)
    await door.authenticate(bearer(other), "10.0.0.2")  # another address is not concerned
    clock.advance(0.5)
    with pytest.raises(Unauthorized):
        await door.authenticate({}, "10.0.0.1")
    with pytest.raises(RateLimited):
        await door.authenticate({}, "10.0.0.1")


async def test_a_key_in_use_survives_its_time_behind_a_bad_neighbour(store: CountingStore, clock: FakeClock) -> None:
    door = Authenticator(store, AuthSettings(failures_per_minute_max=1), None, clock)
    _, plain = await store.create_key()
    await door.authenticate(bearer(plain), "10.0.0.1")
    clock.advance(6)
    with pytest.raises(Unauthorized):
        await door.authenticate({}, "10.0.0.1")
    with pytest.raises(RateLimited):
        await door.authenticate(bearer(make_key().plain), "10.0.0.1")
    await door.authenticate(bearer(plain), "10.0.0.1")


async def test_remembered_addresses_are_bounded(
    store: CountingStore, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.gateway.auth._ADDRESSES_MAX", 5)
    door = Authenticator(store, AuthSettings(), None, clock)
    for number in range(50):
        with pytest.raises(Unauthorized):
            await door.authenticate({}, f"10.0.0.{number}")
    assert len(door._failures) == 5


async def test_without_the_database_known_keys_work_for_their_time_and_nobody_else(
    tmp_path: Path, clock: FakeClock
) -> None:
    url = postgres.new_database()
    database = await Database.open(Settings(data_dir=tmp_path, database_url=SecretStr(url)))
    store = KeyStore(database, clock)
    door = Authenticator(store, AuthSettings(), ADMIN, clock)
    (_, plain), (_, other) = [await store.create_key() for _ in range(2)]
    await door.authenticate(bearer(plain))
    postgres.take_away(url)
    clock.advance(4.9)
    await door.authenticate(bearer(plain))
    await door.authenticate(bearer(ADMIN.get_secret_value()))
    for each in (other, make_key().plain, with_wrong_secret(other)):
        with pytest.raises(StoreUnavailable):
            await door.authenticate(bearer(each))
    with pytest.raises(Unauthorized):
        await door.authenticate(bearer(with_wrong_secret(plain)))
    clock.advance(0.1)
    with pytest.raises(StoreUnavailable):
        await door.authenticate(bearer(plain))
    postgres.bring_back(url)
    await door.authenticate(bearer(plain))
    await door.authenticate(bearer(other))
    await database.close()


@pytest.mark.parametrize("remembered", [True, False])
async def test_the_time_does_not_tell_an_unknown_key_from_a_wrong_one(
    store: CountingStore, clock: FakeClock, remembered: bool
) -> None:
    settings = AuthSettings(failures_per_minute_max=1_000_000)
    door = Authenticator(store, settings, None, clock)
    _, good = await store.create_key()
    kinds = {"wrong": bearer(with_wrong_secret(good)), "unknown": bearer(make_key().plain)}
    times: dict[str, list[int]] = {"wrong": [], "unknown": []}
    for number in range(4_000):
        kind = "wrong" if number % 2 else "unknown"
        if not remembered:
            door.forget()
        begin = time.perf_counter_ns()
        try:
            await door.authenticate(kinds[kind], "10.0.0.1")
        except Unauthorized:
            times[kind].append(time.perf_counter_ns() - begin)
    assert len(times["wrong"]) == len(times["unknown"]) == 2_000
    wrong, unknown = (statistics.median(times[kind]) for kind in ("wrong", "unknown"))
    assert 0.75 <= wrong / unknown <= 1.25, (wrong, unknown)


async def test_a_known_key_costs_less_than_20_microseconds(door: Authenticator, store: CountingStore) -> None:
    _, plain = await store.create_key()
    app = FastAPI()
    app.state.authenticator = door
    raw = [(f"x-filler-{n}".encode(), b"value") for n in range(12)] + [(b"authorization", f"Bearer {plain}".encode())]

    async def once() -> int:
        request = Request({"type": "http", "app": app, "headers": raw, "client": ("127.0.0.1", 5)})
        begin = time.perf_counter_ns()
        await principal(request)
        return time.perf_counter_ns() - begin

    await once()
    median = statistics.median([await once() for _ in range(5_000)])
    assert median < 20_000, f"{median} ns"


def test_roles_and_scopes() -> None:
    reader, member, admin = (Principal("k", "p", role) for role in (Role.READ_ONLY, Role.MEMBER, Role.ADMIN))
    assert [one.can_write for one in (reader, member, admin)] == [False, True, True]
    for one, allowed in ((reader, 1), (member, 2), (admin, 3)):
        for place, role in enumerate((Role.READ_ONLY, Role.MEMBER, Role.ADMIN), start=1):
            if place <= allowed:
                one.require_role(role)
            else:
                with pytest.raises(PermissionDenied, match=role.value):
                    one.require_role(role)
    for role in (Role.MEMBER, Role.ADMIN):
        chat = Principal("k", "p", role, frozenset({Capability.CHAT}))
        chat.require_scope(Capability.CHAT)
        with pytest.raises(PermissionDenied, match="scope `embedding`"):
            chat.require_scope(Capability.EMBEDDING)
    with pytest.raises(PermissionDenied):
        Principal("k", "p", Role.READ_ONLY, frozenset({Capability.CHAT})).require_scope(Capability.CHAT)


def front_door(door: Authenticator) -> FastAPI:
    app = FastAPI()
    app.state.authenticator = door

    @app.exception_handler(ForebayError)
    async def _answer(_request: Request, error: ForebayError) -> JSONResponse:
        return JSONResponse({"code": error.code}, status_code=error.status)

    @app.get("/v1/models")
    async def _models(who: Annotated[Principal, Depends(principal)]) -> str:
        return who.key_id

    @app.post("/v1/chat/completions")
    async def _chat(who: Annotated[Principal, Depends(may_create(Capability.CHAT))]) -> str:
        return who.key_id

    @app.get("/admin/models", dependencies=[Depends(role_at_least(Role.ADMIN))])
    async def _admin() -> str:
        return "admin"

    return app


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    serve = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"  # the backlog holds who comes early
    finally:
        server.should_exit = True
        await serve
        listener.close()


async def test_the_matrix_of_roles_and_routes(door: Authenticator, store: CountingStore) -> None:
    keys = {
        "reader": (await store.create_key(role=Role.READ_ONLY))[1],
        "member": (await store.create_key())[1],
        "embedder": (await store.create_key(scopes=frozenset({Capability.EMBEDDING})))[1],
        "admin": (await store.create_key(role=Role.ADMIN))[1],
        "bootstrap": ADMIN.get_secret_value(),
        "stranger": make_key().plain,
        "nobody": "",
    }
    expected = {
        "reader": [200, 403, 403],
        "member": [200, 200, 403],
        "embedder": [200, 403, 403],
        "admin": [200, 200, 200],
        "bootstrap": [200, 200, 200],
        "stranger": [401, 401, 401],
        "nobody": [401, 401, 401],
    }
    routes = [("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/admin/models")]
    async with serving(front_door(door)) as url, aiohttp.ClientSession() as client:
        for who, plain in keys.items():
            statuses = []
            for method, path in routes:
                async with client.request(method, url + path, headers=bearer(plain) if plain else {}) as answer:
                    statuses.append(answer.status)
            assert statuses == expected[who], who
