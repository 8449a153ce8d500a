"""Forced alignment by PocketSphinx, with the English model that comes in its package.

It refuses other languages, and to know where a letter was said: it hears sounds. Memory is bounded by windows; one decoder
works for all, since the library holds the interpreter while it computes.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from forebay.engines.pronunciation import phones, spelled
from forebay.engines.start import refuse_to_start
from forebay.engines.threads import Unwanted, Wanted
from forebay.engines.word_times import Heard, spread
from forebay.speech import SAMPLE_BYTES, SAMPLE_RATE

_FRAME_SECONDS = 0.01
_FRAME_BYTES = int(_FRAME_SECONDS * SAMPLE_RATE) * SAMPLE_BYTES
_WHOLE_FRAMES_MAX = 3000  # what is longer is worked through in windows
_WINDOW_FRAMES = 1500  # the interpreter stands still while the library computes one: about 0.3 s
_SURE_SHARE = 0.75  # of a window; words that end later may only be there because the window ends
_WORDS_MAX = 300  # at once; nobody says more in 30 s
_WORD_CHARS_MAX = 64
_ADDED_MAX = 20_000  # words that are added to the dictionary before it is loaded anew
# The text is known: nothing is cut off that may turn out to be right.
_SETTINGS = {"lm": None, "loglevel": "FATAL", "beam": 1e-150, "pbeam": 1e-150, "wbeam": 1e-150, "bestpath": False}
_PLAIN = re.compile(r"[a-z']+")
_SCORE_UNIT = 1024 * math.log(1.0001)  # of the library's scores, in natural logarithms


class Sphinx:
    """The decoder. It has one owner, who calls from one thread at a time."""

    def __init__(self) -> None:
        try:
            import pocketsphinx
        except ImportError:
            refuse_to_start("The package `pocketsphinx` is not installed. Run `pip install 'forebay[pocketsphinx]'`.")
        self._library = pocketsphinx
        self._wanted = Wanted()
        self._open()

    def _open(self) -> None:
        self._decoder = self._library.Decoder(**_SETTINGS)
        self._added: dict[str, str] = {}

    def place(
        self, words: Sequence[str], samples: bytes, start: float, wanted: Wanted, found: list[Heard | None]
    ) -> Iterator[None]:
        """Fill in where each word was heard in `samples`, which begin at `start`; None for one that has no sound.

        It yields after each window, so that others have their turn. Words that cannot have been said there share the time
        that is left. Raises Unwanted when nobody waits any more.
        """
        spoken = [place for place, word in enumerate(words) if self._name(word)]
        found[:] = [None] * len(words)
        frames, frame = len(samples) // _FRAME_BYTES, 0
        while spoken and frame < frames:
            self._wanted = wanted
            tried, last = spoken[:_WORDS_MAX], frames
            names = self._names([words[each] for each in tried])
            if frames - frame > _WHOLE_FRAMES_MAX or len(tried) < len(spoken):
                last = min(frames, frame + _WINDOW_FRAMES)
                count, last = self._reach(names, samples, frame, last)
                tried = tried[:count]
            offset = start + frame * _FRAME_SECONDS
            heard = self._align(names[: len(tried)], samples, frame, last, offset) if tried else []
            if heard is None:
                heard = spread([words[each] for each in tried], offset, start + last * _FRAME_SECONDS)
            for place, each in zip(tried, heard, strict=True):
                found[place] = each
            spoken, frame = spoken[len(tried) :], last
            wanted.proceed()
            yield
        begin = max((each.end for each in found if each), default=start)
        left = spread([words[each] for each in spoken], begin, max(begin, start + frames * _FRAME_SECONDS))
        for place, each in zip(spoken, left, strict=True):
            found[place] = each

    def _names(self, words: Sequence[str]) -> list[str]:
        """What the dictionary calls them now."""
        if len(self._added) > _ADDED_MAX:
            self._open()
        return [self._name(word) for word in words]

    def _name(self, word: str) -> str:
        """What the dictionary calls a word, which is added where it is not known; empty for one without a sound."""
        plain = spelled(word)
        if len(plain) > _WORD_CHARS_MAX:
            return ""
        if _PLAIN.fullmatch(plain) and self._decoder.lookup_word(plain):
            return plain
        said = phones(word.strip(), self._decoder.lookup_word)
        if said and said not in self._added:
            name = f"forebay#{len(self._added)}"
            self._decoder.add_word(name, said, False)
            self._added[said] = name
        return self._added.get(said, "")

    def _reach(self, names: Sequence[str], samples: bytes, first: int, last: int) -> tuple[int, int]:
        """How many of the words are surely said in a window, and the frame at which the last of them ends."""
        entries = self._heard(names, samples[first * _FRAME_BYTES : last * _FRAME_BYTES], whole=False)
        most = int(_SURE_SHARE * (last - first))
        sure = [end for end in (entry.end_frame + 1 for entry in entries) if end <= most]
        return len(sure), first + (sure[-1] if sure else max(1, most))

    def _align(self, names: Sequence[str], samples: bytes, first: int, last: int, offset: float) -> list[Heard] | None:
        """Where each word was heard; None when they cannot have been said there."""
        part = samples[first * _FRAME_BYTES : last * _FRAME_BYTES]
        rough = self._heard(names, part, whole=True)
        if len(rough) != len(names):
            return None
        fine = self._refined(part)
        if len(fine) != len(names):
            fine = [(each.start_frame, each.end_frame + 1, None) for each in rough]
        return [
            Heard(offset + begin * _FRAME_SECONDS, offset + end * _FRAME_SECONDS, probability)
            for begin, end, probability in fine
        ]

    def _heard(self, names: Sequence[str], part: bytes, *, whole: bool) -> list[Any]:
        """The words that were heard, of those said to the end where the text need not be said to its end."""
        decoder = self._decoder
        try:
            decoder.set_align_text(" ".join(names))
            self._feed(part)
            if whole:
                decoder.end_utt()
                return _words(decoder.seg())
            found = _words(decoder.seg())
            decoder.end_utt()
            return found
        except RuntimeError:
            self._recover()
            return []

    def _refined(self, part: bytes) -> list[tuple[int, int, float | None]]:
        """Times and probabilities of the words that were heard last, by their sounds; nothing where that fails."""
        decoder = self._decoder
        try:
            decoder.set_alignment()
            self._feed(part)
            decoder.end_utt()
            found = decoder.get_alignment()
        except RuntimeError:
            self._recover()
            return []
        return [
            (each.start, each.start + each.duration, math.exp(each.score * _SCORE_UNIT / max(1, each.duration)))
            for each in found or ()
            if _is_word(each.name)
        ]

    def _feed(self, part: bytes) -> None:
        """Let the library listen. Raises Unwanted."""
        if self._wanted.gone:
            raise Unwanted
        self._decoder.start_utt()
        self._decoder.process_raw(part, full_utt=True)

    def _recover(self) -> None:
        """A decoder in the place of one that is in the middle of something."""
        added = self._added
        self._open()
        for said, name in added.items():
            self._decoder.add_word(name, said, False)
        self._added = added


def _words(entries: Any) -> list[Any]:
    return [each for each in entries or () if _is_word(each.word)]


def _is_word(name: str) -> bool:
    """Silence and noise have names of their own."""
    return not name.startswith(("<", "[", "+"))
