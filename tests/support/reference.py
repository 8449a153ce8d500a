"""all-MiniLM-L6-v2 in float32 and NumPy, from the safetensors file of its authors: what our embeddings are compared with."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_HEADS = 12
_LAYERS = 6
Array = npt.NDArray[np.float32]


class Reference:
    """The encoder, one text at a time, so that no padding can be wrong."""

    def __init__(self, weights: Path) -> None:
        data = weights.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(data[8 : 8 + size])
        values = memoryview(data)[8 + size :]
        self._weights = {
            name: np.frombuffer(values[slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__" and entry["dtype"] == "F32"
        }

    def hidden(self, tokens: list[int]) -> Array:
        """The last hidden state, a row for each token."""
        weight = self._weights
        state = weight["embeddings.word_embeddings.weight"][tokens]
        state = state + weight["embeddings.position_embeddings.weight"][: len(tokens)]
        state = self._norm(state + weight["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for layer in range(_LAYERS):
            state = self._layer(state, f"encoder.layer.{layer}.")
        return state

    def _layer(self, state: Array, name: str) -> Array:
        length, width = state.shape
        query, key, value = (
            self._linear(state, f"{name}attention.self.{part}").reshape(length, _HEADS, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        weights = query @ key.transpose(0, 2, 1) / math.sqrt(width / _HEADS)
        weights = np.exp(weights - weights.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True) @ value).transpose(1, 0, 2).reshape(length, width)
        state = self._norm(
            state + self._linear(mixed, f"{name}attention.output.dense"), f"{name}attention.output.LayerNorm"
        )
        inner = self._linear(state, f"{name}intermediate.dense")
        inner = inner * 0.5 * (1 + _erf(inner / math.sqrt(2)))
        return self._norm(state + self._linear(inner, f"{name}output.dense"), f"{name}output.LayerNorm")

    def _linear(self, state: Array, name: str) -> Array:
        return state @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]

    def _norm(self, state: Array, name: str) -> Array:
        centred = state - state.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]


def _erf(x: Array) -> Array:
    """Abramowitz and Stegun 7.1.26; wrong by 1.5e-7 at most."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.asarray(np.sign(x) * (1 - series * np.exp(-x * x)), dtype=np.float32)


def unit(vector: Array) -> Array:
    """The vector with length 1."""
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)
