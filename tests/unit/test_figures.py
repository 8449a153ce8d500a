"""The figures of engines: known names and numbers pass, and nothing else."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from forebay.replicas import figures
from forebay.replicas.commands import Traits
from forebay.replicas.connection import open_session
from forebay.replicas.postmortem import Quarantine
from forebay.replicas.replica import Replica
from tests.support.clock import FakeClock

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.mark.parametrize(
    "line",
    [
        "forebay_engine_starts_total 3",
        "forebay_requests_total 3",
        "forebay_engine_items_total nan",
        "forebay_engine_items_total 1 2",
        'forebay_engine_items_total{model="other"} 1',
        "forebay_engine_items_total -1",
        " forebay_engine_items_total 1",
        "# TYPE forebay_engine_items_total counter",
    ],
)
def test_other_lines_do_not_pass(line: str) -> None:
    assert figures.read(f"{line}\nforebay_engine_wait_seconds_total 1.5e-05\n") == {
        "forebay_engine_wait_seconds_total": 1.5e-05
    }


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with open_session(reuses_connections=True) as found:
        yield found


async def _says(text: str, status: int = 200) -> Answer:
    async def answer(request: web.Request) -> web.Response:
        known = request.headers.get("Authorization") == "Bearer engine"
        return web.Response(text=text, status=status if known else 401)

    return answer


async def _silence(_request: web.Request) -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError


async def test_an_engine_that_does_not_answer_well_is_left_out(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "_SECONDS", 5)  # one of them uses them up, and the others are in this very loop
    good = "forebay_engine_items_total 7\nforebay_engine_items_waiting 2\nnoise\n"
    answers = [await _says(good), await _says(good, 500), await _says(good + "x" * 70_000), _silence, await _says(good)]
    app = web.Application()
    replicas = []
    for number, answer in enumerate(answers):
        app.router.add_get(f"/{number}", answer)
        traits = Traits("/slots", metrics_path=f"/{number}")
        replica = Replica(f"r{number}", 'a "model"', 1, traits, session, Quarantine(1, 1, FakeClock()))
        replica.headers = {"Authorization": "Bearer engine"}
        replicas.append(replica)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    for replica in replicas:
        replica.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        text = (await figures.gather((replica, session) for replica in replicas)).decode()
    finally:
        await runner.cleanup()
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert samples == [
        f'forebay_engine_{name}{{model="a \\"model\\"",replica="r{number}"}} {value}'
        for name, value in (("items_total", 7.0), ("items_waiting", 2.0))
        for number in (0, 4)
    ]
    assert text.count("# TYPE") == text.count("# HELP") == 2


async def test_nothing_is_said_where_no_engine_counts() -> None:
    assert await figures.gather([]) == b""
