"""On which device a model computes, and which engines can stand still."""

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from forebay.model_config import Model
from forebay.replicas import devices
from forebay.replicas.commands import device_of, traits_of

_MODEL: TypeAdapter[Model] = TypeAdapter(Model)


def _model(engine: str, **options: Any) -> Model:
    source = {} if engine in {"fake", "opencv", "upstream", "command"} else {"source": "file:/models/some"}
    return _MODEL.validate_python({"engine": engine, **source, "options": options})


@pytest.mark.parametrize(
    ("engine", "options", "device"),
    [
        ("fake", {}, "cpu"),
        ("fake", {"device": "gpu3"}, "gpu3"),
        ("opencv", {}, "cpu"),
        ("command", {"argv": ["serve"]}, "cpu"),
        ("command", {"argv": ["serve"], "device": "gpu1"}, "gpu1"),
        ("onnx", {"capability": "embedding"}, "cpu"),
        ("onnx", {"capability": "embedding", "provider": "cuda"}, "gpu0"),
        ("whisper", {}, "cpu"),
        ("whisper", {"device": "cuda", "device_index": 2}, "gpu2"),
        ("diffusion", {}, "cpu"),
        ("diffusion", {"device": "cuda"}, "gpu0"),
        ("speakers", {}, "cpu"),
        ("vllm", {}, "gpu0"),
        ("upstream", {"base_url": "https://models.example.com/v1"}, ""),
    ],
)
def test_a_model_computes_where_its_options_say(engine: str, options: dict[str, Any], device: str) -> None:
    assert device_of(_model(engine, **options)) == device


@pytest.mark.parametrize(
    ("options", "on_cpu", "on_gpu"),
    [
        ({}, "cpu", "gpu0"),
        ({"gpu_layers": 0}, "cpu", "cpu"),
        ({"main_gpu": 1}, "cpu", "gpu1"),
        ({"tensor_split": [0, 0, 1, 1]}, "cpu", "gpu2"),
        ({"tensor_split": [0, 0, 1, 1], "main_gpu": 3}, "cpu", "gpu3"),
    ],
)
def test_llama_cpp_takes_a_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], on_cpu: str, on_gpu: str
) -> None:
    model = _model("llama.cpp", **options)
    for has_gpu, device in ((False, on_cpu), (True, on_gpu)):
        monkeypatch.setattr("forebay.replicas.commands.llama_cpp_has_gpu", lambda has_gpu=has_gpu: has_gpu)
        assert device_of(model) == device


def test_a_gpu_is_of_use_only_to_a_build_for_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package, gpu = tmp_path / "xllamacpp", tmp_path / "nvidia0"
    package.mkdir()
    (package / "__init__.py").touch()
    library = package / "xllamacpp.abi3.so"
    library.write_bytes(b"\x7fELF ggml_cpu_init \0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "xllamacpp", raising=False)
    monkeypatch.setattr(devices, "_GPU_FILES", (str(gpu),))
    found = []
    for change in (lambda: None, gpu.touch, lambda: library.write_bytes(b"\x7fELF ggml_cuda_init \0"), gpu.unlink):
        change()
        devices.llama_cpp_has_gpu.cache_clear()
        found.append(devices.llama_cpp_has_gpu())
    devices.llama_cpp_has_gpu.cache_clear()
    assert found == [False, False, True, False]


def test_engines_of_ours_can_stand_still_and_what_others_run_cannot() -> None:
    ours = ("llama.cpp", "onnx", "whisper", "speakers", "aligner", "diffusion", "opencv", "fake")
    options: dict[str, dict[str, Any]] = {"onnx": {"capability": "embedding"}}
    assert all(traits_of(_model(engine, **options.get(engine, {}))).pausable for engine in ours)
    assert traits_of(_model("command", argv=["serve"])).pausable
    assert not traits_of(_model("command", argv=["serve"], pausable=False)).pausable
    assert not traits_of(_model("vllm")).pausable
    assert not traits_of(_model("upstream", base_url="https://models.example.com/v1")).pausable
