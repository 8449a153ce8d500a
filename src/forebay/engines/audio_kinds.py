"""Tells by its first bytes which kind of recording a file is.

It refuses whatever is not in its list, names and claims of type included: playlists and other texts that point at further
files are no recordings.
"""

from typing import Protocol

_HEAD_BYTES = 4096
_TAGS_MAX = 8
_TS_PACKET, _TS_SYNC = 188, 0x47
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_WAVE_64 = bytes.fromhex("726966662e91cf11a5d628db04c10000")
_PLAIN = {
    b"fLaC": "flac",
    b"OggS": "ogg",
    b"\x1a\x45\xdf\xa3": "matroska",
    b"#!AMR": "amr",
    b"caff": "caf",
    b"\x00\x00\x01\xba": "mpeg",
    b"FLV\x01": "flv",
    _ASF: "asf",
    _WAVE_64: "w64",
}
_MOVIE_ATOMS = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"})


class Readable(Protocol):
    """What of a file is needed here."""

    def read(self, size: int) -> bytes: ...

    def seek(self, offset: int) -> int: ...


def demuxer(source: Readable) -> str | None:
    """The name of the demuxer for a recording; None for what is none."""
    at = 0
    for _ in range(_TAGS_MAX):
        source.seek(at)
        head = source.read(_HEAD_BYTES)
        if not head.startswith(b"ID3") or len(head) < 10:
            return _kind(head)
        at += _tag_bytes(head)
    return None


def _tag_bytes(head: bytes) -> int:
    """How long the ID3 tag is that `head` begins with."""
    size = 0
    for byte in head[6:10]:
        size = size << 7 | byte & 0x7F
    return size + (20 if head[5] & 0x10 else 10)


def _kind(head: bytes) -> str | None:
    for magic, name in _PLAIN.items():
        if head.startswith(magic):
            return name
    if head[:4] in {b"RIFF", b"RIFX", b"RF64", b"BW64"}:
        return {b"WAVE": "wav", b"AVI ": "avi"}.get(head[8:12])
    if head[:4] == b"FORM" and head[8:12] in {b"AIFF", b"AIFC"}:
        return "aiff"
    if head[4:8] in _MOVIE_ATOMS:
        return "mov"
    if _is_transport(head, 0) or _is_transport(head, 4):
        return "mpegts"
    return _framed(head.lstrip(b"\0"))  # some encoders pad the beginning


def _is_transport(head: bytes, start: int) -> bool:
    """Whether packets follow each other from `start`, each after as many bytes of a time stamp."""
    places = range(start, len(head), _TS_PACKET + start)
    return len(places) > 3 and all(head[place] == _TS_SYNC for place in places)


def _framed(head: bytes) -> str | None:
    """The kinds without a container: every frame begins with eleven or twelve set bits."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    layer, version = head[1] >> 1 & 3, head[1] >> 3 & 3
    if head[1] & 0xF6 == 0xF0:
        return "aac" if head[2] >> 2 & 0xF < 13 else None
    valid = layer and version != 1 and head[2] >> 4 != 0xF and head[2] >> 2 & 3 != 3
    return "mp3" if valid else None
