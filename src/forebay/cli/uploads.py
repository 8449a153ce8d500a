"""Files on their way to the server, with a view of how much of them was sent.

It refuses to hold a whole file in memory.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import aiohttp

from forebay.cli.progress import View
from forebay.errors import SetupError

_READ_BYTES = 2**18


@contextmanager
def form_of(fields: Mapping[str, str], files: Mapping[str, Path], view: View) -> Iterator[aiohttp.FormData]:
    """A form of `fields` and then `files`, which are read while it is sent. Raises SetupError."""
    form, sent, size = aiohttp.FormData(), dict.fromkeys(files, 0), 0
    for name, value in fields.items():
        form.add_field(name, value)

    def told(name: str) -> Callable[[int], None]:
        def tell(count: int) -> None:
            sent[name] = count
            view.show_bytes("uploading", sum(sent.values()), size)

        return tell

    with ExitStack() as stack:
        for name, path in files.items():
            try:
                size += path.stat().st_size
                source = stack.enter_context(_Watched(path, told(name)))
            except OSError as error:
                raise SetupError(f"{path} cannot be read: {error.strerror}.") from None
            content = cast("BinaryIO", io.BufferedReader(source, _READ_BYTES))
            form.add_field(name, content, filename=path.name, content_type="application/octet-stream")
        yield form


class _Watched(io.FileIO):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, told: Callable[[int], None]) -> None:
        super().__init__(path)
        self._told = told

    def readinto(self, buffer: Any, /) -> int | None:
        """Read the next bytes."""
        count = super().readinto(buffer)
        self._told(self.tell())
        return count
