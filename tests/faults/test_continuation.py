"""Lines that give their slot to online requests, on a real model: what they say in the end is what they say undisturbed.

One slot: each online request takes it from the line, and leaves its own prompt behind in it.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

import pytest

from forebay.clock import SystemClock, seeded
from forebay.config import Settings
from forebay.dialects.openai.call import Call, Context, parse
from forebay.dialects.openai.chat import ChatBody, chat_call
from forebay.dialects.openai.completions import CompletionBody, completion_call
from forebay.engine_options import LlamaCppOptions
from forebay.inference import Priority
from forebay.jobs.admission import Admission
from forebay.jobs.continuation import Continuation
from forebay.model_config import LlamaCppModel
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import traits_of
from forebay.replicas.connection import open_session
from forebay.replicas.postmortem import Quarantine
from forebay.replicas.replica import Replica, ReplicaState
from forebay.scheduler.gather import gather
from forebay.scheduler.hall import Limits
from forebay.scheduler.scheduler import Scheduler
from forebay.server_config import SchedulerSettings
from forebay.telemetry import Metrics
from tests.support.engine_room import EngineRoom
from tests.support.engines import KEY, Engine
from tests.support.models import smollm2_path
from tests.support.server import eventually

NAME = "chat"
CACHE_BYTES = 256 * 2**20
_LOOKS_MAX = 8
SCHEDULER = SchedulerSettings(headroom_seconds=0.05, batch_floor_seconds=3600)
SETTINGS = Settings(scheduler=SCHEDULER)
PROMPTS = [
    "Write a short story about a dog named Max.",
    "Write a poem with emojis 😀 🎉.",
    "Write python code for quicksort.",
    "Tell me about the moon.",
    "List ten fruits with prices.",
    "Count from 1 to 40.",
    "Explain photosynthesis.",
    "Write JSON with three users.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes in steps.",
    "Schreibe einen Brief auf Deutsch.",
    "写一个故事",
    "Make a markdown table of planets.",
    "Translate 'good morning' into five languages.",
]


@dataclass(slots=True)
class Line:
    """A line on its way through one slot, and those who take the slot from it."""

    continuation: Continuation
    scheduler: Scheduler
    metrics: Metrics
    engine: Engine
    chance: Random

    async def answer(self, call: Call, cuts: list[int] | None = None) -> dict[str, Any]:
        """What becomes of the line when somebody comes each time that it has written so many tokens since it last went on."""
        running = asyncio.create_task(self.continuation.run(call, on_read=lambda: None, on_opened=lambda: None))
        for tokens in cuts or []:
            await eventually(partial(self._has_written, running, tokens), what="so many tokens")
            if running.done():
                break
            await self.interrupt()
        gathered = await running
        body: dict[str, Any] = json.loads(gathered.body)
        used = gathered.usage
        assert used is not None
        assert used.completion_tokens == body["usage"]["completion_tokens"]
        assert used.prompt_tokens == body["usage"]["prompt_tokens"]
        return body

    async def is_interrupted(self, call: Call, tokens: int, alone: Any) -> None:
        """It is, and says the same; a machine that is busy may look too late at how much it has written, and looks again."""
        for _ in range(_LOOKS_MAX):
            assert said(await self.answer(call, [tokens])) == alone
            if self.counted("preemptions"):
                return
        raise AssertionError("it was never interrupted")

    def _has_written(self, running: "asyncio.Task[Any]", tokens: int) -> bool:
        """Since it last went on; or whether there is nothing more to come."""
        (slot,) = self.engine.get("/slots")[1]
        written = slot["next_token"][0]["n_decoded"] if slot["is_processing"] else 0
        return running.done() or written >= tokens

    async def interrupt(self) -> None:
        """An online request, as long as most are."""
        text = f"Say a long hello {self.chance.randrange(10**6)} to everybody who comes in through that green door."
        wanted = chat(text, max_tokens=24, priority=Priority.DEFAULT)
        async with self.scheduler.admit(wanted.request) as permit:
            await gather(permit, wanted, timeout_seconds=60, stall_seconds=60, clock=SystemClock())

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"forebay_{name}_total", {"model": NAME, **labels}) or 0.0


def chat(text: str, *, priority: Priority = Priority.BATCH, **more: Any) -> Call:
    body = {"model": NAME, "messages": [{"role": "user", "content": text}], "temperature": 0, **more}
    return with_priority(chat_call(parse(ChatBody, json.dumps(body).encode()), context()), priority)


def completion(text: str, **more: Any) -> Call:
    body = {"model": NAME, "prompt": text, "temperature": 0, **more}
    return with_priority(completion_call(parse(CompletionBody, json.dumps(body).encode()), context()), Priority.BATCH)


def context() -> Context:
    return Context("req_test", "default", None, max_tokens=512, slots=1, extensions="llama.cpp")


def with_priority(call: Call, priority: Priority) -> Call:
    return replace(call, request=replace(call.request, priority=priority))


@asynccontextmanager
async def standing(address: str) -> AsyncIterator[tuple[Continuation, Scheduler, Metrics]]:
    """The way of a line to an engine with one slot that is up at `address`."""
    model = LlamaCppModel(
        engine="llama.cpp", source=f"file:{smollm2_path()}", options=LlamaCppOptions(cache_ram_bytes=CACHE_BYTES)
    )
    session = open_session(reuses_connections=False)
    try:
        clock, metrics = SystemClock(), Metrics()
        replica = Replica("replica_1", NAME, 1, traits_of(model), session, Quarantine(1.0, 1, clock))
        replica.address = address
        replica.headers = {"Authorization": f"Bearer {KEY}"}
        replica.state = ReplicaState.READY
        scheduler = Scheduler(EngineRoom(replica), {NAME: Limits(1, 64, 60.0)}, SCHEDULER, 10.0, clock, metrics)
        settings = SETTINGS.model_copy(update={"models": {NAME: model}})
        admission = Admission(Catalog(settings), scheduler, settings, clock)
        yield Continuation(admission, settings, metrics), scheduler, metrics
    finally:
        await session.close()


@asynccontextmanager
async def line(seed: int, cache_bytes: int = CACHE_BYTES, template: str | None = None) -> AsyncIterator[Line]:
    spec = {"name": NAME, "model_path": str(smollm2_path()), "slots": 1, "context": 1024}
    engine = Engine("llama_cpp", spec | {"cache_ram_bytes": cache_bytes, "chat_template": template})
    try:
        await asyncio.to_thread(engine.wait_until_ready)
        async with standing("http://{}:{}".format(*engine.address)) as (continuation, scheduler, metrics):
            yield Line(continuation, scheduler, metrics, engine, seeded(seed))
    finally:
        engine.end()


def said(body: dict[str, Any]) -> Any:
    """All of an answer that is not by chance."""
    choice, usage = body["choices"][0], body["usage"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text, choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"], len(body["choices"])


@pytest.mark.timeout(1800)
async def test_a_line_that_is_interrupted_says_what_it_says_undisturbed(prove: bool) -> None:
    prompts, times, tokens = (PROMPTS, 8, 120) if prove else (PROMPTS[:2], 2, 64)
    calls = [chat(prompt, max_tokens=tokens) for prompt in prompts]
    calls += [
        chat(
            "Tell me a long story about the moon.", max_tokens=96, stop=["craters and", "of the sun", " the Earth, and"]
        ),
        completion("Once upon a time, in a village by the sea,", max_tokens=tokens, repeat_penalty=1.1),
    ]
    wrong: list[tuple[bytes, list[int], Any, Any]] = []
    async with line(7) as one:
        for call in calls:
            await one.interrupt()
            await one.answer(call)
            await one.interrupt()
            alone = said(await one.answer(call))  # with its prompt in the cache, as it is whenever it goes on
            for _ in range(times):
                cuts = [one.chance.randrange(20, 56) for _ in range(one.chance.choice((1, 1, 2)))]
                disturbed = said(await one.answer(call, cuts))
                if disturbed != alone:
                    wrong.append((call.request.body, cuts, alone, disturbed))
        preempted, kept = one.counted("preemptions"), one.counted("resumed_tokens")
        resumed, anew = one.counted("resumes", outcome="resumed"), one.counted("resumes", outcome="anew")
    print(f"{preempted:.0f} preemptions: {resumed:.0f} went on with {kept:.0f} tokens, {anew:.0f} began anew")
    assert wrong == []
    assert resumed >= preempted / 2 > 0
    assert kept >= 16 * resumed


@pytest.mark.timeout(300)
async def test_a_line_begins_anew_where_the_engine_has_forgotten_it() -> None:
    call = chat(PROMPTS[0], max_tokens=64)
    async with line(7, cache_bytes=0) as one:
        await one.interrupt()
        alone = said(await one.answer(call))
        await one.interrupt()
        await one.is_interrupted(call, 30, alone)
        assert one.counted("resumes", outcome="anew") == 1
        assert one.counted("resumed_tokens") == 0


@pytest.mark.timeout(300)
async def test_a_line_goes_on_after_the_thoughts_that_it_was_told_not_to_have() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    )
    call = chat(PROMPTS[0], max_tokens=64, reasoning_effort="none")
    async with line(7, template=template) as one:
        await one.answer(call)
        alone = said(await one.answer(call))
        await one.is_interrupted(call, 30, alone)
        assert one.counted("resumes", outcome="resumed") == 1


class Stubborn:
    """An engine over HTTP that writes 20 tokens and then waits, takes no begun answer, and ends the answer after that."""

    def __init__(self, refusal: int) -> None:
        self.asked: list[str] = []
        self._refusal = refusal

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"POST"):
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            await self._answer(json.loads(await reader.readexactly(length)), reader, writer)
        else:
            self._send(writer, 200, b"[]")
        await writer.drain()
        writer.close()

    async def _answer(self, body: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append(body["messages"][-1]["role"])
        if self.asked[-1] == "assistant":
            return self._send(writer, self._refusal, b'{"error": {"message": "No."}}')
        ends = "assistant" in self.asked
        events = [_event({"content": f" {n}"}, n) for n in range(1, 21)] + [_event({}, 20, "stop")] * ends
        text = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events) + b"data: [DONE]\n\n" * ends
        self._send(writer, 200, text)
        await writer.drain()
        if not ends:
            await reader.read()
        return None

    def _send(self, writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
        writer.write(
            b"HTTP/1.1 %d OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n\r\n%b" % (status, body)
        )


def _event(delta: dict[str, Any], number: int, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"choices": [choice], "timings": {"cache_n": 0, "prompt_n": 5, "predicted_n": number}}


@pytest.mark.parametrize("refusal", [400, 500])
async def test_a_line_begins_anew_where_the_engine_takes_no_begun_answer(refusal: int) -> None:
    engine = Stubborn(refusal)
    server = await asyncio.start_server(engine, "127.0.0.1", 0)
    async with (
        server,
        standing("http://{}:{}".format(*server.sockets[0].getsockname())) as (continuation, scheduler, _),
    ):
        call = chat("Count.", max_tokens=64)
        read = asyncio.Event()
        running = asyncio.create_task(continuation.run(call, on_read=read.set, on_opened=lambda: None))
        await read.wait()  # all of it: it is sent in one piece
        async with scheduler.admit(chat("Hello.", priority=Priority.DEFAULT).request):
            pass
        body = json.loads((await running).body)
    assert body["choices"][0]["message"]["content"] == "".join(f" {n}" for n in range(1, 21))
    assert engine.asked == ["user", "assistant", "user"]
