"""How much memory a model will take of which nothing was measured yet: from its settings and the size of its files.

It refuses to be exact: the figures were measured on our engines with small models, lean to the safe side, and count until
the first start has been measured. It reads the header of a GGUF file, and of others no more than their sizes.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from forebay.errors import SetupError
from forebay.model_config import DiffusionModel, FakeModel, LlamaCppModel, Model, UpstreamModel, VllmModel
from forebay.replicas import gguf
from forebay.replicas.commands import device_of
from forebay.replicas.memory import HOST, Bytes

_MIB = 2**20
_FILES_MAX = 4096
_WEIGHTS = frozenset({".safetensors", ".bin", ".gguf", ".onnx", ".onnx_data", ".pt"})
_GPU_CONTEXT_BYTES = 600 * _MIB  # what a CUDA context and its libraries take on the GPU
# Bytes of one number of the KV cache; those of the quantised types come in blocks of 32 with their scales.
_KV_BYTES = {
    "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32,
}  # fmt: skip
_KV_SHARE_UNKNOWN = 0.5  # of the weights, where the header does not tell
_SETTINGS_THAT_MATTER = {"engine", "options", "slots", "source", "sha256", "files"}


@dataclass(frozen=True, slots=True)
class _Figures:
    """An engine without a model, and how many times its files it comes to while it starts and works."""

    fixed: int
    factor: float


_FIGURES = {
    "llama.cpp": _Figures(64 * _MIB, 1.05),
    "onnx": _Figures(360 * _MIB, 2.0),
    "whisper": _Figures(320 * _MIB, 1.5),
    "speakers": _Figures(150 * _MIB, 2.0),
    "aligner": _Figures(200 * _MIB, 1.5),
    "opencv": _Figures(200 * _MIB, 1.0),
    "diffusion": _Figures(600 * _MIB, 1.3),
    "vllm": _Figures(4096 * _MIB, 1.0),
    "command": _Figures(256 * _MIB, 1.2),
    "fake": _Figures(64 * _MIB, 1.0),
}


def fingerprint(model: Model) -> str:
    """Stands for all settings that matter to the memory of a model: under another one it is measured anew."""
    said = model.model_dump_json(include=_SETTINGS_THAT_MATTER)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def declared(model: Model, memory_bytes: int) -> Bytes:
    """What an operator says that a process of it takes, where it runs; nothing for what runs elsewhere."""
    device = device_of(model)
    return {named(device): memory_bytes} if device else {}


def estimate(model: Model, path: Path | None, gpus: Bytes) -> Bytes:
    """Bytes by device of one process. `path` is its file or folder, if it has one; `gpus` what each GPU has in all."""
    if isinstance(model, UpstreamModel):
        return {}
    device, figures = named(device_of(model)), _FIGURES[model.engine]
    files = _weights(path, model)
    if device == HOST:
        return {HOST: figures.fixed + int(files * figures.factor) + _cache(model, path, files)}
    if isinstance(model, VllmModel):
        share = model.options.gpu_memory_utilization
        taken = {f"gpu{number}": share for number in range(model.options.tensor_parallel)}
        return {HOST: figures.fixed, **{name: int(gpus.get(name, 0) * part) for name, part in taken.items()}}
    waiting = files if isinstance(model, DiffusionModel) and model.options.offload != "none" else 0
    computed = int(files * figures.factor) + _cache(model, path, files)
    return {HOST: figures.fixed + waiting, **_split(model, device, computed)}


def taken_along(model: Model, path: Path | None) -> int:
    """Bytes that a process of it takes from its GPU to the host when it sleeps."""
    keeps = isinstance(model, VllmModel) and model.options.sleep_level == 1
    return _weights(path, model) if keeps else 0


def _split(model: Model, device: str, computed: int) -> Bytes:
    """What a model takes of its GPUs: of one, or of all that it is spread over."""
    shares = model.options.tensor_split if isinstance(model, LlamaCppModel) else ()
    if sum(shares) <= 0:
        return {device: _GPU_CONTEXT_BYTES + computed}
    parts = {f"gpu{number}": share / sum(shares) for number, share in enumerate(shares) if share > 0}
    return {name: _GPU_CONTEXT_BYTES + int(computed * part) for name, part in parts.items()}


def _cache(model: Model, path: Path | None, files: int) -> int:
    """The KV cache of all places of a llama.cpp process: it is taken at the start, whoever asks for how much."""
    if not isinstance(model, LlamaCppModel) or path is None:
        return 0
    try:
        values = gguf.check(path).token_values
    except SetupError:  # it is not there yet, or its start will say what is wrong with it
        values = None
    if values is None:
        return int(files * _KV_SHARE_UNKNOWN)
    return int(values * _KV_BYTES[model.options.kv_type] * model.options.context * model.slots)


def _weights(path: Path | None, model: Model) -> int:
    """The size of its files; of those that are not there yet what its settings say."""
    if isinstance(model, FakeModel):
        return model.options.ballast_bytes
    try:
        if path is not None and path.is_dir():
            return _folder(path, model.options.variant if isinstance(model, DiffusionModel) else None)
        beside = path.parent.glob(f"{path.name}_data") if path is not None else ()  # an ONNX model's own weights
        return sum(file.stat().st_size for file in (path, *beside) if file is not None)
    except OSError:
        return model.size_bytes or 0


def _folder(path: Path, variant: str | None) -> int:
    """The weights in a folder of a pipeline: of each part those of the variant (`model.fp16.safetensors`), or the plain."""
    sizes: dict[Path, dict[str, int]] = {}
    for number, file in enumerate(path.rglob("*")):
        if number >= _FILES_MAX:
            break
        if file.suffix in _WEIGHTS and file.is_file():
            _, _, named = file.stem.rpartition(".") if "." in file.stem else ("", "", "")
            part = sizes.setdefault(file.parent, {})
            part[named] = part.get(named, 0) + file.stat().st_size
    return sum(part.get(variant or "", part.get("", 0)) for part in sizes.values())


def named(device: str) -> str:
    """The device of the ledger on which a model computes."""
    return HOST if device == "cpu" else device
