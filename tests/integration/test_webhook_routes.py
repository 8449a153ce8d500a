"""The routes of webhooks on a running server: made, changed, rotated, tested, replayed; nobody else's."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from standardwebhooks import Webhook

from forebay.clock import SystemClock, new_id
from forebay.config import Settings
from forebay.store.database import Database
from forebay.store.key_format import Role
from forebay.store.keys import KeyStore
from tests.support.hostile_urls import hostile_urls
from tests.support.receiver import Answer, Receiver, canary, receiving
from tests.support.server import FAKE, Server, eventually, serving

CONFIG = (
    FAKE.replace("preload = true", "preload = false")
    + """
[outbound]
allowed_networks = ["127.0.0.2/32"]
[webhooks]
endpoints_max = 4
timeout_seconds = 20
[jobs]
poll_seconds = 0.1
"""
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG) as running:
        yield running
        assert "request.bug" not in running.log
        assert "job.bug" not in running.log


@pytest_asyncio.fixture(loop_scope="module")
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving("127.0.0.2") as one:
        yield one


class Account:
    """Calls of one key."""

    def __init__(self, server: Server, key: str) -> None:
        self.server = server
        self.key = key

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
        fields = {"Authorization": f"Bearer {self.key}", **headers}
        address = f"{self.server.url}/v1/webhooks{path}"
        async with self.server.session.request(method, address, json=body, headers=fields) as response:
            return response.status, await response.json()

    async def ok(self, method: str, path: str, body: Any = None, **headers: str) -> dict[str, Any]:
        status, answer = await self.call(method, path, body, **headers)
        assert status == 200, answer
        return answer

    async def settled(self, webhook_id: str, delivery_id: str) -> dict[str, Any]:
        """The delivery once an attempt at it was made."""

        async def attempted() -> dict[str, Any] | None:
            page = await self.ok("GET", f"/{webhook_id}/deliveries")
            return next((each for each in page["data"] if each["id"] == delivery_id and each["attempts"]), None)

        found: dict[str, Any] = await eventually(attempted, what=f"an attempt at {delivery_id}")
        return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keys(server: Server) -> AsyncIterator[KeyStore]:
    database = await Database.open(Settings(data_dir=server.folder / "data"))
    yield KeyStore(database, SystemClock())
    await database.close()


@pytest_asyncio.fixture(loop_scope="module")
async def mine(server: Server, keys: KeyStore) -> Account:
    return await account(server, keys, new_id("project"))


async def account(server: Server, keys: KeyStore, project: str, role: Role = Role.MEMBER) -> Account:
    return Account(server, (await keys.create_key(project, role=role))[1])


async def test_the_life_of_an_endpoint(mine: Account, receiver: Receiver) -> None:
    made = await mine.ok("POST", "", {"url": f"{receiver.url}/a", "events": ["batch.failed"], "description": "x"})
    secret = made.pop("secret")
    assert made == {
        "id": made["id"],
        "object": "webhook",
        "url": f"{receiver.url}/a",
        "events": ["batch.failed"],
        "description": "x",
        "enabled": True,
        "disabled_at": None,
        "disabled_reason": None,
        "previous_secret_expires_at": None,
        "created_at": made["created_at"],
    }
    assert await mine.ok("GET", f"/{made['id']}") == made
    page = await mine.ok("GET", "")
    assert page == {
        "object": "list",
        "data": [made],
        "has_more": False,
        "first_id": made["id"],
        "last_id": made["id"],
    }
    changed = await mine.ok("POST", f"/{made['id']}", {"events": [], "enabled": False})
    assert (changed["events"], changed["enabled"], changed["url"]) == ([], False, made["url"])
    status, answer = await mine.call("POST", f"/{made['id']}/test")
    assert (status, answer["error"]["code"]) == (409, "conflict")
    await mine.ok("POST", f"/{made['id']}", {"enabled": True})

    rotated = await mine.ok("POST", f"/{made['id']}/rotate")
    assert rotated["secret"] != secret
    assert rotated["previous_secret_expires_at"] > made["created_at"]
    assert "secret" not in await mine.ok("GET", f"/{made['id']}")
    sent = await mine.ok("POST", f"/{made['id']}/test")
    assert sent["event"]["type"] == "webhook.test"
    delivery = await mine.settled(made["id"], sent["id"])
    assert (delivery["status"], delivery["attempts"][0]["status_code"]) == ("completed", 200)
    assert delivery["event"] == sent["event"] == receiver.received[0].event
    for each in (secret, rotated["secret"]):
        Webhook(each).verify(receiver.received[0].body, receiver.received[0].headers)

    again = await mine.ok("POST", f"/deliveries/{sent['id']}/replay")
    assert again["id"] != sent["id"]
    await mine.settled(made["id"], again["id"])
    assert receiver.received[1].body == receiver.received[0].body
    assert receiver.received[1].headers["webhook-id"] == receiver.received[0].headers["webhook-id"]
    first = await mine.ok("GET", f"/{made['id']}/deliveries?limit=1")
    assert ([each["id"] for each in first["data"]], first["has_more"]) == ([again["id"]], True)
    rest = await mine.ok("GET", f"/{made['id']}/deliveries?after={first['last_id']}")
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == ([sent["id"]], False)

    assert await mine.ok("DELETE", f"/{made['id']}") == {"id": made["id"], "object": "webhook", "deleted": True}
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/deliveries"), ("POST", "/rotate"), ("POST", "/test")):
        assert (await mine.call(method, f"/{made['id']}{path}"))[0] == 404


async def test_an_attempt_that_failed_says_when_the_next_one_comes(mine: Account, receiver: Receiver) -> None:
    receiver.then = Answer(503)
    made = await mine.ok("POST", "", {"url": receiver.url})
    sent = await mine.ok("POST", f"/{made['id']}/test")
    delivery = await mine.settled(made["id"], sent["id"])
    (attempt,) = delivery["attempts"]
    assert (delivery["status"], attempt["status_code"]) == ("available", 503)
    assert delivery["next_attempt_at"] - int(attempt["at"] + attempt["duration_seconds"]) in range(4, 7)
    assert "503" in attempt["error"]


async def test_410_shows_on_the_endpoint(mine: Account, receiver: Receiver) -> None:
    receiver.then = Answer(410)
    made = await mine.ok("POST", "", {"url": receiver.url})
    sent = await mine.ok("POST", f"/{made['id']}/test")
    assert (await mine.settled(made["id"], sent["id"]))["status"] == "failed"
    shown = await mine.ok("GET", f"/{made['id']}")
    assert (shown["enabled"], "410" in shown["disabled_reason"]) == (False, True)


async def test_what_belongs_to_another_project_is_not_there(
    server: Server, keys: KeyStore, mine: Account, receiver: Receiver
) -> None:
    made = await mine.ok("POST", "", {"url": receiver.url})
    sent = await mine.ok("POST", f"/{made['id']}/test")
    await mine.settled(made["id"], sent["id"])
    other = await account(server, keys, "somebody_else")
    looker = await account(server, keys, "somebody_else", Role.READ_ONLY)
    calls: list[tuple[str, str, Any]] = [
        *[("GET", "", None), ("GET", "/deliveries", None), ("DELETE", "", None), ("POST", "", {"enabled": False})],
        *[("POST", "/rotate", None), ("POST", "/test", None)],
    ]
    for method, path, body in calls:
        assert (await other.call(method, f"/{made['id']}{path}", body))[0] == 404, (method, path)
    assert (await other.call("POST", f"/deliveries/{sent['id']}/replay"))[0] == 404
    assert (await other.ok("GET", ""))["data"] == []
    assert (await looker.ok("GET", ""))["data"] == []
    assert (await looker.call("POST", "", {"url": receiver.url}))[0] == 403
    assert (await mine.ok("GET", f"/{made['id']}"))["enabled"] is True


async def test_the_number_of_endpoints_is_bounded(mine: Account, receiver: Receiver) -> None:
    made = await asyncio.gather(*(mine.call("POST", "", {"url": f"{receiver.url}/{n}"}) for n in range(8)))
    assert sorted(status for status, _ in made) == [200] * 4 + [400] * 4
    assert {answer["error"]["code"] for status, answer in made if status == 400} == {"too_many_webhooks"}


async def test_one_idempotency_key_makes_one_endpoint(mine: Account, receiver: Receiver) -> None:
    key = {"Idempotency-Key": "once"}
    made = await asyncio.gather(*(mine.ok("POST", "", {"url": receiver.url}, **key) for _ in range(5)))
    assert len({each["id"] for each in made}) == 1
    assert len((await mine.ok("GET", ""))["data"]) == 1
    status, answer = await mine.call("POST", "", {"url": f"{receiver.url}/other"}, **key)
    assert (status, answer["error"]["code"]) == (409, "idempotency_conflict")


async def test_no_hostile_url_becomes_an_endpoint_or_is_reached_by_one(mine: Account, receiver: Receiver) -> None:
    async with canary() as bird:
        refused = 0
        made = await mine.ok("POST", "", {"url": receiver.url})
        for url in hostile_urls(bird.port):
            if url.startswith("http://127.0.0.2"):
                continue  # which this server opens on purpose
            for path in ("", f"/{made['id']}"):
                status, answer = await mine.call("POST", path, {"url": url})
                if status == 200:  # a name: it is resolved when something is sent
                    await mine.ok("POST", path, {"url": receiver.url}) if path else await mine.ok(
                        "DELETE", f"/{answer['id']}"
                    )
                else:
                    assert (status, answer["error"]["code"]) == (400, "url_not_allowed"), url
                    refused += 1
        assert refused >= 200
        assert bird.connections == 0


async def test_no_hostile_url_becomes_the_webhook_of_a_batch(server: Server, mine: Account) -> None:
    batch = {"input_file_id": "file-none", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    headers = {"Authorization": f"Bearer {mine.key}"}
    codes = []
    async with canary() as bird:
        for url in hostile_urls(bird.port):
            if url.startswith("http://127.0.0.2"):
                continue
            body = {**batch, "webhook_url": url}
            async with server.session.post(f"{server.url}/v1/batches", json=body, headers=headers) as response:
                codes.append((await response.json())["error"]["code"])
        assert bird.connections == 0
    assert set(codes) == {"url_not_allowed", "file_not_found"}  # names get as far as the file, which is not there
    assert codes.count("url_not_allowed") >= 100


async def test_the_admin_key_has_webhooks_too(server: Server, receiver: Receiver) -> None:
    admin = Account(server, server.key)
    made = await admin.ok("POST", "", {"url": receiver.url})
    await admin.ok("POST", f"/{made['id']}/test")
    await receiver.until(1)
    await admin.ok("DELETE", f"/{made['id']}")
