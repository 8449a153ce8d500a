"""Answers of one JSON object on each line: each record is handed on, and only a whole answer counts."""

from typing import Any

import pytest

from forebay.dialects.speech import RecordGatherer, part_body
from forebay.errors import EngineCrashed, EngineGarbled
from forebay.speech import Segment, segment_from_wire


def _gather(*pieces: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    gatherer = RecordGatherer(found.append)
    for piece in pieces:
        gatherer.feed(piece)
    assert gatherer.body() == b""
    return found


def test_records_are_handed_on_however_they_are_cut() -> None:
    data = b'{"type":"segment","n":1}\n\n{"type":"done"}\n'
    whole = _gather(data)
    assert whole == [{"type": "segment", "n": 1}, {"type": "done"}]
    assert _gather(*(data[place : place + 1] for place in range(len(data)))) == whole


@pytest.mark.parametrize(
    "data",
    [b'{"type":"segment"}\n', b"not json\n", b"[1]\n", b'{"type":"done"}\n{"type":"segment"}\n', b'{"type":"done"}'],
    ids=["no end", "no JSON", "no object", "after the end", "cut"],
)
def test_anything_else_is_garbled(data: bytes) -> None:
    with pytest.raises(EngineGarbled):
        _gather(data)


def test_a_record_that_its_reader_cannot_use_is_garbled() -> None:
    def take(record: dict[str, Any]) -> None:
        float(record["missing"])

    with pytest.raises(EngineGarbled):
        RecordGatherer(take).feed(b'{"type":"segment"}\n')


def test_a_time_that_is_no_number_is_garbled() -> None:
    found: list[Segment] = []
    line = b'{"type":"segment","start":0.0,"end":NaN,"text":"x","words":[]}\n'
    with pytest.raises(EngineGarbled):
        RecordGatherer(lambda record: found.append(segment_from_wire(record))).feed(line)
    assert not found


def test_a_line_without_an_end_is_garbled() -> None:
    gatherer = RecordGatherer(lambda _: None)
    with pytest.raises(EngineGarbled):
        for _ in range(10):
            gatherer.feed(b"x" * 2**20)


def test_an_error_record_is_raised_as_what_it_means() -> None:
    line = b'{"error":{"message":"No memory.","type":"server_error","code":"out_of_memory"}}\n'
    with pytest.raises(EngineCrashed) as raised:
        RecordGatherer(lambda _: None).feed(b'{"type":"segment"}\n' + line)
    assert raised.value.code == "out_of_memory"


def test_a_body_is_a_line_of_json_and_the_samples() -> None:
    head, _, samples = part_body({"last": True}, b"\x00\n\x01").partition(b"\n")
    assert (head, samples) == (b'{"last":true}', b"\x00\n\x01")
