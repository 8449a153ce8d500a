"""The GGUF header check: the real model passes, and nothing that was done to its header gets further than a sentence."""

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from forebay.errors import SetupError
from forebay.replicas import gguf
from tests.support.models import smollm2_path

MUTATIONS = 3000
WHOLE_EVERY = 15  # the vocabulary is 98,000 strings long, so most mutations work on a header with a short one
TOKENS_KEPT = 200
SECONDS_MAX = 20.0
EVIL = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _header(*, tensors: int = 1, pairs: tuple[bytes, ...] = (), infos: tuple[bytes, ...] | None = None) -> bytes:
    known = (_pair(b"general.architecture", 8, _string(b"llama")), *pairs)
    described = (_info(),) if infos is None else infos
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, len(known)) + b"".join(known) + b"".join(described)


def _pair(key: bytes, kind: int, value: bytes) -> bytes:
    return _string(key) + struct.pack("<I", kind) + value


def _info(name: bytes = b"t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def _write(path: Path, header: bytes, file_bytes: int) -> Path:
    """The header and then a hole, so that a large file costs nothing."""
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max(file_bytes, len(header)))
    return path


def test_the_real_model_passes() -> None:
    header = gguf.check(smollm2_path())
    assert (header.version, header.architecture, header.tensors) == (3, "llama", 272)
    assert header.parameters == 134_515_008
    assert header.context_length == 8192
    assert "<|im_start|>" in (header.chat_template or "")


def test_the_smallest_sound_file_passes(tmp_path: Path) -> None:
    header = gguf.check(_write(tmp_path / "m.gguf", _header(), 4096))
    assert (header.parameters, header.context_length, header.chat_template) == (32, None, None)


def test_a_header_larger_than_the_first_look_is_read_on(tmp_path: Path) -> None:
    long = _pair(b"a.list", 9, struct.pack("<IQ", 0, 2**24) + bytes(2**24))
    assert gguf.check(_write(tmp_path / "m.gguf", _header(pairs=(long,)), 2**25)).tensors == 1


_UNSOUND: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "runs past the end"),
    "short": (b"GGUF\3\0\0\0", "runs past the end"),
    "magic": (b"GGML" + _header()[4:], "does not begin with"),
    "version": (b"GGUF\1\0\0\0" + _header()[8:], "format version is 1"),
    "big-endian": (b"GGUF\0\0\0\3" + _header()[8:], "format version"),
    "no tensors": (_header(tensors=0, infos=()), "0 tensors"),
    "too many tensors": (_header(tensors=2**60), "tensors, and 1 to"),
    "too many entries": (struct.pack("<4sIQQ", b"GGUF", 3, 1, 2**63), "metadata entries"),
    "long key": (struct.pack("<4sIQQQ", b"GGUF", 3, 1, 1, 2**64 - 1), "a string in it claims"),
    "key twice": (_header(pairs=(_pair(b"a", 4, b"\1\0\0\0"),) * 2), "there twice"),
    "value type": (_header(pairs=(_pair(b"a", 13, b""),)), "unknown type 13"),
    "nested array": (_header(pairs=(_pair(b"a", 9, struct.pack("<IQ", 9, 1)),)), "an array again"),
    "long array": (_header(pairs=(_pair(b"a", 9, struct.pack("<IQ", 10, 2**61)),)), "items, and at most"),
    "string in array": (_header(pairs=(_pair(b"a", 9, struct.pack("<IQQ", 8, 1, 2**64 - 8)),)), "a string in it claims"),
    "array past the end": (_header(pairs=(_pair(b"a", 9, struct.pack("<IQ", 8, 2**24)),)), "runs past the end|claims"),
    "alignment 0": (_header(pairs=(_pair(b"general.alignment", 4, bytes(4)),)), "power of two"),
    "alignment 3": (_header(pairs=(_pair(b"general.alignment", 4, b"\3\0\0\0"),)), "power of two"),
    "alignment text": (_header(pairs=(_pair(b"general.alignment", 8, _string(b"32")),)), "power of two"),
    "tensor twice": (_header(tensors=2, infos=(_info(), _info())), "tensor name in it is empty or there twice"),
    "long tensor name": (_header(infos=(_info(name=b"t" * 128),)), "a string in it claims 128"),
    "no dimensions": (_header(infos=(_info(shape=()),)), "0 dimensions"),
    "five dimensions": (_header(infos=(_info(shape=(32, 1, 1, 1, 1)),)), "5 dimensions"),
    "overflowing shape": (_header(infos=(_info(shape=(2**32, 2**32, 2**32, 2**32)),)), "impossible shape"),
    "wraps to nothing": (_header(infos=(_info(shape=(2**63, 2)),)), "impossible shape"),
    "empty tensor": (_header(infos=(_info(shape=(32, 0)),)), "impossible shape"),
    "broken block": (_header(infos=(_info(shape=(33,), kind=2),)), "impossible shape"),
    "removed type": (_header(infos=(_info(kind=4),)), "unknown type 4"),
    "offset not aligned": (_header(infos=(_info(offset=8),)), "not aligned"),
    "offset past the end": (_header(infos=(_info(offset=2**63),)), "cut short"),
    "data past the end": (_header(infos=(_info(shape=(8192,)),)), "cut short"),
    "template not text": (_header(pairs=(_pair(b"tokenizer.chat_template", 8, _string(b"\xff")),)), "not UTF-8"),
    "template a number": (_header(pairs=(_pair(b"tokenizer.chat_template", 4, bytes(4)),)), "not a text"),
    "architecture twice": (_header(pairs=(_pair(b"general.architecture", 4, bytes(4)),)), "there twice"),
    "no architecture": (struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + _info(), "does not name its architecture"),
}  # fmt: skip


