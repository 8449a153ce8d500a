"""The form of an API key: how one is made, read, hashed and compared; and the roles that keys can have.

It refuses to know where keys are kept and who may do what with them.
"""

import hashlib
import hmac
import re
import zlib
from dataclasses import dataclass
from enum import StrEnum

from forebay.clock import random_bytes

KEY_LENGTH = 65
_LOOKUP_CHARS = 11  # 64 bits
_SECRET_CHARS = 43  # 256 bits
_CHECKSUM_CHARS = 6  # 32 bits
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_FORM = re.compile(
    f"(fb_([0-9A-Za-z]{{{_LOOKUP_CHARS}}})_[0-9A-Za-z]{{{_SECRET_CHARS}}}_)([0-9A-Za-z]{{{_CHECKSUM_CHARS}}})"
)


class Role(StrEnum):
    """What a key may do: everything; use models within its scopes; or only look."""

    ADMIN = "admin"
    MEMBER = "member"
    READ_ONLY = "read_only"


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made. `plain` is shown once and kept nowhere."""

    plain: str
    prefix: str

    def __repr__(self) -> str:
        return f"NewKey(prefix={self.prefix!r})"


def make_key() -> NewKey:
    """`fb_<lookup>_<secret>_<checksum>`, all in base 62, so that a double click selects the whole."""
    prefix = _base62(random_bytes(8), _LOOKUP_CHARS)
    payload = f"fb_{prefix}_{_base62(random_bytes(32), _SECRET_CHARS)}_"
    return NewKey(payload + _checksum(payload), prefix)


def lookup_prefix(plain: str) -> str | None:
    """The public part of a key by which its row is found; None for what cannot be a key.

    The checksum catches every typo, so a mistyped key costs no look-up.
    """
    match = _FORM.fullmatch(plain)
    if match is None or _checksum(match[1]) != match[3]:
        return None
    return match[2]


def hash_key(plain: str) -> bytes:
    """What the store keeps of a key.

    A plain SHA-256 is right here: the secret is 256 random bits, so there is no dictionary to try, and a slow hash
    made for passwords would only slow down every request.
    """
    return hashlib.sha256(plain.encode()).digest()


def same_hash(left: bytes, right: bytes) -> bool:
    """Compare two hashes in a time that does not depend on where they differ."""
    return hmac.compare_digest(left, right)


def _checksum(payload: str) -> str:
    return _base62(zlib.crc32(payload.encode()).to_bytes(4), _CHECKSUM_CHARS)


def _base62(value: bytes, length: int) -> str:
    number = int.from_bytes(value)
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
