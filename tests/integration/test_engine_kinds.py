"""The engines that are somebody else's program: any command line, vLLM's, and a server far away.

The program behind `command` and behind the name `vllm` is the fake engine, told which port to take; vLLM itself is not
run here. The far server is another Forebay.
"""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import aiohttp
import openai
import pytest

from forebay.model_config import FakeModel
from forebay.replicas.commands import command_for
from tests.support.items import EMBEDDINGS, RERANK, embed, rerank, send, vectors
from tests.support.server import ADMIN_KEY, FAKE, Server, eventually, serving

COMMAND = f"""
default_models = false
[models.mine]
engine = "command"
preload = true
slots = 4
[models.mine.options]
argv = [{json.dumps(sys.executable)}, "-m", "forebay.engines.fake"]
environment = {{ FOREBAY_ENGINE_SPEC = '{{"name":"inner","slots":4,"port":{{port}}}}' }}
remote_model = "inner"
"""
VLLM = """
default_models = false
[models.big]
engine = "vllm"
source = "hf:example/model@abc123"
preload = true
slots = 3
[models.big.options]
context = 1024
arguments = ["--enforce-eager"]
"""
SHIM = f"""#!{sys.executable}
import json, os, pathlib, sys
pathlib.Path(os.environ["SHIM_LOG"]).write_text(json.dumps(sys.argv))
port = int(sys.argv[sys.argv.index("--port") + 1])
os.environ["FOREBAY_ENGINE_KEY"] = os.environ["VLLM_API_KEY"]
os.environ["FOREBAY_ENGINE_SPEC"] = json.dumps({{"name": "big", "slots": 3, "port": port}})
os.execv({json.dumps(sys.executable)}, [{json.dumps(sys.executable)}, "-m", "forebay.engines.fake"])
"""
POOLING = """
default_models = false
[models.big]
engine = "vllm"
source = "hf:example/model@abc123"
preload = true
options = { context = 256, capabilities = ["embedding", "rerank"] }
"""
POOLING_SHIM = f"""#!/bin/sh
exec {sys.executable} {Path(__file__).parents[1] / "support" / "pooling_engine.py"} "$@"
"""
UPSTREAM = """
default_models = false
[models.far]
engine = "upstream"
preload = true
slots = 4
[models.far.options]
base_url = "{url}/v1"
remote_model = "fake"
{key}
"""


async def _ask(client: openai.AsyncOpenAI, model: str) -> tuple[str, str]:
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "[[fake tokens=3]]"}], stream=True
    )
    chunks = [chunk async for chunk in answer]
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), chunks[0].model


async def test_any_command_line_that_speaks_the_dialect_is_an_engine() -> None:
    async with serving(COMMAND) as server:
        text, model = await _ask(server.client(), "mine")
        assert text == "tok0 tok1 tok2 "
        assert model == "mine", "the catalogue's name, not the engine's own"
        (pid,) = server.engine_pids()
        assert await server.stop() == 0
        await eventually(lambda: not Path(f"/proc/{pid}/cmdline").exists(), what="the end of the engine")


