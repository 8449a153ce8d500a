"""An engine of text encoders is ready only once it has computed something."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import tiny_onnx
from tests.support.engines import Engine, alive, eventually
from tests.support.models import minilm_path


@contextmanager
def starting(model: Path) -> Iterator[Engine]:
    tokenizer = minilm_path().with_name("tokenizer.json")
    engine = Engine("onnx_text", {"name": "m", "model_path": str(model), "slots": 1, "tokenizer_path": str(tokenizer)})
    try:
        yield engine
    finally:
        engine.end()


def test_a_model_that_can_be_loaded_but_not_computed_is_never_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with starting(tiny_onnx.encoder(tmp_path / "whole.onnx")) as engine:
        engine.wait_until_ready()
    monkeypatch.setattr(tiny_onnx, "TABLE", tiny_onnx.TABLE[:5])  # no vector for any word: to compute is an error
    with starting(tiny_onnx.encoder(tmp_path / "short.onnx")) as engine:
        eventually(lambda: not alive(engine.guard.pid) or "event=ready" in engine.log, 60)
        assert "event=ready" not in engine.log
        assert engine.guard.poll() not in {None, 0}
        assert "bounds" in engine.log, "it was the computation that failed"
