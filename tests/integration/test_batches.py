"""Batches from outside, through a real server with the fake engine."""

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from tests.support import postgres
from tests.support.batches import CHAT, content, create, finished, jsonl, line, results, submit, upload
from tests.support.server import Server, eventually, serving

JSON_LOG = {"FOREBAY_LOG_FORMAT": "json"}
FAKE = """
default_models = false
[batches]
line_backoff_seconds = 0.05
window_seconds_min = 1
chunk_lines = 64
segment_lines = 16
[jobs]
lease_seconds = 3
backoff_seconds_min = 0.05
attempts_max = 3
[supervisor]
backoff_seconds_min = 0.05
backoff_seconds_max = 0.1
[models.fake]
engine = "fake"
preload = true
slots = 8
"""
IDLE = FAKE.replace("[jobs]", "[jobs]\nenabled = false")
TWO = FAKE + '[models.other]\nengine = "fake"\nslots = 2\n'
BROKEN = FAKE + '[models.broken]\nengine = "fake"\n[models.broken.options]\nfail_start = "exit"\n'
SLOW = "[[fake tokens=20 token_ms=50]]"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    """One server for the tests that take no notice of other batches."""
    async with serving(FAKE) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def idle() -> AsyncIterator[Server]:
    """The same, where nobody works on jobs."""
    async with serving(IDLE) as running:
        yield running


async def cancel(server: Server, batch_id: str) -> dict[str, Any]:
    status, batch = await server.post(f"/v1/batches/{batch_id}/cancel")
    assert status == 200, batch
    return batch


async def progress(server: Server, batch_id: str, lines: int) -> dict[str, Any]:
    """Wait until so many lines are done."""

    async def done() -> dict[str, Any] | None:
        batch: dict[str, Any] = await server.get(f"/v1/batches/{batch_id}")
        return batch if batch["request_counts"]["completed"] >= lines else None

    found: dict[str, Any] = await eventually(done, what=f"{lines} lines of {batch_id}")
    return found


async def nothing_left_over(server: Server) -> None:
    """No segment stays behind a batch that has ended."""
    folder = server.folder / "data" / "blobs" / "segments"
    # A folder may go while it is listed: os.walk passes over it.
    await eventually(lambda: not any(files for _, _, files in os.walk(folder)), what="the removal of the segments")


async def test_every_line_is_answered_once() -> None:
    async with serving(FAKE) as server:
        lines = [line(f"id-{i}", f"Line {i}. [[fake echo=1]]") for i in range(1000)]
        batch = await submit(server, lines, metadata={"night": "one"})
        assert batch["status"] == "validating"
        ended = await finished(server, batch["id"])
        assert ended["status"] == "completed", ended
        assert ended["metadata"] == {"night": "one"}
        assert ended["model"] == "fake"
        assert ended["created_at"] <= ended["in_progress_at"] <= ended["finalizing_at"] <= ended["completed_at"]
        assert ended["error_file_id"] is None
        output, errors = await results(server, ended)
        assert not errors
        used = 0
        for each in output:
            number = each["custom_id"].removeprefix("id-")
            answer = each["response"]["body"]
            assert each["error"] is None
            assert each["response"]["status_code"] == 200
            assert answer["choices"][0]["message"]["content"].strip() == f"Line {number}."
            used += answer["usage"]["total_tokens"]
        assert ended["usage"]["total_tokens"] == used
        await nothing_left_over(server)


async def test_a_submit_is_answered_with_an_estimate_once_the_model_has_run_a_batch() -> None:
    async with serving(FAKE) as server:
        lines = [line(f"id-{i}", f"Line {i:04}. [[fake tokens=4 ttft_ms=50]]") for i in range(160)]
        first = await submit(server, lines)
        assert first["eta_seconds"] is None, "nobody knows yet"
        before = await finished(server, first["id"])
        took = max(1, before["finalizing_at"] - before["in_progress_at"])
        second = await submit(server, [*lines, *({**each, "custom_id": each["custom_id"] + "b"} for each in lines)])
        assert 0.3 * took <= second["eta_seconds"] <= 6 * took
        third = await submit(server, lines)
        assert third["eta_seconds"] > 0
        await finished(server, second["id"])
        await finished(server, third["id"])


