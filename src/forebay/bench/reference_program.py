"""A program for another Python: encodes texts with sentence-transformers, at the size of batch that is fastest here.

It refuses to import anything of this package: the Python that runs it has none of it.
"""

import json
import os
import sys
import time
from importlib import import_module
from typing import Any, TextIO

_SIZES = (4, 8, 16, 32, 64)
_TOKENS_MAX = 512
_TRIES = 2


def main() -> None:
    """Answer each line of texts on standard input with a line of figures, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    model = import_module("sentence_transformers").SentenceTransformer(sys.argv[1], device="cpu")
    model.max_seq_length = _TOKENS_MAX  # it would cut what the other side reads
    texts = json.loads(sys.stdin.readline())
    _encode(model, texts, _SIZES[-1])
    size = min(_SIZES, key=lambda each: min(_encode(model, texts, each) for _ in range(_TRIES)))
    versions = {name: import_module(name).__version__ for name in ("sentence_transformers", "torch")}
    _answer(answers, {"batch_size": size, **versions})
    for line in sys.stdin:
        texts = json.loads(line)
        seconds = _encode(model, texts, size)
        read = model.tokenizer(texts, truncation=True, max_length=_TOKENS_MAX)["input_ids"]
        _answer(answers, {"seconds": seconds, "tokens": sum(map(len, read))})


def _encode(model: Any, texts: list[str], size: int) -> float:
    began = time.perf_counter()
    model.encode(texts, batch_size=size, normalize_embeddings=True, show_progress_bar=False)
    return time.perf_counter() - began


def _answer(answers: TextIO, said: dict[str, Any]) -> None:
    answers.write(json.dumps(said) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
