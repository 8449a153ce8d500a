"""Of `forebay bench coserve`, what can be judged without a server: when requests come, and when an engine has stopped."""

from forebay.bench.coserve import MIXED, SPEECH, measures, stepped_aside
from forebay.bench.mixed import moments
from forebay.clock import seeded

LOOK = 0.02


def looks(busy: float, still: float) -> list[tuple[float, float]]:
    """A process that computes for so long, and then does not."""
    whole = round((busy + still) / LOOK)
    return [(number * LOOK, min(number * LOOK, busy)) for number in range(whole + 1)]


def test_an_engine_has_stepped_aside_when_it_stands_still() -> None:
    assert stepped_aside(looks(0.3, 1.0)) == 0.28, "a hundredth of a second is next to nothing"
    assert stepped_aside(looks(0.0, 1.0)) == 0.0


def test_an_engine_that_never_stops_is_told_by_the_last_look() -> None:
    assert stepped_aside(looks(1.0, 0.0)) == 1.0
    assert stepped_aside(looks(0.9, 0.1)) == 1.0, "too short to be sure"


def test_requests_come_at_the_same_moments_again_and_as_many_as_usual() -> None:
    assert moments(seeded(3), 2.0, 10.0) == moments(seeded(3), 2.0, 10.0)
    found = moments(seeded(4), 2.0, 10.0)
    assert len(found) == 20
    assert found == sorted(found)
    assert 0 <= found[0] < found[-1] < 10
    assert len(moments(seeded(1), 0.01, 1.0)) == 1, "something is measured of every kind"


def test_every_kind_is_measured_with_a_batch_and_without() -> None:
    for plan in (MIXED, SPEECH):
        assert abs(sum(plan.online.values()) - 1) < 1e-9
        names = measures(plan)
        assert all(f"{kind}, {where}, p99" in names for kind in plan.online for where in ("alone", "beside a batch"))
        assert plan.stops in plan.lines
