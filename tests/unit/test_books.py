"""What the books say of models and replicas, by a gauge that reads what a test tells it."""

import asyncio
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

import pytest

from forebay.config import Settings
from forebay.errors import SetupError
from forebay.inference import Capability, Request
from forebay.replicas.books import MeasuredBooks
from forebay.replicas.catalog import Catalog
from forebay.replicas.gauge import Gauge, Reading
from forebay.replicas.keeper import Keeper
from forebay.replicas.memory import HOST
from forebay.replicas.nvml import Gpu
from forebay.telemetry import Log, Metrics
from tests.support.clock import FakeClock
from tests.support.server import eventually

MIB = 2**20
GIB = 2**30
PID = 4711
FIXED = 64 * MIB  # what a fake engine is taken to need


class Dial(Gauge):
    """A gauge whose reading a test sets."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.memory
        self.reading = Reading(10 * GIB, 9 * GIB, 0.5, None, (), {}, {})
        self.trouble: Exception | None = None
        self.stuck: threading.Event | None = None
        self.reads = 0

    def read(self, families: Iterable[int] = ()) -> Reading:
        self.reads += 1
        if self.stuck is not None:
            self.stuck.wait()
        if self.trouble is not None:
            raise self.trouble
        return self.reading

    def show(self, held: int, peak: int | None = None, available: int = 9 * GIB) -> None:
        peaks = {PID: {HOST: held if peak is None else peak}}
        self.reading = replace(self.reading, available_bytes=available, held={PID: {HOST: held}}, peaks=peaks)


class Desk:
    """Books over a catalogue of two fake models, and one keeper for the first of them."""

    def __init__(self, *, other: Mapping[str, Any] = MappingProxyType({}), **more: Any) -> None:
        models = {"plain": {"engine": "fake", **more}, "other": {"engine": "fake", **other}}
        settings = Settings.model_validate({"models": models, "default_models": False})
        self.clock = FakeClock()
        self.dial = Dial(settings)
        self.metrics = Metrics()
        self.books = MeasuredBooks(Catalog(settings), settings.memory, self.dial, self.clock, self.metrics, Log())
        self.replica = SimpleNamespace(process=SimpleNamespace(pid=PID), largest_input=0, in_flight={})
        self.stand = SimpleNamespace(
            replica=self.replica, ready_at=None, asleep_at=None, sleeps=False, leaving=False, load_seconds=1.5
        )
        self.keeper = cast(Keeper, self.stand)
        self.books.keepers = lambda: [("plain", self.keeper)]

    async def measure(self, held: int, peak: int | None = None, **more: Any) -> None:
        self.dial.show(held, peak, **more)
        self.clock.advance(2)
        await self.books.measure()

    def come_up(self) -> None:
        self.stand.ready_at = self.clock.monotonic()

    def work(self, size: int) -> None:
        self.replica.largest_input = size

    @property
    def held(self) -> int:
        return self.books.held("plain", self.keeper)[HOST]

    @property
    def need(self) -> int:
        return self.books.need("plain")[HOST]


async def test_a_model_that_starts_is_charged_with_what_it_will_need_and_later_with_what_it_holds() -> None:
    desk = Desk()
    assert desk.held == desk.need == FIXED
    await desk.measure(20 * MIB)
    assert desk.held == FIXED
    await desk.measure(80 * MIB)
    assert desk.held == 80 * MIB
    desk.come_up()
    await desk.measure(30 * MIB)
    assert desk.held == desk.need == 80 * MIB, "its start came to that, and it has not worked yet"
    desk.work(1000)
    await desk.measure(30 * MIB)
    assert desk.held == 30 * MIB
    assert desk.need == 80 * MIB


async def test_a_model_that_has_come_up_keeps_what_it_was_estimated_to_need_until_it_has_worked() -> None:
    desk = Desk(options={"ballast_bytes": GIB})
    desk.come_up()
    await desk.measure(30 * MIB)
    await desk.measure(30 * MIB)
    assert desk.held == desk.need == GIB + FIXED, "its first requests take the rest"
    desk.work(1000)
    await desk.measure(500 * MIB)
    await desk.measure(400 * MIB)
    assert desk.held == desk.need == 500 * MIB


async def test_what_one_holds_that_already_gives_its_memory_back_says_nothing_of_work() -> None:
    desk = Desk(options={"ballast_bytes": GIB})
    await desk.measure(60 * MIB)
    desk.clock.advance(1)
    desk.come_up()
    desk.work(1000)
    desk.stand.leaving = True
    await desk.measure(20 * MIB)
    assert desk.need == GIB + FIXED, "the next start is not to count on 60 MiB"


async def test_what_work_came_to_stays_reserved() -> None:
    desk = Desk()
    desk.come_up()
    await desk.measure(30 * MIB)
    desk.work(1000)
    await desk.measure(40 * MIB, peak=50 * MIB)
    assert desk.held == desk.need == 50 * MIB
    await desk.measure(30 * MIB)
    assert desk.held == 50 * MIB
    await desk.measure(70 * MIB)
    assert desk.held == 70 * MIB
    assert desk.need == 50 * MIB, "nothing was in flight"


class Pair:
    """Two replicas of `plain` at work that share 3 GiB of weights and have `OWN` each."""

    OWN, WEIGHTS = 200 * MIB, 3 * GIB

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.other = SimpleNamespace(**vars(desk.stand))
        self.other.replica = SimpleNamespace(process=SimpleNamespace(pid=PID + 1), largest_input=0, in_flight={})
        self.both = [("plain", cast(Keeper, each)) for each in (desk.stand, self.other)]
        desk.books.keepers = lambda: self.both

    async def measure(self) -> None:
        desk = self.desk
        part = self.WEIGHTS // len(self.both)
        pids = [cast(Any, keeper).replica.process.pid for _, keeper in self.both]
        held = {pid: {HOST: self.OWN + part} for pid in pids}
        shared = dict.fromkeys(pids, self.WEIGHTS - part)
        desk.dial.reading = replace(desk.dial.reading, held=held, peaks=held, shared=shared)
        desk.clock.advance(2)
        await desk.books.measure()

    async def work(self) -> None:
        for stand in (self.desk.stand, self.other):
            stand.ready_at = self.desk.clock.monotonic()
            stand.replica.largest_input = 1000
        await self.measure()

    @property
    def held(self) -> list[int]:
        return [self.desk.books.held("plain", keeper)[HOST] for _, keeper in self.both]


async def test_what_two_replicas_share_is_charged_once_and_stays_with_the_last() -> None:
    pair = Pair(Desk())
    await pair.work()
    whole, own = pair.WEIGHTS + pair.OWN, pair.OWN
    assert pair.held == [whole, own], "as much as they hold together"
    pair.desk.stand.leaving = True
    assert pair.held == [own, whole], "who leaves gives back no more than that"
    del pair.both[0]
    assert pair.held == [whole], "at once, and not when it is measured again"
    await pair.measure()
    assert pair.held == [whole]


async def test_one_that_sleeps_is_not_charged_with_what_it_shares() -> None:
    pair = Pair(Desk())
    await pair.work()
    pair.desk.stand.asleep_at = pair.desk.clock.monotonic()
    await pair.measure()
    assert pair.held == [pair.WEIGHTS // 2 + pair.OWN, pair.WEIGHTS + pair.OWN]


async def test_what_a_model_needs_is_what_a_replica_holds_without_the_other_that_was_there() -> None:
    pair = Pair(Desk())
    await pair.work()
    assert pair.desk.need == pair.WEIGHTS + pair.OWN


async def test_what_is_shared_with_other_models_is_counted_by_parts() -> None:
    pair = Pair(Desk())
    pair.both[1] = ("other", pair.both[1][1])
    await pair.work()
    assert pair.held[0] == pair.desk.need == pair.WEIGHTS // 2 + pair.OWN


async def test_each_of_two_replicas_is_charged_with_what_an_operator_has_said_at_least() -> None:
    pair = Pair(Desk(memory_bytes=GIB))
    await pair.work()
    assert pair.held == [pair.WEIGHTS // 2 + pair.OWN] * 2
    pair = Pair(Desk(memory_bytes=4 * GIB))
    await pair.work()
    assert pair.held == [4 * GIB] * 2


async def test_a_model_that_once_came_to_more_than_there_is_may_run_alone() -> None:
    desk = Desk()
    desk.come_up()
    desk.work(1000)
    desk.clock.advance(2)
    await desk.measure(30 * MIB)
    desk.work(1000)
    await desk.measure(9 * GIB, available=GIB)
    assert desk.held == 9 * GIB
    assert desk.need == desk.books.totals()[HOST] < 9 * GIB


async def learn(desk: Desk, count: int, model: str = "plain") -> None:
    """A replica of `model` works, and comes to so much."""
    desk.books.keepers = lambda: [(model, desk.keeper)]
    desk.come_up()
    desk.work(1000)
    await desk.measure(count)


async def test_a_model_that_once_came_to_more_than_pinned_ones_leave_may_run_beside_them() -> None:
    desk = Desk(other={"pinned": True, "batch_replicas": 2})
    await learn(desk, 9 * GIB)
    assert desk.need + 3 * FIXED == desk.books.totals()[HOST], "batch replicas hold what others do"
    await desk.measure(200 * MIB)
    assert desk.held == desk.need, "or it would have to leave at once, or others for it"
    desk.books.out_of_memory("plain")
    assert desk.need + 3 * FIXED == desk.books.totals()[HOST]


async def test_pinned_models_that_came_to_more_than_there_is_leave_each_other_what_files_suggest() -> None:
    desk = Desk(pinned=True, other={"pinned": True})
    await learn(desk, 9 * GIB)
    await learn(desk, 3 * GIB, "other")
    assert (desk.books.need("plain"), desk.books.need("other")) == ({HOST: 5 * GIB}, {HOST: FIXED})


async def test_what_a_pinned_model_is_said_to_take_goes_before_what_it_came_to() -> None:
    desk = Desk(other={"pinned": True, "memory_bytes": 2 * GIB})
    await learn(desk, 3 * GIB, "other")
    await learn(desk, 9 * GIB)
    assert desk.need == 6 * GIB


async def test_a_model_is_sure_to_take_what_is_said_or_the_less_of_what_was_learned_and_estimated() -> None:
    desk = Desk(options={"ballast_bytes": GIB}, other={"memory_bytes": 2 * GIB})
    assert desk.books.least("plain") == {HOST: GIB + FIXED}
    await learn(desk, 500 * MIB)
    assert desk.books.least("plain") == desk.books.need("plain") == {HOST: 500 * MIB}
    await learn(desk, 3 * GIB)
    assert desk.books.least("plain") == {HOST: GIB + FIXED}
    await learn(desk, 3 * GIB, "other")
    assert desk.books.least("other") == {HOST: 2 * GIB}


async def test_engines_that_the_driver_does_not_tell_of_are_not_taken_for_others() -> None:
    desk = Desk()
    desk.come_up()
    gpu = Gpu("gpu0", 10 * GIB, 4 * GIB, {99: 4 * GIB}, None, None)
    desk.dial.reading = replace(desk.dial.reading, gpus=(gpu,), unseen={"gpu0": 4 * GIB})
    desk.books.held = lambda _model, _keeper: {HOST: GIB, "gpu0": 3 * GIB}  # type: ignore[method-assign, assignment]
    await desk.books.measure()
    assert desk.books.totals()["gpu0"] == 8 * GIB, "nine tenths of it without the GiB that is others'"
    assert desk.books.others() == {"gpu0": GIB}


@pytest.mark.parametrize("left", [1, 0])
async def test_a_gpu_that_the_driver_does_not_tell_of_for_once_is_as_it_was(left: int) -> None:
    desk = Desk()
    gpus = tuple(Gpu(f"gpu{each}", 10 * GIB, 3 * GIB, {99: 3 * GIB}, None, None) for each in (1, 0))
    desk.dial.reading = replace(desk.dial.reading, gpus=gpus)
    await desk.books.measure()
    before = desk.books.totals(), desk.books.others()
    assert before == ({HOST: 8 * GIB, "gpu0": 6 * GIB, "gpu1": 6 * GIB}, {"gpu0": 3 * GIB, "gpu1": 3 * GIB})
    desk.dial.reading = replace(desk.dial.reading, gpus=gpus[:left])
    await desk.books.measure()
    assert (desk.books.totals(), desk.books.others()) == before
    free = tuple(replace(gpu, used_bytes=0, processes={}) for gpu in gpus)
    desk.dial.reading = replace(desk.dial.reading, gpus=free)
    await desk.books.measure()
    assert desk.books.totals() == {HOST: 8 * GIB, "gpu0": 9 * GIB, "gpu1": 9 * GIB}


SILENT = pytest.mark.parametrize(
    "silent", [(), (Gpu("gpu0", 10 * GIB, 0, {}, None, None),)], ids=["gone", "no heat told"]
)


@SILENT
async def test_a_hot_gpu_that_the_driver_does_not_tell_of_for_once_keeps_the_gate_closed(
    silent: tuple[Gpu, ...],
) -> None:
    desk = Desk()
    hot = Gpu("gpu0", 10 * GIB, 0, {}, None, 95.0)
    for gpus, closed in (((hot,), True), (silent, True), ((replace(hot, celsius=85.0),), True), (silent, True)):
        desk.dial.reading = replace(desk.dial.reading, gpus=gpus)
        await desk.books.measure()
        assert (desk.books.closed() is not None) is closed
    desk.dial.reading = replace(desk.dial.reading, gpus=(replace(hot, celsius=80.0),))
    await desk.books.measure()
    assert desk.books.closed() is None


@SILENT
async def test_a_hot_gpu_that_is_gone_for_good_does_not_keep_the_gate_closed(silent: tuple[Gpu, ...]) -> None:
    desk = Desk()
    desk.dial.reading = replace(desk.dial.reading, gpus=(Gpu("gpu0", 10 * GIB, 0, {}, None, 95.0),))
    await desk.books.measure()
    desk.dial.reading = replace(desk.dial.reading, gpus=silent)
    readings = 0
    while desk.books.closed() is not None:
        await desk.books.measure()
        readings += 1
        assert readings < 20
    assert readings > 5, "not at the first that leaves it out"


async def test_the_peak_of_a_start_is_not_taken_for_work() -> None:
    desk = Desk()
    desk.clock.advance(1)
    desk.come_up()
    desk.work(1000)
    await desk.measure(30 * MIB, peak=200 * MIB)
    assert desk.held == 30 * MIB
    assert desk.need == 200 * MIB


async def test_a_reading_that_began_before_it_was_up_says_nothing_of_work() -> None:
    desk = Desk()
    desk.dial.show(20 * MIB)
    desk.dial.stuck, reads = threading.Event(), desk.dial.reads
    measuring = asyncio.create_task(desk.books.measure())
    await eventually(lambda: desk.dial.reads > reads, what="the measurement to begin")
    desk.clock.advance(1)
    desk.come_up()
    desk.work(1000)
    desk.dial.stuck.set()
    await measuring
    assert desk.held == desk.need == FIXED
    desk.dial.stuck = None
    await desk.measure(30 * MIB)
    assert desk.held == desk.need == 30 * MIB, "the work counts in the next one"


async def test_work_that_lasts_over_readings_counts_in_each() -> None:
    desk = Desk()
    desk.come_up()
    await desk.measure(30 * MIB)
    desk.work(1000)
    desk.replica.in_flight = {1: Request("r", "p", "plain", Capability.CHAT, "/", b"x" * 1000)}
    await desk.measure(40 * MIB)
    await desk.measure(60 * MIB)
    assert desk.need == 60 * MIB


async def test_what_an_operator_said_is_reserved_and_more_is_charged_where_more_is_held() -> None:
    desk = Desk(memory_bytes=GIB)
    desk.come_up()
    await desk.measure(30 * MIB)
    assert desk.held == desk.need == GIB
    await desk.measure(2 * GIB)
    assert desk.held == 2 * GIB
    assert desk.need == GIB


async def test_a_dead_engine_keeps_its_memory_until_the_next_start() -> None:
    desk = Desk()
    await desk.measure(100 * MIB)
    desk.dial.reading = replace(desk.dial.reading, held={}, peaks={})
    await desk.books.measure()
    assert desk.held == 100 * MIB


async def test_a_machine_that_is_short_closes_and_says_how_much_engines_may_hold() -> None:
    desk = Desk()
    turns: list[bool] = []
    desk.books.on_turn = lambda: turns.append(desk.books.gate.open)
    desk.come_up()
    await desk.measure(5 * GIB)
    assert desk.books.closed() is None
    assert desk.books.allowed() == desk.books.totals() == {HOST: 8 * GIB}
    await desk.measure(5 * GIB, available=GIB // 4)
    assert "2.5% of its memory available" in (desk.books.closed() or "")
    lacking = int(10 * GIB * 0.08) - GIB // 4
    assert desk.books.allowed() == {HOST: 5 * GIB - lacking}
    assert desk.books.totals() == {HOST: 8 * GIB}
    await desk.measure(2 * GIB, available=4 * GIB)
    assert desk.books.closed() is None
    assert turns == [False, True]


@pytest.mark.parametrize(
    "trouble", [SetupError("It cannot be measured."), MemoryError(), RuntimeError("can't start new thread")]
)
async def test_what_cannot_be_measured_for_once_is_as_it_was(
    trouble: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk()
    desk.come_up()
    desk.work(1000)
    await desk.measure(30 * MIB)
    desk.dial.trouble = trouble
    for _ in range(2):
        await desk.books.measure()
    assert desk.held == 30 * MIB
    told = capsys.readouterr()
    assert (told.out + told.err).count("memory.unmeasured") == 1
    desk.dial.trouble = None
    await desk.measure(40 * MIB)
    assert desk.held == 40 * MIB


async def test_a_measurement_that_hangs_is_not_waited_for_and_keeps_no_later_one_from_coming(
    capsys: pytest.CaptureFixture[str],
) -> None:
    desk = Desk()
    desk.come_up()
    await desk.measure(5 * GIB, available=GIB // 4)
    assert desk.books.closed() is not None
    desk.dial.stuck, reads = threading.Event(), desk.dial.reads
    measuring = asyncio.create_task(desk.books.measure())
    await eventually(lambda: desk.dial.reads > reads, what="the measurement to begin")
    desk.clock.advance(60)
    await asyncio.wait_for(measuring, 10)
    await desk.books.measure()
    assert desk.dial.reads == reads + 1, "there is one at a time"
    told = capsys.readouterr()
    assert (told.out + told.err).count("memory.unmeasured") == 1
    desk.dial.stuck.set()
    desk.dial.stuck = None

    async def measured() -> bool:
        await desk.measure(2 * GIB, available=4 * GIB)
        return desk.books.closed() is None

    await eventually(measured, what="the gate to open")


async def test_engines_that_take_long_to_measure_are_measured_less_often() -> None:
    desk = Desk()
    desk.dial.stuck, reads = threading.Event(), desk.dial.reads
    running = asyncio.create_task(desk.books.run())
    await eventually(lambda: desk.clock.sleepers, what="the first pause")
    desk.clock.advance(2)
    await eventually(lambda: desk.dial.reads > reads, what="a measurement to begin")
    desk.clock.advance(0.5)
    desk.dial.stuck.set()
    await eventually(lambda: desk.clock.sleepers, what="the next pause")
    desk.clock.advance(4.5)
    assert desk.clock.sleepers == 1, "a look of 0.5 s is followed by a pause of 5 s"
    desk.dial.stuck = threading.Event()
    desk.clock.advance(0.5)
    await eventually(lambda: desk.dial.reads > reads + 1, what="the next measurement")
    desk.clock.advance(20)
    desk.dial.stuck.set()
    await eventually(lambda: desk.clock.sleepers, what="the pause after that")
    desk.clock.advance(9)
    assert desk.clock.sleepers == 1
    desk.clock.advance(1)
    await eventually(lambda: desk.dial.reads > reads + 2, what="no pause to be longer than 10 s")
    running.cancel()
    await asyncio.wait([running])


async def test_weights_that_go_to_the_host_while_a_model_sleeps_need_room_there(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    os.truncate(tmp_path / "model.safetensors", 3 * GIB)
    desk = Desk(engine="vllm", source=f"file:{tmp_path}", options={"sleep_level": 1})
    assert desk.books.totals() == {HOST: 8 * GIB}
    assert desk.held == 4 * GIB
    assert desk.books.may_sleep("plain", {HOST: GIB})
    assert not desk.books.may_sleep("plain", {HOST: GIB + 1})
    desk.stand.sleeps = True
    assert not desk.books.may_sleep("plain", {}), "one that is about to sleep takes it already"
    desk.stand.asleep_at = desk.clock.monotonic()
    assert desk.held == 7 * GIB
    await desk.measure(GIB)
    assert desk.held == 3 * GIB, "some drivers count what is pinned for them for nobody"
    await desk.measure(5 * GIB)
    assert desk.held == 5 * GIB


def test_a_model_of_somebody_elses_server_takes_nothing() -> None:
    upstream = {"engine": "upstream", "options": {"base_url": "http://127.0.0.1/v1"}}
    settings = Settings.model_validate({"models": {"far": upstream}, "default_models": False})
    books = MeasuredBooks(Catalog(settings), settings.memory, Dial(settings), FakeClock(), Metrics(), Log())
    assert books.need("far") == {}


def peak_shown(desk: Desk) -> float:
    return desk.metrics.memory_peak.labels("plain", HOST)._value.get()


async def test_after_a_shortage_the_next_start_asks_for_more_within_bounds_and_for_a_while() -> None:
    desk = Desk()
    await learn(desk, 200 * MIB)
    desk.books.out_of_memory("plain")
    assert desk.need == int(200 * MIB * 1.05)
    desk.clock.advance(400)
    for _ in range(200):
        desk.books.out_of_memory("plain")
    desk.clock.advance(400)
    assert desk.need == 300 * MIB, "others take the rest: half as much again is the most"
    assert desk.held == 200 * MIB, "what runs is charged with what it came to"
    await desk.measure(200 * MIB)
    assert peak_shown(desk) == 200 * MIB, "that is no measurement, which would be kept"
    desk.clock.advance(200)
    assert desk.need == 200 * MIB


async def test_a_shortage_before_anything_was_learned_counts_on_what_files_suggest() -> None:
    desk = Desk(options={"ballast_bytes": GIB})
    desk.books.out_of_memory("plain")
    assert desk.need == int((GIB + FIXED) * 1.05)
    said = Desk(memory_bytes=GIB)
    said.books.out_of_memory("plain")
    assert said.need == GIB, "what an operator said goes before it"
