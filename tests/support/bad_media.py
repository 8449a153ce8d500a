"""Files that are no recordings, or bad ones: damaged, lying, pointing elsewhere, or much larger than they look."""

import gzip
import io
import json
import random
import struct
import zlib
from collections.abc import Iterator
from functools import cache

from PIL import Image

from tests.support.encoded import encoded, hum

_DAMAGED = ("wav", "mp3", "flac", "opus", "mp4", "film", "m4a", "ts")
_TRUNCATIONS, _FLIPS = 9, 8
_BILLIONS = 0xFFFF_FFF0


def bad_media(canary: str, secret: str, seed: int) -> Iterator[tuple[str, bytes]]:
    """Name and content of each; those that point elsewhere point at the address `canary` and the path `secret`."""
    yield from damaged(seed)
    yield from nothing(seed)
    yield from pointing(canary, secret)
    yield from silent()
    yield from lying()
    yield from bombs()


def damaged(seed: int) -> Iterator[tuple[str, bytes]]:
    """Cut somewhere, or with some bits the other way round."""
    chance = random.Random(seed)
    for kind in _DAMAGED:
        whole = hum(kind)
        for number in range(_TRUNCATIONS):
            at = chance.randrange(1, 300) if number < 3 else chance.randrange(len(whole))
            yield f"{kind} cut at {at}", whole[:at]
        for number in range(_FLIPS):
            flipped = bytearray(whole)
            for _ in range(10 ** (number % 4)):
                flipped[chance.randrange(300 if number < 4 else len(whole)) % len(whole)] ^= 1 << chance.randrange(8)
            yield f"{kind} with flipped bits {number}", bytes(flipped)


def nothing(seed: int) -> Iterator[tuple[str, bytes]]:
    """No recording at all."""
    chance = random.Random(seed)
    for size in (0, 1, 3, 12, 44, 4096, 2**20):
        yield f"{size} zero bytes", bytes(size)
    yield "noise", chance.randbytes(100_000)
    for head in (
        b"ID3\x04\0\0\0\0\0\0",
        b"\xff\xfb\x90\x64",
        b"\xff\xf1\x50\x80",
        b"OggS\0\x02",
        b"RIFF\0\0\0\0WAVEfmt ",
        b"fLaC",
    ):
        yield f"noise after {head!r}", head + chance.randbytes(50_000)
    yield "text as mp3", b"This is no music at all. " * 1000
    yield "text behind a tag", b"ID3\x04\0\0\0\0\0\0" + b"This is no music at all. " * 1000
    yield "JSON", json.dumps({"audio": "none"}).encode()
    yield "HTML", b"<!doctype html><audio src='http://127.0.0.1/'></audio>"
    yield "gzip of a wav", gzip.compress(hum("wav"))
    yield "MIDI", b"MThd\0\0\0\x06\0\x01\0\x01\0\x60MTrk\0\0\0\x04\0\xff\x2f\0"
    for kind in ("PNG", "GIF"):
        file = io.BytesIO()
        Image.new("RGB", (10, 10)).save(file, kind)
        yield f"{kind}", file.getvalue()


def pointing(canary: str, secret: str) -> Iterator[tuple[str, bytes]]:
    """Texts and containers that name other files for a player to open."""
    for where, target in {"address": canary, "path": secret, "file URL": f"file://{secret}"}.items():
        hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n".encode()
        yield f"HLS to {where}", hls
        yield f"HLS behind a tag to {where}", b"ID3\x04\0\0\0\0\0\0" + hls
        yield f"HLS behind frames to {where}", hum("mp3")[:2000] + b"\n" + hls
        yield f"concat to {where}", f"ffconcat version 1.0\nfile '{target}'\n".encode()
        yield (
            f"SDP to {where}",
            f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=-\na=control:{target}\nm=audio 9 RTP/AVP 0\n".encode(),
        )
        yield (
            f"XSPF to {where}",
            f"<?xml version='1.0'?><playlist version='1'><trackList><track><location>{target}</location></track></trackList></playlist>".encode(),
        )
        yield f"DASH to {where}", f"<?xml version='1.0'?><MPD><BaseURL>{target}</BaseURL></MPD>".encode()
        yield f"movie with a reference to {where}", _movie_elsewhere(target)
        yield (
            f"movie that is a reference to {where}",
            atom(b"ftyp", b"qt  \0\0\0\0qt  ")
            + atom(
                b"moov",
                atom(
                    b"rmra",
                    atom(
                        b"rmda",
                        atom(
                            b"rdrf", bytes(4) + b"url " + struct.pack(">I", len(target) + 1) + target.encode() + b"\0"
                        ),
                    ),
                ),
            ),
        )
    yield "Matroska linked to another", hum("mka")[:60] + b"\x3c\xb9\x23\x90\x73\xa4" + secret.encode()


