"""A server that dies after a receiver has answered sends the same event again: at least once, by one id."""

import signal
from pathlib import Path
from typing import Any

from tests.support.receiver import receiving
from tests.support.server import FAKE, Server, eventually, serving

CONFIG = FAKE.replace("preload = true", "preload = false") + '\n[outbound]\nallowed_networks = ["127.0.0.2/32"]\n'


async def call(server: Server, method: str, path: str, body: Any = None) -> dict[str, Any]:
    url = f"{server.url}/v1/webhooks{path}"
    async with server.session.request(method, url, json=body, headers=server.headers) as response:
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


async def test_a_death_between_answer_and_settlement(tmp_path: Path) -> None:
    async with receiving("127.0.0.2") as receiver:
        rehearsal = {"FOREBAY_REHEARSAL_KILL_AT": "webhook.sent"}
        async with serving(CONFIG, folder=tmp_path, environment=rehearsal) as first:
            hook = await call(first, "POST", "", {"url": receiver.url})
            sent = await call(first, "POST", f"/{hook['id']}/test")
            assert await first.process.wait() == -signal.SIGKILL
        assert len(receiver.received) == 1
        (tmp_path / "server.log").unlink()  # the next server's address is read from it
        async with serving(CONFIG, folder=tmp_path) as second:
            await receiver.until(2, within_seconds=10)  # its own leases are taken back at the start

            async def completed() -> dict[str, Any] | None:
                [delivery] = (await call(second, "GET", f"/{hook['id']}/deliveries"))["data"]
                return delivery if delivery["status"] == "completed" else None

            delivery = await eventually(completed, what="the end of the delivery")
        assert delivery["id"] == sent["id"]
        assert [attempt["number"] for attempt in delivery["attempts"]] == [2]
        assert len({request.headers["webhook-id"] for request in receiver.received}) == 1
        assert len({request.body for request in receiver.received}) == 1
        assert len(receiver.received) == 2
