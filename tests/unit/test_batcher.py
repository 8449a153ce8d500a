from hypothesis import given
from hypothesis import strategies as st

from forebay.engines.batcher import Batcher, Item

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=40)
ROUNDS = 8


def _items(request: int, sizes: list[int]) -> list[Item]:
    return [Item(request, index, (1,) * size) for index, size in enumerate(sizes)]


def _padded(batch: list[Item]) -> int:
    return len(batch) * max(item.length for item in batch)


@given(st.lists(lengths, min_size=1, max_size=12), st.integers(1, 600))
def test_nothing_is_lost_or_doubled_and_the_budget_is_kept(requests: list[list[int]], budget: int) -> None:
    batcher = Batcher()
    for number, sizes in enumerate(requests):
        batcher.add(number, _items(number, sizes))
    seen = []
    while batch := batcher.take(budget):
        assert len(batch) == 1 or _padded(batch) <= budget
        seen += [(item.request, item.index) for item in batch]
    assert sorted(seen) == [(n, i) for n, sizes in enumerate(requests) for i in range(len(sizes))]
    assert batcher.waiting == 0


@given(st.lists(lengths, min_size=1, max_size=12), st.integers(64, 600))
def test_little_of_a_batch_is_padding(requests: list[list[int]], budget: int) -> None:
    batcher = Batcher()
    for number, sizes in enumerate(requests):
        batcher.add(number, _items(number, sizes))
    while batch := batcher.take(budget):
        first = batch[0].length
        assert all(min(int(first / 1.25), first - 16) <= item.length for item in batch)
        assert all(item.length <= max(int(first * 1.25), first + 16) for item in batch)


@given(st.lists(st.tuples(st.integers(0, 40), lengths), min_size=1, max_size=20), st.integers(64, 600))
def test_no_request_waits_for_ever(arrivals: list[tuple[int, list[int]]], budget: int) -> None:
    batcher = Batcher()
    served: dict[int, int] = {}
    left: dict[int, int] = {}
    for turn in range(5000):
        for number, (when, sizes) in enumerate(arrivals):
            if when == turn:
                batcher.add(number, _items(number, sizes))
                served[number], left[number] = turn, len(sizes)
        batch = batcher.take(budget)
        if not batch and turn > 40:
            break
        for item in batch:
            served[item.request] = turn
            left[item.request] -= 1
        waiting = [number for number, count in left.items() if count]
        assert all(turn - served[number] <= ROUNDS + len(arrivals) for number in waiting)
    assert not any(left.values())


def test_a_single_short_text_goes_before_the_rest_of_a_long_request() -> None:
    batcher = Batcher()
    batcher.add(1, _items(1, [100] * 2048))
    for _ in range(5):
        assert {item.request for item in batcher.take(512)} == {1}
    batcher.add(2, _items(2, [10]))
    assert 2 in {item.request for _ in range(2) for item in batcher.take(512)}


def test_requests_share_a_batch() -> None:
    batcher = Batcher()
    for number in range(8):
        batcher.add(number, _items(number, [20 + number]))
    assert {item.request for item in batcher.take(512)} == set(range(8))


def test_the_place_for_small_requests_takes_no_other() -> None:
    batcher = Batcher()
    batcher.add(1, _items(1, [10] * 100))
    assert batcher.take(512, small_tokens_max=128) == []
    batcher.add(2, _items(2, [100, 28]))
    assert {item.request for item in batcher.take(512, small_tokens_max=128)} == {2}


@given(lengths, st.integers(1, 300))
def test_what_was_put_back_comes_again(sizes: list[int], budget: int) -> None:
    batcher = Batcher()
    batcher.add(1, _items(1, sizes))
    batcher.put_back(batcher.take(10_000))
    seen: list[int] = []
    while batch := batcher.take(budget):
        assert len(batch) == 1 or _padded(batch) <= budget
        seen += [item.index for item in batch]
    assert sorted(seen) == list(range(len(sizes)))


def test_what_was_dropped_does_not_come() -> None:
    batcher = Batcher()
    batcher.add(1, _items(1, [10] * 5))
    batcher.add(2, _items(2, [10]))
    batcher.drop(1)
    batcher.drop(3)
    assert [item.request for item in batcher.take(512)] == [2]
    assert batcher.take(512) == []
