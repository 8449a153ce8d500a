import base64
import contextlib
import json
import socket
import time
import wave
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.der import Turn, der, read_rttm
from tests.support.engines import KEY, Engine, eventually, ready
from tests.support.memory import forget_peak, peak
from tests.support.models import ge2e
from tests.support.speech import sample_rttm, sample_wav
from tests.unit.test_torch_weights import GOOD, NUMBERS, checkpoint

RATE = 16_000
VOICES, SPEAKERS = "/v1/audio/voices", "/v1/audio/speakers"


def _engine(**more: Any) -> contextlib.AbstractContextManager[Engine]:
    return ready("speakers", {"name": "s", "model_path": str(ge2e()), "slots": 4, **more})


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with _engine() as found:
        yield found


@cache
def _pcm() -> np.ndarray:
    with wave.open(str(sample_wav())) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def _reference() -> list[Turn]:
    return read_rttm(sample_rttm())


class Voices:
    """What was heard in a recording."""

    def __init__(self, engine: Engine, pcm: np.ndarray, *, last: bool = True) -> None:
        status, records = engine.records(VOICES, {"last": last}, pcm.astype("<i2").tobytes())
        assert status == 200, records
        assert [each["type"] for each in records] == ["voices"] * (len(records) - 1) + ["done"]
        self.consumed: int = records[-1]["consumed"]
        self.regions: list[list[float]] = [each for record in records[:-1] for each in record["regions"]]
        self.windows: list[list[float]] = [each for record in records[:-1] for each in record["windows"]]
        self.vectors = b"".join(base64.b64decode(record["vectors"]) for record in records[:-1])
        assert {record["dimensions"] for record in records[:-1]} <= {256}
        assert len(self.vectors) == len(self.windows) * 512

    def turns(self, engine: Engine, **more: Any) -> tuple[list[Turn], list[str]]:
        header = {"regions": self.regions, "windows": self.windows, "dimensions": 256, **more}
        status, records = engine.records(SPEAKERS, header, self.vectors)
        assert status == 200, records
        assert records[-1] == {"type": "done"}
        turns = [(each["start"], each["end"], each["speaker"]) for each in records[0]["turns"]]
        assert turns == sorted(turns)
        assert list(dict.fromkeys(speaker for _, _, speaker in turns)) == records[0]["speakers"]
        return turns, records[0]["speakers"]


@pytest.fixture(scope="module")
def heard(engine: Engine) -> Voices:
    return Voices(engine, _pcm())


def test_the_call_is_told_apart_with_two_speakers_given(engine: Engine, heard: Voices) -> None:
    turns, speakers = heard.turns(engine, speakers=2)
    assert speakers == ["A", "B"]
    assert der(_reference(), turns).rate <= 0.20
    assert der(_reference(), turns, collar=0.25).rate <= 0.061


def test_two_speakers_are_counted_in_the_call(engine: Engine, heard: Voices) -> None:
    turns, speakers = heard.turns(engine)
    assert speakers == ["A", "B"]
    assert der(_reference(), turns).rate <= 0.20
    assert len(heard.turns(engine, speakers_min=3)[1]) == 3
    assert len(heard.turns(engine, speakers_max=1)[1]) == 1


def test_turns_are_where_speech_is(engine: Engine, heard: Voices) -> None:
    turns, _ = heard.turns(engine, speakers=2)
    assert sum(end - start for start, end, _ in turns) == pytest.approx(
        sum(end - start for start, end in heard.regions), abs=0.05
    )
    assert all(before[1] <= after[0] for before, after in pairwise(turns))
    assert turns[0][0] > 6


VARIANTS = {
    "later": lambda pcm: np.concatenate([np.zeros(5003, np.int16), pcm]),
    "noisy": lambda pcm: pcm + np.random.default_rng(0).normal(size=len(pcm)) * 55,
    "quiet": lambda pcm: pcm // 10,
    "loud": lambda pcm: np.clip(pcm * 3.0, -32768, 32767),
}


@pytest.mark.parametrize("how", VARIANTS)
def test_the_call_is_told_apart_in_other_forms(how: str, engine: Engine) -> None:
    turns, speakers = Voices(engine, VARIANTS[how](_pcm().astype(np.float64))).turns(engine)
    shift = 5003 / RATE if how == "later" else 0
    assert speakers == ["A", "B"]
    assert der([(start + shift, end + shift, who) for start, end, who in _reference()], turns).rate <= 0.20


def _alone(who: str) -> np.ndarray:
    """What one of the two says while the other is silent, one after another."""
    pieces = []
    others = [(start, end) for start, end, speaker in _reference() if speaker != who]
    for start, end, speaker in _reference():
        for low, high in others:
            if low < end and high > start:
                start, end = (high, end) if low <= start else (start, low)
        if speaker == who and end - start > 0.4:
            pieces.append(_pcm()[int(start * RATE) : int(end * RATE)])
    return np.concatenate(pieces)


