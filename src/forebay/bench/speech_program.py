"""A program for a process of its own: transcribes with faster-whisper driven directly, one file after another.

It refuses to import anything else of this package, so that its memory is that of the library.
"""

import json
import os
import sys
import time
from typing import Any, TextIO


def main() -> None:
    """Answer each line of files on standard input with a line of texts, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    import faster_whisper  # noqa: PLC0415  # what it prints when it is loaded goes there as well

    settings = json.loads(sys.argv[1])
    model = faster_whisper.WhisperModel(settings.pop("model"), **settings)
    for line in sys.stdin:
        wanted = json.loads(line)
        began = time.perf_counter()
        texts = [_transcribe(model, path, wanted["options"]) for path in wanted["paths"]]
        seconds = time.perf_counter() - began
        _answer(answers, {"seconds": seconds, "texts": texts, "version": faster_whisper.__version__})


def _transcribe(model: Any, path: str, options: dict[str, Any]) -> str:
    segments, _ = model.transcribe(path, **options)
    return "".join(segment.text for segment in segments)


def _answer(answers: TextIO, said: dict[str, Any]) -> None:
    answers.write(json.dumps(said) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
