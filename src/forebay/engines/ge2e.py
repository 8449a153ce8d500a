"""The GE2E speaker encoder: from the sound of a second and a half to a vector that is like others of the same voice.

It refuses weights of another shape, and knows nothing of speakers, regions or requests.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as library

from forebay.engines.onnx_model import raise_if_memory
from forebay.engines.torch_weights import NotWeights, Tensor, read_weights

DIMENSIONS = 256
HOP_SAMPLES = 160
WINDOW_FRAMES = 160  # what the network was trained on
WINDOW_SAMPLES = WINDOW_FRAMES * HOP_SAMPLES
_RATE = 16_000
_FFT = 400
_MELS = 40
_LAYERS = 3
_FRAMES_AT_ONCE = 4096
_LOUDNESS = 10 ** (-30 / 20)  # what is quieter is made as loud as this, as in training
_SMALL = 1e-12
_OPSET = 17
_IR_VERSION = 8
_GATES = (0, 3, 1, 2)  # PyTorch's order is input, forget, cell, output; ONNX's is input, output, forget, cell

Floats = npt.NDArray[np.float32]


class Ge2e:
    """The loaded network. `vectors` may run in several threads at once."""

    def __init__(self, path: Path, threads: int) -> None:
        """Raises NotWeights, OSError or OutOfMemory."""
        weights = read_weights(path, "model_state")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that spin while they wait take the core from whatever else runs there.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = _model(weights).SerializeToString()
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def vectors(self, windows: Floats) -> Floats:
        """One vector of length 1 for each of `windows` [windows, frames, mels]. Raises OutOfMemory."""
        try:
            (found,) = self._session.run(None, {"mels": np.ascontiguousarray(windows.transpose(1, 0, 2))})
        except (library.Fail, library.RuntimeException, RuntimeError, MemoryError) as error:
            raise_if_memory(error)
            raise
        return np.asarray(found, dtype=np.float32)


def mel_frames(samples: Floats) -> Floats:
    """The power of each of 40 mel bands in every 10 ms [frames, mels], of sound in -1..1."""
    padded = np.pad(samples, _FFT // 2)
    count = 1 + len(samples) // HOP_SAMPLES
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::HOP_SAMPLES][:count]
    found = np.empty((count, _MELS), dtype=np.float32)
    for first in range(0, count, _FRAMES_AT_ONCE):
        part = slice(first, first + _FRAMES_AT_ONCE)
        found[part] = np.abs(np.fft.rfft(frames[part] * _hann())) ** 2 @ _filters().T
    return found


def gain(samples: Floats) -> float:
    """By what the network wants quiet sound multiplied; 1 for what is loud enough."""
    loudness = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0.0
    return max(1.0, _LOUDNESS / max(loudness, _SMALL))


@cache
def _hann() -> Floats:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)).astype(np.float32)


@cache
def _filters() -> Floats:
    """Triangles that are evenly spaced on Slaney's mel scale, each of area 1 [mels, bins]."""
    edges = _hertz(np.linspace(0.0, _mel(_RATE / 2), _MELS + 2))
    bins = np.fft.rfftfreq(_FFT, 1 / _RATE)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    triangles = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return triangles.astype(np.float32)


_LINEAR_HERTZ = 200 / 3  # one mel, below 1,000 Hz; above, 27 mels are a factor of 6.4
_CORNER_MEL = 15.0
_CORNER_HERTZ = 1000.0
_LOG_STEP = np.log(6.4) / 27


def _mel(hertz: float) -> float:
    return float(_CORNER_MEL + np.log(hertz / _CORNER_HERTZ) / _LOG_STEP)


def _hertz(mels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(mels < _CORNER_MEL, mels * _LINEAR_HERTZ, _CORNER_HERTZ * np.exp(_LOG_STEP * (mels - _CORNER_MEL)))


def _model(weights: dict[str, Tensor]) -> onnx.ModelProto:
    """Three layers of LSTM, and what the last one ends with through a linear layer and ReLU, at length 1."""
    nodes, tensors, flow = [], [], "mels"
    for layer in range(_LAYERS):
        width = _MELS if layer == 0 else DIMENSIONS
        names = [f"weight_{layer}", f"recurrence_{layer}", f"bias_{layer}"]
        tensors += [
            numpy_helper.from_array(each, name) for each, name in zip(_layer(weights, layer, width), names, strict=True)
        ]
        outputs = [f"all_{layer}", f"last_{layer}"]
        nodes.append(helper.make_node("LSTM", [flow, *names], outputs, hidden_size=DIMENSIONS))
        nodes.append(helper.make_node("Squeeze", [outputs[0], "one"], [flow := f"flow_{layer}"]))
    tensors += [
        numpy_helper.from_array(_of_shape(weights, "linear.weight", (DIMENSIONS, DIMENSIONS)).T.copy(), "linear"),
        numpy_helper.from_array(_of_shape(weights, "linear.bias", (DIMENSIONS,)), "offset"),
        numpy_helper.from_array(np.array([_SMALL], dtype=np.float32), "small"),
        numpy_helper.from_array(np.array([1], dtype=np.int64), "one"),
        numpy_helper.from_array(np.array([0], dtype=np.int64), "zero"),
    ]
    nodes += [
        helper.make_node("Squeeze", [f"last_{_LAYERS - 1}", "zero"], ["end"]),
        helper.make_node("MatMul", ["end", "linear"], ["product"]),
        helper.make_node("Add", ["product", "offset"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["raw"]),
        helper.make_node("ReduceL2", ["raw"], ["length"], axes=[1], keepdims=1),
        helper.make_node("Max", ["length", "small"], ["divisor"]),
        helper.make_node("Div", ["raw", "divisor"], ["vectors"]),
    ]
    given = helper.make_tensor_value_info("mels", TensorProto.FLOAT, ["frames", "windows", _MELS])
    found = helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["windows", DIMENSIONS])
    graph = helper.make_graph(nodes, "ge2e", [given], [found], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)


def _layer(weights: dict[str, Tensor], layer: int, width: int) -> Iterator[Tensor]:
    """What ONNX's LSTM takes: the weights of its input and of its last output, and both biases in one row."""
    rows = 4 * DIMENSIONS
    yield _in_order(_of_shape(weights, f"lstm.weight_ih_l{layer}", (rows, width)))[None]
    yield _in_order(_of_shape(weights, f"lstm.weight_hh_l{layer}", (rows, DIMENSIONS)))[None]
    biases = [_in_order(_of_shape(weights, f"lstm.bias_{which}_l{layer}", (rows,))) for which in ("ih", "hh")]
    yield np.concatenate(biases)[None]


def _in_order(rows: Tensor) -> Tensor:
    gates = rows.reshape(4, DIMENSIONS, *rows.shape[1:])
    return np.ascontiguousarray(gates[list(_GATES)].reshape(rows.shape))


def _of_shape(weights: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    found = weights.get(name)
    if found is None or found.shape != shape:
        raise NotWeights(f"These weights cannot be used: {name} is not of the shape {'x'.join(map(str, shape))}.")
    return found
