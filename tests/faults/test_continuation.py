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
from forebay.errors import ForebayError
from forebay.inference import Priority, Request
from forebay.jobs.admission import Admission
from forebay.jobs.continuation import Continuation
from forebay.model_config import LlamaCppModel
from forebay.replicas.catalog import Catalog
from forebay.replicas.commands import traits_of
from forebay.replicas.connection import open_session
from forebay.replicas.postmortem import Quarantine
from forebay.replicas.replica import Replica, ReplicaState
from forebay.scheduler.gather import gather
from forebay.scheduler.scheduler import Limits, Scheduler
from forebay.server_config import SchedulerSettings
from forebay.telemetry import Metrics
from tests.support.engines import KEY, Engine
from tests.support.models import smollm2_path
from tests.support.server import eventually

NAME = "chat"
CACHE_BYTES = 256 * 2**20
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
class Room:
    """A machine room with one engine that is always up."""

    replica: Replica

    def replicas(self, model: str) -> list[Replica]:
        return [self.replica]

    def summon(self, model: str) -> None:
        pass

    def trouble(self, model: str) -> ForebayError | None:
        return None

    def check(self, request: Request) -> None:
        pass

    def condemn(self, replica: Replica) -> None:
        raise AssertionError("the engine did not stop when told to")


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
    return Context("req_test", "default", None, max_tokens=512, slots=1)


def with_priority(call: Call, priority: Priority) -> Call:
    return replace(call, request=replace(call.request, priority=priority))


@asynccontextmanager
async def line(seed: int) -> AsyncIterator[Line]:
    path = smollm2_path()
    spec = {"name": NAME, "model_path": str(path), "slots": 1, "context": 1024, "cache_ram_bytes": CACHE_BYTES}
    model = LlamaCppModel(
        engine="llama.cpp", source=f"file:{path}", options=LlamaCppOptions(cache_ram_bytes=CACHE_BYTES)
    )
    engine = Engine("llama_cpp", spec)
    session = open_session(reuses_connections=False)
    try:
        await asyncio.to_thread(engine.wait_until_ready)
        clock, metrics = SystemClock(), Metrics()
        replica = Replica("replica_1", NAME, 1, traits_of(model), session, Quarantine(1.0, 1, clock))
        replica.address = "http://{}:{}".format(*engine.address)
        replica.headers = {"Authorization": f"Bearer {KEY}"}
        replica.state = ReplicaState.READY
        scheduler = Scheduler(Room(replica), {NAME: Limits(1, 64, 60.0)}, SCHEDULER, 10.0, clock, metrics)
        settings = SETTINGS.model_copy(update={"models": {NAME: model}})
        admission = Admission(Catalog(settings), scheduler, settings, clock)
        continuation = Continuation(admission, settings, metrics)
        yield Line(continuation, scheduler, metrics, engine, seeded(seed))
    finally:
        await session.close()
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
    assert resumed >= preempted / 2
    assert kept >= 16 * resumed
