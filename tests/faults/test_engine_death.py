"""Engines that die, hang, talk rubbish or do not stop, while others work."""

import asyncio
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

import openai
import psutil
import pytest

from tests.support.answers import Answer, ask, first_bytes, read
from tests.support.measuring import within
from tests.support.models import smollm2_path
from tests.support.processes import lives
from tests.support.server import Server, chat_body, eventually, serving

DEBUG = {"FOREBAY_LOG_LEVEL": "debug", "FOREBAY_LOG_FORMAT": "json"}
STALL_SECONDS = 2
CONFIG = f"""
default_models = false
[supervisor]
backoff_seconds_min = 0.05
backoff_seconds_max = 0.1
stall_seconds = {STALL_SECONDS}
cancel_grace_seconds = 0.5
oom_cooldown_seconds = 3
[models.fake]
engine = "fake"
preload = true
slots = 4
[models.other]
engine = "fake"
preload = true
"""
LONG = "[[fake tokens=3000 token_ms=10]]"


async def begin(server: Server, text: str, **fields: Any) -> tuple[asyncio.Task[Answer], str]:
    """Start a stream and read its first event; the rest is read by the task. Its request id comes along."""
    response = await server.send(chat_body(text, stream=True, **fields))
    await first_bytes(response)
    return asyncio.create_task(read(response)), response.headers["x-request-id"]


async def test_kill_9_of_an_engine_mid_stream(prove: bool) -> None:
    back = list[float]()
    async with serving(CONFIG, environment=DEBUG) as server:

        async def told(_number: int) -> float:
            number = len(back)
            beside = asyncio.create_task(ask(server, f"{number} [[fake tokens=60 token_ms=10]]", model="other"))
            streams = [(await begin(server, f"{number}.{which} {LONG}"))[0] for which in range(3)]
            killed_at = monotonic()
            os.kill(server.engine_pid(), signal.SIGKILL)
            answers = await asyncio.gather(*streams)
            for answer in answers:
                assert (answer.code, answer.done) == ("engine_crashed", False), answer
                assert set(answer.error or {}) == {"message", "type", "param", "code"}
            assert (await ask(server, f"Next after {number}.")).whole
            back.append(monotonic() - killed_at)
            assert (await beside).whole
            assert (await beside).tokens == 60
            return max(answer.ended_at for answer in answers) - killed_at

        for _ in range(100 if prove else 15):
            await within(1, told)
        print(f"{len(back)} kills: the next answer came after {max(back):.3f} s at most")
        assert await server.metric("forebay_engine_deaths_total", model="fake", kind="crash") == len(back)
        assert await server.metric("forebay_engine_deaths_total", model="other") == 0
        died = server.named("engine.died")
        assert {event["exit_code"] for event in died} == {-signal.SIGKILL}
        assert len(died[0]["last_lines"]) > 0
        await server.until_load(0, 0)


async def test_the_official_client_raises_when_the_engine_dies_under_a_stream() -> None:
    async with serving(CONFIG, environment=DEBUG) as server:
        stream = await server.client().chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "[[fake crash_at=5 crash=segv token_ms=20]]"}],
            stream=True,
        )
        with pytest.raises(openai.APIError) as raised:
            async for _ in stream:
                pass
        assert raised.value.code == "engine_crashed"
        with pytest.raises(openai.InternalServerError) as whole:
            await server.client().chat.completions.create(
                model="fake", messages=[{"role": "user", "content": "[[fake crash_at=3 crash=exit]]"}]
            )
        assert (whole.value.status_code, whole.value.code) == (502, "engine_crashed")


async def test_a_stopped_engine_is_replaced_within_the_stall_limit() -> None:
    async with serving(CONFIG, environment=DEBUG) as server:

        async def told(number: int) -> float:
            engine = psutil.Process(server.engine_pid())
            stream, _ = await begin(server, f"{number} {LONG}")
            unanswered = asyncio.create_task(ask(server, f"{number} [[fake delay_ms=60000]]"))
            await server.until_load(2, 0)
            stopped_at = monotonic()
            engine.suspend()
            for answer in await asyncio.gather(stream, unanswered):
                assert answer.code == "request_timeout"
            seconds = monotonic() - stopped_at
            assert (await ask(server, "Next.")).whole
            back = monotonic() - stopped_at
            print(f"SIGSTOP: callers told after {seconds:.2f} s, next answer after {back:.2f} s")
            assert not lives(engine)
            assert await _deaths(server) == number + 1
            return seconds

        await within(STALL_SECONDS + 2, told)