def atom(kind: bytes, content: bytes) -> bytes:
    """One piece of a movie."""
    return struct.pack(">I", len(content) + 8) + kind + content


def _movie_elsewhere(target: str) -> bytes:
    """A movie whose sound is said to be in another file: the reference to its own data is replaced, sizes and all."""
    whole = encoded("mov", "pcm_s16le", 16_000, 1.0)
    own = atom(b"url ", b"\0\0\0\x01") if atom(b"url ", b"\0\0\0\x01") in whole else atom(b"alis", b"\0\0\0\x01")
    other = atom(b"url ", bytes(4) + target.encode() + b"\0")
    for kind in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        at = whole.index(kind) - 4
        size = struct.unpack_from(">I", whole, at)[0] + len(other) - len(own)
        whole = whole[:at] + struct.pack(">I", size) + whole[at + 4 :]
    assert own in whole
    return whole.replace(own, other)


def silent() -> Iterator[tuple[str, bytes]]:
    """Whole files in which there is nothing to hear."""
    yield "mp4 without sound", encoded("mp4", None, 0, 1.0, picture="mpeg4")
    yield "webm without sound", encoded("webm", None, 0, 1.0, picture="libvpx")
    yield "wav without samples", hum("wav")[:44].ljust(78, b"\0")
    yield "movie without anything", atom(b"ftyp", b"isom\0\0\0\0isom")


def wav(
    *,
    form: int = 1,
    channels: int = 1,
    rate: int = 16_000,
    bits: int = 16,
    align: int | None = None,
    size: int | None = None,
    content: bytes = bytes(3200),
    more: bytes = b"",
) -> bytes:
    """A file whose header says what it is told to."""
    width = channels * bits // 8 if align is None else align
    fmt = struct.pack("<HHIIHH", form, channels & 0xFFFF, rate, rate * width & 0xFFFF_FFFF, width & 0xFFFF, bits) + more
    said = len(content) if size is None else size
    body = b"fmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", said) + content
    return b"RIFF" + struct.pack("<I", min(said + 36, _BILLIONS)) + b"WAVE" + body


def lying() -> Iterator[tuple[str, bytes]]:
    """Headers that claim what cannot be."""
    for rate in (0, 1, 999, 2**31 - 1, 4_000_000_000):
        yield f"wav of {rate} Hz", wav(rate=rate, align=2)
    for channels in (0, 65, 1024, 65_535):
        yield f"wav of {channels} channels", wav(channels=channels, content=bytes(400_000))
    for bits in (0, 1, 7, 64, 65_535):
        yield f"wav of {bits} bits", wav(bits=bits, align=2)
    yield "wav of an unknown code", wav(form=0xABCD)
    yield "wav that says it is a film", wav(form=0x1234, bits=0, align=0)
    yield "wav that says it is billions of bytes", wav(size=_BILLIONS)
    yield "wav that says it is empty", wav(size=0)
    yield "wav whose blocks are of no bytes", wav(align=0)
    yield "wav with a header of billions", b"RIFF\xff\xff\xff\xffWAVEfmt " + struct.pack("<I", _BILLIONS) + bytes(1000)
    yield "flac with a picture of 16 MB that is not there", b"fLaC\x06\xff\xff\xff" + bytes(1000) + hum("flac")
    yield "flac of 655,350 Hz", _flac_head(655_350)
    yield "Matroska of unknown sizes", b"\x1a\x45\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xff" + bytes(1000)
    yield (
        "avi with one piece of billions",
        b"RIFF\xff\xff\xff\xffAVI LIST" + struct.pack("<I", _BILLIONS) + b"hdrl" + bytes(1000),
    )