async def test_a_line_is_answered_as_it_would_be_online(server: Server) -> None:
    fields: dict[str, Any] = {"max_tokens": 3, "temperature": 0.2, "seed": 7, "n": 2}
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    batch = await submit(
        server,
        [line("sampled", "Say it.", **fields), line("called", "Look. [[fake tool=look]]", tools=[tool])],
    )
    output, _ = await results(server, await finished(server, batch["id"]))
    by_name = {each["custom_id"]: each["response"]["body"] for each in output}
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("sampled", "Say it.", fields),
        ("called", "Look. [[fake tool=look]]", {"tools": [tool]}),
    ]
    for name, text, more in asked:
        async with await server.chat(text, **more) as response:
            online = await response.json()
        for answer in (online, by_name[name]):
            del answer["created"]
        assert by_name[name] == online


WRONG: dict[str, Any] = {
    "temperature": 9,
    "max_tokens": 0,
    "messages": [],
    "n": 100,
    "tool_choice": "required",
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"pattern": "a{9999}"}}},
    "nonsense": True,
    "stop": ["a", "b", "c", "d", "e"],
}


async def test_wrong_lines_become_error_lines_and_dead_letters() -> None:
    lines = [line(f"id-{i}", f"Line {i}.") for i in range(990)]
    wrong = [line(f"wrong-{field}", "Wrong.", **{field: value}) for field, value in WRONG.items()]
    wrong.append(line("failing", "Fail. [[fake status=500]]"))
    wrong.append(line("long", "Long. [[fake context_error=1]]"))
    async with serving(FAKE) as server:
        batch = await submit(server, lines[:500] + wrong + lines[500:])
        ended = await finished(server, batch["id"])
        assert ended["status"] == "completed"
        output, errors = await results(server, ended)
        assert (len(output), len(errors)) == (990, 10)
        by_name = {each["custom_id"]: each for each in errors}
        for field in WRONG:
            response = by_name[f"wrong-{field}"]["response"]
            assert by_name[f"wrong-{field}"]["error"] is None
            assert response["status_code"] == 400
            assert response["body"]["error"]["param"].startswith(field), response
        assert by_name["long"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
        assert by_name["failing"]["response"] is None
        assert by_name["failing"]["error"]["code"] == "engine_error"


FILES: dict[str, tuple[list[Any], str, int | None]] = {
    "not JSON": ([line("a", "x"), '{"custom_id": '], "invalid_json_line", 2),
    "not an object": ([line("a", "x"), "[1]"], "invalid_json_line", 2),
    "not UTF-8": ([line("a", "x"), '"\udcff"'], "invalid_json_line", 2),
    "not finite": ([line("a", "x"), line("b", "x", temperature=float("nan"))], "invalid_json_line", 2),
    "a blank line": ([line("a", "x"), "", line("b", "x")], "invalid_json_line", 2),
    "no custom_id": ([{**line("a", "x"), "custom_id": None}], "invalid_custom_id", 1),
    "an empty custom_id": ([line("", "x")], "invalid_custom_id", 1),
    "a NUL in a custom_id": ([line("a\0b", "x")], "invalid_custom_id", 1),
    "a long custom_id": ([line("i" * 513, "x")], "invalid_custom_id", 1),
    "two of a custom_id": ([line("a", "x"), line("b", "x"), line("a", "y")], "duplicate_custom_id", 3),
    "another url": ([line("a", "x"), line("b", "x", url="/v1/completions")], "mismatched_url", 2),
    "another method": ([{**line("a", "x"), "method": "GET"}], "invalid_method", 1),
    "a stream": ([line("a", "x") | {"body": {"model": "fake", "stream": True}}], "stream_not_supported", 1),
    "no body": ([{"custom_id": "a", "method": "POST", "url": CHAT}], "missing_required_parameter", 1),
    "a body that is none": ([{**line("a", "x"), "body": "x"}], "invalid_body", 1),
    "no model": ([{**line("a", "x"), "body": {}}], "missing_required_parameter", 1),
    "no such model": ([line("a", "x"), line("b", "x", model="nobody")], "model_not_found", 2),
    "an unknown field": ([{**line("a", "x"), "more": 1}], "unknown_field", 1),
    "a line that is too long": ([line("a", "x"), line("b", "x" * 70_000)], "line_too_long", 2),
    "too many lines": ([line(str(i), "x") for i in range(31)], "too_many_lines", None),
    "blank lines alone": (["", ""], "empty_file", None),
}


async def test_a_file_that_is_wrong_fails_with_the_number_of_the_line() -> None:
    config = FAKE.replace("[batches]", "[batches]\nlines_max = 30\nline_bytes_max = 65536")
    async with serving(config) as server:
        started = {}
        for name, (lines, _, _) in FILES.items():
            data = b"".join(
                (each if isinstance(each, str) else json.dumps(each)).encode("utf-8", "surrogateescape") + b"\n"
                for each in lines
            )
            file = await upload(server, data)
            status, batch = await create(server, file["id"])
            assert status == 200, batch
            started[name] = batch["id"]
        for name, (_, code, number) in FILES.items():
            ended = await finished(server, started[name])
            assert ended["status"] == "failed", name
            first = ended["errors"]["data"][0]
            assert (first["code"], first["line"]) == (code, number), (name, ended["errors"])
            assert ended["failed_at"] is not None
            assert ended["output_file_id"] is None
            assert ended["error_file_id"] is None
            assert ended["request_counts"] == {"total": 0, "completed": 0, "failed": 0}


async def test_no_more_than_a_hundred_mistakes_are_told(server: Server) -> None:
    batch = await submit(server, ["{"] * 500)
    ended = await finished(server, batch["id"])
    assert [each["line"] for each in ended["errors"]["data"]] == list(range(1, 101))


async def test_a_mark_line_ends_of_windows_and_blank_lines_at_the_end_are_fine(server: Server) -> None:
    body = b"\r\n".join(jsonl([line(f"id-{i}", "x")]).strip() for i in range(3))
    for data in (b"\xef\xbb\xbf" + body, body + b"\r\n\r\n\n"):
        file = await upload(server, data)
        _, batch = await create(server, file["id"])
        ended = await finished(server, batch["id"])
        assert ended["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
        await results(server, ended)


async def test_a_cancelled_batch_keeps_what_is_finished() -> None:
    async with serving(FAKE) as server:
        batch = await submit(server, [line(f"id-{i}", f"Line {i}. {SLOW}") for i in range(300)])
        await progress(server, batch["id"], 8)
        answer = await cancel(server, batch["id"])
        assert answer["status"] in {"cancelling", "cancelled"}
        ended = await finished(server, batch["id"], within_seconds=10)
        assert ended["status"] == "cancelled"
        assert ended["cancelling_at"] <= ended["cancelled_at"]
        output, errors = await results(server, ended)
        assert len(output) >= 8
        assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}
        assert len(output) + len(errors) == 300
        await server.until_load(0, 0)
        await nothing_left_over(server)
        again = await cancel(server, batch["id"])
        assert again["status"] == "cancelled"


async def test_a_batch_that_nobody_works_on_yet_is_cancelled_at_once(idle: Server) -> None:
    batch = await submit(idle, [line("a", "x")])
    assert (await idle.get(f"/v1/batches/{batch['id']}"))["status"] == "validating"
    ended = await cancel(idle, batch["id"])
    assert ended["status"] == "cancelled"
    assert ended["request_counts"] == {"total": 0, "completed": 0, "failed": 0}


def one_of_many(number: int) -> dict[str, Any]:
    """A line of a batch of which the first few are answered at once and the others take long."""
    return line(f"id-{number}", f"Line {number}. {SLOW if number >= 8 else ''}")


async def test_a_batch_expires_with_its_window() -> None:
    async with serving(FAKE) as server:
        batch = await submit(server, [one_of_many(i) for i in range(200)], completion_window="3s")
        assert batch["expires_at"] - batch["created_at"] in {3, 4}
        ended = await finished(server, batch["id"], within_seconds=20)
        assert ended["status"] == "expired"
        assert ended["expired_at"] is not None
        output, errors = await results(server, ended)
        assert output
        assert {each["error"]["code"] for each in errors} == {"batch_expired"}
        assert len(output) + len(errors) == 200
        await server.until_load(0, 0)


async def test_a_line_that_kills_engines_costs_nobody_else_anything() -> None:
    lines = [line(f"id-{i}", f"Line {i}. [[fake tokens=5 token_ms=2]]") for i in range(999)]
    poison = line("poison", "Poison. [[fake crash_at=3 crash=segv token_ms=20]]")
    async with serving(FAKE, environment=JSON_LOG) as server:
        batch = await submit(server, [*lines[:400], poison, *lines[400:]])
        ended = await finished(server, batch["id"])
        output, errors = await results(server, ended)
        assert ended["status"] == "completed"
        assert [each["custom_id"] for each in errors] == ["poison"], [each["custom_id"] for each in errors]
        assert errors[0]["response"]["status_code"] == 422
        assert errors[0]["response"]["body"]["error"]["code"] == "quarantined"
        assert len(output) == 999
        assert await server.metric("forebay_engine_deaths_total", model="fake", kind="crash") == 2


async def test_a_file_may_name_several_models() -> None:
    async with serving(TWO) as server:
        lines = [line(f"{name}-{i}", f"{name} {i}.", model=name) for i in range(100) for name in ("fake", "other")]
        ended = await finished(server, (await submit(server, lines))["id"])
        assert ended["status"] == "completed"
        assert ended["model"] is None
        output, _ = await results(server, ended)
        assert all(each["response"]["body"]["model"] == each["custom_id"].split("-")[0] for each in output)


async def test_a_model_that_cannot_be_started_does_not_hold_up_the_others() -> None:
    async with serving(BROKEN) as server:
        lines = [line(f"{name}-{i}", "x", model=name) for i in range(40) for name in ("broken", "fake")]
        ended = await finished(server, (await submit(server, lines))["id"])
        assert ended["status"] == "completed"
        output, errors = await results(server, ended)
        assert {each["custom_id"].split("-")[0] for each in output} == {"fake"}
        assert {each["error"]["code"] for each in errors} == {"engine_unavailable"}
        assert len(errors) == 40


async def test_lines_that_are_cut_off_before_they_begin_give_their_places_back() -> None:
    config = BROKEN.replace("chunk_lines = 64", "chunk_lines = 10").replace("attempts_max = 3", "attempts_max = 1")
    config = config.replace("[models.broken]", "[models.broken]\nslots = 1")
    async with serving(config) as server:
        batch = await submit(server, [line(f"id-{i}", "x", model="broken") for i in range(120)])
        ended = await finished(server, batch["id"], within_seconds=40)
        assert ended["request_counts"] == {"total": 120, "completed": 0, "failed": 120}


async def test_a_stop_and_a_start_lose_nothing_and_run_nothing_twice(tmp_path: Path) -> None:
    async with serving(FAKE, folder=tmp_path) as server:
        batch = await submit(server, [one_of_many(i) for i in range(40)])
        await progress(server, batch["id"], 8)
        assert await server.stop() == 0
    async with serving(FAKE, folder=tmp_path) as server:
        resumed = await server.get(f"/v1/batches/{batch['id']}")
        assert resumed["status"] == "in_progress"
        assert resumed["request_counts"]["completed"] >= 8
        ended = await finished(server, batch["id"])
        assert ended["status"] == "completed"
        output, _ = await results(server, ended)
        assert len(output) == 40
        again = await server.metric("forebay_batch_lines_total", model="fake", outcome="completed")
        assert again == 40 - resumed["request_counts"]["completed"]


async def test_a_nul_in_one_line_harms_no_other_line_on_postgres() -> None:
    async with serving(FAKE, environment={"FOREBAY_DATABASE_URL": postgres.new_database()}) as server:
        odd = line("odd", "x", **{"a\0b": 1})
        ended = await finished(server, (await submit(server, [line("fine", "x"), odd]))["id"])
        output, errors = await results(server, ended)
        assert ([each["custom_id"] for each in output], [each["custom_id"] for each in errors]) == (["fine"], ["odd"])
        async with server.session.get(f"{server.url}/v1/batches/a%00b", headers=server.headers) as response:
            assert response.status == 400, await response.text()


async def until_checked(server: Server, batch_id: str) -> None:
    async def checked() -> bool:
        return bool((await server.get(f"/v1/batches/{batch_id}"))["status"] == "in_progress")

    await eventually(checked, what=f"the check of {batch_id}")


async def test_the_more_urgent_batch_goes_first() -> None:
    config = FAKE.replace("[jobs]", "[jobs]\nchunks_at_once = 1").replace("slots = 8", "slots = 1")
    async with serving(config) as server:
        (pid,) = server.engine_pids()
        engine = psutil.Process(pid)
        engine.suspend()  # so that the first is not over before both others wait

        async def runs() -> bool:
            return (await server.load())[0] == 1

        first = await submit(server, [line(f"id-{i}", "x [[fake tokens=1 delay_ms=15]]") for i in range(64)])
        await eventually(runs, what="a line of the first")
        later = [line(f"id-{i}", "x [[fake tokens=1]]") for i in range(5)]
        patient = await submit(server, later, priority=-1)
        urgent = await submit(server, later, priority=1)
        assert urgent["priority"] == 1
        for batch in (patient, urgent):
            await until_checked(server, batch["id"])
        engine.resume()
        ends = [await finished(server, batch["id"]) for batch in (first, urgent, patient)]
        assert all(end["status"] == "completed" for end in ends)
        times = [(await server.get(f"/v1/jobs/{end['id']}"))["finished_at"] for end in ends]
        assert times[1] <= times[2]


async def test_an_urgent_batch_goes_before_the_lines_of_chunks_that_run_already() -> None:
    config = FAKE.replace("chunk_lines = 64", "chunk_lines = 50").replace("slots = 8", "slots = 2")
    async with serving(config) as server:
        first = await submit(server, [line(f"id-{i}", "x [[fake tokens=1 delay_ms=100]]") for i in range(200)])
        await progress(server, first["id"], 16)
        urgent = await submit(server, [line("urgent", "x")], priority=1)
        await finished(server, urgent["id"])
        counts = (await server.get(f"/v1/batches/{first['id']}"))["request_counts"]
        assert counts["completed"] < 100, counts


CREATIONS: dict[str, tuple[dict[str, Any], str | None]] = {
    "no such file": ({"input_file_id": "file_nothing"}, "input_file_id"),
    "no such endpoint": ({"endpoint": "/v1/nothing"}, "endpoint"),
    "tokens to count": ({"endpoint": "/v1/messages/count_tokens"}, "endpoint"),
    "a text to cut into tokens": ({"endpoint": "/tokenize"}, "endpoint"),
    "tokens to put together": ({"endpoint": "/detokenize"}, "endpoint"),
    "no window": ({"completion_window": "soon"}, "completion_window"),
    "a window that is too long": ({"completion_window": "25h"}, "completion_window"),
    "a window that is too short": ({"completion_window": "0s"}, "completion_window"),
    "too much metadata": ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    "a long key": ({"metadata": {"k" * 65: ""}}, "metadata"),
    "a long value": ({"metadata": {"k": "v" * 513}}, "metadata.k"),
    "an early end of the output": ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}}, None),
    "another anchor": ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, None),
    "an unknown field": ({"more": 1}, "more"),
    "a priority that is none": ({"priority": 2}, "priority"),
    "an address inside": ({"webhook_url": "http://127.0.0.1/hook"}, None),
}


