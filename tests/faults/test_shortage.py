"""A machine that is short of memory starts nothing again of what died of that, until it is well."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

from structlog.testing import capture_logs

from forebay.app import Machine
from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.model_config import FakeModel
from forebay.replicas.gauge import Reading
from forebay.server_config import MemorySettings, SupervisorSettings
from forebay.telemetry import Metrics
from tests.support.server import eventually

GIB = 2**30


def reading(available: int) -> Reading:
    return Reading(8 * GIB, available, 0.0, None, (), {}, {})


async def test_an_engine_that_died_of_a_shortage_starts_again_when_it_is_over(tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path,
        default_models=False,
        models={"fake": FakeModel(engine="fake", slots=4)},
        memory=MemorySettings(measure_seconds=3600),  # what it reads is said here
        supervisor=SupervisorSettings(backoff_seconds_min=0.01, backoff_seconds_max=0.05),
    )
    machine = Machine(settings, dict(os.environ), SystemClock(), Metrics())
    supervising = asyncio.create_task(machine.supervisor.run())
    with capture_logs() as logs:
        try:
            await machine.supervisor.wait_until_ready("fake")
            (replica,) = machine.supervisor.replicas("fake")
            assert replica.process is not None
            machine.memory.gate.update(reading(available=GIB // 10))
            os.killpg(replica.process.pid, signal.SIGKILL)

            def events(name: str) -> int:
                return sum(entry["event"] == name for entry in logs)

            await eventually(lambda: events("engine.held_back"), what="the start that is held back")
            (_, keeper) = machine.supervisor.keepers()[0]
            first = keeper.retry_at
            await eventually(lambda: keeper.retry_at != first, what="another look")
            machine.supervisor.record("fake").halvings = 1  # as after such a death, and the cool-down is over
            await eventually(lambda: events("engine.slots_restored"), what="the end of the cool-down")
            first = keeper.retry_at
            await eventually(lambda: keeper.retry_at != first, what="another look")
            assert events("engine.starting") == 1
            assert events("engine.held_back") == 1
            machine.memory.gate.update(reading(available=7 * GIB))
            await eventually(lambda: machine.supervisor.replicas("fake"), what="the engine, once there is memory again")
            assert events("engine.starting") == 2
        finally:
            supervising.cancel()
            with suppress(asyncio.CancelledError):
                await supervising