async def test_after_the_whole_machine_was_held_up_nobody_is_to_blame() -> None:
    async with serving(CONFIG + f"[http]\nwrite_stall_seconds = {STALL_SECONDS}\n", environment=DEBUG) as server:
        engine = server.engine_pid()
        streams = [(await begin(server, "[[fake tokens=600 token_ms=10]]"))[0] for _ in range(3)]
        unread = await server.send(chat_body("[[fake tokens=600 token_ms=10]]", stream=True))
        await first_bytes(unread)
        held = [server.pid, *(process.pid for process in server.family())]
        for pid in held:
            os.kill(pid, signal.SIGSTOP)
        going_on_at = monotonic() + 2 * STALL_SECONDS

        async def held_up() -> bool:
            return monotonic() > going_on_at

        await eventually(held_up, what="a machine that has stood still for longer than any engine may")
        for pid in held:
            os.kill(pid, signal.SIGCONT)
        for answer in await asyncio.gather(*streams, read(unread)):
            assert answer.whole, answer
            assert answer.tokens == 600
        assert server.engine_pid() == engine
        assert await _deaths(server) == 0


async def test_whoever_waits_on_a_stopped_engine_that_is_condemned_is_told_of_the_stall() -> None:
    """One leaves, which a stopped engine does not confirm: that neither puts off nor renames what the other is told."""
    async with serving(CONFIG, environment=DEBUG) as server:

        async def told(number: int) -> float:
            engine = psutil.Process(server.engine_pid())
            response = await server.send(chat_body(f"{number} {LONG}", stream=True))
            await first_bytes(response)
            unanswered = asyncio.create_task(ask(server, f"{number} [[fake delay_ms=60000]]"))
            await server.until_load(2, 0)
            stopped_at = monotonic()
            engine.suspend()
            response.close()
            await eventually(lambda: len(server.named("engine.condemned")) > number, what="the engine to be condemned")
            assert (await unanswered).code == "request_timeout"
            seconds = monotonic() - stopped_at
            assert (await ask(server, "Next.")).whole
            assert await server.metric("forebay_engine_deaths_total", model="fake", kind="stall") == number + 1
            assert await _deaths(server) == number + 1
            return seconds

        await within(STALL_SECONDS + 2, told)


async def test_an_engine_that_freezes_itself_is_replaced() -> None:
    async with serving(CONFIG, environment=DEBUG) as server:

        async def longest_gap(number: int) -> float:
            beside = asyncio.create_task(ask(server, "[[fake tokens=300 token_ms=10]]", model="other"))
            answer = await ask(server, f"{number} [[fake freeze_at=5]]")
            assert answer.code == "request_timeout"
            assert (await ask(server, "Next.")).whole
            return (await beside).longest_gap_seconds

        await within(STALL_SECONDS, longest_gap)


async def test_nobody_is_sent_to_an_engine_whose_hung_stream_it_has_not_given_up() -> None:
    """Its stream hangs before the engine stands still, and so ends before the engine is known to hang."""
    config = CONFIG.replace(f"stall_seconds = {STALL_SECONDS}", f"stall_seconds = {2 * STALL_SECONDS}")
    async with serving(config, environment=DEBUG) as server:
        engine = psutil.Process(server.engine_pid())
        hung = asyncio.create_task(ask(server, "[[fake hang_at=5]]"))
        assert (await ask(server, "[[fake tokens=150 token_ms=10]]")).whole
        assert not hung.done()
        engine.suspend()
        assert (await hung).code == "request_timeout"
        following = await ask(server, "Next.")
        assert following.whole, following
        assert not lives(engine)
        assert await _deaths(server) == 1


async def test_one_stream_that_hangs_ends_and_its_engine_stays() -> None:
    async with serving(CONFIG, environment=DEBUG) as server:
        engine = server.engine_pid()

        async def ended(_number: int) -> float:
            began = monotonic()
            beside = asyncio.create_task(ask(server, "[[fake tokens=400 token_ms=10]]"))
            streamed, whole = await asyncio.gather(
                ask(server, "[[fake hang_at=5]]"), ask(server, "[[fake hang_at=3]] once", stream=False)
            )
            took = monotonic() - began
            assert (streamed.status, streamed.code) == (200, "request_timeout")
            assert (whole.status, whole.code) == (504, "request_timeout")
            print(f"hung streams ended after {took:.2f} s")
            assert (await beside).whole
            return took

        await within(STALL_SECONDS + 2, ended)
        assert server.engine_pid() == engine
        assert await _deaths(server) == 0
        await server.until_load(0, 0)


async def test_an_engine_that_does_not_stop_is_replaced_once_the_others_on_it_are_done() -> None:
    config = CONFIG.replace("slots = 4", "slots = 2")
    async with serving(config, environment=DEBUG) as server:
        engine = psutil.Process(server.engine_pid())
        response = await server.send(chat_body("[[fake refuse_stop=1 tokens=1000 token_ms=10]]", stream=True))
        await first_bytes(response)
        beside, _ = await begin(server, "[[fake tokens=400 token_ms=10]]")
        response.close()
        next_one = asyncio.create_task(ask(server, "Next."))
        await eventually(lambda: server.named("engine.condemned"), what="the engine to be condemned")
        assert lives(engine)
        assert await server.load() == (2, 1)
        other = await beside
        assert other.whole
        assert (await next_one).whole
        assert (await next_one).ended_at > other.ended_at
        assert not lives(engine)
        assert await server.metric("forebay_engine_deaths_total", model="fake", kind="refused_to_stop") == 1
        await server.until_load(0, 0)


