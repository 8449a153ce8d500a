import contextlib
import http.client
import os
import random
import re
import signal
import socket
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, Self

import numpy as np
import psutil
import pytest

from forebay.engines.whisper_chunks import windows
from forebay.replicas import figures
from forebay.speech import Segment, segment_from_wire
from tests.support.engines import KEY, Engine, alive, children, eventually, parted, ready
from tests.support.models import whisper_base, whisper_tiny
from tests.support.speech import sample_wav, sample_words

PATH = "/v1/audio/transcriptions"
SECOND = 16_000
CANCEL_SECONDS = 2.0


@cache
def _sample() -> np.ndarray:
    with wave.open(str(sample_wav())) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def _body(pcm: np.ndarray, **header: Any) -> bytes:
    return parted({"task": "transcribe", "last": True, **header}, pcm.astype("<i2").tobytes())


def _ask(engine: Engine, pcm: np.ndarray, **header: Any) -> tuple[int, list[dict[str, Any]]]:
    """The status, and the records of the answer."""
    return engine.records(PATH, _body(pcm, **header))


def _heard(engine: Engine, pcm: np.ndarray, **header: Any) -> list[Segment]:
    status, records = _ask(engine, pcm, **header)
    assert status == 200, records
    assert records[-1]["type"] == "done", records[-1]
    return [segment_from_wire(record) for record in records if record["type"] == "segment"]


def _text(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments).strip()


class _Call:
    """One request on a connection of its own that can be given up, and is at the end of a `with`."""

    def __init__(self, engine: Engine, pcm: np.ndarray, **header: Any) -> None:
        self._engine = engine
        self._taken = engine.metric("requests_total")
        self.socket = socket.create_connection(engine.address, timeout=120)
        body = _body(pcm, **header)
        head = f"POST {PATH} HTTP/1.1\r\nHost: engine\r\nAuthorization: Bearer {KEY}\r\nX-Request-ID: req_test\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def wait_for_a_step(self) -> None:
        """Wait until it is computed, where nobody else asks meanwhile."""
        eventually(lambda: self._engine.metric("requests_total") > self._taken, 60)

    def give_up(self) -> float:
        """Half-close, and wait until the engine has closed; the seconds that took."""
        begun = time.monotonic()
        self.socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while self.socket.recv(65_536):
                pass
        self.socket.close()
        return time.monotonic() - begun


def _computing(engine: Engine) -> int:
    """The compute process."""
    return int(eventually(lambda: next(iter(children(engine.pid)), None), 30))


def _busy_seconds(engine: Engine, seconds: float) -> float:
    """Processor time that the engine and its compute process take in so many seconds."""

    def taken() -> float:
        processes = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children()]
        return sum(sum(each.cpu_times()[:2]) for each in processes)

    before = taken()
    time.sleep(seconds)  # it is a measurement, and waits for nothing
    return taken() - before


def _engine(**more: Any) -> contextlib.AbstractContextManager[Engine]:
    spec = {"name": "w", "slots": 32, "model_path": str(more.pop("model", whisper_tiny())), **more}
    return ready("whisper", spec)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with _engine(rehearse=True) as found:
        yield found


def _words(text: str) -> list[str]:
    return re.sub(r"[^a-z' ]", " ", text.lower()).split()


def _error_rate(wanted: list[str], found: list[str]) -> float:
    """Words to change, leave out or put in, for each that is wanted."""
    row = list(range(len(found) + 1))
    for number, word in enumerate(wanted, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(found, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != other))
    return row[-1] / len(wanted)


def test_it_hears_what_the_library_hears(engine: Engine) -> None:
    from faster_whisper import WhisperModel

    library = WhisperModel(str(whisper_tiny()), device="cpu", compute_type="int8")
    reference, _ = library.transcribe(_sample().astype(np.float32) / 32768, vad_filter=True, word_timestamps=True)
    wanted = _words(sample_words())
    theirs = _error_rate(wanted, _words("".join(segment.text for segment in reference)))
    heard = _heard(engine, _sample(), words=True)
    assert _error_rate(wanted, _words(_text(heard))) <= theirs + 0.005


def test_a_recording_that_was_paused_is_heard_the_same(engine: Engine) -> None:
    wanted, before, computing = _heard(engine, _sample()), engine.metric("requests_total"), _computing(engine)
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(_heard, engine, _sample())
        eventually(lambda: engine.metric("requests_total") > before, 60)
        with engine.paused():
            assert not heard.done()
        assert _text(heard.result()) == _text(wanted)
    assert _computing(engine) == computing


