"""Reads the tensors of a PyTorch checkpoint without PyTorch: the form before 1.6, pickles and then the raw numbers.

It refuses to run anything that a file names: it walks the opcodes itself, builds dictionaries, tuples and descriptions of
tensors from those that it knows, and ends at any other.
"""

import io
import math
import pickletools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

FILE_BYTES_MAX = 256 * 2**20
_HEAD_BYTES_MAX = 2**20
_OPCODES_MAX = 200_000
_RANK_MAX = 8
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_FLOAT = np.dtype("<f4")
_COUNT = struct.Struct("<q")

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"})
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_DICTIONARY = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_STORAGE = "torch FloatStorage"
_MARK = object()

Tensor = npt.NDArray[np.float32]


class NotWeights(Exception):
    """The file is no checkpoint that can be read here; the message says what is the matter."""


@dataclass(frozen=True, slots=True)
class _Global:
    """Something that a pickle names; it is never looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """Numbers that stand further down in the file."""

    key: str
    count: int


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor: a part of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]


def read_weights(path: Path, group: str) -> dict[str, Tensor]:
    """The tensors of the dictionary `group` of a checkpoint, by their names. Raises NotWeights, or OSError."""
    if path.stat().st_size > FILE_BYTES_MAX:
        _refuse(f"it is larger than {FILE_BYTES_MAX} bytes")
    data = path.read_bytes()
    head = io.BytesIO(data[:_HEAD_BYTES_MAX])
    magic, protocol, system, content, keys = (_unpickled(head) for _ in range(5))
    if (
        magic != _MAGIC
        or protocol != _PROTOCOL
        or not isinstance(system, dict)
        or system.get("little_endian") is not True
    ):
        _refuse("it is not in the form that PyTorch wrote before version 1.6")
    views = content.get(group) if isinstance(content, dict) else None
    if not isinstance(views, dict) or not all(isinstance(each, _View) for each in views.values()):
        _refuse(f"it has no tensors by the name {group}")
    if sum(math.prod(view.shape) for view in views.values()) > len(data) // _FLOAT.itemsize:
        _refuse("its tensors are larger than the file")
    storages = dict(_storages(data, head.tell(), keys))
    return {str(name): _tensor(view, storages) for name, view in views.items()}


def _refuse(why: str) -> NoReturn:
    raise NotWeights(f"These weights cannot be read: {why}.")


def _storages(data: bytes, at: int, keys: Any) -> Iterator[tuple[str, Tensor]]:
    """Every storage in the order of the file."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        _refuse("it has no list of storages")
    for key in keys:
        if at + _COUNT.size > len(data):
            _refuse("it is cut off")
        (count,) = _COUNT.unpack_from(data, at)
        at += _COUNT.size
        if not 0 <= count <= (len(data) - at) // _FLOAT.itemsize:
            _refuse("it is cut off")
        yield key, np.frombuffer(data, _FLOAT, count, at)
        at += count * _FLOAT.itemsize


def _tensor(view: _View, storages: dict[str, Tensor]) -> Tensor:
    numbers = storages.get(view.storage.key)
    size = math.prod(view.shape)
    if numbers is None or view.storage.count != numbers.size or view.offset + size > numbers.size:
        _refuse("a tensor lies outside its storage")
    found = numbers[view.offset : view.offset + size].reshape(view.shape)
    if not np.isfinite(found).all():
        _refuse("a number in it is not finite")
    return found


def _unpickled(stream: io.BytesIO) -> Any:
    """The value of the pickle that begins here; the stream then stands behind it."""
    machine = _Machine()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number > _OPCODES_MAX:
                _refuse("it has too many opcodes")
            machine.step(opcode.name, argument)
        return machine.pop()
    except (ValueError, IndexError, KeyError, TypeError, OverflowError):
        _refuse("it is damaged, or no checkpoint of PyTorch")


class _Machine:
    """The stack and the memo of one pickle. Wrong types and empty stacks raise the errors that `_unpickled` expects."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self._stack.pop()

    def step(self, name: str, argument: Any) -> None:
        """Do what one opcode says, if it is one that checkpoints need."""
        if name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _NUMBERS or name == "BINUNICODE":
            self._stack.append(argument)
        elif name in _TUPLES:
            count = _TUPLES[name]
            self._stack.append(tuple(self.pop() for _ in range(count))[::-1])
        elif name in {"BINPUT", "LONG_BINPUT"}:
            self._memo[argument] = self._stack[-1]
        elif name in {"BINGET", "LONG_BINGET"}:
            self._stack.append(self._memo[argument])
        elif name not in {"PROTO", "STOP"}:
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        match name:
            case "EMPTY_DICT":
                self._stack.append({})
            case "EMPTY_LIST":
                self._stack.append([])
            case "MARK":
                self._stack.append(_MARK)
            case "TUPLE":
                self._stack.append(tuple(self._since_mark()))
            case "APPEND" | "APPENDS":
                new = self._since_mark() if name == "APPENDS" else [self.pop()]
                _of(list, self._stack[-1]).extend(new)
            case "SETITEM" | "SETITEMS":
                self._set(self._since_mark() if name == "SETITEMS" else [self.pop(), self.pop()][::-1])
            case "BUILD":  # attributes of a dictionary: what PyTorch notes about its own versions
                self.pop()
            case "GLOBAL":
                self._stack.append(_named(argument))
            case "BINPERSID":
                self._stack.append(_storage(self.pop()))
            case "REDUCE":
                arguments = _of(tuple, self.pop())
                self._stack.append(_made(self.pop(), arguments))
            case _:
                raise NotWeights(f"These weights cannot be read: they ask for {name}, which no tensor needs.")

    def _since_mark(self) -> list[Any]:
        found = []
        while (value := self.pop()) is not _MARK:
            found.append(value)
        return found[::-1]

    def _set(self, items: list[Any]) -> None:
        target = _of(dict, self._stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nothing nested: the hash of a tuple takes as long as its sender likes.
            if not isinstance(key, str | int):
                raise TypeError
            target[key] = value


def _of(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _named(name: str) -> _Global:
    if name not in {_DICTIONARY, _TENSOR, _STORAGE}:
        raise NotWeights("These weights cannot be read: they name something other than tensors of floats.")
    return _Global(name)


def _storage(described: Any) -> _Storage:
    kind, which, key, _device, count, view = _of(tuple, described)
    if kind != "storage" or not isinstance(which, _Global) or which.name != _STORAGE or view is not None:
        raise ValueError
    return _Storage(_of(str, key), _whole(count))


def _made(what: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(what, _Global):
        raise TypeError
    if what.name == _DICTIONARY and not arguments:
        return {}
    if what.name != _TENSOR:
        raise ValueError
    storage, offset, shape, strides, _gradient, _hooks = arguments
    if len(shape) > _RANK_MAX:
        raise ValueError
    sizes = tuple(_whole(each) for each in _of(tuple, shape))
    steps = tuple(_whole(each) for each in _of(tuple, strides))
    in_order = tuple(math.prod(sizes[place + 1 :]) for place in range(len(sizes)))
    if steps != in_order:
        raise ValueError
    return _View(_of(_Storage, storage), _whole(offset), sizes)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= FILE_BYTES_MAX:
        raise ValueError
    return value
