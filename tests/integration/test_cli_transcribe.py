"""`forebay transcribe` as a person and as a script run it, against a real server."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.integration.test_cli_batch import ON_TERMINAL, forebay
from tests.support.jobs import result, until_ended
from tests.support.server import Server, serving
from tests.support.terminal import CTRL_C, on_terminal
from tests.support.transcriptions import speech, until_nothing_is_left

CONFIG = """
default_models = false
[audio]
stretch_seconds = 30
diarization_model = "whisper"
[jobs]
watch_seconds = 0.05
[models.whisper]
engine = "fake"
preload = true
slots = 4
"""
MODEL = ("--model", "whisper")
SLOW = "[[fake token_ms=400]]"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG) as running:
        yield running
        assert "request.bug" not in running.log


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    path = tmp_path / "talk.wav"
    path.write_bytes(speech(8))
    return path


async def test_each_recording_gets_a_file_beside_it(server: Server, talk: Path) -> None:
    other = talk.with_name("[other].wav")
    other.write_bytes(speech(4, 2))
    ended = await forebay(server, "transcribe", *MODEL, talk.name, other.name, "--format", "srt", folder=talk.parent)
    assert (ended.status, ended.out) == (0, ""), ended.err
    assert talk.with_suffix(".srt").read_text().startswith("1\n00:00:00,000 --> 00:00:02,000\n")
    assert other.with_suffix(".srt").exists()
    for said in ("talk.wav: uploading, 0.2 MiB", "[other].wav: completed, 100 %", "Wrote talk.srt."):
        assert said in ended.err
    assert sorted(path.suffix for path in talk.parent.iterdir()) == [".srt", ".srt", ".wav", ".wav"]


async def test_cues_have_the_times_of_their_words(server: Server, talk: Path) -> None:
    for form in ("srt", "vtt"):
        ended = await forebay(
            server, "transcribe", *MODEL, talk.name, "--format", form, "--background", folder=talk.parent
        )
        job = await until_ended(server, ended.out.strip())
        status, body = await result(server, job["id"], "verbose_json")
        assert status == 200
        assert json.loads(body)["words"], f"for {form} the times of words were worked out"


async def test_nothing_is_written_over(server: Server, talk: Path) -> None:
    folder = talk.parent
    there = talk.with_suffix(".txt")
    there.write_text("mine")
    refused = await forebay(server, "transcribe", *MODEL, talk.name, folder=folder)
    assert (refused.status, refused.err) == (
        1, "forebay: talk.txt is there already. Give --force to write over it, or another --output.\n",
    )  # fmt: skip
    assert there.read_text() == "mine"
    elsewhere = await forebay(server, "transcribe", *MODEL, talk.name, "-o", "new/texts", folder=folder)
    assert elsewhere.status == 0, elsewhere.err
    text = (folder / "new" / "texts" / "talk.txt").read_text()
    assert len(text.split()) == 16
    forced = await forebay(server, "transcribe", *MODEL, talk.name, "--force", folder=folder)
    assert (forced.status, there.read_text()) == (0, text)
    twice = await forebay(server, "transcribe", *MODEL, talk.name, f"./{talk.name}", "-o", "twice", folder=folder)
    assert twice.status == 1
    assert "would both be written as" in twice.err


async def test_who_speaks_is_told_in_formats_that_have_it(server: Server, talk: Path) -> None:
    begins = {
        ("--format", "rttm"): ("talk.rttm", "SPEAKER recording 1 "),
        ("--format", "diarized_json"): ("talk.json", '{"task":"transcribe"'),
        ("--format", "vtt", "--diarize", "--speakers", "1"): ("talk.vtt", "WEBVTT\n\n"),
    }
    for more, (name, begin) in begins.items():
        ended = await forebay(server, "transcribe", *MODEL, talk.name, *more, folder=talk.parent)
        assert ended.status == 0, ended.err
        assert (talk.parent / name).read_text().startswith(begin)
    assert "A: " in (talk.parent / "talk.vtt").read_text() or "<v A>" in (talk.parent / "talk.vtt").read_text()


async def test_what_goes_wrong_is_a_sentence(server: Server, talk: Path) -> None:
    folder = talk.parent
    (folder / "noise.mp3").write_bytes(b"no sound at all" * 100)
    for arguments, said in (
        (("nothing.wav",), "There is no file nothing.wav."),
        ((talk.name, "--speakers", "2"), "`--speakers` needs `--diarize`."),
        (
            (talk.name, "--translate", "--format", "diarized_json"),
            "forebay: A translation is not written as diarized_json.",
        ),
        ((talk.name, "--language", "tlh"), "Invalid value for 'language'"),
        (("noise.mp3",), "The recording cannot be used."),
    ):
        ended = await forebay(server, "transcribe", *MODEL, *arguments, folder=folder)
        assert ended.status == 1
        assert said in ended.err
        assert "Traceback" not in ended.err
    both = await forebay(server, "transcribe", *MODEL, "noise.mp3", talk.name, folder=folder)
    assert both.status == 1
    assert "noise.mp3: The job job_" in both.err
    assert talk.with_suffix(".txt").exists(), "one that is bad does not hold up the others"


async def test_what_is_handed_in_goes_on_alone(server: Server, talk: Path) -> None:
    ended = await forebay(server, "transcribe", *MODEL, talk.name, "--background", folder=talk.parent)
    assert ended.status == 0, ended.err
    job_id = ended.out.strip()
    assert re.fullmatch(r"job_[0-9a-f]{32}", job_id)
    assert (await until_ended(server, job_id))["status"] == "completed"
    printed = await forebay(server, "jobs", "result", job_id, "--format", "json", folder=talk.parent)
    assert json.loads(printed.out)["text"]
    kept = await forebay(server, "jobs", "result", job_id, "-o", "said.json", folder=talk.parent)
    assert kept.status == 0
    assert (talk.parent / "said.json").read_text() == printed.out
    refused = await forebay(server, "jobs", "result", job_id, "--format", "docx", folder=talk.parent)
    assert (refused.status, "This result can be written as" in refused.err) == (1, True)


async def test_a_bar_shows_how_far_it_is_and_ctrl_c_cancels(server: Server, talk: Path) -> None:
    talk.write_bytes(speech(60))
    arguments = ("transcribe", *MODEL, str(talk), "--prompt", SLOW, "--url", server.url)
    async with on_terminal(*arguments, environment=ON_TERMINAL, folder=talk.parent) as terminal:
        await terminal.wait_for(r"transcribing.*?[1-9][0-9.]* %")
        terminal.press(CTRL_C)
        await terminal.wait_for(r"Stopped\. What was not finished is cancelled\.")
        assert await terminal.ended() == 130
    jobs = (await server.get("/v1/jobs?kind=transcription&limit=1"))["data"]
    assert (await until_ended(server, jobs[0]["id"]))["status"] == "cancelled"
    await until_nothing_is_left(server)
    assert not talk.with_suffix(".txt").exists()
