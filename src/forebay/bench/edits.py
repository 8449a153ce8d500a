"""Edits of images, asked of a running server, and the pictures that belong to a measurement.

It refuses to look into a picture: a program with a library of images does that.
"""

import asyncio
import base64
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from forebay.bench.program import Program, running
from forebay.bench.wire import now
from forebay.dialects.openai.images import EDITS

_ANSWER_SECONDS = 3600.0
_PROGRAM = (sys.executable, "-P", "-m", "forebay.bench.picture_program")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is edited: an image, its mask, and how that marks: by what is white, or else by what is transparent."""

    image: Path
    mask: Path
    white: bool = True

    @property
    def mask_mode(self) -> str:
        """As the server takes it."""
        return "white" if self.white else "alpha"


@dataclass(frozen=True, slots=True)
class Edited:
    """What came of an edit: the picture and what it takes to make it again, or what went wrong."""

    seconds: float
    picture: bytes = field(default=b"", repr=False)
    used: Mapping[str, Any] = field(default_factory=dict)
    trouble: str = ""


Edit = Callable[[Subject, Mapping[str, Any]], Awaitable[Edited]]
"""One edit of a subject with fields of the API."""


@asynccontextmanager
async def editing(url: str, key: str) -> AsyncIterator[Edit]:
    """A way to ask a server for edits, one connection for all of them."""
    timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
    async with aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {key}"}, timeout=timeout) as session:

        async def edit(subject: Subject, fields: Mapping[str, Any]) -> Edited:
            form = aiohttp.FormData()
            for name, value in {**fields, "mask_mode": subject.mask_mode}.items():
                form.add_field(name, str(value))
            for name, path in (("image", subject.image), ("mask", subject.mask)):
                form.add_field(name, await asyncio.to_thread(path.read_bytes), filename=path.name)
            began = now()
            async with session.post(EDITS, data=form) as answer:
                body = await answer.json()
            seconds = now() - began
            if answer.status != 200:
                return Edited(seconds, trouble=f"the server answered {answer.status}: {body['error']['message']}")
            (picture,) = body["data"]
            return Edited(seconds, base64.b64decode(picture["b64_json"]), picture["used"])

        yield edit


def drawing() -> AbstractAsyncContextManager[Program]:
    """The program that makes samples and sheets."""
    return running(_PROGRAM, "the program for pictures", "Look at what it said.")


async def sample(program: Program, folder: Path, edge: int, seed: int) -> Subject:
    """An image of so many pixels on each side, with its mask; another one for every seed."""
    made = await program.ask({"sample": {"folder": str(folder), "edge": edge, "seed": seed}})
    return Subject(Path(made["image"]), Path(made["mask"]))
