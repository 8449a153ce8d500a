import itertools
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from forebay.engines.torch_weights import NotWeights, read_weights

PROTOCOL = b"\x80\x02"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def whole(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def tensor(key: str, count: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """The opcodes of a tensor, as PyTorch writes them."""
    sizes, steps = (b"(" + b"".join(map(whole, each)) + b"t" for each in (shape, strides))
    storage = b"((" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + whole(count) + b"NtQ"
    ordered = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + whole(offset) + sizes + steps + b"\x89" + ordered + b"tR"


def checkpoint(
    group: bytes, storages: dict[str, np.ndarray], system: bytes = b"\x88", magic: int = 0x6CFC9C46
) -> bytes:
    """A whole file: `group` are the opcodes of what stands under `weights`."""
    number = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" if magic == 0x6CFC9C46 else whole(magic)
    head = (
        PROTOCOL + number + b"." + PROTOCOL + b"M\xe9\x03." + PROTOCOL + b"}" + text("little_endian") + system + b"s."
    )
    body = PROTOCOL + b"}" + text("weights") + group + b"s."
    keys = PROTOCOL + b"](" + b"".join(map(text, storages)) + b"e."
    numbers = b"".join(struct.pack("<q", len(each)) + each.astype("<f4").tobytes() for each in storages.values())
    return head + body + keys + numbers


NUMBERS = np.arange(12, dtype=np.float32)
GOOD = b"}(" + text("a") + tensor("s", 12, 0, (3, 4), (4, 1)) + text("b") + tensor("s", 12, 4, (2,), (1,)) + b"u"


def read(folder: Path, data: bytes) -> dict[str, np.ndarray]:
    path = folder / "weights.pt"
    path.write_bytes(data)
    return read_weights(path, "weights")


def test_tensors_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = read(tmp_path, checkpoint(GOOD, {"other": np.ones(3), "s": NUMBERS}))
    assert list(found) == ["a", "b"]
    assert np.array_equal(found["a"], NUMBERS.reshape(3, 4))
    assert np.array_equal(found["b"], [4, 5])


ALONE = {"s": NUMBERS}


HOSTILE = {
    "empty": b"",
    "a zip archive": b"PK\x03\x04" + bytes(100),
    "another magic number": checkpoint(GOOD, ALONE, magic=7),
    "another order of bytes": checkpoint(GOOD, ALONE, b"\x89"),
    "a name to be called": checkpoint(b"cos\nsystem\n(" + text("true") + b"tR", ALONE),
    "a name found out by the file": checkpoint(text("os") + text("system") + b"\x93", ALONE),
    "an object to be made": checkpoint(b"(ios\nsystem\n", ALONE),
    "an object to be made by class": checkpoint(b"(cos\nsystem\no", ALONE),
    "a registered extension": checkpoint(b"\x82\x01", ALONE),
    "nothing of that name": checkpoint(b"}", ALONE).replace(text("weights"), text("weightz")),
    "no tensors": checkpoint(b"}" + text("a") + text("b") + b"s", ALONE),
    "a tensor outside": checkpoint(b"}" + text("a") + tensor("s", 12, 1, (3, 4), (4, 1)) + b"s", ALONE),
    "a tensor before": checkpoint(b"}" + text("a") + tensor("s", 12, -1, (3,), (1,)) + b"s", ALONE),
    "columns before rows": checkpoint(b"}" + text("a") + tensor("s", 12, 0, (3, 4), (1, 3)) + b"s", ALONE),
    "another count": checkpoint(b"}" + text("a") + tensor("s", 13, 0, (3,), (1,)) + b"s", ALONE),
    "no such storage": checkpoint(b"}" + text("a") + tensor("z", 12, 0, (3,), (1,)) + b"s", ALONE),
    "a huge tensor": checkpoint(b"}" + text("a") + tensor("s", 12, 0, (2**27,), (1,)) + b"s", ALONE),
    "many dimensions": checkpoint(b"}" + text("a") + tensor("s", 12, 0, (1,) * 9999, (1,) * 9999) + b"s", ALONE),
    "no end of opcodes": checkpoint(b"}" + b"N0" * 300_000, ALONE),
    "too many opcodes": checkpoint(b"N\x85" * 150_000, ALONE),
    "a nested key": checkpoint(b"}" + b")" + b"\x85" * 1000 + b"Ns", ALONE),
    "doubled keys": checkpoint(b"}" + b")" + b"q\x00h\x00\x86" * 60 + b"Ns", ALONE),
    "no number": checkpoint(GOOD, {"s": np.full(12, np.nan)}),
    "a long text": checkpoint(b"X\xff\xff\xff\xff", ALONE),
    "cut off": checkpoint(GOOD, ALONE)[:-1],
    "a negative count": checkpoint(GOOD, {}) + struct.pack("<q", -5),
}


@pytest.mark.parametrize("why", HOSTILE)
def test_what_is_no_checkpoint_is_refused(why: str, tmp_path: Path) -> None:
    with pytest.raises(NotWeights, match=r"^These weights cannot be read: .*\.$"):
        read(tmp_path, HOSTILE[why])


def test_a_larger_file_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(NotWeights, match="larger"):
        read_weights(path, "weights")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # texts with odd escapes
def test_a_damaged_file_is_refused_or_read_and_nothing_else(tmp_path: Path, prove: bool) -> None:
    rounds = 100_000 if prove else 2000
    chance = random.Random(5)
    good = checkpoint(GOOD, ALONE)
    refused = 0
    for number in range(rounds):
        data = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            place = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[place] = chance.randrange(256)
                case 1:
                    del data[place : place + chance.randint(1, 20)]
                case 2:
                    data[place:place] = data[chance.randrange(len(data)) :][: chance.randint(1, 20)]
                case _:
                    data[place:place] = bytes(
                        [chance.choice(b"(0123FGHIJKLMNPQRSTUVXabcdeghijlopqrstu}])\x80\x81\x86\x8a\x8b\x93")]
                    )
            data = data or bytearray(b".")
        try:
            found = read(tmp_path, bytes(data))
        except NotWeights:
            refused += 1
        else:
            assert all(np.isfinite(each).all() for each in found.values()), number
    assert refused > rounds / 3


def test_every_cut_is_refused(tmp_path: Path) -> None:
    good = checkpoint(GOOD, ALONE)
    for end in itertools.chain(range(0, len(good), 7), [len(good) - 1]):
        with pytest.raises(NotWeights):
            read(tmp_path, good[:end])
