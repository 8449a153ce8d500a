import itertools

import pytest

from forebay.engines.whisper_chunks import Chunk
from forebay.engines.whisper_line import ALIGN, ENCODE, GENERATE, Entry, Line, Pace

MOST = {ENCODE: 2, GENERATE: 8, ALIGN: 8}


class _Office:
    """Computes by the line's order alone, and notes what was in each step."""

    def __init__(self, **most: int) -> None:
        self.line = Line(lambda stage: {**MOST, **most}[stage])
        self.left: dict[int, int] = {}
        self.steps: list[tuple[str, list[int]]] = []
        self._numbers = itertools.count()

    def join(self, request: int, chunks: int, key: str = "") -> None:
        self.line.join(request, chunks)
        self.left[request] = chunks
        found = [Entry(next(self._numbers), request, place, Chunk(((0, 1),))) for place in range(chunks)]
        for entry in found:
            entry.key = ""
        self._keys = {**getattr(self, "_keys", {}), request: key}
        self.line.add(found)

    def step(self) -> bool:
        entries = self.line.take()
        if not entries:
            return False
        stage = entries[0].stage
        assert {(entry.stage, entry.key) for entry in entries} == {(stage, entries[0].key)}
        self.steps.append((stage, [entry.request for entry in entries]))
        for entry in entries:
            if stage == GENERATE:
                self.left[entry.request] -= 1
                self.line.finished(entry.request, 1)
            else:
                entry.stage, entry.key = GENERATE, self._keys[entry.request]
                self.line.add([entry])
        return True

    def written(self) -> list[list[int]]:
        return [requests for stage, requests in self.steps if stage == GENERATE]


def test_equals_are_written_together() -> None:
    office = _Office()
    for request in range(8):
        office.join(request, 1)
    while office.step():
        pass
    assert [sorted(requests) for requests in office.written()] == [list(range(8))]


def test_one_long_recording_fills_its_own_steps() -> None:
    office = _Office()
    office.join(1, 20)
    while office.step():
        pass
    assert [len(requests) for requests in office.written()] == [8, 8, 4]


def test_a_short_one_gets_in_after_the_step_that_runs() -> None:
    office = _Office()
    office.join(1, 40)
    for _ in range(6):
        office.step()
    before = len(office.steps)
    office.join(2, 1)
    while office.left[2]:
        office.step()
    assert len(office.steps) - before == 2  # one to encode, one to write
    assert office.left[1] > 0


def test_a_long_one_is_not_passed_over_for_ever() -> None:
    office = _Office(**{ENCODE: 1, GENERATE: 1})
    office.join(0, 4)
    for request in range(1, 200):
        office.join(request, 1)
        for _ in range(2):
            office.step()
    assert office.left[0] == 0


def test_different_options_are_not_written_together() -> None:
    office = _Office()
    for request in range(6):
        office.join(request, 1, key=str(request % 2))
    while office.step():
        pass
    assert all(len({request % 2 for request in requests}) == 1 for requests in office.written())
    assert sum(map(len, office.written())) == 6
    assert len(office.written()) == 2


def test_a_suspect_is_computed_alone() -> None:
    line = Line(lambda _: 8)
    line.join(1, 3)
    entries = [Entry(number, 1, number, Chunk(((0, 1),)), suspect=number == 1) for number in range(3)]
    line.add(entries)
    steps = []
    while taken := line.take():
        steps.append([entry.number for entry in taken])
    assert steps == [[0, 2], [1]]


def test_who_leaves_is_forgotten() -> None:
    line = Line(lambda _: 8)
    line.join(1, 3)
    entries = [Entry(number, 1, number, Chunk(((0, 1),))) for number in range(3)]
    line.add(entries)
    assert line.waiting == 3
    assert line.leave(1) == entries
    line.add(entries)
    line.finished(1, 1)
    assert (line.waiting, line.take()) == (0, [])


def test_steps_become_as_large_as_the_time_allows() -> None:
    pace = Pace()
    assert pace.most(GENERATE, 8, 4) == 2
    pace.note(GENERATE, 2, 2.0)
    assert pace.most(GENERATE, 8, 4) == 4
    pace.note(GENERATE, 4, 2.4)  # among more, each takes less
    assert pace.most(GENERATE, 8, 4) == 6
    assert pace.most(GENERATE, 3, 4) == 3
    for _ in range(20):
        pace.note(GENERATE, 1, 9.0)
        pace.note(GENERATE, 2, 18.0)
        pace.note(GENERATE, 4, 36.0)
    assert pace.most(GENERATE, 8, 4) == 1
    assert pace.most(ENCODE, 1, 4) == 1


@pytest.mark.parametrize("stage", [ALIGN, GENERATE])
def test_what_is_nearly_done_goes_first(stage: str) -> None:
    line = Line(lambda _: 8)
    line.join(1, 2)
    near = Entry(1, 1, 1, Chunk(((0, 1),)), stage=stage, alone=True)
    line.add([Entry(0, 1, 0, Chunk(((0, 1),))), near])
    assert line.take() == [near]
