"""A model of letters in ONNX that hears tones: each letter has its own, and a text can be said so that times are known."""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

RATE = 16_000
FRAME = 320  # samples, as wav2vec2 has them
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, **{each: 5 + at for at, each in enumerate(LETTERS)}}
TONE_SECONDS = 0.06
GAP_SECONDS = 0.04
_HERTZ_STEP = 100  # a frame holds whole waves of each


_HEAVY = 2048


def save(folder: Path, *, mask: bool = False, layers: int = 0) -> Path:
    """The model with what lies beside it in a repository; `layers` of heavy work make it slow, and change nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    size = len(VOCABULARY)
    time = np.arange(FRAME) / RATE
    waves = 2 * np.pi * _HERTZ_STEP * (2 + np.arange(size))[:, None] * time
    silent = np.array([each in {"<pad>", "<s>", "</s>", "<unk>"} for each in VOCABULARY])[:, None]
    bias = np.zeros((1, size, 1), np.float32)
    bias[0, 0] = 7
    weights = {
        "cos": np.where(silent, 0, np.cos(waves))[:, None].astype(np.float32),
        "sin": np.where(silent, 0, np.sin(waves))[:, None].astype(np.float32),
        "scale": np.array(10 / (FRAME / 2), np.float32),
        "bias": bias,
        "one": np.array([1]),
    }
    nodes = [
        helper.make_node("Unsqueeze", ["input_values", "one"], ["sound"]),
        *(helper.make_node("Conv", ["sound", each], [f"{each}_heard"], strides=[FRAME]) for each in ("cos", "sin")),
        *(helper.make_node("Mul", [f"{each}_heard"] * 2, [f"{each}_power"]) for each in ("cos", "sin")),
        helper.make_node("Add", ["cos_power", "sin_power"], ["power"]),
        helper.make_node("Sqrt", ["power"], ["height"]),
        helper.make_node("Mul", ["height", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["columns" if not layers else "light"]),
        helper.make_node("Transpose", ["columns"], ["logits"], perm=[0, 2, 1]),
    ]
    if layers:
        nodes[-1:-1] = _heavy(layers)
        weights["first"] = np.full((FRAME, _HEAVY), 1e-6, np.float32)
        weights["layer"] = np.full((_HEAVY, _HEAVY), 1e-6, np.float32)
        weights["rows"], weights["nothing"] = np.array([-1, FRAME]), np.array(0, np.float32)
    inputs = [helper.make_tensor_value_info("input_values", TensorProto.FLOAT, ["batch", "samples"])]
    if mask:
        inputs.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "samples"]))
    graph = helper.make_graph(
        nodes,
        "tones",
        inputs,
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "frames", size])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, "sampling_rate": RATE}))
    return path


def _heavy(layers: int) -> list[onnx.NodeProto]:
    """Work for each frame, of which nothing comes."""
    return [
        helper.make_node("Reshape", ["input_values", "rows"], ["framed"]),
        helper.make_node("MatMul", ["framed", "first"], ["layer_0"]),
        *(helper.make_node("MatMul", [f"layer_{at}", "layer"], [f"layer_{at + 1}"]) for at in range(layers)),
        helper.make_node("ReduceSum", [f"layer_{layers}"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "nothing"], ["none"]),
        helper.make_node("Add", ["light", "none"], ["columns"]),
    ]


def said(text: str, at: float = 0.0, seconds: float = 0.0) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Samples in which `text` is said in tones from `at` on, in silence of `seconds` in all, and the times of its words.

    What is no letter is silent; a digit is said as a letter that the text does not name.
    """
    sound, times, now = [np.zeros(round(at * RATE))], [], at
    for place, word in enumerate(text.upper().split()):
        if place:
            sound += [_tone(VOCABULARY["|"]), np.zeros(round(GAP_SECONDS * RATE))]
            now += TONE_SECONDS + GAP_SECONDS
        begin = now
        for character in word:
            symbol = VOCABULARY.get(character, VOCABULARY["Q"] if character.isalnum() else None)
            if symbol is not None:
                sound += [_tone(symbol), np.zeros(round(GAP_SECONDS * RATE))]
                now += TONE_SECONDS + GAP_SECONDS
        times.append((begin, max(begin, now - GAP_SECONDS)))
    samples = np.concatenate(sound)
    samples = np.pad(samples, (0, max(0, round(seconds * RATE) - len(samples))))
    return np.round(samples * 8000).astype("<i2"), times


def _tone(symbol: int) -> np.ndarray:
    return np.sin(2 * np.pi * _HERTZ_STEP * (2 + symbol) * np.arange(round(TONE_SECONDS * RATE)) / RATE)
