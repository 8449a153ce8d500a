"""Dead letters of a running server: lines of batches and webhooks that were given up, and another try at them."""

import asyncio
from collections.abc import AsyncIterator
from itertools import accumulate
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.store.database import Database
from forebay.store.dead_letters import DeadLetterStore, LostLine
from forebay.store.jobs import JobStore
from tests.support.batches import CHAT, content, create, finished, jsonl, line, results, submit, upload
from tests.support.receiver import Answer, receiving
from tests.support.server import Server, eventually, serving

CONFIG = """
default_models = false
[batches]
line_backoff_seconds = 0.01
[jobs]
backoff_seconds_min = 0.01
watch_seconds = 0.05
[outbound]
allowed_networks = ["127.0.0.0/8"]
[models.fake]
engine = "fake"
preload = true
"""
FAIL = "Fail. [[fake status=500]]"


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_server() -> AsyncIterator[Server]:
    async with serving(CONFIG) as running:
        yield running
        assert "request.bug" not in running.log


@pytest_asyncio.fixture(loop_scope="module")
async def server(one_server: Server) -> AsyncIterator[Server]:
    """The server without dead letters."""
    yield one_server
    database = await Database.open(Settings(data_dir=one_server.folder / "data"))
    async with database.begin() as transaction:
        await transaction.execute(sa.text("DELETE FROM dead_letters"))
    await database.close()


async def ask(
    server: Server, method: str, path: str = "", *, key: str | None = None, body: Any = None, **headers: str
) -> tuple[int, dict[str, Any]]:
    sent = {"Authorization": f"Bearer {key or server.key}", **headers}
    url = f"{server.url}/v1/dead-letters{path}"
    async with server.session.request(method, url, headers=sent, json=body) as response:
        return response.status, await response.json()


async def letters(server: Server, query: str = "") -> list[dict[str, Any]]:
    status, page = await ask(server, "GET", f"?limit=100{query}")
    assert status == 200, page
    found: list[dict[str, Any]] = page["data"]
    return found


async def failed_batch(server: Server, *names: str) -> str:
    """A batch whose lines of these names fail, and one that does not."""
    batch = await submit(server, [line("good", "Good."), *(line(name, FAIL) for name in names)])
    ended = await finished(server, batch["id"])
    assert ended["request_counts"]["failed"] == len(names)
    return str(batch["id"])


async def test_a_lost_line_is_read_with_its_input_and_every_attempt(server: Server) -> None:
    batch = await failed_batch(server, "ä-1")
    (letter,) = await letters(server)
    assert (letter["kind"], letter["job_id"], letter["custom_id"], letter["line"]) == ("batch", batch, "ä-1", 2)
    assert letter["error"]["code"] == "engine_error"
    assert [attempt["code"] for attempt in letter["attempts"]] == ["engine_error"] * 3
    assert (letter["requeued_at"], letter["requeued_as"]) == (None, None)
    status, shown = await ask(server, "GET", f"/{letter['id']}")
    assert status == 200
    assert shown.pop("input") == line("ä-1", FAIL)
    assert shown == letter


async def test_a_line_is_edited_and_requeued_once(server: Server) -> None:
    batch = await failed_batch(server, "one")
    (letter,) = await letters(server)
    edited = line("one", "Better. [[fake echo=1]]")["body"]
    status, taken = await ask(server, "POST", f"/{letter['id']}/requeue", body={"body": edited})
    assert status == 200, taken
    ended = await finished(server, taken["requeued_as"])
    assert (ended["status"], ended["metadata"]) == ("completed", {"requeued_from": batch})
    output, errors = await results(server, ended)
    assert [(each["custom_id"], each["response"]["body"]["choices"][0]["message"]["content"]) for each in output] == [
        ("one", "Better. ")
    ]
    assert not errors
    status, error = await ask(server, "POST", f"/{letter['id']}/requeue")
    assert (status, error["error"]["code"]) == (409, "already_requeued")
    status, again = await ask(server, "POST", f"/{letter['id']}/requeue", body={"again": True, "body": edited})
    assert status == 200
    assert again["requeued_as"] != taken["requeued_as"]
    await finished(server, again["requeued_as"])
    assert (await letters(server))[0]["requeued_as"] == again["requeued_as"]
    assert await letters(server, "&waiting=true") == []


async def test_a_key_without_the_scope_makes_no_batch_and_takes_up_no_line(server: Server) -> None:
    batch = await failed_batch(server, "one")
    key = await server.create_key("default", "member", "--scope", "embedding")
    file = await upload(server, jsonl([line("chat", "Run it for me.")]), key=key)
    status, refused = await create(server, file["id"], key=key)
    assert (status, refused["error"]["code"]) == (403, "insufficient_scope")
    (letter,) = await letters(server)
    for path in (f"/{letter['id']}/requeue", "/requeue"):
        status, refused = await ask(server, "POST", path, key=key)
        assert (status, refused["error"]["code"]) == (403, "insufficient_scope")
    assert [letter["requeued_as"] for letter in await letters(server)] == [None]
    assert [job["id"] for job in (await server.get("/v1/batches?limit=1"))["data"]] == [batch]