def test_a_file_beside_the_server_is_no_part_of_an_engine(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')\n")
    model = FakeModel.model_validate({"engine": "fake", "options": {"fail_start": "exit"}})
    command = command_for("m", model, 1, None, "key", 0)
    ended = subprocess.run(
        command.argv, check=False, capture_output=True, cwd=tmp_path, env={**os.environ, **command.environment}
    )
    assert b"shadowed" not in ended.stderr
    assert b"asked to fail at the start" in ended.stderr


def _install(shim: str, folder: Path) -> str:
    """Put a program of the name `vllm` in a folder; the PATH that finds it."""
    program = folder / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(shim, encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return f"{program.parent}:/usr/bin:/bin"


async def test_vllm_is_started_with_its_own_options_and_a_key_that_no_process_list_shows(tmp_path: Path) -> None:
    path = _install(SHIM, tmp_path)
    log = tmp_path / "argv.json"
    async with serving(VLLM, environment={"PATH": path, "SHIM_LOG": str(log)}) as server:
        text, _ = await _ask(server.client(), "big")
        assert text == "tok0 tok1 tok2 "
    argv = json.loads(log.read_text(encoding="utf-8"))
    assert argv[1:3] == ["serve", "example/model"]
    options = dict(zip(argv[3::2], argv[4::2], strict=False))
    assert options["--revision"] == "abc123"
    assert options["--max-model-len"] == "1024"
    assert options["--max-num-seqs"] == "3"
    assert options["--served-model-name"] == "big"
    assert options["--host"] == "127.0.0.1"
    assert "--enforce-eager" in argv
    assert not any("key" in part for part in argv)


async def test_vllm_embeds_and_ranks(tmp_path: Path) -> None:
    log = tmp_path / "asked.jsonl"
    environment = {"PATH": _install(POOLING_SHIM, tmp_path), "SHIM_LOG": str(log)}
    async with serving(POOLING, environment=environment) as server:
        made = await embed(server, ["one", "two words", "three more words"], model="big")
        assert vectors(made) == [[1, 3, 0.5], [2, 5, 0.5], [3, 5, 0.5]]
        assert (made["model"], made["usage"]) == ("big", {"prompt_tokens": 6, "total_tokens": 6})
        packed = await embed(server, ["one", "two words"], model="big", encoding_format="base64")
        assert vectors(packed) == [[1, 3, 0.5], [2, 5, 0.5]]
        documents = ["nothing", "a panda eats bamboo", "panda"]
        ranked = await rerank(server, "panda eats", documents, model="big", return_documents=True)
        found = [(each["index"], each["relevance_score"]) for each in ranked["results"]]
        assert found == [(1, 1.0), (2, 0.5), (0, 0.0)]
        assert ranked["results"][0]["document"] == {"text": documents[1]}
        assert ranked["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
        await _check_cut(server)
    asked = [json.loads(each) for each in log.read_text(encoding="utf-8").splitlines()]
    assert {each["model"] for each in asked} == {"big"}
    assert [each["path"] for each in asked if "truncate_prompt_tokens" in each] == [EMBEDDINGS, RERANK, RERANK]


async def _check_cut(server: Server) -> None:
    """What is too long is refused, and cut where that is asked for, or usual."""
    long = "a " * 255 + "f g"
    for path, body in ((EMBEDDINGS, {"input": ["a", long]}), (RERANK, {"query": "a", "documents": ["b", long]})):
        status, answer = await send(server, path, {"model": "big", **body})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded"), answer
    assert vectors(await embed(server, ["x", long], model="big", truncate=True)) == [[1, 1, 0.5], [256, 1, 0.5]]
    for path, more in ((RERANK, {"truncate": True}), ("/v2/rerank", {})):
        answer = await rerank(server, "f g", ["x", long], model="big", path=path, **more)
        assert [(each["index"], each["relevance_score"]) for each in answer["results"]] == [(1, 0.5), (0, 0.0)]


async def test_without_vllm_the_reason_is_a_sentence() -> None:
    async with serving(VLLM.replace("preload = true", ""), environment={"PATH": "/nonexistent"}) as server:
        with pytest.raises(openai.InternalServerError, match="could not be started"):
            await eventually(lambda: _refusal(server.client()), what="a refusal")
        assert "vllm" in (await server.model("big"))["reason"]


async def _refusal(client: openai.AsyncOpenAI) -> None:
    await client.chat.completions.create(model="big", messages=[{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("from_file", [False, True])
async def test_a_far_server_is_an_engine_with_a_key_of_its_own(tmp_path: Path, *, from_file: bool) -> None:
    (tmp_path / "far.key").write_text(ADMIN_KEY + "\n", encoding="utf-8")
    key = f'key_file = "{tmp_path / "far.key"}"' if from_file else 'key_env = "FAR_KEY"'
    async with serving(FAKE) as far:
        config = UPSTREAM.format(url=far.url, key=key)
        near_key = "another-admin-key-0123456789abcdef0123"
        environment = {"FAR_KEY": ADMIN_KEY, "FOREBAY_ADMIN_KEY": near_key}
        async with serving(config, environment=environment) as near:
            near.key = near_key
            text, model = await _ask(near.client(), "far")
            assert (text, model) == ("tok0 tok1 tok2 ", "far")
            whole = await near.client().chat.completions.create(
                model="far", messages=[{"role": "user", "content": "[[fake tokens=2]]"}]
            )
            assert whole.choices[0].message.content == "tok0 tok1 "
            with pytest.raises(openai.BadRequestError, match="context"):
                await near.client().chat.completions.create(
                    model="far", messages=[{"role": "user", "content": "[[fake context_error=1]]"}]
                )
            assert await far.stop() == 0
            with pytest.raises(openai.InternalServerError) as refused:
                await _ask(near.client(), "far")
            assert refused.value.code == "engine_unavailable"
            assert (await near.model("far"))["running"] == 0


async def test_a_far_server_that_refuses_our_key_is_our_trouble_and_not_the_callers() -> None:
    async with serving(FAKE) as far:
        config = UPSTREAM.format(url=far.url, key='key_env = "FAR_KEY"')
        async with serving(config, environment={"FAR_KEY": "wrong"}) as near:
            with pytest.raises(openai.InternalServerError) as refused:
                await _ask(near.client(), "far")
            assert (refused.value.status_code, refused.value.code) == (502, "upstream_refused")
            assert "this server's account" in str(refused.value)


async def test_an_upstream_whose_key_is_not_set_stops_the_start_with_the_remedy(tmp_path: Path) -> None:
    config = UPSTREAM.format(url="http://127.0.0.1:9", key='key_env = "FAR_KEY_THAT_IS_NOT_SET"')
    with pytest.raises(AssertionError, match="FAR_KEY_THAT_IS_NOT_SET"):
        async with serving(config, folder=tmp_path):
            pass


async def test_a_client_that_leaves_frees_the_place_at_the_far_server() -> None:
    async with serving(FAKE) as far:
        config = UPSTREAM.format(url=far.url, key=f'headers = {{ Authorization = "Bearer {ADMIN_KEY}" }}')
        async with serving(config) as near:
            response = await near.chat("[[fake tokens=100000 token_ms=20]]", model="far", stream=True)
            await response.content.readany()
            assert (await far.model())["running"] == 1
            response.close()
            await eventually(lambda: _idle(far), within_seconds=5, what="a free place at the far server")


async def _idle(server: object) -> bool:
    return bool((await server.model())["running"] == 0)  # type: ignore[attr-defined]


async def test_an_unreachable_upstream_answers_503_soon() -> None:
    config = UPSTREAM.format(url="http://127.0.0.1:9", key="")
    async with serving(config) as server:
        async with await server.chat("hello", model="far") as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "engine_unavailable"
        assert isinstance(server.session, aiohttp.ClientSession)
