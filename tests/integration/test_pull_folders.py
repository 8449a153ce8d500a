"""Whole repositories of a hub as folders: what is taken, what is refused, and what an interrupted pull leaves."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from forebay.clock import SystemClock
from forebay.config import PullSettings, Settings
from forebay.engine_options import DiffusionOptions
from forebay.errors import SetupError
from forebay.model_config import DiffusionModel
from forebay.replicas import pull
from forebay.replicas.catalog import Catalog
from forebay.replicas.repository import MANIFEST
from tests.support.files_server import FilesServer, serve
from tests.support.hub import FILES, SOURCE, TREE, entry, fetched, hub

INDEX = {"_class_name": "FluxPipeline", "_diffusers_version": "0.1", "transformer": ["diffusers", "T"],
         "vae": ["diffusers", "V"], "tokenizer": ["transformers", "C"], "image_encoder": [None, None]}  # fmt: skip
VAE_ALONE = b'{"_class_name": "FluxPipeline", "vae": ["a", "B"]}'
WEIGHTS = os.urandom(300_000)
WANTED = {
    "model_index.json": json.dumps(INDEX).encode(),
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": WEIGHTS,
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "transformer/diffusion_pytorch_model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer/merges.txt": b"a b",
    "tokenizer/spiece.model": b"pieces",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": WEIGHTS[:1000],
}
UNWANTED = {
    "README.md": b"words",
    "painter.safetensors": WEIGHTS,
    "transformer/diffusion_pytorch_model.bin": b"pickle",
    "transformer/modeling.py": b"code",
    "transformer/diffusion_pytorch_model.fp16-00001-of-00001.safetensors": b"half",
    "transformer/diffusion_pytorch_model.safetensors.index.fp16.json": b"{}",
    "vae/diffusion_pytorch_model.fp16.safetensors": b"half",
    "vae/model.onnx": b"onnx",
    "vae/flax_model.msgpack": b"flax",
    "image_encoder/config.json": b"{}",
    "safety_checker/model.safetensors": b"not named",
    "tokenizer/deep/er.json": b"{}",
}


class HastyClock(SystemClock):
    """The real clock, but it does not wait between attempts."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


def settings(folder: Path, server: FilesServer, options: dict[str, Any] | None = None, **limits: Any) -> Settings:
    model = DiffusionModel(engine="diffusion", source=SOURCE, options=DiffusionOptions.model_validate(options or {}))
    pulling = PullSettings(hub_url=server.url, **limits)
    return Settings(models_dir=folder, models={"m": model}, pull=pulling, default_models=False)


async def bring(said: Settings, seen: list[tuple[int, int | None]] | None = None) -> Path:
    steps = seen if seen is not None else []
    return await pull.pull("m", Catalog(said), said.pull, HastyClock(), lambda done, total: steps.append((done, total)))


def found(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("pages", [1, 3])
async def test_a_folder_has_what_its_parts_need_and_nothing_else(tmp_path: Path, pages: int) -> None:
    seen: list[tuple[int, int | None]] = []
    async with hub(WANTED | UNWANTED, pages=pages) as server:
        said = settings(tmp_path, server)
        catalog = Catalog(said)
        assert catalog.needs_file("m")
        assert not catalog.present("m")
        folder = await bring(said, seen)
        assert folder.parent == tmp_path
        assert found(folder) == WANTED
        assert sorted(fetched(server)) == sorted(WANTED)
        assert catalog.present("m")
        size = sum(map(len, WANTED.values()))
        assert seen[-1] == (size, size)
        assert catalog.size_bytes("m") == size
        await pull.verify("m", catalog)
        requests = len(server.requests)
        assert await bring(said) == folder
        assert len(server.requests) == requests
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, f"{folder.name}.lock"}
    assert pull.remove("m", catalog)
    assert not catalog.present("m")
    assert not pull.remove("m", catalog)


async def test_a_folder_of_that_name_without_its_list_is_replaced(tmp_path: Path) -> None:
    async with hub(WANTED) as server:
        said = settings(tmp_path, server)
        folder = await bring(said)
        (folder / MANIFEST).unlink()
        assert not Catalog(said).present("m")
        assert await bring(said) == folder
        assert found(folder) == WANTED


async def test_a_variant_replaces_the_weights_of_the_parts_that_have_it(tmp_path: Path) -> None:
    async with hub(WANTED | UNWANTED) as server:
        folder = await bring(settings(tmp_path, server, {"variant": "fp16"}))
        names = {name for name in found(folder) if name.endswith((".safetensors", ".index.json", ".fp16.json"))}
        assert names == {
            "transformer/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
            "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
            "vae/diffusion_pytorch_model.fp16.safetensors",
        }


