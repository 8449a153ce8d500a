"""What every engine program promises to the server, over the fake one and llama.cpp's."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from forebay.engine_options import LlamaCppOptions
from forebay.model_config import LlamaCppModel
from forebay.replicas.commands import command_for
from tests.support import models
from tests.support.engines import KEY, Engine, alive, chat, environment, eventually, guarded

LONG = "Tell a long story about a dog and a cat. [[fake tokens=100000 rate=200]]"
PLANTED = "zebrafinch"

_SHOW_PARAMETERS = """
import json, os, xllamacpp
from forebay.engines import llama_cpp
p = llama_cpp._parameters(llama_cpp.Spec(**json.loads(os.environ["SPEC"])), "key", xllamacpp)
print(json.dumps({
    "slots": p.n_parallel, "context": p.n_ctx, "threads": [p.cpuparams.n_threads, p.cpuparams_batch.n_threads],
    "gpu_layers": p.n_gpu_layers, "tensor_split": list(p.tensor_split)[:3], "main_gpu": p.main_gpu,
    "kv": [p.cache_type_k == xllamacpp.ggml_type.GGML_TYPE_Q8_0, p.cache_type_v == p.cache_type_k],
    "flash": p.flash_attn_type == xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "batch": p.n_batch, "cache": p.cache_ram_mib, "template": p.chat_template, "embeddings": p.embedding,
}))
"""

Start = Callable[..., Engine]


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return models.smollm2()


@pytest.fixture(scope="module", params=["fake", "llama_cpp"])
def module(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def spec(module: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    spec: dict[str, Any] = {"name": "small", "slots": 2, "context": 1024}
    if module == "llama_cpp":
        spec["model_path"] = str(request.getfixturevalue("smollm2_path"))
    return spec


@pytest.fixture(scope="module")
def engine(module: str, spec: dict[str, Any]) -> Iterator[Engine]:
    """One for all tests that leave it as they found it."""
    engine = Engine(module, spec)
    engine.wait_until_ready()
    yield engine
    engine.end()


@pytest.fixture
def start(module: str, spec: dict[str, Any]) -> Iterator[Start]:
    """Engines of a test's own, ended with it."""
    with ExitStack() as stack:

        def start(**more: Any) -> Engine:
            engine = Engine(module, {**spec, **more})
            stack.callback(engine.end)
            return engine

        yield start


def test_health_needs_no_key(engine: Engine) -> None:
    assert engine.ask("GET", "/health", key=None)[0] == 200


@pytest.mark.parametrize("key", [None, "wrong", KEY + "x", KEY[:-1]])
@pytest.mark.parametrize(("method", "path"), [("GET", "/slots"), ("GET", "/props"), ("POST", "/v1/chat/completions")])
def test_every_other_route_needs_the_key(engine: Engine, method: str, path: str, key: str | None) -> None:
    status, answer = engine.ask(method, path, chat("hello") if method == "POST" else None, key=key)
    assert status == 401
    assert answer["error"]["message"]
    assert answer["error"]["type"] == "authentication_error"


def test_the_key_is_neither_in_the_arguments_nor_in_the_log(engine: Engine) -> None:
    assert KEY not in Path(f"/proc/{engine.pid}/cmdline").read_text()
    assert KEY not in Path(f"/proc/{engine.guard.pid}/cmdline").read_text()
    assert KEY not in engine.log


def test_props_say_whether_the_template_has_tools(engine: Engine) -> None:
    assert engine.get("/props")[1]["chat_template_caps"]["supports_tools"] is False


def test_slots_are_listed(engine: Engine) -> None:
    assert [slot["id"] for slot in engine.get("/slots")[1]] == [0, 1]
    assert engine.busy() == 0


def test_a_chat_streams_text_then_a_reason_then_usage(engine: Engine) -> None:
    *chunks, last, usage = engine.answer(chat("Say hello.", max_tokens=5))
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in (*chunks, last))
    assert len({chunk["id"] for chunk in (*chunks, last, usage)}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    counts = usage["usage"]
    assert counts["completion_tokens"] == 5
    assert counts["total_tokens"] == counts["prompt_tokens"] + 5
    assert counts["prompt_tokens_details"]["cached_tokens"] >= 0


def test_a_completion_streams_text_then_a_reason_then_usage(engine: Engine) -> None:
    body = {**chat(""), "prompt": "Once upon a time", "max_tokens": 5}
    del body["messages"]
    events = engine.answer(body, "/v1/completions")
    text = [event["choices"][0] for event in events if event["choices"]]
    assert "".join(choice["text"] for choice in text)
    assert text[-1]["finish_reason"] == "length"
    assert events[-1]["usage"]["completion_tokens"] == 5  # llama.cpp puts it beside the last choice


def test_the_same_request_gets_the_same_text(engine: Engine) -> None:
    def text() -> str:
        events = engine.answer(chat("Who wrote Hamlet?", max_tokens=12))
        return "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"])

    assert text() == text()