def _flac_head(rate: int) -> bytes:
    whole = bytearray(hum("flac"))
    packed = int.from_bytes(whole[18:26], "big") & (1 << 44) - 1 | rate << 44
    whole[18:26] = packed.to_bytes(8, "big")
    return bytes(whole)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Little that asks for much."""
    packed = zlib.compress(bytes(50_000_000), 9)
    frame = b"TXXX" + _safe(len(packed) + 4) + b"\0\x09" + _safe(50_000_000) + packed
    yield "a packed tag", b"ID3\x04\0\0" + _safe(len(frame)) + frame + hum("mp3")
    yield "a tag of 256 MB that is not there", b"ID3\x04\0\0" + _safe(2**28 - 1) + hum("mp3")
    yield "a thousand tags", b"ID3\x04\0\0\0\0\0\0" * 1000 + hum("mp3")
    yield (
        "a tag with a picture of 20 MB",
        b"ID3\x03\0\0"
        + _safe(20_000_010)
        + b"APIC"
        + struct.pack(">IH", 20_000_000, 0)
        + bytes(20_000_000)
        + hum("mp3"),
    )
    yield "pieces within pieces", _nested(20_000)
    yield (
        "tracks beside tracks",
        atom(b"ftyp", b"isom\0\0\0\0isom") + atom(b"moov", atom(b"trak", atom(b"mdia", b"")) * 50_000),
    )
    for table, width in ((b"stsz", 4), (b"stts", 8), (b"stsc", 12), (b"stco", 4), (b"ctts", 8)):
        yield f"a movie whose {table.decode()} has billions of entries", _with_table(table, _BILLIONS, b"\x7f" * width)
    yield "a movie whose samples last for ever", _with_table(b"stts", 1, struct.pack(">II", 0xFFFF, 0x7FFF_FFFF))
    packed = zlib.compress(bytes(30_000_000), 9)
    yield (
        "a packed header",
        atom(b"ftyp", b"qt  \0\0\0\0qt  ")
        + atom(b"moov", atom(b"cmov", atom(b"dcom", b"zlib") + atom(b"cmvd", struct.pack(">I", 2**31 - 1) + packed))),
    )
    yield (
        "flac in which every frame is the longest",
        hum("flac")[:8] + struct.pack(">HH", 65_535, 65_535) + hum("flac")[12:],
    )
    yield (
        "one piece of 100 MB",
        b"RIFF"
        + struct.pack("<I", 100_000_036)
        + wav(channels=2, rate=1000, size=100_000_000, content=bytes(1_000_000))[8:],
    )


def _safe(size: int) -> bytes:
    """A size as ID3 writes it: seven bits in each byte."""
    return bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))


@cache
def _nested(depth: int) -> bytes:
    content = b""
    for number in range(depth):
        content = (
            atom((b"trak", b"mdia", b"minf", b"stbl")[number % 4], content) if number % 500 else atom(b"moov", content)
        )
    return atom(b"ftyp", b"isom\0\0\0\0isom") + atom(b"moov", content)


def _with_table(kind: bytes, count: int, entry: bytes) -> bytes:
    """A movie in which one table has another count and other entries, at the place and in the size of the old one."""
    whole = bytearray(hum("mp4"))
    at = whole.find(kind)
    if at < 0:  # that table is not always there: another one takes its name
        at = whole.find(b"stts")
        whole[at : at + 4] = kind
    size = struct.unpack_from(">I", whole, at - 4)[0]
    head = at + (12 if kind == b"stsz" else 8)
    struct.pack_into(">I", whole, head, count)
    if kind == b"stsz":
        struct.pack_into(">I", whole, head - 4, 0)
    filled = (entry * size)[: at - 4 + size - head - 4]
    whole[head + 4 : head + 4 + len(filled)] = filled
    return bytes(whole)
