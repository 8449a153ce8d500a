"""Batches in threads: what each request gets, whatever becomes of those that it shares its batches with."""

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from forebay.engines.batcher import Item
from forebay.engines.compute import Compute, StepFailed
from forebay.engines.connection import Refused
from forebay.engines.serving import OutOfMemory
from tests.support.cancels import cancel_twice

BAD = 13


class Library:
    """Doubles the first token of each item, and remembers what it was given. It refuses batches with a bad one.

    It has memory for `tokens_max` padded tokens, in all batches at once. With the gate closed, batches of more than
    `gated_tokens` wait.
    """

    def __init__(self, tokens_max: int = 10_000, gated_tokens: int = 0) -> None:
        self.begun: list[list[int]] = []
        self.ended: set[int] = set()
        self.late: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self._gated_tokens = gated_tokens
        self._free = tokens_max
        self._lock = threading.Lock()

    def step(self, batch: Sequence[Item]) -> list[Any]:
        self.begun.append([item.tokens[0] for item in batch])
        self.late += [item.tokens[0] for item in batch if item.tokens[0] in self.ended]
        padded = len(batch) * max(item.length for item in batch)
        with self._lock:
            self._free -= padded
        try:
            if padded > self._gated_tokens:
                assert self.gate.wait(120)
            return self._compute(batch)
        finally:
            with self._lock:
                self._free += padded

    def _compute(self, batch: Sequence[Item]) -> list[Any]:
        with self._lock:
            if self._free < 0:
                raise OutOfMemory
        if any(item.tokens[0] == BAD for item in batch):
            raise StepFailed
        return [2 * item.tokens[0] for item in batch]


def items(*values: int, length: int = 4) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [((value,) + (0,) * (length - 1), ()) for value in values]


def nothing() -> None:
    return


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def test_an_item_that_the_library_refuses_fails_its_own_request_alone() -> None:
    library = Library()
    compute = Compute(library.step, 1000, 1, 0, 60)
    library.gate.clear()
    blocker = asyncio.create_task(compute.run(items(1), nothing))
    await until(lambda: bool(library.begun))
    tasks = [asyncio.create_task(compute.run(items(value, value + 100), nothing)) for value in range(10, 17)]
    await until(lambda: compute.waiting == 14)
    library.gate.set()
    await blocker
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert len(library.begun[1]) == 14, "all in one batch"
    failed = outcomes.pop(BAD - 10)
    assert isinstance(failed, Refused)
    assert outcomes == [[2 * value, 2 * value + 200] for value in (10, 11, 12, 14, 15, 16)]
    assert (compute.running, compute.waiting, compute.figures.cancelled) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_everybody_gets_his_own_or_an_end(seed: int) -> None:
    """Requests of many sizes, some given up, some refused, short of memory: nothing is lost, late or anybody else's."""
    chance = random.Random(seed)
    library = Library(tokens_max=chance.choice([40, 150, 10_000]))
    compute = Compute(library.step, 256, 2, 32, 0.01)
    number, given_up = 100, list[int]()

    async def one() -> None:
        nonlocal number
        first = number
        number += 50
        values = list(range(first, first + chance.randint(1, 50)))
        if chance.random() < 0.1:
            values[-1] = BAD
        for _ in range(chance.randint(0, 300)):
            await asyncio.sleep(0)
        wanted = [item for value in values for item in items(value, length=chance.randint(1, 40))]
        try:
            async with asyncio.timeout(chance.choice([None, None, chance.random() * 0.02])):
                found = await compute.run(wanted, nothing)
            assert found == [2 * value for value in values]
        except TimeoutError:
            given_up.append(first)
        except Refused:
            assert BAD in values
        library.ended |= {value for value in values if value != BAD}

    await asyncio.gather(*(one() for _ in range(80)))
    assert (compute.running, compute.waiting) == (0, 0)
    assert given_up
    assert library.late == [], "what nobody waits for any more is not computed"


async def test_who_is_cancelled_twice_is_kept_no_longer_than_the_step() -> None:
    library = Library()
    compute = Compute(library.step, 1000, 1, 0, 60)
    library.gate.clear()
    task = asyncio.create_task(compute.run(items(1), nothing))
    await until(lambda: bool(library.begun))
    await cancel_twice(task)
    library.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (compute.running, compute.waiting, compute.figures.cancelled) == (0, 0, 1)
    assert await compute.run(items(2), nothing) == [4]


async def test_a_shortage_beside_a_large_batch_halves_that_one_and_nobody_is_blamed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = Library(tokens_max=1000, gated_tokens=32)
    compute = Compute(library.step, 1000, 1, 32, 60)
    library.gate.clear()
    large = asyncio.create_task(compute.run(items(*range(20, 120), length=10), nothing))
    await until(lambda: len(library.begun) == 1)
    small = [asyncio.create_task(compute.run(items(value), nothing)) for value in (1, 2)]
    await until(lambda: compute.figures.out_of_memory == 1)
    for _ in range(1000):  # time enough for what must not happen
        await asyncio.sleep(0)
    library.gate.set()
    assert await asyncio.gather(*small) == [[2], [4]]
    assert await large == [2 * value for value in range(20, 120)]
    assert [len(batch) for batch in library.begun] == [100, 2, 2]
    assert (compute.budget_tokens, compute.figures.out_of_memory) == (500, 1)
    assert capsys.readouterr().err == "event=batch_halved budget_tokens=500\n"
    assert (compute.running, compute.waiting) == (0, 0)


async def test_a_batch_that_is_too_much_by_itself_is_halved_until_it_fits() -> None:
    library = Library(tokens_max=300)
    compute = Compute(library.step, 1000, 1, 0, 60)
    assert await compute.run(items(*range(20, 120), length=10), nothing) == [2 * value for value in range(20, 120)]
    assert compute.budget_tokens == 250
    assert compute.figures.out_of_memory == 2
    with pytest.raises(Refused, match="more memory than there is"):
        await compute.run(items(1, length=400), nothing)
    assert compute.budget_tokens == 200


async def test_many_that_ran_out_beside_each_other_are_all_computed() -> None:
    """Each fits by itself, and no two do."""
    library = Library(tokens_max=100)
    compute = Compute(library.step, 60, 3, 60, 60)
    tasks = [asyncio.create_task(compute.run(items(value, length=60), nothing)) for value in range(20, 40)]
    async with asyncio.timeout(20):
        assert await asyncio.gather(*tasks) == [[2 * value] for value in range(20, 40)]
    assert (compute.running, compute.waiting) == (0, 0)
