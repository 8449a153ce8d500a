"""A model of letters in ONNX Runtime (wav2vec2 with CTC): pieces of a recording in, log-probabilities of letters out.

It refuses a model whose files beside it do not say which symbol is which, and never lets what a piece gives depend on the
pieces that are computed with it.
"""

import json
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import numpy.typing as npt
import onnxruntime

from forebay.engines.batcher import Item
from forebay.engines.compute import StepFailed
from forebay.engines.ctc import WILDCARD, Alphabet, Emissions
from forebay.engines.onnx_model import open_session, run_session
from forebay.engines.serving import OutOfMemory
from forebay.engines.start import refuse_to_start
from forebay.engines.threads import Wanted, cores
from forebay.speech import SAMPLE_RATE

Samples = npt.NDArray[np.int16]

_BLANKS = ("<pad>", "[PAD]", "<blank>", "<blk>")
_DELIMITERS = ("|", " ", "▁")
_FILE_BYTES_MAX = 16 * 2**20
_PIECE_STEP = SAMPLE_RATE  # lengths of pieces are multiples of it, so that many have the same
_CORE_SAMPLES = 10 * SAMPLE_RATE
_CONTEXT_SAMPLES = SAMPLE_RATE  # heard on each side of a piece, and not used
_QUIET = 1e-7


@dataclass(frozen=True, slots=True)
class Ear:
    """What one request listens for: the columns of these symbols, and whether anybody still waits."""

    symbols: npt.NDArray[np.int64]
    wanted: Wanted


class Piece(Sequence[int]):
    """A stretch of samples to listen to, of which the frames from `first` to `last` (samples of the recording) count."""

    def __init__(self, recording: Samples, begin: int, length: int, first: int, last: int, ear: Ear) -> None:
        self.begin, self.first, self.last, self.ear = begin, first, last, ear
        self._recording = recording
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: Any) -> Any:
        return self._recording[self.begin : self.begin + self._length][place]

    @property
    def samples(self) -> Samples:
        """What is there of them; the recording may end before."""
        return self._recording[self.begin : self.begin + self._length]


@dataclass(frozen=True, slots=True)
class Letters:
    """What was heard in a piece: log-probabilities for frames, and the sample at which each begins and the last ends."""

    emissions: Emissions
    borders: npt.NDArray[np.float64] = field(repr=False)


