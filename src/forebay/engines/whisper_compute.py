"""The compute process of the whisper engine: it holds the model, and does one step at a time for the front process.

It refuses to know requests, and it decides nothing about who is served: it answers what it is asked over its standard
input and output, and ends with the front process. A step cannot be interrupted; whoever does not want to wait kills it.

A message is `>II` lengths, a JSON head and bytes; both directions. First it says what the model can. Then, for each
`{"do": "encode" | "generate" | "align", "forget": [ids], ...}`, it answers `{"chunks": [...]}`: for each chunk what is
`next` for it and with whom it may be computed (`key`), or its segments, and the `seconds` that it took; or
`{"error": "out_of_memory" | "engine_error"}`.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import ctranslate2
import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.audio import pad_or_trim
from faster_whisper.tokenizer import _LANGUAGE_CODES, Tokenizer
from faster_whisper.transcribe import get_suppressed_tokens
from numpy.typing import NDArray

from forebay.engines.start import keep_stdout, refuse_to_start, run_out_of_memory
from forebay.engines.whisper_text import Part, Tries, Try, split

_PR_SET_PDEATHSIG = 1
_FULL_SCALE = 32768.0
_FRAMES_MAX = 3000
_FRAMES_MIN = 2  # the model hears two as one, and times of words have to be found in one at least
_REST_SECONDS_MIN = 1.0
_UNSURE_REST_SECONDS_MIN = 5.0  # of sound that may be silence; the model would make something up
_PROMPT_TOKENS_MAX = 223
_PREPENDED = "\"'“¿([{-"
_APPENDED = "\"'.。,，!！?？:：”)]}、"
_NUMERALS = frozenset("0123456789%$€£¥")
_SHORTAGES = ("out of memory", "memoryallocation", "alloc_failed", "failed to allocate")


@dataclass(slots=True)
class _Chunk:
    """One chunk between its steps."""

    encoded: NDArray[Any]
    frames: int
    duration: float
    tokenizer: Any
    words: bool
    tries: Tries
    prompt: list[int]
    parts: list[Part]
    rest: float | None = None

    @property
    def written(self) -> Try:
        """What it was decided to be."""
        return self.tries.best()


class Model:
    """A loaded model and the chunks that are under way."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._model = WhisperModel(
            spec["model_path"],
            device=spec["device"],
            device_index=spec["device_index"],
            compute_type=spec["compute_type"],
            cpu_threads=spec["threads"],
            local_files_only=True,
        )
        self._rehearse = spec["rehearse"]
        self._threads = spec["threads"] if spec["device"] == "cpu" else 0
        self._chunks: dict[int, _Chunk] = {}
        self._tokenizers: dict[tuple[str, str], Any] = {}
        if spec["warm_up"]:
            self._warm_up()

    @property
    def multilingual(self) -> bool:
        """Whether it knows more than English."""
        return bool(self._model.model.is_multilingual)

    @property
    def abilities(self) -> dict[str, Any]:
        """What the front process is told first."""
        vocabulary = self._model.hf_tokenizer
        known = [code for code in _LANGUAGE_CODES if vocabulary.token_to_id(f"<|{code}|>") is not None]
        languages = known if self.multilingual else ["en"]
        return {"multilingual": self.multilingual, "languages": languages, "tokens": vocabulary.get_vocab_size()}

    def do(self, what: dict[str, Any], data: bytes) -> dict[str, Any]:
        """One step."""
        for number in what.get("forget", ()):
            self._chunks.pop(number, None)
        steps: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "encode": lambda: self._encode(what["chunks"], data),
            "generate": lambda: self._generate(what["ids"]),
            "align": lambda: self._align(what["ids"]),
        }
        self._check_rehearsal(what)
        begun = self._clock()
        chunks = list(steps[what["do"]]())
        return {"chunks": chunks, "seconds": self._clock() - begun}

    def _clock(self) -> float:
        """Seconds that steps take. On a CPU as if it had that to itself: small steps would only add to a crowd."""
        return time.process_time() / self._threads if self._threads else time.monotonic()

    def _encode(self, asked: Sequence[dict[str, Any]], data: bytes) -> Iterator[dict[str, Any]]:
        sound = np.frombuffer(data, "<i2").astype(np.float32) / _FULL_SCALE
        features, begin = [], 0
        for each in asked:
            features.append(self._model.feature_extractor(sound[begin : begin + each["samples"]])[..., :-1])
            begin += each["samples"]
        encoded = self._encoded(np.stack([pad_or_trim(each) for each in features]))
        for row, each, found in zip(encoded, asked, features, strict=True):
            language, probability = each["language"], None
            if language is None:
                language, probability = self._language(row)
            tokenizer = self._tokenizer(each["task"], language)
            options = each["options"]
            prompt = self._prompt(tokenizer, options)
            frames = min(_FRAMES_MAX, max(_FRAMES_MIN, found.shape[-1]))
            duration = each["samples"] / self._model.feature_extractor.sampling_rate
            chunk = _Chunk(row, frames, duration, tokenizer, each["words"], Tries(options), prompt, [])
            self._chunks[each["id"]] = chunk
            told = {} if probability is None else {"language": language, "probability": probability}
            yield {"id": each["id"], **_generation(chunk), **told}

    def _encoded(self, features: NDArray[np.float32]) -> NDArray[Any]:
        view = self._model.model.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(features)), to_cpu=True)
        return np.array(view.to(ctranslate2.DataType.float32))

    def _language(self, encoded: NDArray[Any]) -> tuple[str, float]:
        token, probability = self._model.model.detect_language(_view([encoded]))[0][0]
        return token[2:-2], float(probability)

    def _generate(self, ids: Sequence[int]) -> Iterator[dict[str, Any]]:
        chunks = [self._chunks[number] for number in ids]
        options, temperature = chunks[0].tries.options, chunks[0].tries.temperature
        how = (
            {
                "beam_size": 1,
                "num_hypotheses": options["best_of"],
                "sampling_topk": 0,
                "sampling_temperature": temperature,
            }
            if temperature > 0
            else {"beam_size": options["beam_size"], "patience": options["patience"]}
        )
        results = self._model.model.generate(
            _view([chunk.encoded for chunk in chunks]),
            [chunk.prompt for chunk in chunks],
            length_penalty=options["length_penalty"],
            repetition_penalty=options["repetition_penalty"],
            no_repeat_ngram_size=options["no_repeat_ngram_size"],
            max_length=self._model.max_length,
            return_scores=True,
            return_no_speech_prob=True,
            suppress_tokens=self._suppressed(chunks[0].tokenizer, options),
            **how,
        )
        for number, chunk, result in zip(ids, chunks, results, strict=True):
            chunk.tries.all.append(_tried(result, chunk, temperature))
            yield {"id": number, **(self._written(chunk) if chunk.tries.ended else _generation(chunk))}

    def _written(self, chunk: _Chunk) -> dict[str, Any]:
        """What is next for a chunk whose text is decided."""
        written = chunk.written
        if chunk.tries.silent(written):
            return _ended(chunk, [])
        whole = len(chunk.prompt) + len(written.tokens) < self._model.max_length
        rest_min = _REST_SECONDS_MIN if chunk.tries.options["vad"] else _UNSURE_REST_SECONDS_MIN
        timestamps = chunk.tokenizer.timestamp_begin
        chunk.parts, chunk.rest = split(written.tokens, timestamps, chunk.duration, whole=whole, rest_min=rest_min)
        if chunk.words and any(_text_tokens(chunk, part) for part in chunk.parts):
            return {"next": "align", "key": ""}
        return _ended(chunk, [_part(part) for part in chunk.parts])

    def _align(self, ids: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Times of words, of one chunk at a time: together they are no faster, and what is padded changes them."""
        for number in ids:
            chunk = self._chunks[number]
            parts = [_part(part) for part in chunk.parts]
            encoded = _view([chunk.encoded])
            self._model.add_word_timestamps([parts], chunk.tokenizer, encoded, chunk.frames, _PREPENDED, _APPENDED, 0.0)
            yield {"id": number, **_ended(chunk, parts)}

    def _prompt(self, tokenizer: Any, options: Mapping[str, Any]) -> list[int]:
        hotwords = options["hotwords"] and options["hotwords"].strip()
        given = (options["initial_prompt"] or "").strip()
        room = _PROMPT_TOKENS_MAX - (len(tokenizer.encode(" " + hotwords)) if hotwords else 0)
        before = tokenizer.encode(" " + given)[-room:] if given and room > 0 else []
        prompt: list[int] = self._model.get_prompt(tokenizer, before, hotwords=hotwords or None)
        return prompt

    def _suppressed(self, tokenizer: Any, options: Mapping[str, Any]) -> list[int]:
        wanted = list(options["suppress_tokens"])
        found = set(get_suppressed_tokens(tokenizer, wanted) if wanted else ())
        return sorted(found | self._numerals if options["suppress_numerals"] else found)

    @cached_property
    def _numerals(self) -> frozenset[int]:
        vocabulary = self._model.hf_tokenizer
        texts = ((number, vocabulary.decode([number])) for number in range(vocabulary.token_to_id("<|endoftext|>")))
        return frozenset(number for number, text in texts if not _NUMERALS.isdisjoint(text))

    def _tokenizer(self, task: str, language: str) -> Any:
        key = (task, language)
        if key not in self._tokenizers:
            self._tokenizers[key] = Tokenizer(self._model.hf_tokenizer, self.multilingual, task, language)
        return self._tokenizers[key]

    def _warm_up(self) -> None:
        """Compute something once, so that the first request finds everything in its place."""
        tokenizer = self._tokenizer("transcribe", "en")
        encoded = _view(list(self._encoded(np.zeros((1, self._model.model.n_mels, _FRAMES_MAX), np.float32))))
        self._model.model.generate(encoded, [tokenizer.sot_sequence], max_length=8)
        self._model.find_alignment(tokenizer, [tokenizer.encode(" warm up")], encoded, [_FRAMES_MAX])

    def _check_rehearsal(self, what: dict[str, Any]) -> None:
        """Let happen what a prompt asks for, where the engine was started to rehearse mishaps."""
        if not self._rehearse:
            return
        numbers = [each["id"] for each in what.get("chunks", ())] + list(what.get("ids", ()))
        options = [each["options"] for each in what.get("chunks", ())]
        options += [self._chunks[number].tries.options for number in numbers if number in self._chunks]
        prompts = " ".join(each["initial_prompt"] or "" for each in options)
        many = len(numbers) > 1
        if "[[crash]]" in prompts:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "[[out of memory]]" in prompts or ("[[out of memory together]]" in prompts and many):
            raise MemoryError
        if "[[refuse]]" in prompts:
            raise ValueError(prompts)
        if "[[hang]]" in prompts:
            while True:
                np.linalg.svd(np.ones((256, 256)))


def _generation(chunk: _Chunk) -> dict[str, Any]:
    """With whom a chunk may be written: the same options, and prompts of one form. Guesses are made alone."""
    options, temperature = chunk.tries.options, chunk.tries.temperature
    same = {name: options[name] for name in _SHARED} | {"temperature": temperature}
    same["prompt"] = [len(chunk.prompt), chunk.prompt.index(chunk.tokenizer.sot)]
    return {"next": "generate", "key": json.dumps(same, sort_keys=True), "alone": temperature > 0}


_SHARED = (
    *("beam_size", "best_of", "patience", "length_penalty", "repetition_penalty", "no_repeat_ngram_size"),
    *("suppress_tokens", "suppress_numerals"),
)


def _tried(result: Any, chunk: _Chunk, temperature: float) -> Try:
    tokens = tuple(result.sequences_ids[0])
    sum_logprob = result.scores[0] * len(tokens) ** chunk.tries.options["length_penalty"]
    text = chunk.tokenizer.decode(list(tokens)).strip()
    return Try(tokens, text, temperature, sum_logprob / (len(tokens) + 1), float(result.no_speech_prob))


def _part(part: Part) -> dict[str, Any]:
    return {"seek": 0, "start": part.start, "end": part.end, "tokens": list(part.tokens), "words": []}


def _text_tokens(chunk: _Chunk, part: Part) -> list[int]:
    return [token for token in part.tokens if token < chunk.tokenizer.eot]


def _ended(chunk: _Chunk, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The segments of a chunk, as `speech.segment_to_wire` writes them; those without a text are none."""
    written = chunk.written
    segments = []
    for part in parts:
        text = chunk.tokenizer.decode(part["tokens"])
        if not text.strip():
            continue
        words = [
            {"start": _seconds(word["start"]), "end": _seconds(word["end"]), "text": word["word"],
             "probability": round(float(word["probability"]), 4)}
            for word in part["words"]
        ]  # fmt: skip
        segments.append(
            {
                "start": _seconds(part["start"]),
                "end": _seconds(part["end"]),
                "text": text,
                "tokens": part["tokens"],
                "temperature": written.temperature,
                "avg_logprob": round(written.avg_logprob, 5),
                "compression_ratio": round(written.compression_ratio, 4),
                "no_speech_prob": round(written.no_speech_prob, 5),
                "words": words,
            }
        )
    return {"next": "done", "segments": segments, "rest": chunk.rest}


def _seconds(found: Any) -> float:
    return round(float(found), 3)


def _view(rows: Sequence[NDArray[Any]]) -> Any:
    return ctranslate2.StorageView.from_array(np.ascontiguousarray(np.stack(rows)))


def _shortage(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _SHORTAGES)


def _load(spec: dict[str, Any]) -> Model:
    """The model. Ends the process, saying why, where it cannot be used."""
    for name in ("model.bin", "tokenizer.json"):
        if not Path(spec["model_path"], name).is_file():
            refuse_to_start(f"{spec['name']} has no {name}: it has to be a Whisper model converted for CTranslate2.")
    try:
        return Model(spec)
    except MemoryError:
        run_out_of_memory(f"{spec['name']} needs more memory than there is.")
    except (RuntimeError, ValueError) as error:
        if _shortage(error):
            run_out_of_memory(f"{spec['name']} needs more memory than there is.")
        refuse_to_start(f"{spec['name']} cannot be loaded: {error}.")


def read_message(source: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next message; None at the end."""
    lengths = source.read(8)
    if len(lengths) < 8:
        return None
    head_bytes, data_bytes = struct.unpack(">II", lengths)
    head, data = source.read(head_bytes), source.read(data_bytes)
    return (json.loads(head), data) if len(data) == data_bytes else None


def main() -> None:
    """Load the model, and answer until the front process closes standard input or ends."""
    spec, parent = json.loads(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    out = keep_stdout()
    model = _load(spec)
    _tell(out, model.abilities)
    while message := read_message(sys.stdin.buffer):
        try:
            answer = model.do(*message)
        except (MemoryError, RuntimeError, ValueError, IndexError) as error:
            code = "out_of_memory" if _shortage(error) else "engine_error"
            answer = {"error": code, "reason": f"{type(error).__name__}: {error}"[:500]}
        _tell(out, answer)


def _tell(out: int, answer: dict[str, Any]) -> None:
    head = json.dumps(answer).encode()
    left = memoryview(struct.pack(">II", len(head), 0) + head)
    while left:
        left = left[os.write(out, left) :]


if __name__ == "__main__":
    main()
