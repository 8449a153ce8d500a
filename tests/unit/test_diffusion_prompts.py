"""Prompts that are asked for again are not read again."""

from typing import Any

from forebay.engines.diffusion_prompts import Remembered


class Reader:
    """Remembers what it read."""

    def __init__(self) -> None:
        self.read: list[list[str]] = []

    def __call__(self, prompts: list[str], *, scale: int | None = None) -> tuple[Any, ...]:
        self.read.append(prompts)
        return (*prompts, scale)


def test_the_same_words_are_read_once() -> None:
    reader = Reader()
    encode = Remembered(reader)
    assert encode(["a cat"]) == encode(["a cat"]) == ("a cat", None)
    assert reader.read == [["a cat"]]


def test_other_words_other_companions_and_other_settings_are_read() -> None:
    reader = Reader()
    encode = Remembered(reader)
    assert [encode(["a"]), encode(["b"]), encode(["a", "b"]), encode(["a"], scale=1), encode(["a', 'b"])] == [
        ("a", None), ("b", None), ("a", "b", None), ("a", 1), ("a', 'b", None)
    ]  # fmt: skip
    assert len(reader.read) == 5


def test_only_the_last_few_are_kept_and_none_after_it_was_told_to_forget() -> None:
    reader = Reader()
    encode = Remembered(reader)
    for number in range(9):
        encode([str(number)])
        encode(["always"])
    encode(["8"])
    assert len(reader.read) == 10
    encode(["0"])
    assert len(reader.read) == 11
    encode.forget()
    encode(["0"])
    assert len(reader.read) == 12