@pytest.mark.parametrize("who", ["speaker90", "speaker91"])
def test_one_speaker_alone_is_one(who: str, engine: Engine) -> None:
    assert Voices(engine, _alone(who)).turns(engine)[1] == ["A"]
    assert Voices(engine, np.tile(_alone(who), 3)).turns(engine)[1] == ["A"]


def test_what_the_two_say_in_another_order_is_told_apart(engine: Engine) -> None:
    ann, bob = _alone("speaker90"), _alone("speaker91")
    order = [("b", bob), ("a", ann), ("b", bob[: 5 * RATE]), ("a", ann[2 * RATE :])]
    reference, at = [], 0.0
    for who, pcm in order:
        reference.append((at, at + len(pcm) / RATE, who))
        at += len(pcm) / RATE
    turns, speakers = Voices(engine, np.concatenate([pcm for _, pcm in order])).turns(engine)
    assert speakers == ["A", "B"]
    errors = der(reference, turns)
    assert errors.confused / errors.total < 0.1


def test_known_speakers_get_their_names(engine: Engine, heard: Voices) -> None:
    references = {
        name: Voices(engine, _alone(who)[: 8 * RATE]).vectors
        for name, who in (("Ann", "speaker90"), ("Bob", "speaker91"))
    }
    known = [{"name": name, "vectors": base64.b64encode(data).decode()} for name, data in references.items()]
    names = {"speaker90": "Ann", "speaker91": "Bob"}
    said = [(start, end, names[who]) for start, end, who in _reference()]

    turns, speakers = heard.turns(engine, known=known)
    assert set(speakers) == {"Ann", "Bob"}
    # By their own names: no other mapping counts.
    overlap = {
        name: sum(
            max(0, min(end, high) - max(start, low))
            for start, end, who in turns
            for low, high, other in said
            if who == other == name
        )
        for name in references
    }
    assert min(overlap.values()) > 6

    assert set(heard.turns(engine, known=known[1:])[1]) == {"A", "Bob"}
    stranger = np.random.default_rng(1).normal(size=(5, 256)).astype("<f2").tobytes()
    unknown = [{"name": "Eve", "vectors": base64.b64encode(stranger).decode()}]
    assert heard.turns(engine, known=unknown)[1] == ["A", "B"]


@pytest.mark.parametrize(("who", "other"), [("speaker90", "speaker91"), ("speaker91", "speaker90")])
def test_somebody_who_does_not_speak_is_not_named(who: str, other: str, engine: Engine) -> None:
    clip = base64.b64encode(Voices(engine, _alone(other)[: 5 * RATE]).vectors).decode()
    assert Voices(engine, _alone(who)).turns(engine, known=[{"name": "Ann", "vectors": clip}])[1] == ["A"]


def test_a_stretch_without_a_silence_ends_where_it_ends(engine: Engine) -> None:
    breathless = _pcm()[int(24.2 * RATE) : int(25.4 * RATE)]
    assert Voices(engine, breathless, last=False).consumed == len(breathless)


def test_a_stretch_ends_in_silence_and_the_next_goes_on_there(engine: Engine, heard: Voices) -> None:
    first = Voices(engine, _pcm()[: 23 * RATE], last=False)
    assert 11 * RATE < first.consumed < 23 * RATE
    assert max(end for _, end in first.regions) <= first.consumed / RATE
    second = Voices(engine, _pcm()[first.consumed :])
    later = first.consumed / RATE
    first.regions += [[start + later, end + later] for start, end in second.regions]
    first.windows += [[start + later, end + later] for start, end in second.windows]
    first.vectors += second.vectors
    assert der(_reference(), first.turns(engine, speakers=2)[0]).rate <= 0.20


def test_silence_and_a_single_sample_have_no_voices(engine: Engine) -> None:
    for pcm in (np.zeros(3 * RATE, np.int16), np.zeros(1, np.int16)):
        nothing = Voices(engine, pcm, last=False)
        assert (nothing.consumed > 0, nothing.regions, nothing.windows) == (True, [], [])
        assert nothing.turns(engine, speakers=2) == ([], [])


def _many(heard: Voices, times: int) -> tuple[dict[str, Any], bytes, list[Turn]]:
    """The call again and again, a little different each time."""
    vectors = np.frombuffer(heard.vectors, "<f2").reshape(-1, 256).astype(np.float32)
    chance = np.random.default_rng(0)
    parts = [(vectors + chance.normal(size=vectors.shape) * 0.004).astype("<f2").tobytes() for _ in range(times)]
    spans = {
        name: [[start + 30 * number, end + 30 * number] for number in range(times) for start, end in found]
        for name, found in (("regions", heard.regions), ("windows", heard.windows))
    }
    reference = [
        (start + 30 * number, end + 30 * number, who) for number in range(times) for start, end, who in _reference()
    ]
    return {**spans, "dimensions": 256}, b"".join(parts), reference


