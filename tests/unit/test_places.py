"""How much memory requests may hold together."""

import pytest

from forebay.errors import Overloaded
from forebay.gateway.places import Room


def test_who_is_alone_may_hold_more_than_there_is_and_nobody_beside_others() -> None:
    room = Room(100, "pictures")
    with room.held(60) as first, first.more(90), pytest.raises(Overloaded), room.held(1):
        pytest.fail("there was room")
    with room.held(40) as first, room.held(40) as second:
        with first.more(20), pytest.raises(Overloaded), second.more(1):
            pytest.fail("there was room")
        with second.more(20):
            pass
        with pytest.raises(Overloaded), second.more(21):
            pytest.fail("there was room")
    with room.held(100):
        pass