def test_a_stream_that_was_paused_goes_on_from_there(engine: Engine) -> None:
    body = chat("Tell a story about a dog. [[fake tokens=120 rate=60]]", max_tokens=120)

    def said(events: list[Any]) -> list[Any]:
        return [event["choices"] for event in events]

    engine.answer(body)  # what it keeps of the prompt may change the text that follows
    whole = said(engine.answer(body))
    with closing(engine.open(body)) as stream:
        for read in range(1, 4):
            eventually(lambda read=read: stream.read_what_is_there().count(b'"content":') > 4 * read, 30)
            with engine.paused():
                so_far = stream.read_what_is_there()
                assert b"[DONE]" not in so_far
            assert stream.received == so_far
        assert said(list(stream.events())) == whole
    assert engine.busy() == 0


def test_two_choices_are_told_apart(engine: Engine) -> None:
    events = engine.answer(chat("Say hello.", max_tokens=4, n=2))
    assert {choice["index"] for event in events for choice in event["choices"]} == {0, 1}
    eventually(lambda: engine.busy() == 0, 10)


def test_a_prompt_beyond_the_context_is_refused_before_the_stream(engine: Engine) -> None:
    status, answer = engine.ask("POST", "/v1/chat/completions", chat("dog " * 1500))
    assert status == 400
    assert answer["error"]["type"] == "exceed_context_size_error"


def test_a_body_that_is_no_json_is_refused(engine: Engine) -> None:
    status, answer = engine.ask("POST", "/v1/chat/completions", "[")
    assert 400 <= status < 600
    assert answer["error"]["message"]


def _seconds_to_stop(engine: Engine, how: str) -> float:
    with closing(engine.open(chat(LONG, max_tokens=900))) as stream:
        stream.read_until(b'"content":')
        assert engine.busy() == 1
        left = time.monotonic()
        getattr(stream, how)()
        if how == "half_close":
            assert b"[DONE]" not in stream.read_to_end()
        eventually(lambda: engine.busy() == 0, 10)
        return time.monotonic() - left


@pytest.mark.parametrize("how", ["half_close", "close"])
def test_a_caller_that_leaves_stops_the_work(engine: Engine, how: str) -> None:
    """llama.cpp looks once a token, so on a machine with more to do than cores one try may be unlucky."""
    assert min(_seconds_to_stop(engine, how) for _ in range(3)) < 0.5


def test_the_log_never_holds_a_prompt(engine: Engine) -> None:
    engine.answer(chat(f"Tell about the {PLANTED}.", max_tokens=3))
    assert PLANTED not in engine.log
    assert "event=" in engine.log


# Of the ends that follow each is timed, so the best of three engines counts.


def _seconds_to_terminate(start: Start) -> float:
    engine = start()
    engine.wait_until_ready()
    stream = engine.open(chat(LONG, max_tokens=900))
    stream.read_until(b'"content":')
    begun = time.monotonic()
    engine.guard.terminate()
    assert engine.guard.wait(30) == 0
    seconds = time.monotonic() - begun
    stream.close()
    return seconds


def test_sigterm_ends_it_with_zero_within_a_second(start: Start) -> None:
    assert any(_seconds_to_terminate(start) < 1 for _ in range(3))


def _seconds_to_see_a_kill(start: Start) -> float:
    engine = start()
    engine.wait_until_ready()
    pid = engine.pid
    begun = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert engine.guard.wait(30) == -signal.SIGKILL
    return time.monotonic() - begun


def test_kill_9_is_seen_at_once(start: Start) -> None:
    assert any(_seconds_to_see_a_kill(start) < 0.5 for _ in range(3))