def test_words_lie_in_order_inside_of_their_segments_and_of_the_sound(engine: Engine) -> None:
    heard = _heard(engine, _sample(), words=True)
    words = [word for segment in heard for word in segment.words]
    assert len(heard) >= 2
    assert "".join(word.text for word in words) == "".join(segment.text for segment in heard)
    assert 6 < words[0].start < 7.5  # where the first of the reference is
    for segment in heard:
        assert segment.start <= segment.words[0].start
        assert segment.words[-1].end <= segment.end <= 30
    for before, after in pairwise(words):
        assert before.start <= before.end <= after.start + 0.011
    assert all(0 < (word.probability or 0) <= 1 for word in words)


def test_times_are_those_of_the_stretch_and_not_of_what_was_said(engine: Engine) -> None:
    silence = np.zeros(20 * SECOND, np.int16)
    said = _sample()[22 * SECOND :]
    twice = np.concatenate([silence, said, silence, said])
    heard = _heard(engine, twice, words=True, options={"temperatures": [0]})
    starts = [word.start for segment in heard for word in segment.words if "Yankee" in word.text]
    assert len(starts) == 2, _text(heard)
    assert starts[1] - starts[0] == pytest.approx(28, abs=0.5)
    assert heard[0].start > 19.5


@pytest.mark.parametrize("loudness", [0, 100, 2000])
def test_where_nobody_speaks_nothing_is_heard(engine: Engine, loudness: int) -> None:
    noise = np.random.default_rng(3).normal(0, 1, 20 * SECOND) * loudness
    status, records = _ask(engine, noise)
    assert status == 200
    assert [record["type"] for record in records] == ["language", "done"]
    assert records[-1] == {"type": "done", "consumed": 20 * SECOND, "speech": []}
    assert _heard(engine, noise[:0]) == []


def test_eight_at_once_hear_what_each_hears_alone(engine: Engine) -> None:
    parts = [_sample()[second * SECOND : (second + 9) * SECOND] for second in range(6, 14)]
    exact: dict[str, Any] = {"words": True, "options": {"temperatures": [0]}}  # other temperatures take chances
    alone = [_heard(engine, part, **exact) for part in parts]
    before = {name: engine.metric(name) for name in ("batches_total", "items_total")}
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda part: _heard(engine, part, **exact), parts))
    assert together == alone
    assert len(set(map(_text, alone))) > 1
    batches, items = (engine.metric(name) - before[name] for name in ("batches_total", "items_total"))
    assert items == 8
    assert batches < 8
    assert (engine.metric("requests_running"), engine.metric("items_waiting")) == (0, 0)


def test_a_stretch_that_is_not_the_last_ends_in_a_silence(engine: Engine) -> None:
    greedy = {"beam_size": 1, "temperatures": [0]}
    gap = np.concatenate([_sample()[6 * SECOND :], np.zeros(2 * SECOND, np.int16), _sample()[9 * SECOND : 11 * SECOND]])
    _, records = _ask(engine, gap, last=False, options=greedy)
    assert 24 * SECOND < records[-1]["consumed"] < 26 * SECOND
    assert records[-1]["speech"][-1][1] * SECOND <= records[-1]["consumed"]
    assert _ask(engine, gap, last=True, options=greedy)[1][-1]["consumed"] == len(gap)


@pytest.mark.parametrize("vad", [True, False])
def test_a_stretch_without_a_silence_ends_where_it_is_quietest(engine: Engine, vad: bool) -> None:
    spoken = np.array(_sample()[13 * SECOND : 27 * SECOND])
    spoken[11 * SECOND + 8000 : 11 * SECOND + 11_000] = 0  # too short for an end of speech
    options = {"beam_size": 1, "temperatures": [0], "vad": vad, "vad_onset": 0.002, "vad_offset": 0.001}
    _, records = _ask(engine, spoken, last=False, options=options)
    assert 11 * SECOND + 8000 <= records[-1]["consumed"] <= 11 * SECOND + 11_000
    short = _sample()[13 * SECOND : 15 * SECOND]
    _, records = _ask(engine, short, last=False, options=options)
    assert records[-1]["consumed"] == len(short)


def test_without_vad_all_of_it_is_listened_to(engine: Engine) -> None:
    long = np.concatenate([_sample()[8 * SECOND :], _sample()[8 * SECOND :]])
    status, records = _ask(engine, long, options={"vad": False})
    assert status == 200
    assert records[-1] == {"type": "done", "consumed": len(long), "speech": [[0.0, 44.0]]}
    heard = _text([segment_from_wire(record) for record in records if record["type"] == "segment"])
    assert heard.count("New Jersey") >= 3


