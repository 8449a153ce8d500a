"""Pictures in a line and one thread: who shares a batch, who is let go when, and what happens short of memory."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import pytest

from forebay.engines import diffusion_work, lived
from forebay.engines.compute import StepFailed
from forebay.engines.connection import Refused
from forebay.engines.diffusion_order import Order, Result, Row, Settings, Watch
from forebay.engines.diffusion_work import Work
from forebay.engines.serving import OutOfMemory
from forebay.engines.threads import Unwanted
from forebay.pixels import Size
from tests.support.cancels import cancel_twice
from tests.support.server import eventually

BAD = 13


class Library:
    """Paints pictures whose only byte is their seed. A step waits for leave; a batch of more rows than fit runs out of
    memory, and so does every batch until `savings_needed` ways to save are on. It refuses batches with a bad seed."""

    def __init__(self, rows_max: int = 64, savings_needed: int = 0, ways: int = 2) -> None:
        self.begun: list[list[int]] = []
        self.steps = 0
        self.savings: list[str] = []
        self.spent: list[Sequence[str]] = []
        self._rows_max = rows_max
        self.savings_needed = savings_needed
        self._ways = [f"way{number}" for number in range(ways)]
        self._leave = threading.Semaphore(0)
        self.free = False

    def let(self, steps: int = 1) -> None:
        for _ in range(steps):
            self._leave.release()

    def run_free(self) -> None:
        self.free = True
        self.let(64)

    def paint(self, rows: Sequence[Row], watch: Watch) -> list[Result]:
        seeds = [row.seed for row in rows]
        self.begun.append(seeds)
        settings = rows[0].order.settings
        for step in range(1, settings.steps + 1):
            assert self.free or self._leave.acquire(timeout=120)
            if len(rows) > self._rows_max or len(self.savings) < self.savings_needed:
                raise OutOfMemory
            if BAD in seeds:
                raise StepFailed("bad")
            self.steps += 1
            if not watch.stepped(step, settings.steps):
                raise Unwanted
            if settings.partials and step == 1:
                watch.partial(0, [bytes([seed]) for seed in seeds])
        return [Result(bytes([seed]), settings.steps) for seed in seeds]

    def save(self) -> str | None:
        if len(self.savings) == len(self._ways):
            return None
        self.savings.append(self._ways[len(self.savings)])
        return self.savings[-1]

    def spend(self, but: Sequence[str] = ()) -> None:
        self.spent.append(tuple(but))
        self.savings = [each for each in self.savings if each in but]


class Teller:
    """What a request was told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, int]] = []
        self.pictures: dict[int, bytes] = {}
        self.partials: list[tuple[int, int | None]] = []
        self.notices: list[str] = []
        self.lives = 0

    def step(self, image: int, step: int, steps: int) -> None:
        self.steps.append((image, step, steps))

    def rows(self, image: int, pixels: bytes, partial: int | None = None) -> None:
        if partial is None:
            self.pictures[image] = pixels
        else:
            self.partials.append((image, partial))

    def finished(self, image: int, steps: int, notices: Sequence[str]) -> None:
        self.notices += notices

    def alive(self) -> None:
        self.lives += 1


def order(*seeds: int, steps: int = 2, reproducible: bool = False, partials: int = 0, edge: int = 1) -> Order:
    settings = Settings("generate", Size(edge, edge), steps, guidance=None, strength=None, partials=partials)
    return Order(settings, "a cat", "", seeds, reproducible)


class Bench:
    """Work on a library."""

    def __init__(self, library: Library, batch_images: int = 4, cooldown_seconds: float = 1000.0) -> None:
        self.work = Work(library, batch_images, cooldown_seconds, seconds_max=60.0)
        self.library = library

    def ask(self, asked: Order) -> tuple["asyncio.Task[None]", Teller]:
        teller = Teller()
        return asyncio.create_task(self.work.run(asked, teller)), teller

    async def busy(self) -> tuple["asyncio.Task[None]", Teller]:
        """A request whose picture is being painted, so that others wait."""
        asked = self.ask(order(99, edge=9))
        await eventually(lambda: self.work.painting)
        return asked


@asynccontextmanager
async def bench(library: Library, **more: float) -> AsyncIterator[Bench]:
    made = Bench(library, **more)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        library.run_free()
        for each in made.work._running:
            each.remove_done_callback(diffusion_work._die)
            each.cancel()
            with suppress(asyncio.CancelledError):
                await each


async def test_pictures_with_the_same_settings_share_a_batch_in_order_of_arrival() -> None:
    async with bench(Library(), batch_images=3) as at:
        first, _ = await at.busy()
        asked = [
            at.ask(order(1, 2)),
            at.ask(order(3, edge=2)),
            at.ask(order(4, 5)),
            at.ask(order(6, reproducible=True)),
        ]
        await eventually(lambda: at.work.waiting == 6)
        at.library.run_free()
        await asyncio.gather(first, *(task for task, _ in asked))
    assert at.library.begun == [[99], [1, 2, 4], [3], [5], [6]]
    assert [teller.pictures for _, teller in asked] == [
        {0: b"\1", 1: b"\2"},
        {0: b"\3"},
        {0: b"\4", 1: b"\5"},
        {0: b"\6"},
    ]
    assert asked[2][1].steps == [(0, 1, 2), (0, 2, 2), (1, 1, 2), (1, 2, 2)]
    assert [len(teller.notices) for _, teller in asked] == [2, 0, 1, 0], "who has shared a batch is told so"


