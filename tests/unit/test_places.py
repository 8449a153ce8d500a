"""How much memory requests may hold together."""

import pytest

from forebay.errors import Overloaded
from forebay.gateway.places import Places, Room


def test_who_is_alone_may_hold_more_than_there_is_and_nobody_beside_others() -> None:
    room = Room(100, "pictures")
    with room.held(60, "a") as first, first.more(90), pytest.raises(Overloaded), room.held(1, "b"):
        pytest.fail("there was room")
    with room.held(40, "a") as first, room.held(40, "b") as second:
        with first.more(20), pytest.raises(Overloaded), second.more(1):
            pytest.fail("there was room")
        with second.more(20):
            pass
        with pytest.raises(Overloaded), second.more(21):
            pytest.fail("there was room")
    with room.held(100, "a"):
        pass


def test_one_project_leaves_a_quarter_of_the_memory_and_of_the_places_to_the_others() -> None:
    room, places = Room(100, "pictures"), Places(4, "pictures")
    with room.held(40, "a") as first, room.held(35, "a"):
        with pytest.raises(Overloaded), room.held(1, "a"):
            pytest.fail("it has its share")
        with first.more(5), room.held(20, "b"), pytest.raises(Overloaded), room.held(1, "b"):
            pytest.fail("there was room")
    with room.held(90, "a"), room.held(10, "b"):
        pass
    with places.entered("a"), places.entered("a"), places.entered("a"), places.entered("b"):
        for project in ("a", "c"):
            with pytest.raises(Overloaded), places.entered(project):
                pytest.fail("there was a place")
