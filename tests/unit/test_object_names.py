"""Names of objects in a store that others fill: what leads out of it is none."""

import pytest

from forebay.blobs.key import is_object_name


@pytest.mark.parametrize(
    "name",
    [
        "a.jpg",
        "inbox/7/IMG 001 (1).jpg",
        "日本/é.jpg",
        "a#b?%2f.jpg",
        "x*~[]{}^`'\"<>|:;,.jpg",
        "a/" * 511 + "b",
        "ä" * 127,
    ],
)
def test_it_names_an_object(name: str) -> None:
    assert is_object_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "/", "/a", "a/", "a//b", "..", "../a", "a/../b", "a/..", ".", "./a", ".hidden", "a/.partial/b"),
        *("a\\b", "..\\a", "a\0b", "a\nb", "a\tb", "a\x7fb", "a\u202eb", "a\u00a0b", "a\ud800b", "a\u2028b"),
        *("x" * 256, "ä" * 128, "a/" * 512 + "b"),
    ],
)
def test_it_names_none(name: str) -> None:
    assert not is_object_name(name)
