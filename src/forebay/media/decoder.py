"""The programs that decode recordings: started when one is needed, spoken to over a socket, ended when they hang.

It refuses to decode anything itself, and to let a program or its child go on once nobody waits for what it does.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from enum import IntEnum

from forebay.clock import Clock
from forebay.config import AudioSettings, environment_for_others
from forebay.errors import (
    ForebayError,
    InsufficientStorage,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    ServerError,
    ShuttingDown,
)
from forebay.speech import SAMPLE_RATE

_WAITING_MAX = 64  # recordings whose turn has not come; they lie on the disk meanwhile
_GRACE_SECONDS = 2.0
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
        self._clock = clock
        self._places = asyncio.Semaphore(settings.decodes_at_once)
        self._waiting = 0
        self._closed = False
        self._idle: list[_Program] = []
        self._busy: set[_Program] = set()

    async def close(self) -> None:
        """End every program, whatever it is at, and start none."""
        self._closed = True
        programs = [*self._idle, *self._busy]
        self._idle.clear()
        for program in programs:
            program.kill()
        for program in programs:
            await program.wait()

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
            verdict = await self._verdict(recording, samples, samples_max, on_percent)
        finally:
            self._places.release()
        if verdict != _Verdict.OK:
            raise _refusal(verdict, samples_max // SAMPLE_RATE)

    async def _verdict(self, recording: int, samples: int, samples_max: int, on_percent: Callable[[int], None]) -> int:
        for program in (self._take(), None):  # one that was killed by somebody else is nobody's mistake, once
            if self._closed:
                raise ShuttingDown
            os.ftruncate(samples, 0)
            os.lseek(samples, 0, os.SEEK_SET)
            with contextlib.suppress(OSError):
                return await self._ask(
                    program or await _start(self._settings), recording, samples, samples_max, on_percent
                )
        raise ServerError(_FAILED)

    async def _ask(
        self, program: "_Program", recording: int, samples: int, samples_max: int, on_percent: Callable[[int], None]
    ) -> int:
        """Its verdict; one that has not come to any is ended. Raises OSError if it died."""
        self._busy.add(program)
        whole = False
        try:
            async with self._clock.timeout(2 * self._settings.decode_seconds_max + _GRACE_SECONDS):
                verdict = await program.ask(recording, samples, samples_max, on_percent)
            whole = True
        except TimeoutError:
            return _Verdict.TOO_COSTLY
        finally:
            self._busy.discard(program)
            if whole:
                self._idle.append(program)
            else:
                program.kill()
        return verdict

    def _take(self) -> "_Program | None":
        """One that is idle, and has not died of something else meanwhile."""
        while self._idle:
            program = self._idle.pop()
            if program.lives:
                return program
            program.kill()
        return None


class _Program:
    """One running program; it decodes one recording at a time."""

    def __init__(self, process: asyncio.subprocess.Process, ours: socket.socket) -> None:
        self._process = process
        self._socket = ours
        self._asked = False

    @property
    def lives(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return self._process.returncode is None

    async def ask(self, recording: int, samples: int, samples_max: int, on_percent: Callable[[int], None]) -> int:
        """Its verdict. Raises OSError if it has ended."""
        socket.send_fds(self._socket, [struct.pack(">Q", samples_max)], [recording, samples])
        loop = asyncio.get_running_loop()
        self._asked = True
        try:
            while said := await loop.sock_recv(self._socket, 4096):
                if said[-1] >= _END:
                    return said[-1] - _END
                on_percent(said[-1])
        finally:
            self._asked = False
        raise ConnectionResetError

    def kill(self) -> None:
        """End it, and the child that decodes; whoever waits for its answer is told."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if not self._asked:
            self._socket.close()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def wait(self) -> None:
        """Wait until it has ended."""
        await self._process.wait()


async def _start(settings: AudioSettings) -> _Program:
    limits = {"memory_bytes_max": settings.decode_memory_bytes_max, "seconds_max": settings.decode_seconds_max}
    ours, its = socket.socketpair()
    try:
        ours.setblocking(False)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "forebay.engines.audio_decode", json.dumps(limits)),
            stdin=its.fileno(),
            stdout=asyncio.subprocess.DEVNULL,
            env=environment_for_others(),
            start_new_session=True,
        )
    except OSError:
        ours.close()
        raise ServerError(_FAILED) from None
    except BaseException:
        ours.close()
        raise
    finally:
        its.close()
    return _Program(process, ours)


def _refusal(verdict: int, seconds_max: int) -> ForebayError:
    """What the caller is told."""
    match verdict:
        case _Verdict.NOT_A_RECORDING:
            return invalid(
                "It is no audio or video file of a kind that is taken here: WAV, FLAC, MP3, M4A, MP4, MOV, Ogg, Opus, "
                "WebM, Matroska, AAC, AMR, AIFF, CAF, AVI, MPEG, FLV or WMA."
            )
        case _Verdict.NO_AUDIO:
            return invalid("There is no sound in it.")
        case _Verdict.TOO_LONG:
            return too_large(f"It is longer than {seconds_max} seconds. Cut it into parts.")
        case _Verdict.TOO_COSTLY:
            return too_large(
                "It takes too much time or memory to decode. Send it in another format, or cut it into parts."
            )
        case _Verdict.NO_ROOM:
            return InsufficientStorage()
        case _:
            return invalid("It is damaged, or its sound is coded in a way that is not known here.")


def invalid(message: str) -> InvalidRequest:
    """The refusal of what is no recording."""
    return InvalidRequest(f"The recording cannot be used. {message}", code="media_invalid")


def too_large(message: str) -> PayloadTooLarge:
    """The refusal of a recording above a limit."""
    return PayloadTooLarge(f"The recording is too large. {message}", code="media_too_large")
