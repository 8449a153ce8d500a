"""Tiny random models in ONNX: a table of vectors for tokens, and a cross-encoder on top of it."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY = 30_522
WIDTH = 8
_rng = np.random.default_rng(7)
TABLE = _rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
KINDS = _rng.normal(size=(2, WIDTH)).astype(np.float32)


def head(classes: int) -> np.ndarray:
    """The weights from summed vectors to logits."""
    return np.random.default_rng(classes).normal(size=(WIDTH, classes)).astype(np.float32)


def encoder(path: Path, rows: int = VOCABULARY) -> Path:
    """`last_hidden_state` is the vector of each of the first `rows` tokens; padding is whatever its token has."""
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])]
    output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "length", WIDTH])
    return _save(path, nodes, {"table": TABLE[:rows]}, ["input_ids", "attention_mask"], output)


def cross_encoder(path: Path, classes: int = 1) -> Path:
    """`logits` of the sum over the tokens of vector plus kind, under the mask."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("Gather", ["kinds", "token_type_ids"], ["sides"]),
        helper.make_node("Mul", ["words", "sides"], ["both"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["both", "column"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "middle"], ["summed"], keepdims=0),
        helper.make_node("MatMul", ["summed", "head"], ["logits"]),
    ]
    weights = {"table": TABLE, "kinds": KINDS, "head": head(classes), "last": np.array([2]), "middle": np.array([1])}
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])
    return _save(path, nodes, weights, ["input_ids", "attention_mask", "token_type_ids"], output)


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    inputs: list[str],
    output: onnx.ValueInfoProto,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in inputs],
        [output],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path
