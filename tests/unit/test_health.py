"""The gate: it closes when memory is short or a GPU is hot, and opens a good bit later."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from forebay.replicas.gauge import Reading
from forebay.replicas.health import Gate
from forebay.replicas.nvml import Gpu
from forebay.server_config import MemorySettings

SETTINGS = MemorySettings(
    available_min_share=0.05, available_resume_share=0.08, gpu_celsius_max=90, gpu_celsius_resume=83
)


def reading(available: int = 500, celsius: float | None = None) -> Reading:
    """Of a machine with 1,000 bytes, a GPU that is cool and one as hot as is said."""
    gpus = tuple(Gpu(f"gpu{n}", 1, 0, {}, None, degrees) for n, degrees in enumerate((40.0, celsius)))
    return Reading(1000, available, 0.0, None, gpus, {}, {})


def test_it_is_open_before_anything_was_read() -> None:
    assert Gate(SETTINGS).open


def test_little_memory_closes_it_and_more_opens_it() -> None:
    gate = Gate(SETTINGS)
    told = [(gate.update(reading(available)), gate.open) for available in (50, 49, 79, 50, 49, 80, 50)]
    assert told == [
        (False, True),
        (True, False),
        (False, False),
        (False, False),
        (False, False),
        (True, True),
        (False, True),
    ]


def test_a_hot_gpu_closes_it_and_a_cooler_one_opens_it() -> None:
    gate = Gate(SETTINGS)
    told = [
        gate.open for degrees in (90.0, 91.0, 84.0, 90.0, 83.0, 90.0) if gate.update(reading(celsius=degrees)) or True
    ]
    assert told == [True, False, False, False, True, True]


def test_it_stays_closed_while_either_is_wrong() -> None:
    gate = Gate(SETTINGS)
    gate.update(reading(10, 95.0))
    assert "1.0% of its memory" in gate.reason
    assert not gate.update(reading(500, 95.0))
    assert gate.reason == "A GPU is at 95 degrees Celsius; the machine loads again at 83."
    assert gate.update(reading(500, 60.0))
    assert gate.reason == ""


def test_a_gpu_that_tells_no_temperature_is_not_hot() -> None:
    gate = Gate(SETTINGS)
    assert not gate.update(reading())
    assert gate.open


@given(st.lists(st.integers(0, 200), max_size=50))
def test_between_two_turns_there_is_always_the_whole_gap(values: list[int]) -> None:
    gate = Gate(SETTINGS)
    for value in values:
        turned = gate.update(reading(value))
        if turned:
            assert value < 50 if not gate.open else value >= 80
        assert gate.open or value < 80
        assert not gate.open or value >= 50


@pytest.mark.parametrize(
    "wrong", [{"available_min_share": 0.2, "available_resume_share": 0.1}, {"gpu_celsius_resume": 95}]
)
def test_thresholds_the_wrong_way_round_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="is at"):
        MemorySettings(**wrong)  # type: ignore[arg-type]


def test_it_says_how_much_is_lacking_until_it_opens() -> None:
    gate = Gate(SETTINGS)
    told = []
    for available in (50, 40, 70, 80):
        gate.update(reading(available))
        told.append(gate.lacking_bytes)
    assert told == [0, 40, 10, 0]