async def test_what_cannot_be_created_is_refused(idle: Server) -> None:
    file = await upload(idle, jsonl([line("a", "x")]))
    for name, (fields, param) in CREATIONS.items():
        status, answer = await create(idle, file_id=file["id"], **fields)
        assert status == 400, name
        if param is not None:
            assert (answer["error"]["param"] or "").startswith(param), (name, answer)
    other = await upload(idle, b"x", purpose="user_data")
    status, answer = await create(idle, other["id"])
    assert (status, answer["error"]["code"]) == (400, "invalid_file_purpose")


async def test_a_batch_belongs_to_its_project(idle: Server) -> None:
    file = await upload(idle, jsonl([line("a", "x")]))
    _, batch = await create(idle, file["id"])
    stranger = await idle.create_key("stranger")
    status, answer = await create(idle, file["id"], key=stranger)
    assert (status, answer["error"]["code"]) == (400, "file_not_found")
    status, _ = await idle.post(f"/v1/batches/{batch['id']}/cancel", key=stranger)
    assert status == 404
    headers = {"Authorization": f"Bearer {stranger}"}
    for path in (f"/v1/batches/{batch['id']}", f"/v1/batches?after={batch['id']}"):
        async with idle.session.get(idle.url + path, headers=headers) as response:
            assert response.status == 404
    async with idle.session.get(f"{idle.url}/v1/batches", headers=headers) as response:
        assert (await response.json())["data"] == []