async def test_all_lines_of_an_endpoint_become_one_batch(server: Server) -> None:
    first = await failed_batch(server, "a", "b", "same")
    second = await failed_batch(server, "c", "same")
    assert len(await letters(server)) == 5
    assert len(await letters(server, f"&job={first}")) == 3
    assert len(await letters(server, "&code=engine_error&kind=batch")) == 5
    assert await letters(server, "&code=other") == []
    status, taken = await ask(server, "POST", "/requeue", body={"job": first})
    assert (status, taken["requeued"], taken["left"], len(taken["jobs"])) == (200, 3, 0, 1), taken
    await finished(server, taken["jobs"][0]["id"])
    assert len(await letters(server, "&waiting=true")) == 5  # three of them are new: they failed again
    status, taken = await ask(server, "POST", "/requeue", body={"job": second})
    assert (taken["requeued"], taken["left"]) == (2, 0)
    ended = await finished(server, taken["jobs"][0]["id"])
    assert ended["metadata"] == {"requeued_from": second}
    assert ended["request_counts"] == {"total": 2, "completed": 0, "failed": 2}
    assert len(await letters(server)) == 10
    # Two lines of one name cannot be in one batch: one of them is left for the next call.
    status, taken = await ask(server, "POST", "/requeue")
    assert (taken["requeued"], taken["left"]) == (4, 1)
    four = taken["jobs"][0]["id"]
    status, taken = await ask(server, "POST", "/requeue", body={"kind": "batch"})
    assert taken["requeued"] >= 1
    for batch in (four, taken["jobs"][0]["id"]):
        await finished(server, batch)
    status, taken = await ask(server, "POST", "/requeue", body={"code": "other"})
    assert (taken["requeued"], taken["left"], taken["jobs"]) == (0, 0, [])


async def test_many_at_once_make_one_batch_of_each_letter(server: Server) -> None:
    await failed_batch(server, "one")
    (letter,) = await letters(server)
    before = len((await server.get("/v1/files?purpose=batch"))["data"])
    answers = await asyncio.gather(*(ask(server, "POST", f"/{letter['id']}/requeue") for _ in range(10)))
    assert sorted(status for status, _ in answers) == [200] + [409] * 9
    after = await server.get("/v1/files?purpose=batch")
    assert len(after["data"]) == before + 1
    (taken,) = [answer for status, answer in answers if status == 200]
    await finished(server, taken["requeued_as"])


async def test_where_the_input_is_gone_a_body_takes_its_place(server: Server) -> None:
    batch = await failed_batch(server, "one")
    file_id = (await server.get(f"/v1/batches/{batch}"))["input_file_id"]
    async with server.session.delete(f"{server.url}/v1/files/{file_id}", headers=server.headers) as response:
        assert response.status == 200
    (letter,) = await letters(server)
    assert (await ask(server, "GET", f"/{letter['id']}"))[1]["input"] is None
    status, error = await ask(server, "POST", f"/{letter['id']}/requeue")
    assert (status, error["error"]["code"]) == (409, "input_gone")
    status, taken = await ask(server, "POST", "/requeue")
    assert (status, taken["requeued"], taken["left"], taken["gone"]) == (200, 0, 1, 1)
    body = line("one", "New.")["body"]
    status, taken = await ask(server, "POST", f"/{letter['id']}/requeue", body={"body": body})
    assert status == 200
    ended = await finished(server, taken["requeued_as"])
    (output,) = await content(server, ended["output_file_id"])
    assert output["custom_id"] == "one"


async def test_what_is_wrong_with_a_request_is_said(server: Server) -> None:
    await failed_batch(server, "one")
    (letter,) = await letters(server)
    path = f"/{letter['id']}/requeue"
    wrong: tuple[Any, ...] = (
        {"body": {"stream": True, "model": "fake"}}, {"body": {}}, {"body": []}, {"agian": True}, {"again": 1},
    )  # fmt: skip
    for body in wrong:
        status, error = await ask(server, "POST", path, body=body)
        assert status == 400, (body, error)
    wrong = ({"kind": 1}, {"waiting": True}, [])
    for body in wrong:
        assert (await ask(server, "POST", "/requeue", body=body))[0] == 400
    assert len(await letters(server, "&waiting=true")) == 1
    for query in ("?limit=0", "?limit=101", "?waiting=perhaps"):
        assert (await ask(server, "GET", query))[0] == 400
    assert (await ask(server, "GET", "?after=nothing"))[0] == 404


