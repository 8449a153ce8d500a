"""The check of images before an engine sees them, by programs that are spoken to over their pipes.

It refuses to decode anything itself, and to believe a program further than that its answer has the form of a picture.
"""

import asyncio
import contextlib
import json
import struct
from asyncio.subprocess import PIPE
from enum import IntEnum

from forebay.clock import Clock
from forebay.config import MediaSettings
from forebay.errors import CallerError, ServerError
from forebay.media.medium import IMAGE
from forebay.media.programs import Places, Programs, launch

_OUT_BYTES_MAX = 32 * 2**20
_PICTURES = (b"data:image/png;base64,", b"data:image/jpeg;base64,")
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
_FAILED = "The program that looks at images failed. Try again."


class _Verdict(IntEnum):
    """What the program says; its own numbers."""

    OK = 0
    NOT_AN_IMAGE = 1
    BROKEN = 2
    TOO_MANY_PIXELS = 3
    TOO_MANY_FRAMES = 4
    TOO_COSTLY = 5
    TOO_NARROW = 6
    NOT_BASE64 = 7


class Checker:
    """Makes of an image what an engine may see."""

    def __init__(self, settings: MediaSettings, clock: Clock) -> None:
        self._settings = settings
        self._places = Places(settings.checks_at_once)
        self._programs = Programs(self._start, settings.check_seconds_max, _FAILED, clock)

    async def close(self) -> None:
        """End every program."""
        await self._programs.close()

    async def check(
        self, data: bytes, *, declared: str | None, in_base64: bool, low: bool, patient: bool = False
    ) -> str:
        """The `data:` URL of the image as our own encoder writes it.

        `declared` is the type that its sender claims (`png`), `in_base64` how `data` is written. Raises InvalidRequest
        (`media_invalid`), PayloadTooLarge (`media_too_large`) and ServerError.
        """
        settings = self._settings
        edge = settings.low_edge_pixels_max if low else settings.edge_pixels_max
        head = json.dumps({"declared": declared, "base64": in_base64, "edge": min(edge, settings.edge_pixels_max)})
        async with self._places.one(patient=patient):
            answer = await self._programs.ask(lambda program: program.ask(head.encode(), data))
        verdict, picture = (_Verdict.TOO_COSTLY, b"") if answer is None else answer
        if verdict != _Verdict.OK:
            raise _refusal(verdict, settings)
        if not _is_picture(picture):
            raise ServerError(_FAILED)
        return picture.decode("ascii")

    async def _start(self) -> "_Program":
        settings = self._settings
        limits = {
            "pixels_max": settings.pixels_max,
            "frames_max": settings.frames_max,
            "memory_bytes_max": settings.check_memory_bytes_max,
            "seconds_max": settings.check_seconds_max,
        }
        return _Program(await launch("forebay.engines.image_check", limits, stdin=PIPE, stdout=PIPE))


class _Program:
    """One running program; it looks at one image at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def lives(self) -> bool:
        """Whether it has not ended, as far as is known: its pipe may be closed before its end is told."""
        assert self._process.stdin is not None
        return self._process.returncode is None and not self._process.stdin.is_closing()

    async def ask(self, head: bytes, data: bytes) -> tuple[int, bytes]:
        """Verdict and picture. Raises OSError if it has ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        if stdin.is_closing():  # what is written then is lost, or a RuntimeError, by the loop
            raise BrokenPipeError
        stdin.writelines((struct.pack(">II", len(head), len(data)), head, data))
        await stdin.drain()
        try:
            verdict, size = struct.unpack(">BI", await stdout.readexactly(5))
            if size > _OUT_BYTES_MAX:
                raise OSError("an answer that is too long")
            return verdict, await stdout.readexactly(size)
        except asyncio.IncompleteReadError:
            raise ConnectionResetError from None

    def kill(self) -> None:
        """End it; the child that looks at an image ends with it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> None:
        """Wait until it has ended."""
        await self._process.wait()


def _is_picture(answer: bytes) -> bool:
    _, comma, content = answer.partition(b",")
    return answer.startswith(_PICTURES) and bool(comma) and not content.translate(None, _BASE64)


def _refusal(verdict: int, settings: MediaSettings) -> CallerError:
    """What the caller is told."""
    match verdict:
        case _Verdict.NOT_AN_IMAGE:
            return IMAGE.invalid("It is no PNG, JPEG, WebP or GIF, or another one than its `data:` URL says.")
        case _Verdict.TOO_MANY_PIXELS:
            return IMAGE.too_large(f"It has more than {settings.pixels_max} pixels. Scale it down.")
        case _Verdict.TOO_MANY_FRAMES:
            return IMAGE.too_large(f"It is an animation of more than {settings.frames_max} frames. Send one frame.")
        case _Verdict.TOO_COSTLY:
            return IMAGE.too_large("It takes too much time or memory to decode. Scale it down.")
        case _Verdict.TOO_NARROW:
            return IMAGE.invalid("One of its sides is more than 200 times as long as the other.")
        case _Verdict.NOT_BASE64:
            return IMAGE.invalid(
                "Its base64 is not valid: write it in one line, with its padding and without percent-encoding."
            )
        case _:
            return IMAGE.invalid("It is damaged.")
