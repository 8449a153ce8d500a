"""A user of batches: uploads a file, has it run, and waits for its end.

It refuses to go on after an answer that is no success, and to wait for ever.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from forebay.bench.wire import now
from forebay.errors import SetupError

ENDED = frozenset({"completed", "failed", "cancelled", "expired"})

_PIECE_BYTES = 2**20
_LOOK_SECONDS = 0.05  # at first; to ask so often for long is work that slows down what is measured
_LOOK_SHARE = 1 / 200  # of the time that it has taken so far
_WAIT_SECONDS = 900.0
_BOUNDARY = "forebay-bench"


class Caller:
    """What a user of batches sends."""

    def __init__(self, session: aiohttp.ClientSession, endpoint: str) -> None:
        self._session = session
        self._endpoint = endpoint

    async def upload(self, path: Path, purpose: str = "batch") -> str:
        """The id of the file."""
        head = (
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="lines.jsonl"\r\n\r\n'
        ).encode()
        tail = f"\r\n--{_BOUNDARY}--\r\n".encode()
        headers = {
            "Content-Type": f"multipart/form-data; boundary={_BOUNDARY}",
            "Content-Length": str(len(head) + _bytes(path) + len(tail)),
        }
        answer = await self._ask("POST", "/v1/files", data=_form(head, path, tail), headers=headers)
        return str(answer["id"])

    async def create(self, file_id: str) -> str:
        """The id of the batch."""
        body = {"input_file_id": file_id, "endpoint": self._endpoint, "completion_window": "24h"}
        return str((await self._ask("POST", "/v1/batches", json=body))["id"])

    async def cancel(self, batch_id: str) -> None:
        """Stop a batch."""
        await self._ask("POST", f"/v1/batches/{batch_id}/cancel")

    async def batch(self, batch_id: str) -> dict[str, Any]:
        """A batch as it is now."""
        return await self._ask("GET", f"/v1/batches/{batch_id}")

    async def until(self, batch_id: str, wanted: frozenset[str]) -> dict[str, Any]:
        """The batch as soon as its status is one of those wanted."""
        began = now()
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                while True:
                    batch = await self.batch(batch_id)
                    if batch["status"] in wanted:
                        return batch
                    await asyncio.sleep(max(_LOOK_SECONDS, _LOOK_SHARE * (now() - began)))
        except TimeoutError:
            raise SetupError(f"The batch was not done after {_WAIT_SECONDS:g} s. Measure with fewer lines.") from None

    async def lines(self, file_id: str) -> list[bytes]:
        """The lines of a file."""
        async with self._session.get(f"/v1/files/{file_id}/content") as response:
            return (await response.read()).splitlines()

    async def _ask(self, method: str, path: str, **fields: Any) -> dict[str, Any]:
        async with self._session.request(method, path, **fields) as response:
            answer: dict[str, Any] = await response.json()
            if response.status != 200:
                raise SetupError(f"The server answered {response.status}: {answer['error']['message']}")
            return answer


def _bytes(path: Path) -> int:
    return path.stat().st_size


async def _form(head: bytes, path: Path, tail: bytes) -> AsyncIterator[bytes]:
    yield head
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece
    yield tail


@asynccontextmanager
async def calling(url: str, key: str, endpoint: str) -> AsyncIterator[Caller]:
    """A user of the server at `url`, who has batches for `endpoint` made."""
    headers = {"Authorization": f"Bearer {key}"}
    timeout = aiohttp.ClientTimeout(total=_WAIT_SECONDS)
    async with aiohttp.ClientSession(url, headers=headers, timeout=timeout) as session:
        yield Caller(session, endpoint)