async def test_a_step_that_was_stopped_for_hours_is_a_sign_of_life_and_one_that_takes_too_long_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, looks = 1000.0, 0

    def monotonic() -> float:
        nonlocal looks
        looks += 1
        return now

    async def pass_by(seconds: float) -> None:
        nonlocal now
        now, before = now + seconds, looks
        await eventually(lambda: looks > before + 1)

    monkeypatch.setattr(lived, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(lived, "_LOOK_SECONDS", 0.005)
    async with bench(Library()) as at:
        _, teller = await at.busy()
        for _ in range(10):
            await pass_by(600)  # each of them counts for a second
        assert teller.lives >= 3
        for _ in range(60):
            await pass_by(1)
        told = teller.lives
        for _ in range(10):
            await pass_by(1)
        assert teller.lives == told


async def test_pictures_that_have_to_be_the_same_every_time_are_painted_one_by_one() -> None:
    library = Library()
    library.run_free()
    async with bench(library) as at:
        task, teller = at.ask(order(1, 2, reproducible=True))
        await task
    assert library.begun == [[1], [2]]
    assert teller.pictures == {0: b"\1", 1: b"\2"}


async def test_nothing_but_the_running_step_is_computed_for_who_has_gone() -> None:
    async with bench(Library()) as at:
        task, teller = at.ask(order(1, steps=9))
        at.library.let(2)
        await eventually(lambda: len(teller.steps) == 2)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done(), "the running step has not ended"
        at.library.let()
        with pytest.raises(asyncio.CancelledError):
            await task
        at.library.let(9)
        other, _ = at.ask(order(2, steps=1))
        await other
    assert at.library.steps == 3 + 1
    assert at.library.begun == [[1], [2]]
    assert at.work.figures.cancelled == 1


async def test_who_is_cancelled_twice_is_kept_no_longer_than_the_step() -> None:
    async with bench(Library()) as at:
        task, _ = at.ask(order(1, steps=9))
        await eventually(lambda: at.work.painting)
        await cancel_twice(task)
        at.library.let()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert at.work._requests == []
        assert (at.work.waiting, at.work.painting) == (0, 0)
        assert at.work.figures.cancelled == 1


async def test_who_waits_and_goes_is_never_begun() -> None:
    async with bench(Library()) as at:
        first, _ = await at.busy()
        task, _ = at.ask(order(1))
        await eventually(lambda: at.work.waiting)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        at.library.run_free()
        await first
    assert at.library.begun == [[99]]


async def test_who_leaves_a_batch_is_let_go_at_its_next_step_and_the_others_stay() -> None:
    async with bench(Library()) as at:
        first, _ = await at.busy()
        (one, _), (two, stays) = at.ask(order(1, steps=4)), at.ask(order(2, steps=4))
        await eventually(lambda: at.work.waiting == 2)
        at.library.let(3)
        await first
        await eventually(lambda: stays.steps)
        one.cancel()
        at.library.let()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(one, 5)
        assert not two.done()
        at.library.let(9)
        await two
    assert at.library.begun == [[99], [1, 2]]
    assert stays.pictures == {0: b"\2"}


async def test_a_batch_that_is_refused_fails_only_who_is_to_blame() -> None:
    async with bench(Library()) as at:
        first, _ = await at.busy()
        (good, told), (bad, _) = at.ask(order(1)), at.ask(order(BAD))
        await eventually(lambda: at.work.waiting == 2)
        at.library.run_free()
        await asyncio.gather(first, good)
        with pytest.raises(Refused) as refused:
            await bad
    assert told.pictures == {0: b"\1"}
    assert b"engine_error" in refused.value.body
    assert at.library.begun == [[99], [1, BAD], [1], [BAD]]


async def test_short_of_memory_pictures_are_painted_one_by_one_for_a_while() -> None:
    library = Library(rows_max=1)
    library.run_free()
    async with bench(library, cooldown_seconds=1000.0) as at:
        await at.ask(order(1, 2))[0]
        await at.ask(order(3, 4))[0]
        assert library.begun == [[1, 2], [1], [2], [3], [4]]
        assert at.work.savings == 1
        at.work._cooldown_seconds = 0.0
        await at.ask(order(5, 6))[0]
    assert library.begun[5:] == [[5, 6], [5], [6]]


async def test_each_way_to_save_memory_is_tried_once_and_kept() -> None:
    library = Library(savings_needed=2)
    library.run_free()
    async with bench(library) as at:
        task, teller = at.ask(order(1, partials=1))
        await task
        assert library.begun == [[1], [1], [1]]
        assert library.savings == ["way0", "way1"]
        await at.ask(order(2))[0]
    assert library.begun[3:] == [[2]]
    assert teller.partials == [(0, 0)]
    assert at.work.figures.out_of_memory == 2


async def test_a_picture_that_no_saving_helps_fails_and_the_savings_are_undone() -> None:
    library = Library(savings_needed=3)
    library.run_free()
    async with bench(library) as at:
        task, _ = at.ask(order(1, 2, 3))
        with pytest.raises(Refused) as refused:
            await task
        assert b"out_of_memory" in refused.value.body
        assert library.savings == []
        assert at.work.waiting == 0
        library.savings_needed = 0
        await at.ask(order(4))[0]
    assert library.begun[-1] == [4]


async def test_whoever_waits_hears_that_something_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion_work, "_ALIVE_SECONDS", 0.005)
    async with bench(Library()) as at:
        _, painted = await at.busy()
        _, waits = at.ask(order(1))
        await eventually(lambda: painted.lives and waits.lives)
        limit = at.work._seconds_max = Passed()
        await eventually(lambda: limit.looks)
        before = waits.lives
        await eventually(lambda: limit.looks > 3)
        assert waits.lives == before, "a step that takes too long is no sign of life"


class Passed(float):
    """A limit that every step has passed; counts how often it was looked at."""

    looks = 0

    def __ge__(self, other: float) -> bool:
        self.looks += 1
        return False
