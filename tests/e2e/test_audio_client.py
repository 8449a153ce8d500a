"""The official client, a real Whisper model and a telephone call of two people with its reference."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from functools import partial
from itertools import pairwise
from time import monotonic
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai.types.audio import (
    Transcription,
    TranscriptionDiarized,
    TranscriptionTextDeltaEvent,
    TranscriptionTextDoneEvent,
    TranscriptionTextSegmentEvent,
    TranscriptionVerbose,
)

from tests.support.der import der, read_rttm
from tests.support.measuring import within
from tests.support.models import ge2e, whisper_tiny
from tests.support.server import Server, serving
from tests.support.speech import SAMPLE_SECONDS, sample_rttm, sample_utterances, sample_wav, sample_words
from tests.support.subtitles import Cue, read_srt, read_vtt

CONFIG = f"""
default_models = false
[models.whisper]
engine = "whisper"
source = "file:{whisper_tiny() / "model.bin"}"
preload = true
[models.voices]
engine = "speakers"
source = "file:{ge2e()}"
preload = true
[models.words]
engine = "aligner"
options.backend = "pocketsphinx"
[audio]
diarization_model = "voices"
"""
NAME = "call.wav"

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with server.client() as one:
        yield one


def call() -> tuple[str, bytes]:
    return NAME, sample_wav().read_bytes()


def plain(text: str) -> list[str]:
    """The words of a text, as they are compared."""
    letters = "".join(char if char.isalnum() or char == "'" else " " for char in text.lower())
    return letters.split()


def word_errors(said: Sequence[str], heard: Sequence[str]) -> float:
    """Words to insert, leave out and replace, for each word that was said."""
    costs = list(range(len(heard) + 1))
    for row, word in enumerate(said, 1):
        before, costs[0] = costs[0], row
        for column, other in enumerate(heard, 1):
            best = min(before + (word != other), costs[column] + 1, costs[column - 1] + 1)
            before, costs[column] = costs[column], best
    return costs[-1] / len(said)


async def test_json_says_what_was_said_and_how_sure_that_is(client: openai.AsyncOpenAI) -> None:
    made = await client.audio.transcriptions.create(
        model="whisper", file=call(), language="en", temperature=0, include=["logprobs"]
    )
    assert isinstance(made, Transcription)
    errors = word_errors(plain(sample_words()), plain(made.text))
    print(f"word error rate {errors:.3f}: {made.text}")
    assert errors < 0.3
    assert made.usage is not None
    assert made.usage.type == "duration"
    assert made.usage.seconds == SAMPLE_SECONDS
    assert made.logprobs
    assert "".join(entry.token or "" for entry in made.logprobs).strip() == made.text
    assert all(entry.logprob is not None and entry.logprob <= 0 for entry in made.logprobs)


async def test_words_cover_what_the_reference_says_was_spoken(client: openai.AsyncOpenAI) -> None:
    made = await client.audio.transcriptions.create(
        model="whisper", file=call(), response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert isinstance(made, TranscriptionVerbose)
    assert (made.language, made.duration) == ("english", SAMPLE_SECONDS)
    assert made.words
    assert made.segments
    assert plain(" ".join(word.word for word in made.words)) == plain(made.text)
    assert plain(" ".join(segment.text for segment in made.segments)) == plain(made.text)
    starts = [word.start for word in made.words]
    assert starts == sorted(starts)
    assert all(0 <= word.start <= word.end <= SAMPLE_SECONDS for word in made.words)
    spans = [(begin, end) for begin, end, _ in sample_utterances()]
    met = [any(word.start < end and word.end > begin for word in made.words) for begin, end in spans]
    outside = [
        word
        for word in made.words
        if not any(word.start < end + 0.5 and word.end > begin - 0.5 for begin, end in spans)
    ]
    print(f"{sum(met)} of {len(spans)} utterances have words, {len(outside)} of {len(made.words)} words are in none")
    assert sum(met) >= 0.8 * len(spans)
    assert len(outside) <= 0.05 * len(made.words)


async def test_subtitles_with_speakers(client: openai.AsyncOpenAI) -> None:
    text: Any = await client.audio.transcriptions.create(
        model="whisper", file=call(), response_format="srt", extra_body={"diarize": True, "speakers": 2}
    )
    cues = read_srt(text)
    check_cues(cues)
    assert {cue.text[:3] for cue in cues} == {"A: ", "B: "}


async def test_subtitles_with_silence_and_a_hint(client: openai.AsyncOpenAI) -> None:
    vad: Any = {"type": "server_vad", "threshold": 0.4, "prefix_padding_ms": 200, "silence_duration_ms": 300}
    text: Any = await client.audio.transcriptions.create(
        model="whisper", file=call(), response_format="vtt", prompt="A telephone call.", chunking_strategy=vad
    )
    cues = read_vtt(text)
    check_cues(cues)
    assert word_errors(plain(sample_words()), plain(" ".join(cue.text for cue in cues))) < 0.5


def check_cues(cues: Sequence[Cue]) -> None:
    assert len(cues) > 5
    assert all(before.end <= cue.start for before, cue in pairwise(cues))
    assert cues[-1].end <= SAMPLE_SECONDS


async def test_diarized_json(client: openai.AsyncOpenAI) -> None:
    made = await client.audio.transcriptions.create(
        model="whisper", file=call(), response_format="diarized_json", chunking_strategy="auto", extra_body={"num_speakers": 2}
    )  # fmt: skip
    assert isinstance(made, TranscriptionDiarized)
    assert made.duration == SAMPLE_SECONDS
    assert {segment.speaker for segment in made.segments} == {"A", "B"}
    assert plain(" ".join(segment.text for segment in made.segments)) == plain(made.text)
    found = [(segment.start, segment.end, segment.speaker) for segment in made.segments]
    errors = der(read_rttm(sample_rttm()), found)
    print(f"error rate of the speakers of segments {errors.rate:.3f}")
    assert errors.confused / errors.total < 0.2


async def test_a_stream_is_of_the_clients_own_events(client: openai.AsyncOpenAI) -> None:
    stream = await client.audio.transcriptions.create(
        model="whisper", file=call(), stream=True, response_format="diarized_json"
    )
    deltas, segments = [], []
    done: TranscriptionTextDoneEvent | None = None
    async for event in stream:
        assert done is None
        if isinstance(event, TranscriptionTextDeltaEvent):
            deltas.append(event.delta)
        elif isinstance(event, TranscriptionTextSegmentEvent):
            segments.append(event)
        else:
            assert isinstance(event, TranscriptionTextDoneEvent)
            done = event
    assert done is not None
    assert len(deltas) > 1
    assert "".join(deltas) == done.text
    assert word_errors(plain(sample_words()), plain(done.text)) < 0.3
    assert plain(" ".join(segment.text for segment in segments)) == plain(done.text)
    assert done.usage is not None
    assert done.usage.input_tokens == 10 * SAMPLE_SECONDS


async def test_alignments(server: Server) -> None:
    segments = [{"start": begin, "end": end, "text": text} for begin, end, text in sample_utterances()]
    file = await server.client().files.create(file=call(), purpose="user_data")
    body = {"model": "words", "file_id": file.id, "segments": segments}
    headers = server.headers
    async with server.session.post(f"{server.url}/v1/audio/alignments", json=body, headers=headers) as response:
        made = await response.json()
        assert response.status == 200, made
    assert [segment["text"] for segment in made["segments"]] == [segment["text"] for segment in segments]
    assert [word["word"] for word in made["words"]] == sample_words().split()
    for segment, (begin, end, _) in zip(made["segments"], sample_utterances(), strict=True):
        assert all(begin - 0.5 <= word["start"] <= word["end"] <= end + 0.5 for word in segment["words"])


async def test_real_engines_stop_when_their_caller_has_gone(
    server: Server, client: openai.AsyncOpenAI, prove: bool
) -> None:
    chance = random.Random(4)
    for _ in range(50 if prove else 5):
        await within(2.0, partial(_seconds_to_stop, server, client, chance.uniform(0.1, 4)))


async def _seconds_to_stop(server: Server, client: openai.AsyncOpenAI, moment: float, _number: int) -> float:
    """How long engines go on whose caller leaves at this moment."""
    asking = asyncio.create_task(
        client.audio.transcriptions.create(model="whisper", file=call(), response_format="diarized_json")
    )
    await asyncio.wait({asking}, timeout=moment)
    asking.cancel()
    left = monotonic()
    for model in ("whisper", "voices"):
        await server.until_load(0, 0, model)
    return monotonic() - left


@pytest.mark.filterwarnings("ignore:deprecated")  # OpenAI's own models for it go; this server's stay
async def test_what_this_model_cannot_do_is_refused(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.audio.transcriptions.create(model="whisper", file=call(), language="de")
    assert refused.value.param == "language"
    with pytest.raises(openai.BadRequestError):
        await client.audio.translations.create(model="whisper", file=call())
    with pytest.raises(openai.BadRequestError) as broken:
        await client.audio.transcriptions.create(model="whisper", file=(NAME, b"RIFF, or not"))
    assert (broken.value.code, broken.value.param) == ("media_invalid", "file")
