"""Every directive of the fake engine does what it says, or the tests that rely on it would prove nothing."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import psutil
import pytest

from tests.support.engines import KEY, Engine, chat, eventually

Start = Callable[..., Engine]


def _text(events: list[Any]) -> str:
    return "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"])


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """One for all directives that leave it alive."""
    engine = Engine("fake", {"name": "fake", "slots": 4})
    engine.wait_until_ready()
    yield engine
    engine.end()


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def start(**spec: Any) -> Engine:
            engine = Engine("fake", {"name": "fake", **spec})
            stack.callback(engine.end)
            return engine

        yield start


def _stats(engine: Engine) -> dict[str, int]:
    stats: dict[str, int] = engine.get("/fake/stats")[1]
    return stats


def test_tokens_are_counted_and_numbered(engine: Engine) -> None:
    events = engine.answer(chat("hello [[fake tokens=3]]"))
    assert _text(events) == "tok0 tok1 tok2 "
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    counts = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert events[-1]["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}


def test_sixteen_tokens_without_a_directive(engine: Engine) -> None:
    assert len(_text(engine.answer(chat("hello"))).split()) == 16


def test_what_cannot_be_read_is_ignored(engine: Engine) -> None:
    assert _text(engine.answer(chat("[[fake tokens=many color=red = tokens]]"))) == _text(engine.answer(chat("x")))


def test_max_tokens_cuts(engine: Engine) -> None:
    events = engine.answer(chat("[[fake tokens=9]]", max_tokens=2))
    assert _text(events) == "tok0 tok1 "
    assert events[-2]["choices"][0]["finish_reason"] == "length"


def test_only_the_last_user_message_directs(engine: Engine) -> None:
    said = [("user", "[[fake tokens=9]]"), ("user", "[[fake tokens=2]]"), ("assistant", "[[fake tokens=5]]")]
    body = chat("") | {"messages": [{"role": role, "content": text} for role, text in said]}
    assert _text(engine.answer(body)) == "tok0 tok1 "


def test_text_parts_are_read(engine: Engine) -> None:
    body = chat("") | {"messages": [{"role": "user", "content": [{"type": "text", "text": "[[fake tokens=1]]"}]}]}
    assert _text(engine.answer(body)) == "tok0 "


def test_echo_gives_the_prompt_back(engine: Engine) -> None:
    assert _text(engine.answer(chat("to be or 日本 not [[fake echo=1]]"))) == "to be or 日本 not "


def test_two_runs_give_the_same_bytes_but_for_the_time(start: Start) -> None:
    def run() -> list[Any]:
        engine = start()
        engine.wait_until_ready()
        return [{**event, "created": 0} for event in engine.answer(chat("same [[fake tokens=5]]"))]

    assert run() == run()


def test_a_tool_is_called(engine: Engine) -> None:
    events = engine.answer(chat("[[fake tool=get_weather]]"))
    calls = [call for e in events if e["choices"] for call in e["choices"][0]["delta"].get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "get_weather"
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {}
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_choices_take_a_slot_each(engine: Engine) -> None:
    with closing(engine.open(chat("[[fake tokens=2 hang_at=1]]", n=3))) as stream:
        stream.read_until(b"tok0")
        assert engine.busy() == 3
    assert engine.ask("POST", "/v1/chat/completions", chat("", n=5))[0] == 400
    eventually(lambda: engine.busy() == 0, 10)


def test_one_body_when_no_stream_is_asked_for(engine: Engine) -> None:
    status, answer = engine.ask("POST", "/v1/chat/completions", chat("[[fake tokens=2]]", stream=False))
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == "tok0 tok1 "
    body = {"prompt": ["a [[fake tokens=1]]", "b [[fake tokens=1]]"]}
    assert [c["text"] for c in engine.ask("POST", "/v1/completions", body)[1]["choices"]] == ["tok0 ", "tok0 "]


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_a_status_is_answered(engine: Engine, status: int) -> None:
    answered, body = engine.ask("POST", "/v1/chat/completions", chat(f"[[fake status={status}]]"))
    assert answered == status
    assert set(body["error"]) == {"code", "message", "type"}


def test_a_context_error_is_answered(engine: Engine) -> None:
    status, body = engine.ask("POST", "/v1/chat/completions", chat("[[fake context_error=1]]"))
    assert status == 400
    assert body["error"]["type"] == "exceed_context_size_error"


@pytest.mark.parametrize(
    ("directive", "least"), [("delay_ms=200 tokens=1", 0.2), ("token_ms=40 tokens=6", 0.2), ("rate=50 tokens=10", 0.18)]
)
def test_it_takes_the_time_that_it_is_told(engine: Engine, directive: str, least: float) -> None:
    began = time.monotonic()
    engine.answer(chat(f"[[fake {directive}]]"))
    assert least <= time.monotonic() - began < least + 3


def test_a_cancelled_request_computes_no_further(engine: Engine) -> None:
    before = _stats(engine)
    with closing(engine.open(chat("[[fake tokens=100000]]"))) as stream:
        stream.read_until(b"tok1 ")
        stream.half_close()
        assert b"[DONE]" not in stream.read_to_end()
    after = _stats(engine)
    assert after["cancelled"] == before["cancelled"] + 1
    assert after["running"] == 0
    assert after["tokens"] - before["tokens"] < 100_000


def test_a_reader_that_does_not_read_slows_the_work_and_can_still_leave(engine: Engine) -> None:
    before = _stats(engine)["tokens"]
    stream = engine.open(chat("[[fake tokens=1000000]]"))
    eventually(lambda: _stats(engine)["tokens"] > before, 5)
    stream.close()
    eventually(lambda: engine.busy() == 0, 10)
    assert _stats(engine)["tokens"] - before < 500_000


def test_a_hanging_request_leaves_the_rest_alive_and_can_be_cancelled(engine: Engine) -> None:
    with closing(engine.open(chat("[[fake hang_at=2]]"))) as stream:
        stream.read_until(b"tok1 ")
        assert engine.busy() == 1
        assert _text(engine.answer(chat("[[fake tokens=1]]"))) == "tok0 "
        stream.half_close()
        assert b"tok2" not in stream.read_to_end()
    assert engine.busy() == 0


def test_refusing_to_stop_computes_to_the_end(engine: Engine) -> None:
    before = _stats(engine)
    with closing(engine.open(chat("[[fake tokens=10 token_ms=200 refuse_stop=1]]"))) as stream:
        stream.read_until(b"tok0 ")
        stream.half_close()
        assert engine.busy() == 1
        assert b"tok9 " in stream.read_to_end()
    after = _stats(engine)
    assert (after["finished"], after["cancelled"]) == (before["finished"] + 1, before["cancelled"])


def test_garbage_is_written(engine: Engine) -> None:
    with closing(engine.open(chat("[[fake garbage_at=1]]"))) as stream:
        assert b"\x00\xff\xfe<garbage>" in stream.read_until(b"garbage")


def test_a_truncated_stream_just_ends(engine: Engine) -> None:
    with closing(engine.open(chat("[[fake truncate_at=2]]"))) as stream:
        got = stream.read_to_end()
    assert b"tok1 " in got
    assert b"[DONE]" not in got
    assert not got.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("how", "code"), [("segv", -signal.SIGSEGV), ("kill", -signal.SIGKILL), ("exit", 1), ("unknown", -signal.SIGKILL)]
)
def test_a_crash_comes_after_the_tokens_before_it(start: Start, how: str, code: int) -> None:
    engine = start()
    engine.wait_until_ready()
    with closing(engine.open(chat(f"[[fake crash_at=3 crash={how}]]"))) as stream:
        got = stream.read_to_end()
    assert b"tok2 " in got
    assert b"tok3 " not in got
    assert engine.guard.wait(30) == code


def test_running_out_of_memory_exits_86_with_a_line(start: Start) -> None:
    engine = start()
    engine.wait_until_ready()
    with closing(engine.open(chat("[[fake oom_at=0]]"))) as stream:
        assert stream.read_to_end() == b""
    assert engine.guard.wait(30) == 86
    assert "out of memory" in engine.log.splitlines()[-1]


def test_more_at_once_than_memory_holds_exits_86(start: Start) -> None:
    engine = start(slots=3, memory_slots_max=1)
    engine.wait_until_ready()
    engine.answer(chat("one at a time"))
    with closing(engine.open(chat("[[fake hang_at=1]]"))) as first:
        first.read_until(b"tok0 ")
        engine.open(chat("second")).close()
        assert engine.guard.wait(30) == 86


def test_a_frozen_engine_answers_nothing(start: Start) -> None:
    engine = start()
    engine.wait_until_ready()
    with closing(engine.open(chat("[[fake freeze_at=1]]"))) as stream:
        stream.read_until(b"tok0 ")
        eventually(lambda: psutil.Process(engine.pid).status() == psutil.STATUS_STOPPED, 10)
        with closing(socket.create_connection(engine.address, timeout=0.2)) as probe:
            probe.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            with pytest.raises(TimeoutError):
                probe.recv(1)
        os.kill(engine.pid, signal.SIGCONT)
        stream.read_until(b"[DONE]")


@pytest.mark.parametrize(("how", "code"), [("exit", 1), ("oom", 86), ("refuse", 78)])
def test_a_start_fails_as_asked(start: Start, how: str, code: int) -> None:
    assert start(fail_start=how).guard.wait(30) == code


def test_a_slow_start_is_not_ready_at_first(start: Start) -> None:
    slow, quick = start(start_delay_seconds=60), start(start_delay_seconds=0.4)
    slow.wait_until_listening()
    assert slow.get("/health")[0] == 503
    assert slow.ask("POST", "/v1/chat/completions", chat("x"))[0] == 503
    quick.wait_until_ready()
    assert slow.get("/health")[0] == 503


def test_never_ready_stays_so(start: Start) -> None:
    engine = start(fail_start="never_ready")
    engine.wait_until_listening()
    assert [engine.get("/health")[0] for _ in range(5)] == [503] * 5


def test_tools_are_shown_in_the_props(start: Start) -> None:
    engine = start(tools=True)
    engine.wait_until_ready()
    assert engine.get("/props")[1]["chat_template_caps"]["supports_tools"] is True


def test_more_requests_than_slots_wait_in_line_and_leave_it(start: Start) -> None:
    engine = start(slots=1)
    engine.wait_until_ready()
    with ExitStack() as stack:
        first, second, third = (stack.enter_context(closing(engine.open(chat("[[fake hang_at=1]]")))) for _ in range(3))
        first.read_until(b"tok0 ")
        second.half_close()
        assert second.read_to_end() == b"", "it has never begun"
        assert _stats(engine)["started"] == 1
        first.half_close()
        third.read_until(b"tok0 ")
        assert _stats(engine) == {"started": 2, "finished": 0, "cancelled": 1, "running": 1, "tokens": 2}


def test_the_log_names_the_request(engine: Engine) -> None:
    engine.answer(chat("hello"))
    assert "event=started request_id=req_test" in engine.log
    assert "event=finished request_id=req_test" in engine.log


def test_a_connection_serves_many_requests(engine: Engine) -> None:
    request = f"GET /slots HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
    with closing(socket.create_connection(engine.address, timeout=5)) as connection:
        for parts in (request, request + request, request[:20]):
            connection.sendall(parts)
        connection.sendall(request[20:])
        got = b""
        while got.count(b"is_processing") < 4 * 4:
            got += connection.recv(65536)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nContent-Length: 9999999999999999\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000, 431),
    ],
)
def test_what_is_not_http_is_refused_and_closed(engine: Engine, sent: bytes, status: int) -> None:
    with closing(socket.create_connection(engine.address, timeout=5)) as connection:
        connection.sendall(sent)
        assert connection.recv(65536).startswith(b"HTTP/1.1 %d " % status)
        assert connection.recv(1) == b""
