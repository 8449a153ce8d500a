"""One suite for measured peaks of memory, over SQLite and PostgreSQL."""

import asyncio
from dataclasses import replace

from forebay.peaks import Peak, input_class
from forebay.store.database import Database
from forebay.store.model_memory import ModelMemoryStore

GIB = 2**30
SINCE = 1000.0
PEAK = Peak("chat", "0123", "host", 11, 4 * GIB, 2.5, 2000.0)


async def test_what_was_saved_is_there_after_a_restart(database: Database) -> None:
    others = [replace(PEAK, device="gpu0"), replace(PEAK, input_class=0), replace(PEAK, fingerprint="4567")]
    await ModelMemoryStore(database).save([PEAK, *others], SINCE)
    assert set(await ModelMemoryStore(database).load(SINCE)) == {PEAK, *others}


async def test_the_larger_figure_stays(database: Database) -> None:
    store = ModelMemoryStore(database)
    for peak_bytes, measured_at in ((4 * GIB, 2000.0), (6 * GIB, 2001.0), (3 * GIB, 2002.0)):
        await store.save([replace(PEAK, peak_bytes=peak_bytes, measured_at=measured_at)], SINCE)
    assert await store.load(SINCE) == [replace(PEAK, peak_bytes=6 * GIB, measured_at=2001.0)]


async def test_coming_to_about_as_much_again_keeps_it_fresh(database: Database) -> None:
    store = ModelMemoryStore(database)
    for peak_bytes, measured_at in ((100, 2000.0), (90, 2001.0), (89, 2002.0)):
        await store.save([replace(PEAK, peak_bytes=peak_bytes, measured_at=measured_at, load_seconds=1.0)], SINCE)
    assert await store.load(SINCE) == [replace(PEAK, peak_bytes=100, measured_at=2001.0, load_seconds=1.0)]


async def test_what_is_old_gives_way_to_less(database: Database) -> None:
    store = ModelMemoryStore(database)
    await store.save([PEAK], SINCE)
    smaller = replace(PEAK, peak_bytes=GIB, measured_at=3000.0)
    await store.save([smaller], since=2000.5)
    assert await store.load(SINCE) == [smaller]


async def test_what_is_old_is_forgotten(database: Database) -> None:
    store = ModelMemoryStore(database)
    fresh = replace(PEAK, model="other", measured_at=3000.0)
    await store.save([PEAK, fresh], SINCE)
    assert await store.load(2000.5) == [fresh]
    assert await store.load(0) == [fresh]


async def test_many_who_save_at_once_leave_the_largest(database: Database) -> None:
    store = ModelMemoryStore(database)
    rows = [[replace(PEAK, peak_bytes=n * GIB), replace(PEAK, model="b", peak_bytes=n)] for n in range(1, 9)]
    await asyncio.gather(*(store.save(peaks if n % 2 else peaks[::-1], SINCE) for n, peaks in enumerate(rows)))
    assert {(peak.model, peak.peak_bytes) for peak in await store.load(SINCE)} == {("chat", 8 * GIB), ("b", 8)}


def test_inputs_are_in_classes_by_powers_of_two() -> None:
    assert [input_class(size) for size in (0, 1, 2, 3, 4, 1023, 1024)] == [0, 1, 2, 2, 3, 10, 11]
