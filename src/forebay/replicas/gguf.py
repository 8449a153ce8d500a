"""The header check that a GGUF file passes before an engine sees it.

It refuses every count, length, type and range that the file cannot back with bytes, and never reads tensor data.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from forebay.errors import SetupError

_METADATA_MAX = 65_536
_TENSORS_MAX = 262_144
_KEY_BYTES_MAX = 65_535
_TENSOR_NAME_BYTES_MAX = 127
_STRING_BYTES_MAX = 4 * 2**20
_TEMPLATE_BYTES_MAX = 2**20
_ARRAY_ITEMS_MAX = 16 * 2**20
_DIMENSIONS_MAX = 4
_ELEMENTS_MAX = 2**62
_ALIGNMENT_MAX = 2**20
_ALIGNMENT = 32
_HEADER_BYTES_MAX = 128 * 2**20
_WINDOW_BYTES = 2 * 2**20  # most headers fit; a larger one is read again with four times the room

_UINT32 = struct.Struct("<I")
_UINT64 = struct.Struct("<Q")
_START = struct.Struct("<4sIQQ")
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip

# Type number -> (values in a block, bytes of a block).
_TENSOR_TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip

Scalar = int | float | bool | bytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a sound header says. `token_values`: numbers that the KV cache has for each token, if it tells."""

    version: int
    architecture: str
    tensors: int
    parameters: int
    context_length: int | None
    token_values: int | None
    chat_template: str | None


class _Unsound(Exception):
    """What is wrong, as the end of a sentence."""


class _WindowTooSmall(Exception):
    """The header goes on behind the bytes that were read so far."""


@dataclass(slots=True)
class _Cursor:
    """A position in the first bytes of the file. Nothing moves it past the end of the file."""

    window: bytes
    file_bytes: int
    position: int = 0

    def advance(self, count: int) -> int:
        """Step over `count` bytes that are there, and say where they start."""
        start = self.position
        end = start + count
        if end > self.file_bytes:
            raise _Unsound("its header runs past the end of the file")
        if end > len(self.window):
            raise _WindowTooSmall
        self.position = end
        return start

    def uint32(self) -> int:
        value: int = _UINT32.unpack_from(self.window, self.advance(4))[0]
        return value

    def uint64(self) -> int:
        value: int = _UINT64.unpack_from(self.window, self.advance(8))[0]
        return value

    def string(self, bytes_max: int) -> bytes:
        length = self.uint64()
        if length > bytes_max:
            raise _Unsound(f"a string in it claims {length} bytes, and at most {bytes_max} are taken")
        start = self.advance(length)
        return self.window[start : start + length]

    def skip_strings(self, count: int) -> None:
        """Step over an array of strings; the one loop here that runs a hundred thousand times."""
        window, position, end = self.window, self.position, len(self.window) - 8
        read = _UINT64.unpack_from
        for _ in range(count):
            if position > end:
                break
            length = read(window, position)[0]
            if length > _STRING_BYTES_MAX:
                raise _Unsound(f"a string in it claims {length} bytes, and at most {_STRING_BYTES_MAX} are taken")
            position += 8 + length
        else:
            self.advance(position - self.position)
            return
        self.advance(max(position - self.position, 0) + 8)


def check(path: Path) -> GgufHeader:
    """Read and check the header of a file. Raises SetupError with what is wrong with it."""
    try:
        with path.open("rb") as file:
            return _read(file)
    except OSError as error:
        raise SetupError(f"The model file {path} cannot be read: {error.strerror}.") from None
    except _Unsound as error:
        raise SetupError(f"{path} is not a sound GGUF file: {error}. Remove it and pull it again.") from None


def _read(file: BinaryIO) -> GgufHeader:
    file_bytes = file.seek(0, 2)
    window_bytes = _WINDOW_BYTES
    while window_bytes <= _HEADER_BYTES_MAX:
        file.seek(0)
        try:
            return _parse(_Cursor(file.read(window_bytes), file_bytes))
        except _WindowTooSmall:
            window_bytes *= 4
    raise _Unsound(f"its header is larger than {_HEADER_BYTES_MAX} bytes")


def _parse(cursor: _Cursor) -> GgufHeader:
    magic, version, tensors, pairs = _START.unpack_from(cursor.window, cursor.advance(_START.size))
    if magic != b"GGUF":
        raise _Unsound("it does not begin with `GGUF`")
    if version not in (2, 3):
        raise _Unsound(f"its format version is {version}, and 2 and 3 are known")
    if pairs > _METADATA_MAX:
        raise _Unsound(f"it claims {pairs} metadata entries, and at most {_METADATA_MAX} are taken")
    if not 0 < tensors <= _TENSORS_MAX:
        raise _Unsound(f"it claims {tensors} tensors, and 1 to {_TENSORS_MAX} are taken")
    metadata = _metadata(cursor, pairs)
    parameters = _tensors(cursor, tensors, _alignment(metadata))
    return _summary(version, metadata, tensors, parameters)