@pytest.mark.parametrize("samples", [0, 1, 100, 170, 320, 400, 700])
def test_however_little_there_is_it_is_listened_to(engine: Engine, samples: int) -> None:
    exact: dict[str, Any] = {"words": True, "options": {"vad": False, "temperatures": [0], "no_speech_threshold": None}}
    exact["options"]["log_prob_threshold"] = None  # whatever is written is wanted, and its words are looked for
    status, records = _ask(engine, _sample()[8 * SECOND :][:samples], **exact)
    assert (status, records[-1]["type"], records[-1].get("consumed")) == (200, "done", samples), records
    for segment in (segment_from_wire(record) for record in records if record["type"] == "segment"):
        assert all(0 <= word.start <= word.end <= 0.1 for word in segment.words)


def test_a_last_chunk_of_eleven_milliseconds_fails_nothing(engine: Engine) -> None:
    fading = _sample() * np.clip(np.arange(30 * SECOND, 0, -1) / (2 * SECOND), 0, 1)
    part = np.concatenate([fading, _sample()[10 * SECOND :][:16]])
    *_, tail = windows(part, 30 * SECOND)
    assert tail.samples == 176
    eager = {"vad": False, "temperatures": [0], "no_speech_threshold": None, "log_prob_threshold": None}
    assert "New Jersey" in _text(_heard(engine, part, words=True, options=eager))


def test_a_short_recording_does_not_wait_for_a_long_one(engine: Engine) -> None:
    long = np.tile(_sample(), 6)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(_heard, engine, long, options={"beam_size": 1, "temperatures": [0]})
        eventually(lambda: engine.metric("items_waiting") > 0, 30)
        assert _heard(engine, _sample()[6 * SECOND : 12 * SECOND], options={"temperatures": [0]})
        assert not first.done()
        assert len(first.result()) > 6


def test_options_reach_the_model(engine: Engine) -> None:
    part = _sample()[12 * SECOND : 20 * SECOND]
    plain = _heard(engine, part)[0]
    assert plain.temperature == 0
    assert _heard(engine, part, options={"temperatures": [0.5]})[0].temperature == 0.5
    greedy = _heard(engine, part, options={"beam_size": 1, "temperatures": [0]})
    assert greedy[0].avg_logprob != plain.avg_logprob
    named = _heard(engine, part, options={"hotwords": "Dyane, Sheila", "beam_size": 2})
    assert named[0].avg_logprob != plain.avg_logprob
    prompted = _heard(engine, part, options={"initial_prompt": "diane and sheila talk on the phone"})
    assert prompted[0].avg_logprob != plain.avg_logprob
    word = plain.tokens[3]
    assert word not in _heard(engine, part, options={"suppress_tokens": [word]})[0].tokens
    assert not re.search(r"\d", _text(_heard(engine, part, options={"suppress_numerals": True})))
    assert _heard(engine, part, options={"no_speech_threshold": 0.0, "log_prob_threshold": 0.0}) == []


