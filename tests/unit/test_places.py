"""How many requests and how many bytes there may be at once."""

from contextlib import ExitStack

import pytest

from forebay.errors import Overloaded
from forebay.gateway.places import Places, Room


def test_one_project_leaves_a_quarter_to_the_others() -> None:
    places = Places(8, "pictures")
    with ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(places.entered("one"))
        with pytest.raises(Overloaded, match="Too many pictures"), places.entered("one"):
            pass
        for _ in range(2):
            stack.enter_context(places.entered("other"))
        with pytest.raises(Overloaded), places.entered("third"):
            pass
    with places.entered("one"):
        pass


def test_the_only_place_is_for_anybody() -> None:
    places = Places(1, "pictures")
    with places.entered("one"), pytest.raises(Overloaded), places.entered("other"):
        pass


def test_bytes_are_counted_while_they_are_held() -> None:
    room = Room(100, "pictures")
    with room.held(60), room.held(40):
        with pytest.raises(Overloaded) as error, room.held(1):
            pass
        assert error.value.retry_after_seconds
    with room.held(100):
        pass


def test_one_that_is_alone_may_hold_more_than_there_are() -> None:
    room = Room(100, "pictures")
    with room.held(500), pytest.raises(Overloaded), room.held(1):
        pass
    with room.held(1), pytest.raises(Overloaded), room.held(500):
        pass