def test_six_hours_take_little_memory_and_time(engine: Engine, heard: Voices) -> None:
    header, vectors, reference = _many(heard, 720)
    forget_peak(engine.pid)
    before = peak(engine.pid)
    begun = time.monotonic()
    status, records = engine.records(SPEAKERS, header, vectors)
    seconds = time.monotonic() - begun
    assert status == 200
    assert records[0]["speakers"] == ["A", "B"]
    assert peak(engine.pid) - before < 400 * 2**20
    assert peak(engine.pid) < 700 * 2**20
    assert seconds < 60
    turns = [(each["start"], each["end"], each["speaker"]) for each in records[0]["turns"] if each["start"] < 600]
    assert der([turn for turn in reference if turn[0] < 600], turns).rate <= 0.20


def test_an_hour_in_stretches_is_as_good_as_its_parts(engine: Engine, prove: bool) -> None:
    times = 120 if prove else 4
    pcm, at, whole = np.tile(_pcm(), times), 0, None
    while at < len(pcm):
        last = at + 70 * RATE >= len(pcm)
        part = Voices(engine, pcm[at : at + 70 * RATE], last=last)
        for spans in (part.regions, part.windows):
            spans[:] = [[start + at / RATE, end + at / RATE] for start, end in spans]
        at += part.consumed
        if whole is None:
            whole = part
            continue
        whole.regions += part.regions
        whole.windows += part.windows
        whole.vectors += part.vectors
    assert whole is not None
    turns, speakers = whole.turns(engine)
    reference = [(start + 30 * n, end + 30 * n, who) for n in range(times) for start, end, who in _reference()]
    assert speakers == ["A", "B"]
    assert der(reference, turns).rate <= 0.20


def _leave(engine: Engine, path: str, body: bytes) -> float:
    """Send a request, go away once it is worked on, and see how long it takes until the engine has let go."""
    before = engine.log.count("event=cancelled")
    with socket.create_connection(engine.address, timeout=60) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: e\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        eventually(lambda: engine.busy() == 1, 10)
        connection.shutdown(socket.SHUT_WR)
        begun = time.monotonic()
        while connection.recv(65536):
            pass
        seconds = time.monotonic() - begun
    assert engine.busy() == 0
    assert engine.log.count("event=cancelled") == before + 1
    return seconds


def test_whoever_leaves_stops_the_work(engine: Engine, heard: Voices) -> None:
    """The best of three, as a busy machine may hold one up."""
    sound = json.dumps({"last": True}).encode() + b"\n" + np.tile(_pcm(), 20).tobytes()
    assert any(_leave(engine, VOICES, sound) < 2 for _ in range(3))
    header, vectors, _ = _many(heard, 720)
    order = json.dumps(header).encode() + b"\n" + vectors
    assert any(_leave(engine, SPEAKERS, order) < 2 for _ in range(3))
    assert heard.turns(engine, speakers=2)[1] == ["A", "B"]


def test_a_shortage_of_memory_makes_smaller_batches(heard: Voices) -> None:
    with _engine(rehearse_windows_max=5) as engine:
        found = np.frombuffer(Voices(engine, _pcm()).vectors, "<f2").astype(np.float32)
        assert found == pytest.approx(np.frombuffer(heard.vectors, "<f2").astype(np.float32), abs=2e-3)
        assert "event=batch_halved windows=4" in engine.log


def test_regions_that_meet_but_for_rounding_are_one_turn(engine: Engine) -> None:
    header = {"regions": [[0, 1.001], [1.0005, 2]], "windows": [[0, 1.6], [0.4, 2]], "dimensions": 256}
    status, records = engine.records(SPEAKERS, header, VECTORS)
    assert (status, records[0]["turns"]) == (200, [{"start": 0.0, "end": 2.0, "speaker": "A"}])