@pytest.mark.parametrize("what", _UNSOUND)
def test_what_is_unsound_is_refused_with_its_reason(tmp_path: Path, what: str) -> None:
    header, said = _UNSOUND[what]
    file_bytes = len(header) if what in {"empty", "short"} else 8192
    with pytest.raises(SetupError, match=f"is not a sound GGUF file: .*({said})"):
        gguf.check(_write(tmp_path / "m.gguf", header, file_bytes))


@pytest.mark.parametrize("kind", sorted(gguf._TENSOR_TYPES))
def test_a_tensor_of_each_type_fits_to_the_byte(tmp_path: Path, kind: int) -> None:
    block, block_bytes = gguf._TENSOR_TYPES[kind]
    header = _header(infos=(_info(shape=(block * 2, 3), kind=kind),))
    start = -(-len(header) // 32) * 32
    gguf.check(_write(tmp_path / "m.gguf", header, start + 6 * block_bytes))
    if start + 6 * block_bytes > len(header) + 1:
        with pytest.raises(SetupError, match="cut short"):
            gguf.check(_write(tmp_path / "m.gguf", header, start + 6 * block_bytes - 1))


def test_a_file_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="cannot be read: No such file"):
        gguf.check(tmp_path / "nothing.gguf")


def test_a_model_cut_at_any_place_is_noticed(tmp_path: Path) -> None:
    header, file_bytes = _real_header(), smollm2_path().stat().st_size
    chance = random.Random(5)
    path = tmp_path / "m.gguf"
    for length in (0, 1, 23, 24, len(header) - 1, len(header), file_bytes - 1, *chance.sample(range(file_bytes), 20)):
        with path.open("wb") as file:
            file.write(header[:length])
            file.truncate(length)
        with pytest.raises(SetupError):
            gguf.check(path)


def _real_header() -> bytes:
    """The real header, read whole; where its tensor list ends is where the data must begin."""
    with smollm2_path().open("rb") as file:
        start = file.read(8 * 2**20)
    cursor = gguf._Cursor(start, smollm2_path().stat().st_size)
    gguf._parse(cursor)
    return start[: cursor.position]


def _short_vocabulary(header: bytes) -> bytes:
    """The same header with the long string arrays cut to their first items: all its structure in little space."""
    pieces: list[bytes] = []
    done = 0
    for key in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges"):
        count_at = header.index(_string(key)) + len(_string(key)) + 8
        position, count = count_at + 8, struct.unpack_from("<Q", header, count_at)[0]
        kept_end = position
        for number in range(count):
            if number == TOKENS_KEPT:
                kept_end = position
            position += 8 + struct.unpack_from("<Q", header, position)[0]
        pieces += [header[done:count_at], struct.pack("<Q", TOKENS_KEPT), header[count_at + 8 : kept_end]]
        done = position
    return b"".join(pieces) + header[done:]


def _mutated(header: bytes, chance: random.Random) -> bytes:
    changed = bytearray(header)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        position = chance.randrange(len(changed))
        match chance.randrange(6):
            case 0:
                changed[position] ^= 1 << chance.randrange(8)
            case 1:
                changed[position] = chance.randrange(256)
            case 2:
                evil = chance.choice(EVIL).to_bytes(8, "little")[: chance.choice((4, 8))]
                changed[position : position + len(evil)] = evil
            case 3:
                changed[position : position + chance.randrange(1, 64)] = b""
            case 4:
                changed[position:position] = chance.randbytes(chance.randrange(1, 64))
            case _:
                start = chance.randrange(len(changed))
                changed[position:position] = changed[start : start + chance.randrange(1, 256)]
    return bytes(changed)


def _headers(whole: bytes, short: bytes, chance: random.Random, count: int) -> Iterator[bytes]:
    for number in range(count):
        yield _mutated(whole if number % WHOLE_EVERY == 0 else short, chance)


def test_thousands_of_mutations_are_sound_or_a_sentence(tmp_path: Path, *, prove: bool) -> None:
    whole, file_bytes = _real_header(), smollm2_path().stat().st_size
    short = _short_vocabulary(whole)
    path = _write(tmp_path / "m.gguf", short, file_bytes)
    gguf.check(path)
    chance = random.Random(20_261)
    refused = 0
    count = MUTATIONS * (10 if prove else 1)
    began = monotonic()
    for header in _headers(whole, short, chance, count):
        with path.open("r+b") as file:
            file.write(header)
            os.truncate(file.fileno(), file_bytes)
        try:
            gguf.check(path)
        except SetupError as error:
            refused += 1
            assert "is not a sound GGUF file" in str(error)
            assert len(str(error)) < 500
    assert monotonic() - began < SECONDS_MAX * count / MUTATIONS
    assert count // 4 < refused < count