async def test_a_model_may_take_longer_to_stop_than_others() -> None:
    config = CONFIG.replace("slots = 4", "slots = 1\ncancel_grace_seconds = 30")
    async with serving(config, environment=DEBUG) as server:
        engine = server.engine_pid()
        response = await server.send(chat_body("[[fake refuse_stop=1 tokens=120 token_ms=10]]", stream=True))
        await first_bytes(response)
        response.close()
        assert (await ask(server, "Next.")).whole
        assert server.engine_pid() == engine
        assert server.named("engine.condemned") == []
        assert await _deaths(server) == 0


async def test_rubbish_and_cut_answers_are_one_caller_s_trouble() -> None:
    async with serving(CONFIG, environment=DEBUG) as server:
        engine = server.engine_pid()
        beside = asyncio.create_task(ask(server, "[[fake tokens=100 token_ms=10]]"))
        for directive in ("garbage_at=0", "garbage_at=5", "truncate_at=0", "truncate_at=5"):
            streamed = await ask(server, f"[[fake {directive}]]")
            assert streamed.code == "engine_garbled", (directive, streamed)
            assert not streamed.done
            whole = await ask(server, f"[[fake {directive}]]", stream=False)
            assert (whole.status, whole.code) == (502, "engine_garbled"), (directive, whole)
        assert (await beside).whole
        assert server.engine_pid() == engine
        assert await _deaths(server) == 0
        await server.until_load(0, 0)


async def test_out_of_memory_halves_the_places_for_a_while() -> None:
    config = CONFIG.replace("oom_cooldown_seconds = 3", "oom_cooldown_seconds = 5")
    async with serving(config, environment=DEBUG) as server:
        answer = await ask(server, "[[fake oom_at=3]]")
        assert answer.code == "out_of_memory"
        assert (await ask(server, "Next.")).whole
        model = await server.model()
        assert (model["slots"], model["replicas"][0]["slots"]) == (2, 2)
        running = [asyncio.create_task(ask(server, f"{each} [[fake tokens=300 token_ms=10]]")) for each in range(2)]
        await server.until_load(2, 0)
        waiting = asyncio.create_task(ask(server, "Wait."))
        await server.until_load(2, 1)
        assert all(answer.whole for answer in await asyncio.gather(*running, waiting))
        await eventually(_slots(server, 4), within_seconds=20, what="four places again")
        assert await server.metric("forebay_engine_deaths_total", model="fake", kind="out_of_memory") == 1
        assert len(server.named("engine.slots_restored")) == 1
        assert (await ask(server, "At the end.")).whole


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the memory of a process that others start")
async def test_a_real_engine_that_finds_too_little_memory_comes_up_with_half_the_places_and_has_all_when_there_is_more() -> (
    None
):
    """Eight contexts of llama.cpp are 1.5 GB of memory, of which the operating system gives it only 1.2 GiB."""
    config = f"""
default_models = false
[supervisor]
backoff_seconds_min = 0.05
backoff_seconds_max = 0.1
oom_cooldown_seconds = 3
[models.real]
engine = "llama.cpp"
source = "file:{smollm2_path()}"
slots = 8
max_tokens = 16
options = {{ context = 8192, threads = 1 }}
"""
    async with serving(config, environment=DEBUG) as server:
        unlimited = resource.prlimit(server.pid, resource.RLIMIT_DATA)
        resource.prlimit(server.pid, resource.RLIMIT_DATA, (int(1.2 * 2**30), unlimited[1]))  # its engines inherit it
        assert (await ask(server, "What is a river?", model="real")).whole, "it has waited for the second start"
        assert await server.metric("forebay_engine_deaths_total", model="real", kind="out_of_memory") >= 1
        assert server.named("engine.slots_halved", model="real")[0]["slots"] == 4
        resource.prlimit(server.pid, resource.RLIMIT_DATA, unlimited)
        await eventually(_slots(server, 8, "real"), within_seconds=60, what="eight places again")
        assert (await ask(server, "What is a stone?", model="real")).whole


def _slots(server: Server, count: int, name: str = "fake") -> Callable[[], Awaitable[bool]]:
    async def reached() -> bool:
        return [replica["slots"] for replica in (await server.model(name))["replicas"]] == [count]

    return reached


async def test_kill_9_of_a_guard_takes_its_engine_along() -> None:
    async with serving(CONFIG, environment=DEBUG) as server:
        engine = psutil.Process(server.engine_pid())
        stream, _ = await begin(server, LONG)
        killed_at = monotonic()
        os.kill(server.guard_pid(), signal.SIGKILL)
        assert (await stream).code == "engine_crashed"
        await eventually(lambda: not lives(engine), what="the end of the engine")
        print(f"kill -9 of the guard: engine gone and caller told after {monotonic() - killed_at:.3f} s")
        assert (await ask(server, "Next.")).whole


async def _deaths(server: Server) -> float:
    kinds = ("crash", "stall", "out_of_memory", "refused_to_stop")
    return sum([await server.metric("forebay_engine_deaths_total", model="fake", kind=kind) for kind in kinds])