async def test_a_webhook_gets_its_attempts_again(server: Server) -> None:
    async with receiving() as receiver:
        receiver.answers.append(Answer(410))
        batch = await submit(server, [line("a", "Good.")], webhook_url=f"{receiver.url}/hook")
        await finished(server, batch["id"])
        await receiver.until(1)

        async def found() -> list[dict[str, Any]]:
            return await letters(server, "&kind=webhook")

        (letter,) = await eventually(found, what="the dead letter of the webhook")
        assert (letter["custom_id"], letter["endpoint"], letter["line"]) == (None, None, None)
        status, _ = await ask(server, "POST", f"/{letter['id']}/requeue", body={"body": {}})
        assert status == 400
        status, taken = await ask(server, "POST", f"/{letter['id']}/requeue")
        assert (status, taken["requeued_as"]) == (200, letter["job_id"])
        received = await receiver.until(2)
        assert received[0].event == received[1].event


async def test_letters_are_removed_and_nobody_elses_business(server: Server) -> None:
    await failed_batch(server, "one")
    (letter,) = await letters(server)
    stranger, reader = await server.create_key("stranger"), await server.create_key("default", "read_only")
    for method, path in (("GET", ""), ("POST", "/requeue"), ("DELETE", "")):
        assert (await ask(server, method, f"/{letter['id']}{path}", key=stranger))[0] == 404
    assert (await ask(server, "GET", key=stranger))[1]["data"] == []
    assert (await ask(server, "POST", "/requeue", key=stranger))[1]["requeued"] == 0
    assert (await ask(server, "GET", f"/{letter['id']}", key=reader))[0] == 200
    for method, path in (("POST", f"/{letter['id']}/requeue"), ("POST", "/requeue"), ("DELETE", f"/{letter['id']}")):
        assert (await ask(server, method, path, key=reader))[0] == 403
    status, gone = await ask(server, "DELETE", f"/{letter['id']}")
    assert (status, gone) == (200, {"id": letter["id"], "object": "dead_letter", "deleted": True})
    assert (await ask(server, "DELETE", f"/{letter['id']}"))[0] == 404
    assert await letters(server) == []


async def test_a_requeue_with_a_key_is_made_once(server: Server) -> None:
    await failed_batch(server, "one")
    (letter,) = await letters(server)
    key = {"Idempotency-Key": "again-and-again"}
    first = await ask(server, "POST", f"/{letter['id']}/requeue", **key)
    assert first[0] == 200
    await finished(server, first[1]["requeued_as"])
    assert await ask(server, "POST", f"/{letter['id']}/requeue", **key) == first
    status, error = await ask(server, "POST", "/requeue", **key)
    assert (status, error["error"]["code"]) == (409, "idempotency_conflict")


async def test_letters_without_an_input_do_not_hold_up_older_ones(server: Server) -> None:
    kept = await failed_batch(server, "old")
    gone = await submit(server, [line("good", "Good.")])
    ended = await finished(server, gone["id"])
    database = await Database.open(Settings(data_dir=server.folder / "data"))
    job = await JobStore(database, SystemClock()).get("default", gone["id"])
    lost = [LostLine(f"id-{number}", number, 0, 9, "engine_error", "It failed.", []) for number in range(1, 1001)]
    async with database.begin() as transaction:
        store = DeadLetterStore(database, SystemClock())
        await store.add_lines(transaction, job, CHAT, ended["input_file_id"], lost)
    await database.close()
    url = f"{server.url}/v1/files/{ended['input_file_id']}"
    async with server.session.delete(url, headers=server.headers) as response:
        assert response.status == 200
    _, taken = await ask(server, "POST", "/requeue", body={"code": "engine_error"})
    assert (taken["requeued"], taken["left"], taken["gone"]) == (1, 1000, 1000)
    ended = await finished(server, taken["jobs"][0]["id"])
    assert ended["metadata"] == {"requeued_from": kept}


async def test_a_call_takes_up_a_thousand_at_most(server: Server) -> None:
    lines = [jsonl([line(f"id-{number}", "[[fake tokens=1]]")]) for number in range(1001)]
    file = await upload(server, b"".join(lines))
    batch = await submit(server, [line("good", "Good.")])
    await finished(server, batch["id"])
    database = await Database.open(Settings(data_dir=server.folder / "data"))
    job = await JobStore(database, SystemClock()).get("default", batch["id"])
    offsets = accumulate((len(each) for each in lines), initial=0)
    lost = [
        LostLine(f"id-{number}", number + 1, offset, len(each), "engine_error", "It failed.", [])
        for number, (offset, each) in enumerate(zip(offsets, lines, strict=False))
    ]
    async with database.begin() as transaction:
        await DeadLetterStore(database, SystemClock()).add_lines(transaction, job, CHAT, file["id"], lost)
    await database.close()
    names: set[str] = set()
    for count, left in ((1000, 1), (1, 0)):
        _, taken = await ask(server, "POST", "/requeue", body={"job": batch["id"]})
        assert (taken["requeued"], taken["left"]) == (count, left)
        ended = await finished(server, taken["jobs"][0]["id"])
        output, errors = await results(server, ended)
        assert (len(output), errors) == (count, [])
        names |= {each["custom_id"] for each in output}
    assert len(names) == 1001