GOOD_ORDER = {"regions": [[0, 2]], "windows": [[0, 1.6], [0.4, 2]], "dimensions": 256}
VECTORS = np.ones((2, 256), "<f2").tobytes()
KNOWN = {"name": "Ann", "vectors": base64.b64encode(VECTORS).decode()}
BAD_ORDERS: dict[str, tuple[Any, bytes]] = {
    "no JSON": (b"{", VECTORS),
    "deep JSON": (b"[" * 100_000, VECTORS),
    "a list": ([], VECTORS),
    "other dimensions": ({**GOOD_ORDER, "dimensions": 128}, VECTORS),
    "a vector too few": (GOOD_ORDER, VECTORS[:512]),
    "half a vector": (GOOD_ORDER, VECTORS[:-7]),
    "not a number": (GOOD_ORDER, np.full((2, 256), np.nan, "<f2").tobytes()),
    "infinite": (GOOD_ORDER, np.full((2, 256), np.inf, "<f2").tobytes()),
    "huge": (GOOD_ORDER, np.full((2, 256), 60_000, "<f2").tobytes()),
    "no windows": ({"regions": [], "dimensions": 256}, VECTORS),
    "windows of text": ({**GOOD_ORDER, "windows": [["a", "b"], ["c", "d"]]}, VECTORS),
    "windows of three": ({**GOOD_ORDER, "windows": [[0, 1, 2], [0, 1, 2]]}, VECTORS),
    "windows of no length": ({**GOOD_ORDER, "windows": [[0, 0], [1, 2]]}, VECTORS),
    "windows without end": (json.dumps({**GOOD_ORDER, "windows": [[0, float("inf")], [1, 2]]}).encode(), VECTORS),
    "regions without order": ({**GOOD_ORDER, "regions": [[5, 6], [1, 2]]}, VECTORS),
    "regions that overlap": ({**GOOD_ORDER, "regions": [[1, 3], [2, 4]]}, VECTORS),
    "regions of years": ({**GOOD_ORDER, "regions": [[0, 1e12]]}, VECTORS),
    "no speakers": ({**GOOD_ORDER, "speakers": 0}, VECTORS),
    "too many speakers": ({**GOOD_ORDER, "speakers": 101}, VECTORS),
    "true speakers": ({**GOOD_ORDER, "speakers": True}, VECTORS),
    "more than most": ({**GOOD_ORDER, "speakers_min": 3, "speakers_max": 2}, VECTORS),
    "known is no list": ({**GOOD_ORDER, "known": {}}, VECTORS),
    "too many known": ({**GOOD_ORDER, "known": [KNOWN] * 33}, VECTORS),
    "known twice": ({**GOOD_ORDER, "known": [KNOWN, KNOWN]}, VECTORS),
    "known without a name": ({**GOOD_ORDER, "known": [{**KNOWN, "name": ""}]}, VECTORS),
    "known without vectors": ({**GOOD_ORDER, "known": [{**KNOWN, "vectors": ""}]}, VECTORS),
    "known in no base64": ({**GOOD_ORDER, "known": [{**KNOWN, "vectors": "???"}]}, VECTORS),
}


@pytest.mark.parametrize("why", BAD_ORDERS)
def test_what_cannot_be_computed_is_refused(why: str, engine: Engine) -> None:
    status, (answer,) = engine.records(SPEAKERS, *BAD_ORDERS[why])
    assert status == 400 or (status == 200 and "error" in answer), answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"].endswith(".")
    assert engine.busy() == 0


def test_sound_that_is_none_is_refused(engine: Engine) -> None:
    assert engine.records(VOICES, {"last": True}, b"")[0] == 400
    assert engine.records(VOICES, {"last": True}, b"123")[0] == 400
    assert engine.records(VOICES, {"last": 1}, b"1234")[0] == 400
    assert engine.records(VOICES, b"no line", b"")[0] == 400
    assert engine.records(VOICES, {}, bytes(661 * RATE * 2))[0] == 413


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model_path": "/nowhere/at/all.pt"}, "its weights cannot be opened"),
        ({"slots": 0}, "at least 1 slot"),
        ({"step_seconds": 2.0}, "steps of 0.05 s to the length of a window"),
    ],
)
def test_what_it_cannot_start_with_is_said(more: dict[str, Any], said: str) -> None:
    _refuses_to_start({"model_path": str(ge2e()), **more}, said)


def test_weights_of_something_else_are_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(checkpoint(GOOD, {"s": NUMBERS}))
    _refuses_to_start({"model_path": str(path)}, "no tensors by the name model_state")


def _refuses_to_start(spec: dict[str, Any], said: str) -> None:
    engine = Engine("speakers", {"name": "s", **spec})
    assert engine.guard.wait(30) == 78
    assert said in engine.log
    assert str(spec["model_path"]) not in engine.log
    engine.end()


def test_figures_and_slots_are_shown(engine: Engine, heard: Voices) -> None:
    figures = dict(line.split() for line in engine.metrics().splitlines())
    assert float(figures["forebay_engine_items_total"]) >= len(heard.windows)
    assert float(figures["forebay_engine_audio_seconds_total"]) >= 30
    assert figures["forebay_engine_requests_running"] == "0"
    assert [each["is_processing"] for each in engine.get("/slots")[1]] == [False] * 4
