"""Writes segments as subtitles, SubRip and WebVTT: short lines, in order of time, none above another.

It refuses to let a text end a cue or begin one: what would is escaped.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from forebay.dialects.speakers import by_speaker
from forebay.speech import Segment, Word

_LINE_CHARS = 42
_CUE_CHARS = 2 * _LINE_CHARS
_CUE_MILLISECONDS = 7000  # that one stands at most
_SENTENCE_ENDS = (".", "?", "!", "…", "。", "？", "！")  # the full-width ones of Chinese and Japanese


@dataclass(slots=True)
class _Cue:
    """A text, shown for a while. Times are milliseconds."""

    start: int
    end: int
    text: str
    speaker: str | None


def srt(segments: Sequence[Segment]) -> str:
    """As SubRip."""
    return "".join(
        f"{number}\n{_time(cue.start, ',')} --> {_time(cue.end, ',')}\n{_lines(_srt_text(cue))}\n\n"
        for number, cue in enumerate(_cues(segments), 1)
    )


def vtt(segments: Sequence[Segment]) -> str:
    """As WebVTT."""
    return "WEBVTT\n\n" + "".join(
        f"{_time(cue.start, '.')} --> {_time(cue.end, '.')}\n{_vtt_text(cue)}\n\n" for cue in _cues(segments)
    )


def _srt_text(cue: _Cue) -> str:
    text = cue.text if cue.speaker is None else f"{_plain(cue.speaker)}: {cue.text}"
    *before, last = text.split("->")
    return "->".join([*(part.rstrip("-") for part in before), last])  # an arrow with more strokes would be one of times


def _vtt_text(cue: _Cue) -> str:
    text = _escaped(_lines(cue.text))
    return text if cue.speaker is None else f"<v {_escaped(_plain(cue.speaker))}>{text}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _plain(text: str) -> str:
    """On one line, without what cannot be shown."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _lines(text: str) -> str:
    """Cut between words, as evenly as it goes; a word is left whole."""
    words = text.split(" ")
    count = max(1, -(-len(text) // _LINE_CHARS))
    most, lines = max(_LINE_CHARS // 2, -(-len(text) // count)), [""]
    for word in words:
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if (lines[-1] and len(longer) > _LINE_CHARS) or (len(lines[-1]) >= most and len(lines) < count):
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _cues(segments: Sequence[Segment]) -> list[_Cue]:
    """In order of time, each as long as it may stand."""
    cues = sorted(_raw_cues(segments), key=lambda cue: cue.start)
    free_from = 0
    for place, cue in enumerate(cues):
        cue.start = max(cue.start, free_from)
        cue.end = max(cue.end, cue.start + 1)
        if place + 1 < len(cues):
            cue.end = max(cue.start + 1, min(cue.end, cues[place + 1].start))
        free_from = cue.end
    return cues


def _raw_cues(segments: Iterable[Segment]) -> Iterator[_Cue]:
    for segment in by_speaker(segments):
        for start, end, raw in _pieces(segment):
            text = _plain(raw)
            if text:
                yield _Cue(_milliseconds(start), _milliseconds(end), text, segment.speaker)


def _pieces(segment: Segment) -> Iterator[tuple[float, float, str]]:
    """A segment as it is, or cut between words where it is too long to be read at once."""
    words = segment.words or tuple(_spread(segment))
    if not words or (len(segment.text) <= _CUE_CHARS and not _too_long(segment.start, segment.end)):
        yield segment.start, segment.end, segment.text
        return
    piece: list[Word] = []
    for word in words:
        if piece and _is_full(piece, word):
            yield piece[0].start, piece[-1].end, "".join(each.text for each in piece)
            piece = []
        piece.append(word)
    yield piece[0].start, piece[-1].end, "".join(each.text for each in piece)


def _spread(segment: Segment) -> Iterator[Word]:
    """Words of a segment that has no times for them, each with as much of its time as it has letters."""
    texts = segment.text.split()
    share = (segment.end - segment.start) / max(1, sum(map(len, texts)))
    start = segment.start
    for text in texts:
        yield Word(start, start + share * len(text), f" {text}")
        start += share * len(text)


def _is_full(piece: list[Word], word: Word) -> bool:
    chars = sum(len(each.text) for each in piece)
    if piece[-1].text.rstrip().endswith(_SENTENCE_ENDS) and chars > _LINE_CHARS:
        return True
    return chars + len(word.text) > _CUE_CHARS or _too_long(piece[0].start, word.end)


def _too_long(start: float, end: float) -> bool:
    return (end - start) * 1000 > _CUE_MILLISECONDS


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _time(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{rest:03}"