async def test_a_file_of_ones_own_replaces_the_weights_of_what_paints(tmp_path: Path) -> None:
    async with hub(WANTED | UNWANTED) as server:
        folder = await bring(settings(tmp_path, server, {"transformer_file": "/models/transformer.gguf"}))
        assert {name for name in found(folder) if name.startswith("transformer/")} == {"transformer/config.json"}
        assert "vae/diffusion_pytorch_model.safetensors" in found(folder)


async def test_an_interrupted_pull_goes_on_where_it_stopped(tmp_path: Path) -> None:
    async with hub(WANTED) as server:
        said = settings(tmp_path, server, attempts_max=1)
        server.cut_after = 200_000
        with pytest.raises(SetupError, match="goes on from there"):
            await bring(said)
        assert not Catalog(said).present("m")
        assert not Catalog(said).path("m").exists()
        server.cut_after = None
        before = len(server.requests)
        folder = await bring(said)
        assert found(folder) == WANTED
        again = [(path.removeprefix(FILES), told) for path, told in server.requests[before:] if path.startswith(FILES)]
        weights = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
        assert "model_index.json" not in dict(again), "what is whole is not fetched again"
        assert 0 < int(dict(again)[weights]["Range"].removeprefix("bytes=").rstrip("-")) <= 200_000


async def test_a_cancelled_pull_leaves_what_the_next_one_takes_up(tmp_path: Path) -> None:
    async with hub(WANTED) as server:
        said = settings(tmp_path, server)
        server.stall_after = 200_000
        running = asyncio.create_task(bring(said))
        await asyncio.wait_for(server.stalled.wait(), 10)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        server.stall_after = None
        assert found(await bring(said)) == WANTED
        assert fetched(server).count("tokenizer/merges.txt") == 1


async def test_what_has_changed_in_the_repository_meanwhile_is_fetched_again(tmp_path: Path) -> None:
    async with hub(WANTED) as server:
        said = settings(tmp_path, server, attempts_max=1)
        server.cut_after = 200_000
        with pytest.raises(SetupError):
            await bring(said)
        server.cut_after = None
        changed = {**WANTED, "tokenizer/merges.txt": b"b a"}
        del changed["vae/config.json"]
        server.files = {FILES + path: body for path, body in changed.items()}
        server.files[TREE] = json.dumps([entry(path, body) for path, body in changed.items()]).encode()
        assert found(await bring(said)) == changed


async def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    async with hub(WANTED) as server:
        server.files[FILES + "vae/diffusion_pytorch_model.safetensors"] = WEIGHTS[1:1001]
        said = settings(tmp_path, server)
        with pytest.raises(SetupError, match=r"has the checksum \w+ and not \w+, so it was deleted"):
            await bring(said)
        assert not Catalog(said).path("m").exists()


async def test_a_small_file_of_another_size_is_refused(tmp_path: Path) -> None:
    async with hub(WANTED) as server:
        server.files[FILES + "vae/config.json"] = b"1"
        with pytest.raises(SetupError, match="has 1 bytes and not the 2"):
            await bring(settings(tmp_path, server))


@pytest.mark.parametrize("announce", [True, False])
async def test_a_file_is_no_larger_than_its_hub_has_told(tmp_path: Path, announce: bool) -> None:
    """What the list told was allowed; more is not written to the disk."""
    files = {"model_index.json": VAE_ALONE, "vae/config.json": b"{}"}
    async with hub(files) as server:
        server.announce = announce
        server.files[FILES + "vae/config.json"] = b"x" * 40_000_000
        with pytest.raises(SetupError, match="more than the 2 bytes"):
            await bring(settings(tmp_path, server))
    assert not list(tmp_path.rglob("config.json*"))
    assert server.sent < 20_000_000


@pytest.mark.parametrize(
    "path",
    [
        "../evil.json",
        "vae/../../evil.json",
        "/etc/evil.json",
        "vae//evil.json",
        "vae\\evil.json",
        "vae/./e.json",
        "a\nb",
    ],
)
async def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, path: str) -> None:
    async with hub(WANTED, entry(path, b"{}")) as server:
        with pytest.raises(SetupError, match="leads out of it"):
            await bring(settings(tmp_path / "models", server))
    assert not [each for each in tmp_path.rglob("*") if "evil" in each.name]


