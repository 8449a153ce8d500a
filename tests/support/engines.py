"""Start an engine program as the launcher does, and talk to it byte by byte."""

import contextlib
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

import forebay
from tests.support.processes import GONE

GUARD = Path(forebay.__file__).parent / "engines" / "guard.py"
KEY = "engine-key-for-tests"
LISTENING = "FOREBAY_ENGINE_LISTENING "
_WATCHED_SECONDS = 0.05


def eventually(condition: Callable[[], Any], seconds: float) -> Any:
    """Poll until `condition` gives something true; what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not true within {seconds} s: {condition}"
        time.sleep(0.005)
    return found


def environment(spec: dict[str, Any]) -> dict[str, str]:
    return {**os.environ, "FOREBAY_ENGINE_SPEC": json.dumps(spec), "FOREBAY_ENGINE_KEY": KEY}


def guarded(*argv: str) -> list[str]:
    return [sys.executable, "-I", "-S", str(GUARD), "--", *argv]


def parted(header: Any, payload: bytes) -> bytes:
    """A body of a line, of JSON where it is not given as bytes, and raw bytes."""
    return (header if isinstance(header, bytes) else json.dumps(header).encode()) + b"\n" + payload


class Engine:
    """One running engine under its guard."""

    def __init__(self, module: str, spec: dict[str, Any]) -> None:
        self._log = tempfile.NamedTemporaryFile(mode="r", suffix=".log")  # noqa: SIM115  it lives as long as the engine
        self.guard = subprocess.Popen(
            guarded(sys.executable, "-m", f"forebay.engines.{module}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(self._log.name, "a"),  # noqa: SIM115
            env=environment(spec),
        )
        self.address = ("127.0.0.1", 0)

    def wait_until_listening(self, seconds: float = 60) -> None:
        """Read the one line that it prints; an empty one means that it has ended."""
        assert self.guard.stdout
        ready, _, _ = select.select([self.guard.stdout], [], [], seconds)
        assert ready, "the engine says nothing"
        line = self.guard.stdout.readline().decode()
        assert line.startswith(LISTENING), self.log
        url = urlsplit(line.removeprefix(LISTENING).strip())
        assert url.hostname == "127.0.0.1"
        self.address = ("127.0.0.1", url.port or 0)

    def wait_until_ready(self, seconds: float = 60) -> None:
        self.wait_until_listening(seconds)
        eventually(lambda: self.get("/health")[0] == 200, seconds)

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The engine itself, not its guard."""
        (child,) = children(self.guard.pid)
        return child

    def ask(self, method: str, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
        """One whole exchange: status and JSON."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with contextlib.closing(connection):
            connection.request(method, path, body if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def get(self, path: str) -> tuple[int, Any]:
        return self.ask("GET", path)

    def records(self, path: str, header: Any, payload: bytes | None = None) -> tuple[int, list[dict[str, Any]]]:
        """One exchange of a body as in `parted`, or whole as it is: status, and the records of the answer."""
        body = header if payload is None else parted(header, payload)
        connection = http.client.HTTPConnection(*self.address, timeout=120)
        with contextlib.closing(connection):
            connection.request("POST", path, body, {"Authorization": f"Bearer {KEY}"})
            answer = connection.getresponse()
            return answer.status, [json.loads(each) for each in answer.read().splitlines() if each.strip()]

    def metrics(self) -> str:
        """What GET /metrics answers."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
            return connection.getresponse().read().decode()

    def metric(self, name: str) -> float:
        """One figure of them, by its name without `forebay_engine_`."""
        text = self.metrics()
        found = re.search(rf"^forebay_engine_{name} (\S+)$", text, re.MULTILINE)
        assert found, (name, text)
        return float(found[1])

    def busy(self) -> int:
        return sum(slot["is_processing"] for slot in self.get("/slots")[1])

    def open(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> "Stream":
        return Stream(self.address, path, body)

    def answer(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> list[Any]:
        """Every event of a whole stream."""
        with contextlib.closing(self.open(body, path)) as stream:
            return list(stream.events())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pause it as the server does; nothing of it gets any processor time inside of the `with`."""
        self._say(b"P")
        family = eventually(lambda: still(self.guard.pid), 10)
        before, until = _cpu_seconds(family), time.thread_time() + _WATCHED_SECONDS
        while time.thread_time() < until:  # whatever is not stopped gets on meanwhile
            pass
        yield
        assert _cpu_seconds(family) == before
        self._say(b"R")

    def _say(self, word: bytes) -> None:
        assert self.guard.stdin
        self.guard.stdin.write(word)
        self.guard.stdin.flush()

    def end(self) -> int:
        """Let the guard end it, as it does when the server goes."""
        assert self.guard.stdin
        assert self.guard.stdout
        self.guard.stdin.close()
        code = self.guard.wait(10)
        self.guard.stdout.close()
        self._log.close()
        return code


@contextlib.contextmanager
def ready(module: str, spec: dict[str, Any]) -> Iterator[Engine]:
    """A running engine that is ready; its end is that of the `with`."""
    engine = Engine(module, spec)
    try:
        engine.wait_until_ready()
        yield engine
    finally:
        engine.end()


class Stream:
    """One streamed request on a connection of its own."""

    def __init__(self, address: tuple[str, int], path: str, body: Any, samples: bytes | None = None) -> None:
        """`samples` come after a line with the body, as speech engines take it."""
        self.socket = socket.create_connection(address, timeout=60)
        data = json.dumps(body).encode() if samples is None else parted(body, samples)
        head = f"POST {path} HTTP/1.1\r\nHost: engine\r\nAuthorization: Bearer {KEY}\r\nX-Request-ID: req_test\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self.received = b""

    def read_until(self, mark: bytes) -> bytes:
        """Everything received so far, once it contains `mark`."""
        while mark not in self.received:
            data = self.socket.recv(65536)
            assert data, f"the stream ended without {mark!r}: {self.received[-500:]!r}"
            self.received += data
        return self.received

    def read_what_is_there(self) -> bytes:
        """Everything received so far, without waiting for more."""
        while select.select([self.socket], [], [], 0)[0] and (data := self.socket.recv(65536)):
            self.received += data
        return self.received

    def read_to_end(self) -> bytes:
        """Everything, once the engine has closed; a reset ends it as well."""
        with contextlib.suppress(ConnectionResetError):
            while data := self.socket.recv(65536):
                self.received += data
        return self.received

    def events(self) -> Iterator[Any]:
        """The JSON events up to the end mark, which has to come."""
        for line in self.read_until(b"data: [DONE]").split(b"\n"):
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])

    def half_close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()


def children(pid: int) -> list[int]:
    """The processes that `pid` has started and that still live."""
    return [child.pid for child in psutil.Process(pid).children()]


def alive(pid: int) -> bool:
    """Whether the process is there and not a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except GONE:
        return False


def still(guard: int) -> list[psutil.Process]:
    """Whatever a guard has started, once each thread of it is stopped; nothing before that."""
    states, family = set[str](), list[psutil.Process]()
    with contextlib.suppress(*GONE, ProcessLookupError):  # one that ends meanwhile is not stopped
        family = psutil.Process(guard).children(recursive=True)
        states = {stat.read_text().rpartition(")")[2].split()[0] for each in family for stat in _threads(each.pid)}
    return family if states == {"T"} else []


def _threads(pid: int) -> Iterator[Path]:
    return Path(f"/proc/{pid}/task").glob("*/stat")


def _cpu_seconds(family: list[psutil.Process]) -> float:
    return float(sum(sum(each.cpu_times()[:2]) for each in family))


def chat(text: str, **more: Any) -> dict[str, Any]:
    """A chat request as the server sends it."""
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **stream, **more}


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)
