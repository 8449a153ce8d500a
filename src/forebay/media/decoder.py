"""The decoding of recordings, a few at once, by programs that are handed descriptors.

It refuses to decode anything itself, and to let more than a few wait for their turn.
"""

import asyncio
import os
import struct
from collections.abc import Callable
from contextlib import aclosing
from enum import IntEnum

from forebay.clock import Clock
from forebay.config import AudioSettings
from forebay.errors import ForebayError, InsufficientStorage, Overloaded
from forebay.media.medium import RECORDING
from forebay.media.programs import Programs, SocketProgram, connect
from forebay.speech import SAMPLE_RATE

_WAITING_MAX = 64  # recordings whose turn has not come; they lie on the disk meanwhile
_END = 128
_FAILED = "The program that decodes recordings failed. Try again."


class _Verdict(IntEnum):
    """What the program says; its own numbers."""

    OK = 0
    NOT_A_RECORDING = 1
    BROKEN = 2
    NO_AUDIO = 3
    TOO_LONG = 4
    TOO_COSTLY = 5
    NO_ROOM = 6


class Decoder:
    """Makes samples of recordings, a few at once."""

    def __init__(self, settings: AudioSettings, clock: Clock) -> None:
        self._settings = settings
        self._places = asyncio.Semaphore(settings.decodes_at_once)
        self._waiting = 0
        self._programs = Programs(self._start, settings.decode_seconds_max, _FAILED, clock)

    async def close(self) -> None:
        """End every program, whatever it is at, and start none."""
        await self._programs.close()

    async def decode(self, recording: int, samples: int, samples_max: int, on_percent: Callable[[int], None]) -> None:
        """Decode what one descriptor holds into the other: mono, 16 kHz, signed 16-bit, little-endian.

        Raises InvalidRequest (`media_invalid`), PayloadTooLarge (`media_too_large`), InsufficientStorage, Overloaded and
        ServerError; an error that `on_percent` raises ends it too.
        """
        if self._waiting >= _WAITING_MAX:
            raise Overloaded("Too many recordings are being decoded. Try again later.", retry_after_seconds=5)
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            verdict = await self._programs.ask(
                lambda program: _verdict(program, recording, samples, samples_max, on_percent)
            )
        finally:
            self._places.release()
        if verdict != _Verdict.OK:
            raise _refusal(_Verdict.TOO_COSTLY if verdict is None else verdict, samples_max // SAMPLE_RATE)

    async def _start(self) -> SocketProgram:
        settings = self._settings
        limits = {"memory_bytes_max": settings.decode_memory_bytes_max, "seconds_max": settings.decode_seconds_max}
        return await connect("forebay.engines.audio_decode", limits)


async def _verdict(
    program: SocketProgram, recording: int, samples: int, samples_max: int, on_percent: Callable[[int], None]
) -> int:
    """Its verdict. Raises OSError if it has ended."""
    os.ftruncate(samples, 0)  # another may have begun
    os.lseek(samples, 0, os.SEEK_SET)
    async with aclosing(program.ask(struct.pack(">Q", samples_max), [recording, samples])) as pieces:
        async for said in pieces:
            if said[-1] >= _END:
                return said[-1] - _END
            on_percent(said[-1])
    raise ConnectionResetError


def _refusal(verdict: int, seconds_max: int) -> ForebayError:
    """What the caller is told."""
    match verdict:
        case _Verdict.NOT_A_RECORDING:
            return RECORDING.invalid(
                "It is no audio or video file of a kind that is taken here: WAV, FLAC, MP3, M4A, MP4, MOV, Ogg, Opus, "
                "WebM, Matroska, AAC, AMR, AIFF, CAF, AVI, MPEG, FLV or WMA."
            )
        case _Verdict.NO_AUDIO:
            return RECORDING.invalid("There is no sound in it.")
        case _Verdict.TOO_LONG:
            return RECORDING.too_large(f"It is longer than {seconds_max} seconds. Cut it into parts.")
        case _Verdict.TOO_COSTLY:
            return RECORDING.too_large(
                "It takes too much time or memory to decode. Send it in another format, or cut it into parts."
            )
        case _Verdict.NO_ROOM:
            return InsufficientStorage()
        case _:
            return RECORDING.invalid("It is damaged, or its sound is coded in a way that is not known here.")
