"""What models are taken to need before anything was measured."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from forebay.model_config import Model
from forebay.replicas import gguf
from forebay.replicas.memory import HOST
from forebay.replicas.needs import declared, estimate, fingerprint
from tests.support.models import smollm2_path

MIB = 2**20
GIB = 2**30
KV_BYTES_2048 = 30 * 3 * (64 + 64) * 2 * 2048  # layers, KV heads, key and value of each, f16, tokens


def model(engine: str, **more: Any) -> Model:
    source = {} if engine in ("fake", "opencv", "command", "upstream") else {"source": "file:/a/model"}
    made: Model = TypeAdapter(Model).validate_python({"engine": engine, **source, **more})
    return made


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_the_header_of_a_model_tells_its_kv_cache() -> None:
    assert gguf.check(smollm2_path()).token_values == 30 * 3 * (64 + 64)


def test_a_llama_cpp_model_takes_its_file_and_the_cache_of_all_places() -> None:
    path = smollm2_path()
    weights = path.stat().st_size

    def host(**more: Any) -> int:
        return estimate(model("llama.cpp", **more), path, {})[HOST] - 64 * MIB - int(weights * 1.05)

    assert host(slots=1) == KV_BYTES_2048
    assert host(slots=8) == 8 * KV_BYTES_2048
    assert host(slots=1, options={"context": 8192}) == 4 * KV_BYTES_2048
    assert host(slots=1, options={"kv_type": "q8_0", "flash_attention": "on"}) == int(KV_BYTES_2048 * 34 / 64)


def test_where_the_header_does_not_tell_a_share_of_the_weights_is_taken(tmp_path: Path) -> None:
    path = sparse(tmp_path / "model.gguf", 100 * MIB)
    assert estimate(model("llama.cpp"), path, {})[HOST] == 64 * MIB + 105 * MIB + 50 * MIB


def test_a_file_that_is_not_there_yet_is_as_large_as_is_said(tmp_path: Path) -> None:
    said = estimate(model("onnx", size_bytes=GIB), tmp_path / "absent.onnx", {})[HOST]
    there = estimate(model("onnx"), sparse(tmp_path / "model.onnx", GIB), {})[HOST]
    assert said == there > 2 * GIB


def test_weights_beside_an_onnx_model_count(tmp_path: Path) -> None:
    path = sparse(tmp_path / "model.onnx", MIB)
    alone = estimate(model("onnx"), path, {})[HOST]
    sparse(tmp_path / "model.onnx_data", 100 * MIB)
    assert estimate(model("onnx"), path, {})[HOST] == alone + 200 * MIB


def test_of_a_pipeline_the_files_of_its_variant_count(tmp_path: Path) -> None:
    for part, named in (
        ("unet", "model.safetensors"),
        ("vae", "model.safetensors"),
        ("unet", "model.fp16.safetensors"),
    ):
        (tmp_path / part).mkdir(exist_ok=True)
        sparse(tmp_path / part / named, 50 * MIB if "fp16" in named else 100 * MIB)
    (tmp_path / "unet" / "config.json").write_text("{}")
    fixed = estimate(model("diffusion"), tmp_path / "absent", {})[HOST]
    assert estimate(model("diffusion"), tmp_path, {})[HOST] == fixed + 260 * MIB
    assert estimate(model("diffusion", options={"variant": "fp16"}), tmp_path, {})[HOST] == fixed + 195 * MIB


def test_what_computes_on_a_gpu_takes_its_memory_there(tmp_path: Path) -> None:
    path = sparse(tmp_path / "model.bin", GIB)
    found = estimate(model("whisper", options={"device": "cuda", "device_index": 1}), path, {"gpu1": 80 * GIB})
    assert found.keys() == {HOST, "gpu1"}
    assert found["gpu1"] > GIB
    assert found[HOST] < GIB


def test_what_waits_in_main_memory_for_the_gpu_counts_there(tmp_path: Path) -> None:
    sparse(tmp_path / "model.safetensors", GIB)
    on_gpu = estimate(model("diffusion", options={"device": "cuda"}), tmp_path, {})
    offloaded = estimate(model("diffusion", options={"device": "cuda", "offload": "model"}), tmp_path, {})
    assert offloaded[HOST] - on_gpu[HOST] == GIB


def test_vllm_takes_its_share_of_each_gpu() -> None:
    asked = model("vllm", source="hf:a/b@c", options={"gpu_memory_utilization": 0.5, "tensor_parallel": 2})
    found = estimate(asked, None, {"gpu0": 80 * GIB, "gpu1": 40 * GIB})
    assert (found["gpu0"], found["gpu1"]) == (40 * GIB, 20 * GIB)


def test_what_runs_elsewhere_takes_nothing() -> None:
    upstream = model("upstream", options={"base_url": "http://127.0.0.1/v1"})
    assert estimate(upstream, None, {}) == {}
    assert declared(upstream, GIB) == {}


def test_what_is_said_counts_where_the_model_computes() -> None:
    assert declared(model("fake"), GIB) == {HOST: GIB}
    assert declared(model("fake", options={"device": "gpu1"}), GIB) == {"gpu1": GIB}


def test_ballast_is_known() -> None:
    plain, loaded = model("fake"), model("fake", options={"ballast_bytes": 100 * MIB})
    assert estimate(loaded, None, {})[HOST] - estimate(plain, None, {})[HOST] == 100 * MIB


@pytest.mark.parametrize("change", [{"slots": 3}, {"options": {"context": 512}}, {"source": "file:/another"}])
def test_another_setting_that_matters_is_another_model(change: dict[str, Any]) -> None:
    assert fingerprint(model("llama.cpp", **change)) != fingerprint(model("llama.cpp"))


@pytest.mark.parametrize("change", [{"description": "x"}, {"queue_places": 3}, {"pinned": True}, {"memory_bytes": 5}])
def test_another_setting_that_does_not_matter_is_the_same(change: dict[str, Any]) -> None:
    assert fingerprint(model("llama.cpp", **change)) == fingerprint(model("llama.cpp"))
