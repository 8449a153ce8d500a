"""A model of random numbers that reads and sees, small enough to be written for each run: a llama and an image encoder in GGUF.

Every byte is a token, so that prompts are as long as their texts, and an image is 16 tokens. It says ASCII alone and never
ends by itself.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 64
LAYERS = 2
HEADS = 4
IMAGE_SIDE = 32
PATCH = 8
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2
_ALIGNMENT = 32
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"

_U32, _F32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_I32 = 5


def write(folder: Path) -> tuple[Path, Path]:
    """The language model and its image encoder (`mmproj`)."""
    chance = np.random.default_rng(7)
    model, encoder = folder / "tiny.gguf", folder / "tiny-mmproj.gguf"
    _write(model, _llama_settings(), _llama_tensors(chance))
    _write(encoder, _encoder_settings(), _encoder_tensors(chance))
    return model, encoder


def _llama_settings() -> dict[str, Any]:
    tokens = [*_byte_letters(), "<s>", "</s>"]
    return {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.context_length": 2048,
        "llama.embedding_length": WIDTH,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": 2 * WIDTH,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.chat_template": _TEMPLATE,
    }


def _byte_letters() -> list[str]:
    """The letters that GPT-2's tokeniser writes for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _llama_tensors(chance: np.random.Generator) -> dict[str, np.ndarray]:
    words = _some(chance, 258, WIDTH)
    words[128:] = 0  # half of the others are above
    tensors = {
        "token_embd.weight": _some(chance, 258, WIDTH),
        "output_norm.weight": np.ones(WIDTH, np.float32),
        "output.weight": words,
    }
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"{block}.{name}.weight"] = np.ones(WIDTH, np.float32)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"{block}.{name}.weight"] = _some(chance, WIDTH, WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            tensors[f"{block}.{name}.weight"] = _some(chance, 2 * WIDTH, WIDTH)
        tensors[f"{block}.ffn_down.weight"] = _some(chance, WIDTH, 2 * WIDTH)
    return tensors


def _encoder_settings() -> dict[str, Any]:
    return {
        "general.architecture": "clip",
        "general.name": "tiny-encoder",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": True,
        "clip.vision.image_size": IMAGE_SIDE,
        "clip.vision.patch_size": PATCH,
        "clip.vision.embedding_length": WIDTH,
        "clip.vision.feed_forward_length": 2 * WIDTH,
        "clip.vision.projection_dim": WIDTH,
        "clip.vision.block_count": 1,
        "clip.vision.attention.head_count": HEADS,
        "clip.vision.attention.layer_norm_epsilon": 1e-5,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
    }


def _encoder_tensors(chance: np.random.Generator) -> dict[str, np.ndarray]:
    tensors = {
        "v.class_embd": _some(chance, WIDTH),
        "v.patch_embd.weight": _some(chance, WIDTH, 3, PATCH, PATCH),
        "v.position_embd.weight": _some(chance, IMAGE_TOKENS + 1, WIDTH),
    }
    for name in ("v.pre_ln", "v.blk.0.ln1", "v.blk.0.ln2"):
        tensors |= {f"{name}.weight": np.ones(WIDTH, np.float32), f"{name}.bias": _some(chance, WIDTH)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        tensors |= _layer(chance, f"v.blk.0.{name}", WIDTH, WIDTH)
    tensors |= _layer(chance, "v.blk.0.ffn_down", WIDTH, 2 * WIDTH) | _layer(chance, "v.blk.0.ffn_up", 2 * WIDTH, WIDTH)
    return tensors | _layer(chance, "mm.0", WIDTH, WIDTH) | _layer(chance, "mm.2", WIDTH, WIDTH)


def _layer(chance: np.random.Generator, name: str, out: int, into: int) -> dict[str, np.ndarray]:
    return {f"{name}.weight": _some(chance, out, into), f"{name}.bias": _some(chance, out)}


def _some(chance: np.random.Generator, *shape: int) -> np.ndarray:
    return (chance.standard_normal(shape) * 0.3).astype(np.float32)


def _write(path: Path, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(settings))
    head += b"".join(_string(key) + _value(value) for key, value in settings.items())
    offset, body = 0, b""
    for name, values in tensors.items():
        shape = values.shape[::-1]
        head += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)
        piece = _padded(values.tobytes())
        body += piece
        offset += len(piece)
    path.write_bytes(_padded(head) + body)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case int():
            return struct.pack("<II", _U32, value)
        case float():
            return struct.pack("<If", _F32, value)
        case str():
            return struct.pack("<I", _STRING) + _string(value)
        case _:
            return _array(value)


def _array(values: list[Any]) -> bytes:
    head = struct.pack("<I", _ARRAY)
    if isinstance(values[0], str):
        return head + struct.pack("<IQ", _STRING, len(values)) + b"".join(map(_string, values))
    kind, letter = (_I32, "i") if isinstance(values[0], int) else (_F32, "f")
    return head + struct.pack(f"<IQ{len(values)}{letter}", kind, len(values), *values)