def _seconds_after_the_server(module: str, spec: dict[str, Any]) -> float:
    argv = guarded(sys.executable, "-m", f"forebay.engines.{module}")
    holder = (
        "import subprocess, sys\n"
        f"p = subprocess.Popen({argv!r}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
        "p.stdout.readline(); print(p.pid, flush=True); p.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, env=environment(spec)) as server:
        assert server.stdout
        guard = int(server.stdout.readline())
        (pid,) = (int(child) for child in Path(f"/proc/{guard}/task/{guard}/children").read_text().split())
        server.kill()
    begun = time.monotonic()
    eventually(lambda: not alive(pid) and not alive(guard), 30)
    return time.monotonic() - begun


def test_it_dies_with_the_server(module: str, spec: dict[str, Any]) -> None:
    """A little program holds the guard and is killed; neither guard nor engine outlives it."""
    assert any(_seconds_after_the_server(module, spec) < 1 for _ in range(3))


def _seconds_after_the_guard(start: Start) -> float:
    engine = start()
    engine.wait_until_ready()
    pid = engine.pid
    begun = time.monotonic()
    engine.guard.kill()
    eventually(lambda: not alive(pid), 30)
    return time.monotonic() - begun


def test_kill_9_of_the_guard_kills_it_too(start: Start) -> None:
    assert any(_seconds_after_the_guard(start) < 1 for _ in range(3))


@pytest.mark.parametrize("more", [{"slots": 0}, {"no_such_setting": 1}, {"slots": "two"}])
def test_settings_that_cannot_work_exit_78_with_a_sentence(start: Start, more: dict[str, Any]) -> None:
    engine = start(**more)
    assert engine.guard.wait(30) == 78
    assert engine.log.strip().endswith(".")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"model_path": "/nowhere/small.gguf"}, "The model file small.gguf of small does not exist."),
        ({"model_path": __file__}, "test_engine.py is not a whole GGUF model."),
        ({"kv_type": "q9"}, "small has the unknown kv_type 'q9'."),
        ({"kv_type": "q4_0", "flash_attention": "off"}, "small cannot run with these settings."),
        ({"chat_template": "{% for x in %}"}, "The chat template of small is not valid Jinja."),
    ],
)
@pytest.mark.parametrize("module", ["llama_cpp"], indirect=True)
def test_llama_cpp_says_why_it_cannot_start(start: Start, more: dict[str, Any], sentence: str) -> None:
    engine = start(**more)
    assert engine.guard.wait(60) == 78
    last = engine.log.strip().splitlines()[-1]
    assert last.startswith(sentence)
    assert "/" not in last


@pytest.mark.parametrize("module", ["llama_cpp"], indirect=True)
def test_llama_cpp_keeps_its_other_doors_shut(engine: Engine) -> None:
    for method, path in (
        ("POST", "/props"),
        ("POST", "/slots/0?action=save"),
        ("POST", "/slots/0?action=restore"),
        ("POST", "/models/load"),
        ("GET", "/tools"),
        ("GET", "/"),
    ):
        status, _ = engine.ask(method, path, {"filename": "x"} if method == "POST" else None)
        assert status >= 400, path


def test_every_option_reaches_llama_cpp() -> None:
    options = LlamaCppOptions(
        context=512, threads=5, gpu_layers=7, tensor_split=(0.25, 0.75), main_gpu=1, kv_type="q8_0",
        flash_attention="on", batch=1024, cache_ram_bytes=64 * 2**20, embeddings=True,
    )  # fmt: skip
    model = LlamaCppModel(engine="llama.cpp", source="file:/m.gguf", options=options)
    command = command_for("m", model, 3, Path("/m.gguf"), "key", 0)
    told = json.loads(command.environment["FOREBAY_ENGINE_SPEC"]) | {"chat_template": "T"}
    said = subprocess.run(
        [sys.executable, "-c", _SHOW_PARAMETERS],
        env={**os.environ, "SPEC": json.dumps(told)}, capture_output=True, check=True,
    )  # fmt: skip
    assert json.loads(said.stdout) == {
        "slots": 3, "context": 1536, "threads": [5, 5], "gpu_layers": 7, "tensor_split": [0.25, 0.75, 0], "main_gpu": 1,
        "kv": [True, True], "flash": True, "batch": 1024, "cache": 64, "template": "T", "embeddings": True,
    }  # fmt: skip


@pytest.mark.parametrize("module", ["llama_cpp"], indirect=True)
def test_a_chat_template_of_our_own_brings_tools(start: Start) -> None:
    template = (
        "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}"
        "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    engine = start(chat_template=template)
    engine.wait_until_ready()
    assert engine.get("/props")[1]["chat_template_caps"]["supports_tools"] is True
