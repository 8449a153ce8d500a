"""How English words that no dictionary knows may be said: numbers in words, names by their letters.

It refuses to be right: a rough guess is enough to find where a known text was said.
"""

import re
import unicodedata
from collections.abc import Callable

# The longest that fits is taken. Phones are those of the CMU dictionary.
_SOUNDS = {
    "tch": "CH", "sch": "SH", "igh": "AY", "eau": "OW", "tion": "SH AH N", "ough": "AO", "augh": "AO",
    "ch": "CH", "sh": "SH", "th": "TH", "ph": "F", "gh": "G", "ck": "K", "qu": "K W", "ng": "NG", "wh": "W", "kn": "N",
    "wr": "R", "zh": "ZH", "ee": "IY", "ea": "IY", "oo": "UW", "ou": "AW", "ow": "OW", "oi": "OY", "oy": "OY", "ai": "EY",
    "ay": "EY", "au": "AO", "aw": "AO", "ie": "IY", "ei": "EY", "ey": "IY", "eu": "UW", "ew": "UW", "ar": "AA R",
    "er": "ER", "ir": "ER", "ur": "ER", "or": "AO R",
    "a": "AE", "b": "B", "c": "K", "d": "D", "e": "EH", "f": "F", "g": "G", "h": "HH", "i": "IH", "j": "JH", "k": "K",
    "l": "L", "m": "M", "n": "N", "o": "OW", "p": "P", "q": "K", "r": "R", "s": "S", "t": "T", "u": "AH", "v": "V",
    "w": "W", "x": "K S", "y": "IY", "z": "Z",
}  # fmt: skip
_SOUND = re.compile("|".join(sorted(_SOUNDS, key=len, reverse=True)))
_SOFT_C = re.compile(r"c(?=[eiy])")
_DOUBLE = re.compile(r"([b-df-hj-np-tv-z])\1")
_PART = re.compile(r"[a-z]+(?:'[a-z]+)*|[0-9]+")
_DIGIT_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3})")
_NAMED = {"%": " percent", "&": " and ", "@": " at ", "+": " plus "}

_SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_DIGITS_MAX = 9  # longer ones are read digit by digit

Lookup = Callable[[str], str | None]
"""The phones of a word that a dictionary knows."""


def spelled(word: str) -> str:
    """A word of a text as a dictionary may have it: small letters without accents, and no marks around it."""
    # Each character by itself: marks that follow one another are put in order, in a time that grows with their square.
    letters = "".join(unicodedata.normalize("NFKD", each) for each in word.replace("’", "'"))
    return letters.encode("ascii", "ignore").decode().lower().strip(' \t\r\n.,;:!?"()[]{}<>*_~`-/\\')


def phones(word: str, lookup: Lookup) -> str:
    """How a word may be said; empty for one that has nothing to say."""
    text = _DIGIT_COMMA.sub("", spelled(word))
    for mark, name in _NAMED.items():
        text = text.replace(mark, name)
    letters_alone = word.isupper() and text.isalpha()
    found: list[str] = []
    for part in _PART.findall(text):
        known = lookup(part)
        if known:
            found.append(known)
        elif part.isdigit():
            found += [lookup(each) or _by_letters(each) for each in number_words(part)]
        elif letters_alone and len(part) <= 5:
            found += [lookup(letter) or _by_letters(letter) for letter in part]
        else:
            found.append(_by_letters(part))
    return " ".join(found)


def _by_letters(part: str) -> str:
    return " ".join(_SOUNDS[each] for each in _SOUND.findall(_SOFT_C.sub("s", _DOUBLE.sub(r"\1", part))))


def number_words(digits: str) -> list[str]:
    """A whole number as it is read; four digits that look like a year, as a year."""
    if len(digits) > _DIGITS_MAX or (len(digits) > 1 and digits.startswith("0")):
        return [_SMALL[int(digit)] for digit in digits]
    number = int(digits)
    if len(digits) == 4 and (1100 <= number < 2000 or 2010 <= number < 2100):
        tail = number % 100
        rest = ["hundred"] if tail == 0 else ["oh", _SMALL[tail]] if tail < 10 else _below_thousand(tail)
        return [*_below_thousand(number // 100), *rest]
    found: list[str] = []
    for size, name in ((1_000_000, "million"), (1000, "thousand")):
        if number >= size:
            found += [*_below_thousand(number // size), name]
            number %= size
    return [*found, *_below_thousand(number)] if number or not found else found


def _below_thousand(number: int) -> list[str]:
    if number < 20:
        return [_SMALL[number]]
    if number < 100:
        return [_TENS[number // 10 - 2], *([_SMALL[number % 10]] if number % 10 else [])]
    return [_SMALL[number // 100], "hundred", *(_below_thousand(number % 100) if number % 100 else [])]