def pieces(recording: Samples, first: int, last: int, ear: Ear) -> Iterator[Piece]:
    """The samples from `first` to `last` in pieces, each with what is around it."""
    count = max(1, -(-(last - first) // _CORE_SAMPLES))
    for number in range(count):
        low = first + (last - first) * number // count
        high = first + (last - first) * (number + 1) // count
        begin = max(0, low - _CONTEXT_SAMPLES)
        length = -(-(high + _CONTEXT_SAMPLES - begin) // _PIECE_STEP) * _PIECE_STEP
        begin = max(0, min(begin, len(recording) - length))
        yield Piece(recording, begin, length, low, high, ear)


def joined(parts: Sequence[Letters]) -> Letters:
    """The parts of one segment as one."""
    borders = [each.borders[:-1] for each in parts] + [parts[-1].borders[-1:]]
    return Letters(np.concatenate([each.emissions for each in parts]), np.concatenate(borders))


class Vocabulary:
    """Which symbol stands for which character."""

    def __init__(self, folder: Path) -> None:
        self._ids = _ids(folder)
        blank = next((self._ids[each] for each in _BLANKS if each in self._ids), None)
        if blank is None:
            refuse_to_start(f"The vocabulary beside the model has no blank symbol: none of {', '.join(_BLANKS)}.")
        delimiter = next((self._ids[each] for each in _DELIMITERS if each in self._ids), None)
        self.alphabet = Alphabet(blank, delimiter)
        self.size = max(self._ids.values()) + 1

    def symbols(self, word: str) -> list[list[int]]:
        """The symbols of each character of a word: none for what is not said, a wildcard for what is not known."""
        return [self._symbols(character) for character in word]

    def _symbols(self, character: str) -> list[int]:
        plain = unicodedata.normalize("NFKD", character)[:1]
        for form in (character, character.lower(), character.upper(), plain, plain.lower(), plain.upper()):
            if form and form not in _DELIMITERS and all(each in self._ids for each in form):
                return [self._ids[each] for each in form]
        return [WILDCARD] if character.isalnum() else []


def _ids(folder: Path) -> dict[str, int]:
    found = _read(folder / "vocab.json")
    if found is None and (whole := _read(folder / "tokenizer.json")) is not None:
        model = whole.get("model")
        found = model.get("vocab") if isinstance(model, dict) else None
    if found is None:
        _refuse("The model needs its `vocab.json` beside it, which says which symbol is which.")
    if not found or not all(type(each) is int and 0 <= each < 2**20 for each in found.values()):
        _refuse("`vocab.json` beside the model has to be one object from symbols to their numbers.")
    return cast(dict[str, int], found)


def _refuse(reason: str) -> NoReturn:
    refuse_to_start(reason)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_FILE_BYTES_MAX))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        refuse_to_start(f"{path.name} beside the model cannot be read: {type(error).__name__}.")
    return found if isinstance(found, dict) else None


class Listener:
    """The loaded model. `listen` may run in several threads at once; `stop_unwanted` may be called from another."""

    def __init__(self, model: Path, threads: int, samples_max: int) -> None:
        """`samples_max` other than 0 rehearses a shortage: a batch with more samples runs out of memory."""
        path = model / "model.onnx" if model.is_dir() else model
        self.vocabulary = Vocabulary(path.parent)
        self._samples_max = samples_max
        settings = _read(path.parent / "preprocessor_config.json") or {}
        self._normalise = settings.get("do_normalize", True) is not False
        if settings.get("sampling_rate", SAMPLE_RATE) != SAMPLE_RATE:
            refuse_to_start(
                f"The model listens at another rate than {SAMPLE_RATE} samples a second. Take one that fits."
            )
        self._session = open_session(str(path), "cpu", threads or cores(), int8=False)
        self._input, self._mask = _inputs(self._session)
        self._output = _output(self._session)
        self._running: dict[int, tuple[list[Piece], onnxruntime.RunOptions]] = {}
        self._lock = threading.Lock()
        self._warm_up()

    def _warm_up(self) -> None:
        silence, length = np.zeros(_PIECE_STEP, dtype=np.int16), _PIECE_STEP
        piece = Piece(silence, 0, length, 0, length, Ear(np.arange(1), Wanted()))
        try:
            symbols = self._logits([piece]).shape[2]
        except StepFailed as error:
            refuse_to_start(f"The model cannot listen to a second of silence: {str(error)[:300]}")
        if symbols < self.vocabulary.size:
            refuse_to_start(
                f"The model tells {symbols} symbols apart, and the vocabulary beside it has {self.vocabulary.size}. "
                "They do not belong together."
            )

    def listen(self, batch: Sequence[Item]) -> list[Letters]:
        """What is heard in each piece, in order. Raises OutOfMemory and StepFailed."""
        found: dict[int, Letters] = {}
        order = sorted(range(len(batch)), key=lambda place: batch[place].length)
        if self._samples_max and sum(item.length for item in batch) > self._samples_max:
            raise OutOfMemory
        for _, same in groupby(order, key=lambda place: batch[place].length):
            places = list(same)
            group = [cast(Piece, batch[place].tokens) for place in places]
            for place, piece, logits in zip(places, group, self._logits(group), strict=True):
                found[place] = _letters(piece, logits.astype(np.float32))
        return [found[place] for place in range(len(batch))]

    def stop_unwanted(self) -> None:
        """Break off what is computed for somebody who has gone; what others want of it is computed again."""
        with self._lock:
            for group, options in self._running.values():
                if _unwanted(group):
                    options.terminate = True

    def _logits(self, group: list[Piece]) -> npt.NDArray[Any]:
        """What the model says of pieces of one length."""
        values = np.zeros((len(group), len(group[0])), dtype=np.float32)
        mask = np.zeros(values.shape, dtype=np.int64)
        for row, piece in enumerate(group):
            samples = piece.samples.astype(np.float32) / 32768
            if self._normalise:
                samples = (samples - samples.mean()) / np.sqrt(samples.var() + _QUIET)
            values[row, : len(samples)] = samples
            mask[row, : len(samples)] = 1
        fed = {self._input: values} | ({self._mask: mask} if self._mask else {})
        logits = self._run(group, fed)
        if logits.ndim != 3 or len(logits) != len(group) or not logits.shape[1]:
            raise StepFailed(f"the output has the shape {logits.shape}")
        return logits

    def _run(self, group: list[Piece], fed: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        options = onnxruntime.RunOptions()
        with self._lock:
            self._running[id(options)] = group, options
        try:
            if _unwanted(group):
                raise StepFailed("somebody has gone")
            return run_session(self._session, self._output, fed, options)
        finally:
            with self._lock:
                del self._running[id(options)]


def _unwanted(group: Sequence[Piece]) -> bool:
    return any(piece.ear.wanted.gone for piece in group)


def _letters(piece: Piece, logits: Emissions) -> Letters:
    """The frames of a piece that count. A frame belongs where its middle is."""
    frames = len(logits)
    width = len(piece) / frames
    low = min(frames - 1, max(0, round((piece.first - piece.begin) / width)))
    high = max(low + 1, min(frames, round((piece.last - piece.begin) / width)))
    borders = piece.begin + np.arange(low, high + 1) * width
    logits = np.nan_to_num(logits[low:high], nan=-1e4, posinf=1e4, neginf=-1e4)
    logits = logits - logits.max(axis=1, keepdims=True)
    likeliest = -np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return Letters(np.hstack([logits[:, piece.ear.symbols] + likeliest, likeliest]), borders.astype(np.float64))


def _inputs(session: onnxruntime.InferenceSession) -> tuple[str, str | None]:
    names = {each.name: str(each.type) for each in session.get_inputs()}
    mask = next((name for name in names if name == "attention_mask"), None)
    values = [name for name, kind in names.items() if name != mask and kind == "tensor(float)"]
    if len(values) != 1 or len(names) != 1 + (mask is not None):
        refuse_to_start(f"This is no model of letters in speech: its inputs are {', '.join(sorted(names))}.")
    return values[0], mask


def _output(session: onnxruntime.InferenceSession) -> str:
    outputs = {str(each.name): len(each.shape or ()) for each in session.get_outputs()}
    fitting = [name for name in ("logits", *outputs) if outputs.get(name) == 3]
    if not fitting:
        refuse_to_start(f"This model has no output that fits: it has {', '.join(outputs)}.")
    return fitting[0]
