"""The journal: what was appended is read again, and a torn end is seen as one."""

import os
from pathlib import Path
from typing import Any

import pytest

from forebay.metering.journal import Entry, Journal, abandoned, journals, read, remove_drafts
from forebay.quotas import Account, Use
from tests.support.usage import append_record

ENTRIES = tuple(Entry("2026-11-21", Account("p", "k", f"m{i}", "chat"), Use(1, i, 2, 3, 4, 5, 6)) for i in range(5))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal.create(tmp_path, "node.a")
    for entry in ENTRIES:
        made.append(entry)
    return made


def test_what_was_appended_is_read_again_from_any_record_on(journal: Journal) -> None:
    whole = read(journal.path, 0)
    assert (whole.entries, whole.end, whole.rest) == (ENTRIES, journal.size, 0)
    assert journal.path.stat().st_size == journal.size
    more = Entry("2026-11-22", Account("p", "k", "m", "chat"), Use(1))
    journal.append(more)
    assert read(journal.path, whole.end).entries == (more,)
    assert read(journal.path, journal.size + 99).entries == ()


def test_every_torn_end_ends_at_the_last_whole_record(journal: Journal, tmp_path: Path) -> None:
    content = journal.path.read_bytes()
    ends = [read(journal.path, 0).end]
    torn = tmp_path / "torn"
    for length in range(len(content)):
        torn.write_bytes(content[:length])
        found = read(torn, 0)
        assert found.entries == ENTRIES[: len(found.entries)]
        assert found.end + found.rest == length or length <= 16
        ends.append(found.end)
    assert len(set(ends)) == len(ENTRIES) + 2  # with the beginning of the file, and none


def test_a_long_one_is_read_in_pieces(journal: Journal) -> None:
    more = tuple(Entry("2026-11-22", Account("p", "k" * 60_000, f"m{each}", "chat"), Use(1)) for each in range(100))
    for entry in more:
        journal.append(entry)
    found: list[Entry] = []
    pieces, end = 0, 0
    while (reading := read(journal.path, end)).entries:
        found += reading.entries
        pieces, end = pieces + 1, reading.end
        assert end + reading.rest == journal.size
    assert tuple(found) == (*ENTRIES, *more)
    assert pieces == 2


def test_a_record_that_was_changed_is_none(journal: Journal, tmp_path: Path) -> None:
    content = bytearray(journal.path.read_bytes())
    content[-3] ^= 1
    changed = tmp_path / "changed"
    changed.write_bytes(content)
    found = read(changed, 0)
    assert found.entries == ENTRIES[:-1]
    assert found.rest > 0


def test_of_another_format_nothing_is_read_and_all_is_left(journal: Journal) -> None:
    content = journal.path.read_bytes()
    journal.path.write_bytes(content.replace(b"forebay usage 1\n", b"forebay usage 2\n"))
    found = read(journal.path, 0)
    assert (found.entries, found.end, found.rest) == ((), 0, len(content)), "whoever removes it says so"


def test_a_record_of_another_version_is_read_as_far_as_it_is_known(journal: Journal) -> None:
    account = ("2026-11-22", "p", "k", "m", "chat")
    append_record(journal.path, *account, 1, 2, 3)
    append_record(journal.path, *account, 1, 2, 3, 4, 5, 6, 7, 8, "more")
    append_record(journal.path, *account)
    journal.size = journal.path.stat().st_size
    journal.append(ENTRIES[0])
    whole = read(journal.path, 0)
    uses = [each.use for each in whole.entries[len(ENTRIES) :]]
    assert uses == [Use(1, 2, 3), Use(1, 2, 3, 4, 5, 6, 7), Use(), ENTRIES[0].use]
    assert (whole.end, whole.rest) == (journal.size, 0)


@pytest.mark.parametrize("values", [(), ("2026-11-22", "p"), ("d", "p", "k", "m", 1), ("d", "p", "k", "m", "c", "1")])
def test_a_record_that_no_version_has_written_is_none(journal: Journal, values: tuple[Any, ...]) -> None:
    append_record(journal.path, *values)
    found = read(journal.path, 0)
    assert found.entries == ENTRIES
    assert found.rest > 0


def test_a_record_without_room_leaves_nothing_behind(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    size, write = journal.size, os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
    with pytest.raises(OSError, match="room"):
        journal.append(ENTRIES[0])
    assert journal.path.stat().st_size == journal.size == size


def test_only_the_journal_of_the_dead_is_free(journal: Journal, tmp_path: Path) -> None:
    assert journals(tmp_path) == [journal.path]
    with abandoned(journal.path) as free:
        assert not free
    journal.close(remove=False)
    with abandoned(journal.path) as free:
        assert free
        with abandoned(journal.path) as again:
            assert not again
    with abandoned(tmp_path / "none.journal") as free:
        assert not free


def test_drafts_of_the_dead_are_removed_and_no_others(tmp_path: Path) -> None:
    old, new = tmp_path / "a.new", tmp_path / "b.new"
    for draft in (old, new):
        draft.touch()
    os.utime(old, (1000, 1000))
    remove_drafts(tmp_path, 2000)
    assert [path.name for path in tmp_path.iterdir()] == ["b.new"]