@pytest.mark.parametrize(
    ("header", "param"),
    [
        ({"task": "sing"}, "task"),
        ({"task": "translate"}, "model"),
        ({"language": "de"}, "language"),
        ({"language": "xx"}, "language"),
        ({"language": 3}, "language"),
        ({"words": "yes"}, "words"),
        ({"options": {"beam_size": 0}}, "beam_size"),
        ({"options": {"beam_size": 5.5}}, "beam_size"),
        ({"options": {"temperatures": []}}, "temperatures"),
        ({"options": {"temperatures": [2]}}, "temperatures"),
        ({"options": {"temperatures": 0}}, "temperatures"),
        ({"options": {"suppress_tokens": [60_000]}}, "suppress_tokens"),
        ({"options": {"initial_prompt": 5}}, "initial_prompt"),
        ({"options": {"hotwords": "x" * 20_000}}, "hotwords"),
        ({"options": {"chunk_seconds": 31}}, "chunk_seconds"),
        ({"options": {"vad_onset": 0.2, "vad_offset": 0.4}}, "vad_offset"),
        ({"options": {"vad": None, "patience": float("nan")}}, "patience"),
        ({"options": {"unheard_of": 1}}, "unheard_of"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_its_name(engine: Engine, header: dict[str, Any], param: str) -> None:
    status, (answer,) = _ask(engine, _sample(), **header)
    assert (status, answer["error"]["param"]) == (400, param)
    assert len(answer["error"]["message"]) < 200


def test_bodies_that_are_none_are_refused(engine: Engine) -> None:
    for body, status in (
        (b"", 400),
        (b"{}", 400),
        (b"[]\n", 400),
        (b'{"options": 3}\n', 400),
        (b"{}\n\0", 400),
        (b"{}\n" + bytes(601 * 2 * SECOND), 413),
        (b"{" * 10_000_000, 400),
    ):
        connection = http.client.HTTPConnection(*engine.address, timeout=60)
        with contextlib.closing(connection):
            connection.request("POST", PATH, body, {"Authorization": f"Bearer {KEY}"})
            answer = connection.getresponse()
            assert answer.status == status, body[:20]
            answer.read()
    assert engine.ask("POST", PATH, key=None)[0] == 401


def test_every_request_leaves_a_line_with_its_names(engine: Engine) -> None:
    connection = http.client.HTTPConnection(*engine.address, timeout=60)
    with contextlib.closing(connection):
        named = {"Authorization": f"Bearer {KEY}", "X-Request-ID": "req_named"}
        connection.request("POST", PATH, _body(_sample()[: 9 * SECOND], options={"initial_prompt": "secret"}), named)
        connection.getresponse().read()
    assert "event=finished request_id=req_named audio_seconds=9.00 seconds=" in engine.log
    assert "secret" not in engine.log


def test_its_figures_are_those_that_the_server_passes_on(engine: Engine) -> None:
    lines = engine.metrics().splitlines()
    assert len(lines) > 10
    assert set(figures.read("\n".join(lines))) == {line.split()[0] for line in lines}


# What follows needs prompts that let mishaps happen.


def _seconds_until_killed(engine: Engine) -> float:
    before = _computing(engine)
    restarts = engine.metric("child_restarts_total")
    with _Call(engine, _sample(), options={"initial_prompt": "[[hang]]"}) as call:
        call.wait_for_a_step()
        seconds = call.give_up()
    assert not alive(before)
    assert engine.metric("requests_running") == 0
    eventually(lambda: engine.metric("child_restarts_total") == restarts + 1, 10)
    return seconds


def test_a_step_for_nobody_is_killed_within_two_seconds(engine: Engine) -> None:
    """The best of three, as the engine itself waits for one of the two seconds."""
    assert any(_seconds_until_killed(engine) < CANCEL_SECONDS for _ in range(3))
    assert _text(_heard(engine, _sample()))
    assert _busy_seconds(engine, 1.0) < 0.3
    assert "event=cancelled request_id=req_test" in engine.log


def test_who_is_beside_a_hanging_request_loses_nothing_when_that_is_given_up(engine: Engine) -> None:
    with _Call(engine, _sample(), options={"initial_prompt": "[[hang]]"}) as call, ThreadPoolExecutor(1) as pool:
        call.wait_for_a_step()
        other = pool.submit(_heard, engine, _sample())
        eventually(lambda: engine.metric("items_waiting") == 1, 30)
        call.give_up()
        assert _text(other.result()).endswith("New Jersey now.")


def test_who_waits_hears_of_life_until_a_step_takes_too_long() -> None:
    options = {"initial_prompt": "[[hang]]"}
    with (
        _engine(rehearse=True, hung_seconds=2.0) as slow,
        _Call(slow, _sample(), options=options) as one,
        _Call(slow, _sample(), options=options) as other,
    ):
        for call in (one, other):
            call.socket.settimeout(30)
            told = b""
            while b"\r\n1\r\n\n\r\n" not in told:
                told += call.socket.recv(65_536)
        for call in (one, other):
            call.socket.settimeout(2.5)
            with pytest.raises(TimeoutError):
                for _ in range(30):
                    assert call.socket.recv(65_536)


def _seconds_until_given_up(engine: Engine) -> float:
    with _Call(engine, np.tile(_sample(), 8)) as call:
        before = engine.metric("batches_total")
        eventually(lambda: engine.metric("batches_total") > before, 60)
        return call.give_up()


def test_a_real_step_is_given_up_as_fast(engine: Engine) -> None:
    assert any(_seconds_until_given_up(engine) < CANCEL_SECONDS for _ in range(3))
    assert (engine.metric("items_waiting"), engine.metric("requests_running")) == (0, 0)


def test_random_cancels_leave_nothing(engine: Engine, prove: bool) -> None:
    chance = random.Random(7)

    def cancelled(_: int) -> float:
        seconds = chance.choice((6, 14, 30, 60))
        call = _Call(engine, np.tile(_sample(), 2)[: seconds * SECOND], words=True)
        time.sleep(chance.uniform(0, 1.0))  # the moment is to be any
        return call.give_up()

    with ThreadPoolExecutor(5) as pool:
        longest = max(pool.map(cancelled, range(50 if prove else 20)))
    assert longest < CANCEL_SECONDS + 4  # beside others a step runs to its end
    assert (engine.metric("items_waiting"), engine.metric("requests_running")) == (0, 0)
    assert engine.busy() == 0
    assert len(children(engine.pid)) == 1
    assert _text(_heard(engine, _sample())).endswith("New Jersey now.")
    assert _busy_seconds(engine, 1.0) < 0.3


def test_a_compute_process_that_dies_costs_nobody_anything(engine: Engine) -> None:
    taken = engine.metric("requests_total")
    with ThreadPoolExecutor(3) as pool:
        pending = [pool.submit(_heard, engine, _sample()) for _ in range(3)]
        eventually(lambda: engine.metric("requests_running") == 3 and engine.metric("requests_total") > taken, 30)
        os.kill(_computing(engine), signal.SIGKILL)
        texts = {_text(each.result()) for each in pending}
    assert len(texts) == 1
    assert texts.pop().count("Yankee") == 1
    assert re.search(r"^event=compute_ended code=-9 chunks=\d+$", engine.log, re.MULTILINE)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [("[[crash]]", "engine_error"), ("[[refuse]]", "engine_error"), ("[[out of memory]]", "out_of_memory")],
)
def test_what_fails_twice_alone_fails_its_request_only(engine: Engine, prompt: str, code: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        good = [pool.submit(_heard, engine, _sample())]
        status, records = _ask(engine, _sample(), options={"initial_prompt": prompt})
        assert {_text(each.result())[-15:] for each in good} == {"New Jersey now."}
    assert records[-1]["error"]["code"] == code
    assert status in (200, 500)  # 200 where something was told before
    assert "event=failed request_id=-" in engine.log


def test_a_shortage_halves_the_steps_and_they_recover() -> None:
    with _engine(rehearse=True, chunks_at_once=4, oom_cooldown_seconds=1.0) as small:
        with ThreadPoolExecutor(4) as pool:
            options = {"initial_prompt": "[[out of memory together]]"}
            texts = list(pool.map(lambda _: _text(_heard(small, _sample(), options=options)), range(4)))
        assert all("New Jersey" in text for text in texts)
        assert small.metric("out_of_memory_total") >= 1
        assert re.search(r"^event=batch_halved budget_chunks=\d$", small.log, re.MULTILINE)
        eventually(lambda: _heard(small, _sample()[: 8 * SECOND]) and small.metric("batch_budget_chunks") == 4, 30)


def test_the_compute_process_ends_with_its_engine() -> None:
    with _engine() as dying:
        front, compute = dying.pid, _computing(dying)
        os.kill(front, signal.SIGKILL)
        eventually(lambda: not alive(front) and not alive(compute), 5)


@pytest.mark.parametrize("missing", ["model.bin", "tokenizer.json"])
def test_a_folder_that_holds_no_model_is_refused(tmp_path: Any, missing: str) -> None:
    for name in {"model.bin", "tokenizer.json"} - {missing}:
        (tmp_path / name).write_bytes(b"nothing")
    engine = Engine("whisper", {"name": "w", "model_path": str(tmp_path)})
    assert engine.guard.wait(30) == 78
    assert f"has no {missing}" in engine.log
    engine.end()


def test_a_model_of_many_languages_finds_out_which(prove: bool) -> None:
    if not prove:
        pytest.skip("148 MB")
    with _engine(model=whisper_base()) as engine:
        _, records = _ask(engine, np.tile(_sample(), 3), words=True)
        assert records[0]["type"] == "language"
        assert records[0]["language"] == "en"
        assert records[0]["probability"] > 0.8
        assert "".join(record.get("text", "") for record in records).count("Yankee") == 3
        _, records = _ask(engine, _sample(), language="de")
        assert records[0] == {"type": "language", "language": "de", "probability": 1.0}
        assert "New Jersey" in _text(_heard(engine, _sample(), task="translate", options={"temperatures": [0]}))
        assert _ask(engine, _sample(), language="xx")[0] == 400
        with ThreadPoolExecutor(4) as pool:
            tasks = [{}, {"language": "en"}, {"language": "de"}, {"task": "translate"}]
            assert all(pool.map(lambda header: _heard(engine, _sample(), **header), tasks))
