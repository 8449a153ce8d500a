"""Batches beside other work: lines of one kind that are handed in, counted while they run, and cancelled in the end.

It refuses to leave a batch behind.
"""

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from pydantic_core import from_json

from forebay.bench.caller import ENDED, Caller, calling
from forebay.bench.mixed import Kind
from forebay.bench.report import Report
from forebay.clock import seeded

_CANCELLED = "batch_cancelled"
_DONE = re.compile(r'^forebay_batch_lines_total\{model="([^"]+)",outcome="completed"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Batches:
    """Hands batches in; `models` says which model has which kind of lines."""

    url: str
    key: str
    models: Mapping[str, str]
    session: aiohttp.ClientSession
    folder: Path
    report: Report

    @asynccontextmanager
    async def hand_in(self, kind: Kind, count: int, seed: int) -> AsyncIterator[None]:
        """So many lines of this kind, which run; at the end of the block they stop."""
        path, chance = self.folder / f"{kind.name}.jsonl", seeded(seed)
        lines = await asyncio.to_thread(lambda: b"".join(kind.line(number, chance) for number in range(count)))
        await asyncio.to_thread(path.write_bytes, lines)
        async with calling(self.url, self.key, kind.path) as caller:
            batch_id = await caller.create(await caller.upload(path))
            await caller.until(batch_id, ENDED | {"in_progress"})
            yield
            if (await caller.batch(batch_id))["status"] not in ENDED:
                await caller.cancel(batch_id)
            await self._count(caller, await caller.until(batch_id, ENDED))

    async def done(self) -> dict[str, float]:
        """How many lines of each kind the server has ever answered."""
        async with self.session.get("/metrics") as answer:
            counts = {model: float(count) for model, count in _DONE.findall(await answer.text())}
        return {name: counts.get(model, 0.0) for name, model in self.models.items()}

    async def _count(self, caller: Caller, batch: Mapping[str, Any]) -> None:
        self.report.count([""] * batch["request_counts"]["completed"])
        lost = [] if batch["error_file_id"] is None else await caller.lines(batch["error_file_id"])
        codes = [_code(from_json(line)) for line in lost]
        self.report.count(f"a line of a batch: {code}" for code in codes if code != _CANCELLED)
        if batch["status"] not in {"completed", "cancelled"}:
            self.report.count([f"a batch that was {batch['status']}"])


def _code(line: Mapping[str, Any]) -> str:
    """What a line went wrong with."""
    answer = line["response"] or {}
    return str((line["error"] or answer["body"]["error"])["code"])


@asynccontextmanager
async def handing_in(url: str, key: str, models: Mapping[str, str], report: Report) -> AsyncIterator[Batches]:
    """A way to hand in batches; what becomes of their lines is counted in `report`."""
    headers = {"Authorization": f"Bearer {key}"}
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        async with aiohttp.ClientSession(url, headers=headers) as session:
            yield Batches(url, key, models, session, Path(folder), report)