def _metadata(cursor: _Cursor, pairs: int) -> dict[bytes, Scalar]:
    """All scalars and strings by key; arrays are stepped over."""
    found: dict[bytes, Scalar] = {}
    seen: set[bytes] = set()
    for _ in range(pairs):
        key = cursor.string(_KEY_BYTES_MAX)
        if not key or key in seen:
            raise _Unsound("a metadata key in it is empty or there twice")
        seen.add(key)
        kind = cursor.uint32()
        if kind == _ARRAY:
            _skip_array(cursor)
        else:
            found[key] = _value(cursor, kind)
    return found


def _value(cursor: _Cursor, kind: int) -> Scalar:
    if kind == _STRING:
        return cursor.string(_STRING_BYTES_MAX)
    if kind not in _SCALARS:
        raise _Unsound(f"a metadata value in it has the unknown type {kind}")
    form = _SCALARS[kind]
    value: Scalar = struct.unpack_from(form, cursor.window, cursor.advance(struct.calcsize(form)))[0]
    return value


def _skip_array(cursor: _Cursor) -> None:
    kind, count = cursor.uint32(), cursor.uint64()
    if count > _ARRAY_ITEMS_MAX:
        raise _Unsound(f"an array in it claims {count} items, and at most {_ARRAY_ITEMS_MAX} are taken")
    if kind == _STRING:
        cursor.skip_strings(count)
    elif kind in _SCALARS:
        cursor.advance(count * struct.calcsize(_SCALARS[kind]))
    else:
        raise _Unsound(f"an array in it has items of the type {kind}, which is unknown or an array again")


def _alignment(metadata: dict[bytes, Scalar]) -> int:
    value = metadata.get(b"general.alignment", _ALIGNMENT)
    if type(value) is not int or not 0 < value <= _ALIGNMENT_MAX or value & (value - 1):
        raise _Unsound("its alignment is not a power of two")
    return value


def _tensors(cursor: _Cursor, count: int, alignment: int) -> int:
    """Check every tensor and say how many values they hold together."""
    names: set[bytes] = set()
    parameters = 0
    data_end = 0
    for _ in range(count):
        name = cursor.string(_TENSOR_NAME_BYTES_MAX)
        if not name or name in names:
            raise _Unsound("a tensor name in it is empty or there twice")
        names.add(name)
        elements, tensor_bytes = _tensor_size(cursor)
        offset = cursor.uint64()
        if offset % alignment:
            raise _Unsound("a tensor in it is not aligned")
        parameters += elements
        data_end = max(data_end, offset + tensor_bytes)
    data_start = -(-cursor.position // alignment) * alignment
    if data_start + data_end > cursor.file_bytes:
        raise _Unsound(
            f"its tensors need {data_start + data_end} bytes and the file has {cursor.file_bytes}, so it was cut short"
        )
    return parameters


def _tensor_size(cursor: _Cursor) -> tuple[int, int]:
    dimensions = cursor.uint32()
    if not 0 < dimensions <= _DIMENSIONS_MAX:
        raise _Unsound(f"a tensor in it has {dimensions} dimensions, and 1 to {_DIMENSIONS_MAX} are known")
    row = elements = cursor.uint64()
    for _ in range(dimensions - 1):
        elements *= cursor.uint64()
    kind = cursor.uint32()
    if kind not in _TENSOR_TYPES:
        raise _Unsound(f"a tensor in it has the unknown type {kind}")
    block, block_bytes = _TENSOR_TYPES[kind]
    if not 0 < elements <= _ELEMENTS_MAX or row % block:
        raise _Unsound("a tensor in it has an impossible shape")
    return elements, elements // block * block_bytes


def _summary(version: int, metadata: dict[bytes, Scalar], tensors: int, parameters: int) -> GgufHeader:
    architecture = _text(metadata, b"general.architecture", 64)
    if not architecture:
        raise _Unsound("it does not name its architecture")
    return GgufHeader(
        version=version,
        architecture=architecture,
        tensors=tensors,
        parameters=parameters,
        context_length=_count(metadata, f"{architecture}.context_length"),
        token_values=_token_values(metadata, architecture),
        chat_template=_text(metadata, b"tokenizer.chat_template", _TEMPLATE_BYTES_MAX),
    )


def _token_values(metadata: dict[bytes, Scalar], architecture: str) -> int | None:
    """Keys and values of all layers; None where the header does not tell, or tells for each layer another."""
    layers = _count(metadata, f"{architecture}.block_count")
    heads = _count(metadata, f"{architecture}.attention.head_count")
    width = _count(metadata, f"{architecture}.embedding_length")
    shared = _count(metadata, f"{architecture}.attention.head_count_kv") or heads
    if not (layers and heads and width and shared):
        return None
    key = _count(metadata, f"{architecture}.attention.key_length") or width // heads
    value = _count(metadata, f"{architecture}.attention.value_length") or width // heads
    return layers * shared * (key + value)


def _count(metadata: dict[bytes, Scalar], key: str) -> int | None:
    value = metadata.get(key.encode())
    return value if type(value) is int and value > 0 else None


def _text(metadata: dict[bytes, Scalar], key: bytes, bytes_max: int) -> str | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, bytes) or len(value) > bytes_max:
        raise _Unsound(f"its `{key.decode()}` is not a text of at most {bytes_max} bytes")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _Unsound(f"its `{key.decode()}` is not UTF-8") from None
