"""The names of blobs.

It refuses a name that the server did not make: nothing that a client sends is ever part of one.
"""

import re

_SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}"  # no dot in front: neither `..` nor a hidden file
_KEY = re.compile(rf"{_SEGMENT}(/{_SEGMENT}){{0,7}}")
_PREFIX = re.compile(rf"({_SEGMENT}/){{0,7}}")


def checked_key(key: str) -> str:
    """The key itself, once it is known to be one."""
    assert _KEY.fullmatch(key), f"not a blob key: {key!r}"
    return key


def checked_prefix(prefix: str) -> str:
    """The prefix itself, once it is known to be one: nothing, or whole segments that end in a slash."""
    assert _PREFIX.fullmatch(prefix), f"not a prefix of blob keys: {prefix!r}"
    return prefix
