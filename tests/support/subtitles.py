"""Readers of SubRip and WebVTT for tests, after their descriptions and apart from what writes them."""

import html
import re
from dataclasses import dataclass

_SRT_TIMES = re.compile(r"(\d{2,}):(\d\d):(\d\d),(\d{3}) --> (\d{2,}):(\d\d):(\d\d),(\d{3})")
_VTT_TIMES = re.compile(r"(\d{2,}):([0-5]\d):([0-5]\d)\.(\d{3}) --> (\d{2,}):([0-5]\d):([0-5]\d)\.(\d{3})")
_VOICE = re.compile(r"<v ([^>\n]+)>")


@dataclass(frozen=True)
class Cue:
    """What is shown from `start` to `end`."""

    start: float
    end: float
    lines: tuple[str, ...]
    speaker: str | None = None

    @property
    def text(self) -> str:
        """On one line."""
        return " ".join(self.lines)


def read_srt(text: str) -> list[Cue]:
    """Every cue: its number, its times, its lines, an empty line. Raises AssertionError."""
    cues = []
    for number, block in enumerate(_blocks(text), 1):
        head, times, *lines = block
        assert head == str(number)
        cues.append(_cue(_SRT_TIMES.fullmatch(times), lines))
    return cues


def read_vtt(text: str) -> list[Cue]:
    """Every cue after the head. Raises AssertionError."""
    head, blocks = text.split("\n\n", 1)[0], _blocks(text.split("\n\n", 1)[1])
    assert head == "WEBVTT"
    cues = []
    for times, *lines in blocks:
        voice = _VOICE.match(lines[0])
        shown = [line if voice is None or place else line[voice.end() :] for place, line in enumerate(lines)]
        assert not any("<" in line or ">" in line or re.search(r"&(?!amp;|lt;|gt;)", line) for line in shown)
        cue = _cue(_VTT_TIMES.fullmatch(times), [html.unescape(line) for line in shown])
        cues.append(cue if voice is None else Cue(cue.start, cue.end, cue.lines, html.unescape(voice[1])))
    return cues


def _blocks(text: str) -> list[list[str]]:
    assert not text or text.endswith("\n\n")
    return [block.split("\n") for block in text.split("\n\n") if block]


def _cue(match: re.Match[str] | None, lines: list[str]) -> Cue:
    assert match is not None
    assert lines
    assert all(line.strip() for line in lines)
    hours, minutes, seconds, rest, *end = (int(group) for group in match.groups())
    return Cue(_seconds(hours, minutes, seconds, rest), _seconds(*end), tuple(lines))


def _seconds(hours: int, minutes: int, seconds: int, rest: int) -> float:
    return hours * 3600 + minutes * 60 + seconds + rest / 1000
