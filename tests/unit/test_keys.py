"""The form of an API key: what is made, what is refused offline."""

import string

import pytest

from forebay.store.key_format import KEY_LENGTH, hash_key, lookup_prefix, make_key, same_hash

EVERY_CHARACTER = string.printable + "é\u0660\uff10\x00"


def test_a_key_has_its_form_and_is_found_by_its_prefix() -> None:
    key = make_key()
    kind, prefix, secret, checksum = key.plain.split("_")
    assert (kind, prefix, len(secret), len(checksum)) == ("fb", key.prefix, 43, 6)
    assert len(key.plain) == KEY_LENGTH
    assert 8 <= len(prefix) <= 12
    assert lookup_prefix(key.plain) == key.prefix


def test_every_single_character_mutation_is_refused() -> None:
    plain = make_key().plain
    for place, character in enumerate(plain):
        for other in EVERY_CHARACTER:
            if other != character:
                assert lookup_prefix(plain[:place] + other + plain[place + 1 :]) is None, (place, other)


def test_every_single_insertion_deletion_and_swap_is_refused() -> None:
    plain = make_key().plain
    for place in range(len(plain)):
        assert lookup_prefix(plain[:place] + plain[place + 1 :]) is None
        for other in string.ascii_letters + string.digits + "_ \n":
            assert lookup_prefix(plain[:place] + other + plain[place:]) is None
        swapped = plain[:place] + plain[place + 1 : place + 2] + plain[place] + plain[place + 2 :]
        assert swapped == plain or lookup_prefix(swapped) is None


@pytest.mark.parametrize("text", ["", "fb_", "sk-abc", "fb_" + "0" * 62, "é" * 65, "fb__" + "_" * 61, "0" * 10_000])
def test_what_cannot_be_a_key_is_refused(text: str) -> None:
    assert lookup_prefix(text) is None


def test_keys_do_not_repeat() -> None:
    keys = [make_key() for _ in range(2_000)]
    assert len({key.plain for key in keys}) == len({key.prefix for key in keys}) == 2_000


def test_a_key_does_not_show_in_its_repr() -> None:
    key = make_key()
    assert key.plain not in repr(key)


def test_hashes_compare() -> None:
    one, other = make_key().plain, make_key().plain
    assert same_hash(hash_key(one), hash_key(one))
    assert not same_hash(hash_key(one), hash_key(other))
