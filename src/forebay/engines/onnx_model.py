"""One text encoder in ONNX Runtime: tokens in, one vector or one score for each text out.

It refuses to fall back from the device that was asked for to another one, and to guess which output of a model is meant
when there is none that fits.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as library

from forebay.engines.batcher import Item
from forebay.engines.compute import StepFailed
from forebay.engines.onnx_int8 import quantised
from forebay.engines.serving import OutOfMemory
from forebay.engines.start import refuse_to_start

Vectors = npt.NDArray[np.float32]

PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    "rocm": ("MIGraphXExecutionProvider", "ROCMExecutionProvider"),
}
_ERRORS = (
    library.EPFail, library.EngineError, library.Fail, library.InvalidArgument, library.InvalidGraph,
    library.InvalidProtobuf, library.NoModel, library.NoSuchFile, library.NotImplemented, library.RuntimeException,
    MemoryError, RuntimeError, ValueError,
)  # fmt: skip
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_MEMORY_WORDS = re.compile(r"bad_alloc|out of memory|failed to allocate|bad allocation|BFCArena", re.IGNORECASE)
_SMALL_NORM = 1e-12


def open_session(path: str, provider: str, threads: int, *, int8: bool) -> onnxruntime.InferenceSession:
    """The loaded model on the device that was asked for. Ends the process when that cannot be; raises OutOfMemory."""
    wanted = next((each for each in PROVIDERS[provider] if each in onnxruntime.get_available_providers()), None)
    if wanted is None:
        refuse_to_start(
            f"This build of onnxruntime has no {provider} provider, only "
            f"{', '.join(onnxruntime.get_available_providers())}. Install the build of onnxruntime that has it, or set "
            "`provider` to `cpu`."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait take the core from whatever else runs there: the server, or another engine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(quantised(path) if int8 else path, options, providers=[wanted])
    except _ERRORS as error:
        raise_if_memory(error)
        refuse_to_start(f"ONNX Runtime cannot load {Path(path).name}: {_without_folder(error, path)}")
    if session.get_providers()[0] != wanted:
        refuse_to_start(
            f"ONNX Runtime cannot use {wanted} here; its libraries do not load. Install the driver's version."
        )
    return session


def run_session(
    session: onnxruntime.InferenceSession,
    output: str,
    fed: Mapping[str, npt.NDArray[Any]],
    options: onnxruntime.RunOptions | None = None,
) -> npt.NDArray[Any]:
    """One output of the model. Raises OutOfMemory and StepFailed, the latter too when `options.terminate` was set."""
    try:
        (rows,) = session.run([output], dict(fed), options)
    except _ERRORS as error:
        raise_if_memory(error)
        raise StepFailed(str(error)) from error
    return np.asarray(rows)


class Encoder:
    """A model that turns padded tokens into one row for each text. `encode` may run in several threads at once."""

    def __init__(self, session: onnxruntime.InferenceSession, finish: "Finish", pad: int, tokens_max: int) -> None:
        """`tokens_max` other than 0 rehearses a shortage: a batch with more padded tokens runs out of memory."""
        self._session = session
        self._finish = finish
        self._pad = pad
        self._tokens_max = tokens_max
        self._inputs = [each.name for each in session.get_inputs()]
        unknown = set(self._inputs) - set(_INPUTS)
        if unknown or "input_ids" not in self._inputs:
            refuse_to_start(f"This is no text encoder: its inputs are {', '.join(sorted(self._inputs))}.")
        self._output = _output(session, finish)

    def encode(self, batch: Sequence[Item]) -> list[Any]:
        """One row for each item, in order."""
        longest = max(item.length for item in batch)
        if self._tokens_max and len(batch) * longest > self._tokens_max:
            raise OutOfMemory
        ids = np.full((len(batch), longest), self._pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        kinds = np.zeros_like(ids)
        for row, item in enumerate(batch):
            ids[row, : item.length] = item.tokens
            mask[row, : item.length] = 1
            if item.kinds:
                kinds[row, : item.length] = item.kinds
        fed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
        if "position_ids" in self._inputs:
            fed["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        rows = run_session(self._session, self._output, {name: fed[name] for name in self._inputs})
        return list(self._finish(np.asarray(rows, dtype=np.float32), mask))


Finish = Callable[[Vectors, npt.NDArray[np.int64]], Vectors]
"""From a model's output and the mask to one row for each text."""


def pooled(how: str, *, normalise: bool) -> Finish:
    """Pooling by `how`: `mean`, `cls` or `last`. An output that is one vector for each text already stays as it is."""

    def finish(rows: Vectors, mask: npt.NDArray[np.int64]) -> Vectors:
        vectors = rows if rows.ndim == 2 else _pool(how, rows, mask)
        return normalised(vectors) if normalise else vectors

    return finish


def _pool(how: str, rows: Vectors, mask: npt.NDArray[np.int64]) -> Vectors:
    match how:
        case "cls":
            return np.asarray(rows[:, 0])
        case "last":
            return np.asarray(rows[np.arange(len(rows)), mask.sum(axis=1) - 1])
        case _:
            shares = mask.astype(np.float32)
            shares /= shares.sum(axis=1, keepdims=True)
            return np.asarray(np.matmul(shares[:, None, :], rows)[:, 0])


def normalised(vectors: Vectors) -> Vectors:
    """Vectors of length 1."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, _SMALL_NORM), dtype=np.float32)


def scores(rows: Vectors, mask: npt.NDArray[np.int64]) -> Vectors:
    """One raw score for each text of a cross-encoder with one logit, or with the classes no and yes."""
    logits = rows.reshape(len(rows), -1)
    return np.asarray(logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0])


def _output(session: onnxruntime.InferenceSession, finish: Finish) -> str:
    """The output that is meant."""
    outputs = {each.name: len(each.shape or ()) for each in session.get_outputs()}
    if finish is scores:
        fitting = [name for name in ("logits", *outputs) if outputs.get(name) == 2]
    else:
        names = ("last_hidden_state", "token_embeddings", *(name for name in outputs if outputs[name] == 3))
        fitting = [name for name in (*names, "sentence_embedding", *outputs) if outputs.get(name) in {2, 3}]
    if not fitting:
        refuse_to_start(f"This model has no output that fits: it has {', '.join(outputs)}.")
    return str(fitting[0])


def raise_if_memory(error: Exception) -> None:
    """Raise OutOfMemory if that is what `error` of ONNX Runtime means."""
    if isinstance(error, MemoryError) or _MEMORY_WORDS.search(str(error)):
        raise OutOfMemory from error


def _without_folder(error: Exception, path: str) -> str:
    return str(error).replace(str(Path(path).parent), "…")[:500]
