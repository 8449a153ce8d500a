"""Transcriptions in the background on a running server, over SQLite and PostgreSQL: from the upload to the result."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import psutil
import pytest
import pytest_asyncio
from aiohttp import web

from tests.support import postgres
from tests.support.batches import finished, results, submit, upload
from tests.support.jobs import job_of, keys_of, progress_of, result, rows, until_at, until_ended
from tests.support.measuring import within
from tests.support.receiver import receiving
from tests.support.recordings import data_url
from tests.support.server import Server, eventually, serving
from tests.support.transcriptions import (
    TRANSCRIPTIONS,
    handed_in,
    kept_recordings,
    post,
    speech,
    text_of,
    until_nothing_is_left,
)

CONFIG = """
default_models = false
[audio]
stretch_seconds = 30
online_seconds_max = 20
live_per_project_max = 3
diarization_model = "whisper"
fetch_hosts = ["127.0.0.2"]
[jobs]
backoff_seconds_min = 0.05
attempts_max = 2
prune_seconds = 1
watch_seconds = 0.02
[supervisor]
backoff_seconds_min = 0.05
[scheduler]
headroom_seconds = 1
[outbound]
allowed_networks = ["127.0.0.2/32"]
[models.whisper]
engine = "fake"
preload = true
slots = 4
[models.single]
engine = "fake"
preload = true
slots = 1
"""
CANCEL_SECONDS = 2.0
SLOW = "[[fake token_ms=300]]"  # a second of 2-second segments takes so long
WORDS_OF_2_SECONDS = 4

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str | None:
    """The database: none is SQLite in the data folder."""
    return postgres.new_database() if request.param == "postgres" else None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(url: str | None) -> AsyncIterator[Server]:
    async with serving(CONFIG, environment={} if url is None else {"FOREBAY_DATABASE_URL": url}) as running:
        yield running
        assert "request.bug" not in running.log
        assert "job.bug" not in running.log


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keys(server: Server, url: str | None) -> dict[str, str]:
    """Keys beside that of the administrator, by name."""
    return await keys_of(server, url)


async def test_from_the_upload_to_the_result(server: Server, keys: dict[str, str]) -> None:
    async with receiving("127.0.0.2") as receiver:
        status, job, location = await post(
            server,
            speech(100),
            diarize=True,
            align_model="whisper",
            webhook_url=receiver.url,
            prompt="[[fake token_ms=40]]",
        )
        assert (status, location) == (202, f"/v1/jobs/{job['id']}")
        assert (job["kind"], job["status"], job["model"]) == ("transcription", "available", "whisper")
        assert job["progress"]["stage"] == "queued"
        assert job["webhook_secret"].startswith("whsec_")
        told = [each async for each in progress_of(server, job["id"])]
        [received] = await receiver.until(1)
    assert (received.event["type"], received.event["data"]["id"]) == ("transcription.completed", job["id"])
    stages = list(dict.fromkeys(each["progress"]["stage"] for each in told))
    plan = ["queued", "fetching", "decoding", "transcribing", "aligning", "diarizing", "finished"]
    assert stages == [stage for stage in plan if stage in stages], "in this order, however many of them were seen"
    assert {"transcribing", "finished"} <= set(stages)
    percents = [each["progress"]["percent"] or 0 for each in told]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert len(set(percents)) > 3, percents
    assert told[-1].keys() == job.keys() - {"webhook_secret"}
    await eventually(lambda: not kept_recordings(server.folder), what="what came with it to go")
    for form, begins in {
        "json": b'{"text":"',
        "text": b"",
        "srt": b"1\n00:00:00,000 --> 00:00:02,000\n",
        "vtt": b"WEBVTT\n\n",
        "verbose_json": b'{"task":"transcribe",',
        "diarized_json": b'{"task":"transcribe","duration":100.0,',
        "rttm": b"SPEAKER recording 1 ",
    }.items():
        assert (await result(server, job["id"], form))[1].startswith(begins), form
    whole = json.loads((await result(server, job["id"]))[1])
    assert len(whole["text"].split()) == 50 * WORDS_OF_2_SECONDS
    assert await result(server, job["id"], key=keys["reader"]) == await result(server, job["id"])
    assert (await result(server, job["id"], "json", keys["stranger"]))[0] == 404
    assert (await result(server, job["id"], "docx"))[0] == 400


async def test_what_is_heard_online_is_heard_in_the_background(server: Server) -> None:
    """The same recording in one stretch and in several, uploaded and by its place."""
    short = speech(18)
    status, online, _ = await post(server, short, background=False)
    assert status == 200, online
    file = await upload(server, short, purpose="user_data")
    whole = json.loads((await result(server, await ended(server, short)))[1])
    assert whole == online
    for fields in ({"file_id": file["id"]}, {"url": data_url(short)}):
        assert json.loads((await result(server, await ended(server, None, **fields)))[1]) == online


async def ended(server: Server, content: bytes | None, **fields: Any) -> str:
    job_id = await handed_in(server, content, **fields)
    assert (await until_ended(server, job_id))["status"] == "completed"
    return job_id


async def test_a_recording_that_is_too_long_to_wait_for_becomes_a_job(server: Server) -> None:
    status, job, location = await post(server, speech(40), background=False, response_format="srt")
    assert (status, location) == (202, f"/v1/jobs/{job['id']}")
    await until_ended(server, job["id"])
    assert (await result(server, job["id"]))[1].startswith(b"1\n00:00:00,000 -->")
    status, job, _ = await post(server, None, url=data_url(speech(40)), background=False)
    assert status == 202
    assert len((await text_of(server, job["id"])).split()) == 20 * WORDS_OF_2_SECONDS


async def test_a_recording_that_is_too_long_to_wait_for_is_not_streamed(server: Server) -> None:
    status, body, _ = await post(server, speech(40), background=False, stream=True)
    assert (status, body["error"]["param"], body["error"]["code"]) == (400, "stream", "invalid_value")
    assert "`background`" in body["error"]["message"]


@pytest.mark.parametrize("times", [None, ["word"], ["segment"], ["word", "segment"]])
async def test_a_result_shows_the_times_that_were_asked_for(server: Server, times: list[str] | None) -> None:
    asked = {"response_format": "verbose_json"} | ({} if times is None else {"timestamp_granularities": times})
    status, online, _ = await post(server, speech(6), background=False, **asked)
    assert status == 200, online
    job_id = await ended(server, speech(6), **asked)
    for form in (None, "verbose_json"):
        assert json.loads((await result(server, job_id, form))[1]) == online


async def test_the_same_request_makes_one_job(server: Server) -> None:
    content, same = speech(10, 5), {"Idempotency-Key": "once"}
    first = await post(server, content, headers=same)
    assert await post(server, content, headers=same) == first
    await until_ended(server, first[1]["id"])
    assert (await post(server, content, headers=same))[:2] == first[:2]
    for other in (speech(10, 6), content):
        fields = {} if other is not content else {"language": "de"}
        status, refusal, _ = await post(server, other, headers=same, **fields)
        assert (status, refusal["error"]["code"]) == (409, "idempotency_conflict")
    await until_nothing_is_left(server)


async def test_there_is_no_result_before_the_end(server: Server, keys: dict[str, str]) -> None:
    job_id = await handed_in(server, speech(60), prompt=SLOW)
    await until_at(server, job_id, "transcribing")
    status, body = await result(server, job_id)
    assert (status, json.loads(body)["error"]["code"]) == (409, "job_not_completed")
    async with server.session.post(
        f"{server.url}/v1/jobs/{job_id}/cancel", headers={"Authorization": f"Bearer {keys['stranger']}"}
    ) as response:
        assert response.status == 404
    await server.post(f"/v1/jobs/{job_id}/cancel")
    assert (await until_ended(server, job_id))["status"] == "cancelled"
    assert (await result(server, job_id))[0] == 409
    batch = (await server.get("/v1/jobs?kind=transcription"))["data"]
    assert job_id in {job["id"] for job in batch}
    assert (await result(server, "job_none"))[0] == 404


async def cancelled(server: Server, job_id: str) -> float:
    """Cancel a job, of which nothing is left then; the seconds that took."""
    clock = asyncio.get_running_loop().time
    began = clock()
    await server.post(f"/v1/jobs/{job_id}/cancel")
    job = await until_ended(server, job_id)
    await until_nothing_is_left(server)
    assert job["status"] == "cancelled"
    return clock() - began


async def cancelled_at(server: Server, stage: str, content: bytes, fields: dict[str, Any], _number: int) -> float:
    job_id = await handed_in(server, content, **fields)
    await until_at(server, job_id, stage)
    return await cancelled(server, job_id)


async def test_a_cancel_is_quick_at_every_stage_of_the_work(server: Server) -> None:
    known = data_url(speech(6))
    plans: dict[str, dict[str, Any]] = {
        "transcribing": {"prompt": SLOW},
        "aligning": {"path": "/v1/audio/alignments", "transcript": "So it goes. [[fake delay_ms=9000]]"},
        "diarizing": {
            "diarize": True,
            "known_speaker_names": ["[[fake delay_ms=9000]]"],
            "known_speaker_references": [known],
        },
    }
    for stage, fields in plans.items():
        await within(CANCEL_SECONDS, partial(cancelled_at, server, stage, speech(60), fields))


async def test_a_cancel_is_quick_in_line(server: Server) -> None:
    async def both_cancelled(_number: int) -> float:
        running = [await handed_in(server, speech(60, number), prompt=SLOW) for number in range(2)]
        for job_id in running:
            await until_at(server, job_id, "transcribing")
        waiting = await handed_in(server, speech(5))
        before = len(kept_recordings(server.folder))
        await server.post(f"/v1/jobs/{waiting}/cancel")
        assert (await job_of(server, waiting))["status"] == "cancelled"
        assert len(kept_recordings(server.folder)) == before - 1
        await server.post(f"/v1/jobs/{running[0]}/cancel")
        return await cancelled(server, running[1])

    await within(CANCEL_SECONDS, both_cancelled)


async def test_a_cancel_is_quick_while_a_recording_is_fetched(server: Server) -> None:
    asked, leaving = asyncio.Event(), asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(speech(5))
        asked.set()
        await leaving.wait()
        return answer

    app = web.Application()
    app.router.add_get("/talk.wav", slow)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.2", 0)
    await site.start()
    port = runner.addresses[0][1]

    async def cancelled_while_fetching(_number: int) -> float:
        asked.clear()
        job_id = await handed_in(server, None, url=f"http://127.0.0.2:{port}/talk.wav")
        await asked.wait()
        await until_at(server, job_id, "fetching")
        return await cancelled(server, job_id)

    await within(CANCEL_SECONDS, cancelled_while_fetching)
    leaving.set()
    await runner.cleanup()


async def test_a_cancel_is_quick_while_a_recording_is_decoded(server: Server) -> None:
    async def cancelled_while_decoding(_number: int) -> float:
        await ended(server, speech(2))  # so that there is a program that decodes
        decoders = [process for process in server.family() if "forebay.engines.audio_decode" in process.cmdline()]
        assert decoders
        for process in decoders:
            process.send_signal(signal.SIGSTOP)
        job_id = await handed_in(server, speech(5))
        await until_at(server, job_id, "decoding")
        seconds = await cancelled(server, job_id)
        assert not [each for each in decoders if each.is_running() and each.status() == psutil.STATUS_STOPPED][1:]
        for process in decoders:
            if process.is_running():
                process.send_signal(signal.SIGCONT)
        await ended(server, speech(2))
        return seconds

    await within(CANCEL_SECONDS, cancelled_while_decoding)


async def test_what_cannot_be_heard_fails_for_a_reason(server: Server) -> None:
    async with receiving("127.0.0.2") as receiver:
        job_id = await handed_in(server, b"no sound at all" * 100, webhook_url=receiver.url)
        job = await until_ended(server, job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", "media_invalid")
        [received] = await receiver.until(1)
    assert received.event["type"] == "transcription.failed"
    letters = (await server.get(f"/v1/dead-letters?job_id={job_id}"))["data"]
    assert [letter["error"]["code"] for letter in letters] == ["media_invalid"]
    await until_nothing_is_left(server)
    status, refusal, _ = await post(server, None, file_id="file_none")
    assert (status, refusal["error"]["code"]) == (404, "not_found")


async def test_an_engine_that_fails_is_asked_again_and_then_no_more(server: Server) -> None:
    job_id = await handed_in(server, speech(4), prompt="[[fake status=500]]")
    job = await until_ended(server, job_id)
    assert (job["status"], len(job["attempts"])) == ("failed", 2)
    await until_nothing_is_left(server)
    (letter,) = (await server.get(f"/v1/dead-letters?job={job_id}"))["data"]
    for path in (f"/v1/jobs/{job_id}/retry", f"/v1/dead-letters/{letter['id']}/requeue"):
        status, body = await server.post(path)
        assert (status, body["error"]["code"]) == (409, "input_gone"), path
    url = f"{server.url}/v1/dead-letters/requeue"
    async with server.session.post(url, json={"job": job_id}, headers=server.headers) as response:
        body = await response.json()
    assert (body["requeued"], body["left"], body["gone"]) == (0, 1, 1)
    assert await job_of(server, job_id) == job, "it still says why it failed"


async def test_a_job_whose_recording_lies_elsewhere_is_tried_again(server: Server) -> None:
    file = await upload(server, speech(4), purpose="user_data")
    job_id = await handed_in(server, None, file_id=file["id"], prompt="[[fake status=500]]")
    await until_ended(server, job_id)
    (letter,) = (await server.get(f"/v1/dead-letters?job={job_id}"))["data"]
    assert (await server.post(f"/v1/dead-letters/{letter['id']}/requeue"))[0] == 200
    assert (await until_ended(server, job_id))["error"]["code"] != "recording_gone"


async def test_an_online_request_goes_first_and_nothing_is_lost(server: Server) -> None:
    """The stretch whose place was taken back is done again, those before it are not."""
    content = speech(64, 9)
    undisturbed = await text_of(server, await handed_in(server, content))

    async def waited(_number: int) -> float:
        before = await server.metric("forebay_preemptions_total", model="single")
        job_id = await handed_in(server, content, model="single", prompt="[[fake token_ms=200]]")
        await until_at(server, job_id, "transcribing", 55)
        began = asyncio.get_running_loop().time()
        async with await server.chat("Now. [[fake tokens=1]]", model="single") as answer:
            assert answer.status == 200
        seconds = asyncio.get_running_loop().time() - began
        assert await server.metric("forebay_preemptions_total", model="single") == before + 1
        assert await text_of(server, job_id) == undisturbed
        assert not (await job_of(server, job_id))["attempts"], "it cost no attempt"
        return seconds

    await within(1.0, waited)


async def test_a_project_has_so_many_at_once(server: Server, keys: dict[str, str]) -> None:
    made = [(await post(server, speech(60), key=keys["many"], prompt=SLOW))[1]["id"] for _ in range(3)]
    status, refusal, _ = await post(server, speech(1), key=keys["many"])
    assert (status, refusal["error"]["code"]) == (429, "transcription_limit_reached")
    assert len(kept_recordings(server.folder)) == len(made)
    for job_id in made:
        await server.post(f"/v1/jobs/{job_id}/cancel", keys["many"])
    await until_nothing_is_left(server)


async def test_no_sound_stays_behind_in_a_request(server: Server, url: str | None) -> None:
    clip = data_url(speech(6))
    known = {"diarize": True, "known_speaker_names": ["Ann"], "known_speaker_references": [clip]}
    file = await upload(server, speech(4), purpose="user_data")
    requests: dict[str, dict[str, Any]] = {
        "clip": {"file_id": file["id"], **known},
        "recording": {"url": data_url(speech(4))},
        "place": {"file_id": file["id"]},
    }
    for name, fields in requests.items():
        job_id = await ended(server, None, **fields)
        query = f"SELECT request FROM media_jobs WHERE id = '{job_id}'"

        async def kept(query: str = query) -> bool:
            return (await rows(server, query, url))[0][0] is not None

        if name == "place":
            assert await kept()
        else:

            async def gone() -> bool:
                return not await kept()

            await eventually(gone, what=f"a request without its {name}")


async def test_a_result_goes_with_its_job(server: Server, url: str | None) -> None:
    job_id = await ended(server, speech(4))
    query = f"SELECT id FROM media_jobs WHERE id = '{job_id}'"
    assert await rows(server, query, url) == [(job_id,)]
    async with server.session.delete(f"{server.url}/v1/jobs/{job_id}", headers=server.headers) as response:
        assert response.status == 200
    assert (await result(server, job_id))[0] == 404

    async def swept() -> bool:
        return not await rows(server, query, url)

    await eventually(swept, what="the sweep of a transcription without a job")


async def test_lines_of_a_batch(server: Server) -> None:
    short = speech(6)
    file = await upload(server, short, purpose="user_data")
    status, online, _ = await post(server, short, background=False)
    assert status == 200
    bodies: dict[str, dict[str, Any]] = {
        "by-url": {"url": data_url(short)},
        "by-file": {"file_id": file["id"]},
        "verbose": {"url": data_url(short), "response_format": "verbose_json"},
        "who": {"url": data_url(short), "response_format": "diarized_json"},
        "subtitles": {"url": data_url(short), "response_format": "srt"},
        "noise": {"url": data_url(b"no sound at all" * 100)},
        "nothing": {},
        "stranger": {"file_id": "file_none"},
    }
    lines = [
        {"custom_id": name, "method": "POST", "url": TRANSCRIPTIONS, "body": {"model": "whisper", **body}}
        for name, body in bodies.items()
    ]
    batch = await finished(server, (await submit(server, lines, endpoint=TRANSCRIPTIONS))["id"])
    assert batch["status"] == "completed"
    good, bad = await results(server, batch)
    answers = {line["custom_id"]: line["response"]["body"] for line in good}
    assert answers["by-url"] == answers["by-file"] == online
    assert answers["verbose"]["text"] == online["text"]
    assert answers["who"]["segments"][0]["speaker"] == "A"
    codes = {line["custom_id"]: line["response"]["body"]["error"]["code"] for line in bad}
    assert codes == {
        "subtitles": "invalid_value",
        "noise": "media_invalid",
        "nothing": "missing_required_parameter",
        "stranger": "not_found",
    }
    assert batch["usage"]["input_tokens"] == 4 * 60
    await until_nothing_is_left(server)


async def test_jobs_whose_model_is_being_pulled_leave_their_places_to_others() -> None:
    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stopped.wait()
        writer.close()

    stopped = asyncio.Event()
    registry = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = registry.sockets[0].getsockname()[1]
    away = f'[models.away]\nengine = "whisper"\nsource = "https://127.0.0.1:{port}/model.bin"\n'
    try:
        async with serving(CONFIG.replace("stretch_seconds", "jobs_at_once = 2\nstretch_seconds") + away) as server:
            waiting = [await handed_in(server, speech(30), model="away") for _ in range(2)]
            await eventually(lambda: _pulling(server), within_seconds=10, what="the pull")
            other = await handed_in(server, speech(30), model="whisper")
            assert (await until_ended(server, other))["status"] == "completed"
            assert [(await job_of(server, each))["status"] for each in waiting] == ["available"] * 2
            assert (await server.model("away"))["state"] == "pulling"
    finally:
        stopped.set()
        registry.close()


async def _pulling(server: Server) -> bool:
    return bool((await server.model("away"))["state"] == "pulling")
