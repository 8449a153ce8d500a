import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.engines.pronunciation import number_words, phones, spelled

DICTIONARY = {
    "five": "F AY V",
    "forty": "F AO R T IY",
    "don't": "D OW N T",
    "b": "B IY",
    "c": "S IY",
    "a": "AH",
    "and": "AE N D",
}
# Those of the CMU dictionary; the decoder takes no other.
PHONES = set(
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH".split()  # noqa: SIM905
)


@pytest.mark.parametrize(
    ("digits", "words"),
    [
        ("0", "zero"), ("7", "seven"), ("13", "thirteen"), ("40", "forty"), ("99", "ninety nine"), ("100", "one hundred"),
        ("512", "five hundred twelve"), ("1985", "nineteen eighty five"), ("1900", "nineteen hundred"), ("1906", "nineteen oh six"),
        ("2005", "two thousand five"), ("2024", "twenty twenty four"), ("1000", "one thousand"), ("3000000", "three million"),
        ("12040", "twelve thousand forty"), ("007", "zero zero seven"), ("1234567890", "one two three four five six seven eight nine zero"),
    ],
)  # fmt: skip
def test_numbers_are_read(digits: str, words: str) -> None:
    assert number_words(digits) == words.split()


@given(st.integers(0, 10**12).map(str))
def test_every_number_can_be_read(digits: str) -> None:
    assert all(word.isalpha() for word in number_words(digits))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("“Don’t!”", "D OW N T"),
        ("forty-five", "F AO R T IY F AY V"),
        ("45%", "F AO R T IY F AY V P ER S EH N T"),
        ("BBC", "B IY B IY S IY"),
        ("Sheehy", "SH IY HH IY"),
        ("Müller", "M AH L ER"),
        ("—", ""),
        ("東京", ""),
        ("", ""),
    ],
)
def test_how_words_may_be_said(word: str, said: str) -> None:
    assert phones(word, DICTIONARY.get) == said


@given(st.text(max_size=40))
def test_only_sounds_of_the_dictionary_are_said(word: str) -> None:
    assert set(phones(word, DICTIONARY.get).split()) <= PHONES
    assert spelled(word).isascii()


@pytest.mark.parametrize("word", [" ", "a", "'", "9", "a'", "999,", "&", "-", "\u0315\u0316", "a\u0316\u0315", "ﷺ"])
def test_a_word_of_any_form_is_spelled_in_a_moment(word: str) -> None:
    begun = time.process_time()
    plain = spelled((word * 65_536)[:65_536])
    assert time.process_time() - begun < 1
    phones(plain, DICTIONARY.get)
    assert time.process_time() - begun < 3