async def test_batches_are_listed_page_by_page() -> None:
    async with serving(IDLE) as server:
        file = await upload(server, jsonl([line("a", "x")]))
        made = [(await create(server, file["id"]))[1]["id"] for _ in range(5)]
        found: list[str] = []
        async for batch in server.client().batches.list(limit=2):
            found.append(batch.id)
        assert found == made[::-1]
        page = await server.get("/v1/batches?limit=2")
        assert page["has_more"]
        assert (page["first_id"], page["last_id"]) == (made[4], made[3])


async def test_a_project_has_a_bounded_number_of_unfinished_batches() -> None:
    config = IDLE.replace("[batches]", "[batches]\nlive_per_project_max = 2")
    async with serving(config) as server:
        file = await upload(server, jsonl([line("a", "x")]))
        first, _, third = [await create(server, file["id"]) for _ in range(3)]
        assert first[0] == 200
        assert (third[0], third[1]["error"]["code"]) == (429, "batch_limit_reached")
        await cancel(server, first[1]["id"])
        assert (await create(server, file["id"]))[0] == 200


async def test_an_input_file_stays_until_its_batch_has_ended(idle: Server) -> None:
    file = await upload(idle, jsonl([line("a", "x")]))
    _, batch = await create(idle, file["id"])
    url = f"{idle.url}/v1/files/{file['id']}"
    async with idle.session.delete(url, headers=idle.headers) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (409, "file_in_use")
    await cancel(idle, batch["id"])
    async with idle.session.delete(url, headers=idle.headers) as response:
        assert response.status == 200
    status, answer = await create(idle, file["id"])
    assert (status, answer["error"]["code"]) == (400, "file_not_found")


