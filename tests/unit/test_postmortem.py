"""Why an engine ended, and which inputs are refused because of it."""

import pytest

from forebay.inference import Capability, Request
from forebay.replicas.postmortem import Cause, Death, Quarantine, classify
from tests.support.clock import FakeClock


def request(body: bytes = b"{}", project: str = "p", identity: str = "r") -> Request:
    return Request(identity, project, "model", Capability.CHAT, "/v1/chat/completions", body)


@pytest.mark.parametrize(
    ("exit_code", "lines", "oom_kills", "cause"),
    [
        (78, (), 0, Cause.WRONG_SETUP),
        (86, (), 0, Cause.OUT_OF_MEMORY),
        (1, ("CUDA error: out of memory",), 0, Cause.OUT_OF_MEMORY),
        (-6, ("terminate called after throwing an instance of 'std::bad_alloc'",), 0, Cause.OUT_OF_MEMORY),
        (-9, (), 1, Cause.OUT_OF_MEMORY),
        (-9, (), 0, Cause.CRASH),
        (-11, ("Segmentation fault",), 3, Cause.CRASH),
        (0, (), 0, Cause.CRASH),
    ],
)
def test_causes_are_told_apart(exit_code: int, lines: tuple[str, ...], oom_kills: int, cause: Cause) -> None:
    assert classify(exit_code, lines, oom_kills) is cause


def test_an_engine_that_prints_what_callers_write_is_not_taken_at_its_word() -> None:
    lines = ("prompt: out of memory",)
    assert classify(-11, lines, 0) is Cause.OUT_OF_MEMORY
    assert classify(-11, lines, 0, log_is_clean=False) is Cause.CRASH
    assert classify(86, lines, 0, log_is_clean=False) is Cause.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("cause", "status", "code"),
    [
        (Cause.CRASH, 502, "engine_crashed"),
        (Cause.OUT_OF_MEMORY, 502, "out_of_memory"),
        (Cause.STALL, 504, "request_timeout"),
        (Cause.REFUSED_TO_STOP, 502, "engine_crashed"),
    ],
)
def test_what_the_caller_is_told_says_nothing_of_the_inside(cause: Cause, status: int, code: str) -> None:
    error = Death(cause, -9, ("/secret/path failed",)).as_error()
    assert (error.status, error.code) == (status, code)
    assert "secret" not in str(error)


def test_the_second_death_refuses_the_input_for_a_while() -> None:
    clock = FakeClock()
    quarantine = Quarantine(600, 10, clock)
    assert not quarantine.record(request())
    assert not quarantine.holds(request())
    assert quarantine.record(request(identity="another request, the same input"))
    assert quarantine.holds(request(identity="a third"))
    assert not quarantine.holds(request(b'{"other":1}'))
    assert not quarantine.holds(request(project="q")), "one tenant's poison is not another's"
    clock.advance(601)
    assert not quarantine.holds(request())


def test_deaths_far_apart_do_not_add_up() -> None:
    clock = FakeClock()
    quarantine = Quarantine(600, 10, clock)
    quarantine.record(request())
    clock.advance(601)
    assert not quarantine.record(request())


def test_the_memory_of_suspects_is_bounded() -> None:
    quarantine = Quarantine(600, 3, FakeClock())
    for number in range(10):
        quarantine.record(request(b"%d" % number))
    assert not quarantine.record(request(b"0")), "the oldest suspect was forgotten"
    assert quarantine.record(request(b"9"))
