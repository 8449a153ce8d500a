"""The names of blobs, and of objects in a store that others fill.

It refuses a name of a blob that the server did not make: nothing that a client sends is ever part of one. Of the name of an
object it refuses whatever could lead out of the store.
"""

import re

_SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}"  # no dot in front: neither `..` nor a hidden file
_KEY = re.compile(rf"{_SEGMENT}(/{_SEGMENT}){{0,7}}")
_PREFIX = re.compile(rf"({_SEGMENT}/){{0,7}}")
_OBJECT_BYTES_MAX = 1024  # as S3 and others have it
_SEGMENT_BYTES_MAX = 255  # as file systems have it


def checked_key(key: str) -> str:
    """The key itself, once it is known to be one."""
    assert _KEY.fullmatch(key), f"not a blob key: {key!r}"
    return key


def checked_prefix(prefix: str) -> str:
    """The prefix itself, once it is known to be one: nothing, or whole segments that end in a slash."""
    assert _PREFIX.fullmatch(prefix), f"not a prefix of blob keys: {prefix!r}"
    return prefix


def is_object_name(name: str) -> bool:
    """Whether it names an object: segments between single slashes, each printable and without a dot in front."""
    segments = name.split("/")
    return (
        name.isprintable()
        and "\\" not in name
        and len(name.encode()) <= _OBJECT_BYTES_MAX
        and all(0 < len(segment.encode()) <= _SEGMENT_BYTES_MAX and segment[0] != "." for segment in segments)
    )


def checked_object(name: str) -> str:
    """The name itself, once it is known to be one of an object."""
    assert is_object_name(name), f"not the name of an object: {name!r}"
    return name
