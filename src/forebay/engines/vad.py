"""Finds where somebody speaks: probabilities by the Silero network, and the regions that follow from them.

It refuses to know who speaks and what is said, and it reads the network from the installed package alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from forebay.speech import SAMPLE_RATE

WINDOW_SAMPLES = 512
_CONTEXT_SAMPLES = 64
_WINDOWS_AT_ONCE = 2048
_SMOOTHED_WINDOWS = 5
_FULL_SCALE = 32768.0


@dataclass(frozen=True, slots=True)
class VadOptions:
    """When speech begins and ends: at `onset` it does, and below `offset` for as long as `min_silence_ms` it has ended."""

    onset: float = 0.5
    offset: float = 0.363
    min_speech_ms: int = 0
    min_silence_ms: int = 160
    pad_ms: int = 400
    max_speech_seconds: float = float("inf")


class Vad:
    """The network. It may be used by several threads at once."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.inter_op_num_threads = options.intra_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(str(_network()), options, providers=["CPUExecutionProvider"])

    def probabilities(self, pcm: NDArray[np.int16]) -> NDArray[np.float32]:
        """How likely it is that somebody speaks, for each window of `WINDOW_SAMPLES`; silence is added to the last."""
        windows = -(-len(pcm) // WINDOW_SAMPLES)
        sound = np.zeros(windows * WINDOW_SAMPLES, np.float32)
        sound[: len(pcm)] = pcm
        sound /= _FULL_SCALE
        rows = sound.reshape(-1, WINDOW_SAMPLES)
        before = np.zeros((windows, _CONTEXT_SAMPLES), np.float32)
        before[1:] = rows[:-1, -_CONTEXT_SAMPLES:]
        whole = np.concatenate([before, rows], 1)
        hidden = cell = np.zeros((1, 1, 128), np.float32)
        found = [np.zeros(0, np.float32)]
        for begin in range(0, windows, _WINDOWS_AT_ONCE):
            given = {"input": whole[begin : begin + _WINDOWS_AT_ONCE], "h": hidden, "c": cell}
            output, hidden, cell = self._session.run(None, given)
            found.append(output.reshape(-1))
        return np.concatenate(found)


def regions(
    probabilities: NDArray[np.float32], options: VadOptions, samples: int | None = None
) -> list[tuple[int, int]]:
    """Where somebody speaks, as samples from and to, padded, in order and not overlapping.

    No region is longer than `max_speech_seconds`: longer ones are cut where speech is least likely. `samples` is the true
    length of the sound, where it ends within the last window.
    """
    total = len(probabilities) * WINDOW_SAMPLES if samples is None else samples
    pad = options.pad_ms * SAMPLE_RATE // 1000
    longest = options.max_speech_seconds * SAMPLE_RATE - 2 * pad
    spoken = []
    for begin, end in _spoken(probabilities, options):
        if (end - begin) * WINDOW_SAMPLES < longest:
            spoken.append((begin * WINDOW_SAMPLES, min(end * WINDOW_SAMPLES, total)))
        else:
            spoken += _divided(probabilities, begin, end, max(2, int(longest) // WINDOW_SAMPLES))
    return _padded([(begin, min(end, total)) for begin, end in spoken if begin < total], pad, total)


def _spoken(probabilities: NDArray[np.float32], options: VadOptions) -> Iterator[tuple[int, int]]:
    """The windows from and to of each stretch of speech, with short silences in them."""
    silence = max(1, options.min_silence_ms * SAMPLE_RATE // 1000 // WINDOW_SAMPLES)
    shortest = options.min_speech_ms * SAMPLE_RATE / 1000 / WINDOW_SAMPLES
    begin = quiet = None
    for window, probability in enumerate(probabilities.tolist()):
        if probability >= options.onset:
            begin = window if begin is None else begin
            quiet = None
        elif begin is not None and probability < options.offset:
            quiet = window if quiet is None else quiet
            if window + 1 - quiet >= silence:
                if quiet - begin >= shortest:
                    yield begin, quiet
                begin = quiet = None
    end = len(probabilities)
    if begin is not None and end - begin >= shortest:
        yield begin, end if quiet is None else quiet


def _divided(probabilities: NDArray[np.float32], begin: int, end: int, longest: int) -> Iterator[tuple[int, int]]:
    """Windows from `begin` to `end` in parts of at most `longest`, as samples, cut where speech is least likely."""
    while end - begin > longest:
        low, high = begin + longest // 2, begin + longest
        around = np.pad(probabilities[low:high], _SMOOTHED_WINDOWS // 2, "edge")
        smooth = np.convolve(around, np.ones(_SMOOTHED_WINDOWS), "valid")
        cut = high - 1 - int(np.argmin(smooth[::-1]))
        yield begin * WINDOW_SAMPLES, cut * WINDOW_SAMPLES
        begin = cut
    yield begin * WINDOW_SAMPLES, end * WINDOW_SAMPLES


def _padded(spoken: list[tuple[int, int]], pad: int, total: int) -> list[tuple[int, int]]:
    """With `pad` samples at both ends; where two would overlap they meet in the middle."""
    found = []
    last = 0
    for number, (begin, end) in enumerate(spoken):
        following = spoken[number + 1][0] if number + 1 < len(spoken) else None
        middle = total if following is None else end + (following - end) // 2
        stop = min(end + pad, total, middle)
        found.append((max(begin - pad, last), stop))
        last = stop
    return found


def _network() -> Path:
    """The file of the network, found without importing the package that it comes with."""
    package = find_spec("faster_whisper")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError("The package faster-whisper is not installed.")
    return Path(package.submodule_search_locations[0], "assets", "silero_vad_v6.onnx")
