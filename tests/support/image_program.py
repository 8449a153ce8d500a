"""The program that works on images, started and spoken to as the server does, with files that have no name."""

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from forebay.config import ImageSettings

PROGRAM = "forebay.engines.image_work"
MODEL = {"edge_max": 512, "edge_factor": 8}
PLAN = {"mode": "alpha", "specks": 0, "dilation": 0, "feather": 0}
OUTPUT = {"format": "png", "compression": None, "backdrop": "auto", "size": None}
HEAD_BYTES = 5


@dataclass(frozen=True, slots=True)
class Answer:
    verdict: int
    facts: dict[str, Any]
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Program:
    process: subprocess.Popen[bytes]
    socket: socket.socket

    def prepare(self, images: Sequence[bytes], mask: bytes | None = None, **head: Any) -> Answer:
        told = {"order": "prepare", "images": len(images), "mask": mask is not None, "needs_mask": True, **MODEL}
        return self.order({**told, **head}, [*images, *([] if mask is None else [mask])])

    def finish(self, images: Sequence[bytes], mask: bytes | None, pixels: bytes, **head: Any) -> Answer:
        """`head` has at least the size that was `painted`."""
        told = {"order": "finish", "images": len(images), "mask": mask is not None, "needs_mask": True, "preview": True}
        return self.order({**told, **head}, [*images, *([] if mask is None else [mask]), pixels])

    def order(self, head: dict[str, Any], contents: Sequence[bytes]) -> Answer:
        plan = {**PLAN, **head.pop("plan", {})}
        output = {**OUTPUT, **head.pop("output", {})}
        told = json.dumps({**head, "mask_plan": plan, "output": output}).encode()
        files = [_file(content) for content in [*contents, b""]]
        try:
            socket.send_fds(self.socket, [struct.pack(">I", len(told))], files)
            self.socket.sendall(told)
            verdict, size = struct.unpack(">BI", self._receive(HEAD_BYTES))
            facts = json.loads(self._receive(size))
            return Answer(verdict, facts, os.pread(files[-1], os.fstat(files[-1]).st_size, 0))
        finally:
            for file in files:
                os.close(file)

    def _receive(self, count: int) -> bytes:
        whole = b""
        while len(whole) < count:
            piece = self.socket.recv(count - len(whole))
            assert piece, "the program has ended"
            whole += piece
        return whole


@contextmanager
def running(**settings: Any) -> Iterator[Program]:
    """One program, ended with the block."""
    chosen = ImageSettings(**settings)
    limits = {
        "pixels_max": chosen.pixels_max,
        "ratio_max": chosen.ratio_max,
        "mask_pixels_min": chosen.mask_pixels_min,
        "mask_coverage_max": chosen.mask_coverage_max,
        "preview_pixels": chosen.preview_pixels,
        "memory_bytes_max": chosen.prepare_memory_bytes_max,
        "seconds_max": chosen.prepare_seconds_max,
    }
    ours, its = socket.socketpair()
    with ours:
        command = [sys.executable, "-P", "-m", PROGRAM, json.dumps(limits), str(os.getpid())]
        with subprocess.Popen(command, stdin=its.fileno(), stdout=subprocess.DEVNULL) as process:
            its.close()
            try:
                yield Program(process, ours)
            finally:
                ours.shutdown(socket.SHUT_RDWR)
                process.wait(10)


def _file(content: bytes) -> int:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        file.seek(0)
        return os.dup(file.fileno())