async def test_results_expire_as_asked_for(server: Server) -> None:
    after = {"anchor": "created_at", "seconds": 7200}
    batch = await submit(server, [line("a", "x"), line("b", "x", n=50)], output_expires_after=after)
    ended = await finished(server, batch["id"])
    for file_id in (ended["output_file_id"], ended["error_file_id"]):
        file = await server.get(f"/v1/files/{file_id}")
        assert file["purpose"] == "batch_output"
        assert file["expires_at"] - file["created_at"] == 7200
    assert len(await content(server, ended["output_file_id"])) == 1


async def test_the_secret_of_a_webhook_is_given_once(idle: Server) -> None:
    file = await upload(idle, jsonl([line("a", "x")]))
    _, batch = await create(idle, file["id"], webhook_url="https://example.com/hook")
    assert batch["webhook_secret"].startswith("whsec_")
    assert "webhook_secret" not in await idle.get(f"/v1/batches/{batch['id']}")


@pytest.mark.parametrize("endpoint", ["/v1/completions"])
async def test_other_endpoints(server: Server, endpoint: str) -> None:
    requests = [
        {
            "custom_id": f"id-{i}",
            "method": "POST",
            "url": endpoint,
            "body": {"model": "fake", "prompt": f"Say {i}."},
        }
        for i in range(20)
    ]
    ended = await finished(server, (await submit(server, requests, endpoint=endpoint))["id"])
    output, _ = await results(server, ended)
    assert all(each["response"]["body"]["object"] == "text_completion" for each in output)