@pytest.mark.parametrize("part", ["..", "a/b", ".hidden", ""])
async def test_parts_that_are_no_folders_are_refused(tmp_path: Path, part: str) -> None:
    index = json.dumps({**INDEX, part: ["diffusers", "T"]}).encode()
    async with hub({**WANTED, "model_index.json": index}) as server:
        with pytest.raises(SetupError, match="names no parts"):
            await bring(settings(tmp_path, server))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config.json": b"{}"}, "no folder of diffusers"),
        ({"model_index.json": b"[]"}, "names no parts"),
        ({"model_index.json": VAE_ALONE.replace(b"Flux", b"Video")}, "is not served. Take one of FluxFill"),
        ({"model_index.json": b" " * (2**20 + 1)}, "no folder of diffusers"),
        (
            {"model_index.json": VAE_ALONE, "vae/diffusion_pytorch_model.bin": b"pickle"},
            "can run code alone",
        ),
        (
            {"model_index.json": VAE_ALONE, "vae/model.fp16.safetensors": b"half"},
            "variants fp16 alone",
        ),
    ],
)
async def test_what_is_no_sound_model_is_a_sentence(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    async with hub(files) as server:
        with pytest.raises(SetupError, match=reason):
            await bring(settings(tmp_path, server))


async def test_too_many_bytes_are_not_even_begun(tmp_path: Path) -> None:
    async with hub(WANTED) as server:
        with pytest.raises(SetupError, match="FOREBAY_PULL_FOLDER_BYTES_MAX"):
            await bring(settings(tmp_path, server, folder_bytes_max=100_000))
        assert fetched(server) == ["model_index.json"]


async def test_too_many_files_are_refused(tmp_path: Path) -> None:
    many = [entry(f"vae/file{number}.json", b"{}") for number in range(1001)]
    async with hub(WANTED, *many) as server:
        with pytest.raises(SetupError, match="at most 1000"):
            await bring(settings(tmp_path, server))


async def test_a_full_disk_is_noticed_before(tmp_path: Path) -> None:
    async with hub(WANTED) as server:
        with pytest.raises(SetupError, match="not enough disk space"):
            await bring(settings(tmp_path, server, free_bytes_min=2**60))


@pytest.mark.parametrize(
    "page", [b"{", b"[]]", b'[{"type": "file"}]', b'[{"type": "file", "path": 1, "size": 1}]', b"7"]
)
async def test_a_list_that_cannot_be_read_is_a_sentence(tmp_path: Path, page: bytes) -> None:
    async with hub(WANTED) as server:
        server.files[TREE] = page
        with pytest.raises(SetupError, match="cannot be read"):
            await bring(settings(tmp_path, server))


async def test_a_list_never_leads_to_another_host_with_the_token(tmp_path: Path) -> None:
    async with hub(WANTED) as server, serve(b"[]") as other:
        server.token = "t" * 20
        server.links[TREE] = f'<{other.url}{TREE}>; rel="next"'
        with pytest.raises(SetupError, match="goes on at another host"):
            await bring(settings(tmp_path, server, hub_token=SecretStr("t" * 20)))
        assert not other.requests


async def test_a_list_without_an_end_is_given_up(tmp_path: Path) -> None:
    async with hub(WANTED) as server:
        server.links[TREE] = f'<{server.url}{TREE}>; rel="next"'
        with pytest.raises(SetupError, match="too many files"):
            await bring(settings(tmp_path, server))
        assert len(server.requests) == 100


async def test_a_damaged_folder_is_found_out(tmp_path: Path) -> None:
    async with hub(WANTED) as server:
        said = settings(tmp_path, server)
        folder = await bring(said)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(WEIGHTS[1:1001])
    with pytest.raises(SetupError, match=r"vae/diffusion_pytorch_model.safetensors of the model `m` is not what"):
        await pull.verify("m", Catalog(said))


def test_a_folder_of_ones_own_is_used_where_it_lies(tmp_path: Path) -> None:
    model = DiffusionModel(engine="diffusion", source=f"file:{tmp_path}")
    catalog = Catalog(Settings(models={"m": model}, default_models=False))
    assert catalog.present("m")
    assert catalog.path("m") == tmp_path
    with pytest.raises(SetupError, match="was not pulled, so it is not removed"):
        pull.remove("m", catalog)


@pytest.mark.parametrize(
    "source", ["hf:owner/painter@main/model.safetensors", "https://example.org/model.zip", "pypi:a==1/b"]
)
def test_a_single_file_is_no_diffusion_model(source: str) -> None:
    model = DiffusionModel(engine="diffusion", source=source)
    with pytest.raises(SetupError, match="Name a whole folder"):
        Catalog(Settings(models={"m": model}))


def test_a_folder_has_no_checksum_of_its_own() -> None:
    with pytest.raises(ValidationError, match="leave `sha256` out"):
        DiffusionModel(engine="diffusion", source=SOURCE, sha256="0" * 64)
