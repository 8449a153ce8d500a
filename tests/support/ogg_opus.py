"""Opus in Ogg written by hand, page by page: hours of it in a second, where an encoder would take minutes."""

import struct
import zlib
from collections.abc import Iterator

_PACKET_SECONDS = 0.12
_RATE = 48_000
_PACKETS_A_PAGE = 200
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_HEAD = b"OpusHead" + struct.pack("<BBHIhB", 1, 2, 0, _RATE, 0, 0)
_TAGS = b"OpusTags" + struct.pack("<II", 0, 0)


def opus_of(seconds: float, frame_bytes: int = 15) -> bytes:
    """A stereo recording of that length: one packet of six frames of noise, again and again."""
    packet = bytes((31 << 3 | 4 | 3, 6)) + bytes(range(1, frame_bytes + 1)) * 6
    return b"".join(_pages(packet, round(seconds / _PACKET_SECONDS)))


def _pages(packet: bytes, count: int) -> Iterator[bytes]:
    yield _page(0, 0, 2, [_HEAD])
    yield _page(1, 0, 0, [_TAGS])
    per_packet, number = round(_PACKET_SECONDS * _RATE), 2
    for first in range(0, count, _PACKETS_A_PAGE):
        packets = [packet] * min(_PACKETS_A_PAGE, count - first)
        end = first + len(packets)
        yield _page(number, end * per_packet, 4 if end == count else 0, packets)
        number += 1


def _page(number: int, granule: int, flags: int, packets: list[bytes]) -> bytes:
    lacing = b"".join(b"\xff" * (len(packet) // 255) + bytes((len(packet) % 255,)) for packet in packets)
    head = struct.pack("<4sBBqIIIB", b"OggS", 0, flags, granule, 1, number, 0, len(lacing))
    page = head + lacing + b"".join(packets)
    return page[:22] + struct.pack("<I", _checksum(page)) + page[26:]


def _checksum(page: bytes) -> int:
    """The sum of Ogg is that of zlib with every bit the other way round, from zero and not inverted."""
    found = zlib.crc32(page.translate(_REVERSED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return int(f"{found:032b}"[::-1], 2)
