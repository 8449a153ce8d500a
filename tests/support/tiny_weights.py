"""Weights beside a tiny diffusion model: its transformer as a GGUF file, and a LoRA for it. Torch is not needed for that."""

from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

_LORA_RANK = 4


def quantised(folder: Path, made: Path) -> Path:
    """The transformer of the model in `folder` with matrices in Q8_0, as one file `made`."""
    writer = gguf.GGUFWriter(made, "flux")
    for name, values in load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors").items():
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def lora(folder: Path, made: Path, parts: tuple[str, ...] = ("attn.to_q", "attn.to_v")) -> Path:
    """Random changes of some `parts` of the transformer of the model in `folder`, as one file `made`."""
    random = np.random.default_rng(3)
    changes = {}
    for name, values in load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors").items():
        if name.endswith(tuple(f"{part}.weight" for part in parts)):
            wide, high = values.shape
            key = f"transformer.{name.removesuffix('.weight')}"
            changes[f"{key}.lora_A.weight"] = random.normal(size=(_LORA_RANK, high)).astype(np.float32)
            changes[f"{key}.lora_B.weight"] = random.normal(size=(wide, _LORA_RANK)).astype(np.float32)
    save_file(changes, made)
    return made
