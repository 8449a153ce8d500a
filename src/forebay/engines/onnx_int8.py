"""Turns the matrix products of a model into products of 8-bit integers, before it is loaded.

Weights get a scale for each output, activations one for each block of each token. So a vector never depends on which
other texts happened to be in its batch, as it would with one scale for a whole tensor. It refuses to touch products of
two activations, and whatever does not divide into blocks.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

_BLOCK = 64
_DOMAIN = "com.microsoft"
_COMPUTE_INT8 = 4
_ZERO = 128


def quantised(path: str) -> bytes:
    """The model with its products in integers. Raises what ONNX Runtime raises for a model that it cannot load."""
    with tempfile.TemporaryDirectory() as folder:
        folded = Path(folder) / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        model = onnx.load(folded)
    weights = {each.name: each for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            _replace(model.graph, node, weights[node.input[1]])
    if all(each.domain != _DOMAIN for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return bytes(model.SerializeToString())


def _replace(graph: onnx.GraphProto, node: onnx.NodeProto, weight: onnx.TensorProto) -> None:
    values = numpy_helper.to_array(weight)
    if values.ndim != 2 or values.dtype != np.float32 or values.shape[0] % _BLOCK:
        return
    inner, outer = values.shape
    scales = np.maximum(np.abs(values).max(axis=0) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    whole = np.rint(values / scales).astype(np.int16) + _ZERO
    blocks = whole.astype(np.uint8).T.reshape(outer, inner // _BLOCK, _BLOCK)
    names = f"{weight.name}_int8", f"{weight.name}_scales"
    if names[0] not in {each.name for each in graph.initializer}:
        tensors = (np.ascontiguousarray(blocks), np.repeat(scales, inner // _BLOCK))
        graph.initializer.extend(numpy_helper.from_array(*each) for each in zip(tensors, names, strict=True))
    node.op_type, node.domain = "MatMulNBits", _DOMAIN
    node.input[1:] = names
    shape = {"K": inner, "N": outer, "bits": 8, "block_size": _BLOCK, "accuracy_level": _COMPUTE_INT8}
    node.attribute.extend(helper.make_attribute(key, value) for key, value in shape.items())
    if not any(weight.name in each.input for each in graph.node) and weight in graph.initializer:
        graph.initializer.remove(weight)
