"""Who is in memory, who waits and who leaves: single cases, and thousands of arrivals in simulated time."""

from itertools import pairwise
from math import inf
from random import Random

import pytest

from forebay.errors import SetupError
from tests.support.residents import STEP_SECONDS, Arrival, House, Kind

RULES = {"residency_seconds": 10.0, "swap_wait_seconds": 20.0, "batch_wait_seconds": 50.0, "online_seconds": 60.0}
LARGE, SMALL, TOTAL = 60, 30, 100


def house(*kinds: Kind, total: int = TOTAL, **rules: float) -> House:
    return House(kinds, total, **{**RULES, **rules})


def pair() -> House:
    return house(Kind("one", LARGE), Kind("two", LARGE))


def up(home: House, model: str) -> bool:
    return any(stand.ready_at is not None and not stand.leaving for stand in home.stands(model))


def ask(home: House, model: str, *, batch: bool = False, seconds: float = 0.0) -> None:
    home.run([Arrival(0.0, model, batch)], max(seconds, STEP_SECONDS))


def test_models_that_fit_start_at_once() -> None:
    home = house(Kind("one", LARGE), Kind("small", SMALL))
    ask(home, "one")
    ask(home, "small", seconds=3)
    assert up(home, "one")
    assert up(home, "small")
    assert not home.story.leaves


def test_an_idle_model_leaves_for_the_next_after_its_shortest_stay() -> None:
    home = pair()
    ask(home, "one", seconds=4)
    assert up(home, "one")
    ask(home, "two", seconds=5)
    assert "one would have to leave" in str(home.record("two").waiting)
    home.run([], 8)
    assert (up(home, "one"), up(home, "two")) == (False, True)
    assert (home.record("one").wanted, home.record("one").swapped) == (False, True)
    assert home.story.most_bytes == LARGE


def test_callers_who_give_up_before_its_bound_and_come_again_get_their_model_all_the_same() -> None:
    home = pair()
    patience = 0.75 * RULES["swap_wait_seconds"]

    def give_up() -> None:
        home.lines["two"] = [one for one in home.lines["two"] if home.now - one.at < patience]

    never_idle, began = [Arrival(at / 2, "one") for at in range(400)], home.now
    home.run(never_idle + [Arrival(5 + 3 * turn, "two") for turn in range(60)], 200, give_up)
    loads = [at for at, name in home.story.loads if name == "two"]
    assert loads
    assert loads[0] - began - 5 <= RULES["swap_wait_seconds"] + 10
    assert any(one.model == "two" for _, one in home.story.served)


def test_nobody_leaves_for_a_caller_who_has_gone() -> None:
    home = pair()

    def give_up() -> None:
        home.lines["two"] = [one for one in home.lines["two"] if home.now - one.at < RULES["swap_wait_seconds"] - 2]

    home.run([*(Arrival(at / 2, "one") for at in range(200)), Arrival(5, "two")], 60, give_up)
    assert [name for _, name in home.story.loads] == ["one"]


def test_who_comes_long_after_another_has_given_up_has_waited_for_himself_alone() -> None:
    home = pair()
    never_idle = [Arrival(at / 2, "one") for at in range(200)]

    def give_up() -> None:
        home.lines["two"] = [one for one in home.lines["two"] if home.now - one.at < 15]

    home.run([*never_idle, Arrival(5, "two"), Arrival(28, "two")], 44, give_up)
    assert not [at for at, name in home.story.loads if name == "two"]


def test_a_model_with_a_line_keeps_it_while_it_is_away_and_comes_back() -> None:
    home = house(Kind("one", LARGE, run_seconds=8, slots=1), Kind("two", LARGE))
    home.run([Arrival(0, "one")] * 6 + [Arrival(1, "two")], 32)
    assert up(home, "two")
    assert home.lines["one"]
    assert home.record("one").wanted
    home.run([], 100)
    assert len(home.story.served) == 7
    assert [name for _, name in home.story.loads] == ["one", "two", "one"]


def test_batch_work_makes_way_for_another_model_at_once_and_comes_back_when_that_is_quiet() -> None:
    home = house(Kind("one", LARGE, run_seconds=30), Kind("two", LARGE))
    home.run([Arrival(0, "one", batch=True)] * 8, 5)
    assert up(home, "one")
    ask(home, "two", seconds=4)
    assert up(home, "two")
    assert len(home.lines["one"]) == 8
    home.run([], 50)
    assert up(home, "two"), "it had online traffic a minute ago"
    home.run([], 20)
    assert up(home, "one")


def test_nothing_is_loaded_while_the_machine_is_not_well_but_what_takes_nothing() -> None:
    home = house(Kind("one", LARGE), Kind("elsewhere", 0))
    home.shut = "The machine is short of memory."
    ask(home, "one", seconds=3)
    assert home.record("one").waiting == "The machine is short of memory."
    ask(home, "elsewhere", seconds=3)
    assert up(home, "elsewhere")
    home.shut = None
    home.run([], 3)
    assert up(home, "one")
    assert home.record("one").waiting is None


def test_a_pinned_model_stays_and_what_cannot_fit_beside_it_is_refused() -> None:
    home = house(Kind("one", LARGE, pinned=True), Kind("two", LARGE))
    assert home.residency.refusal(home.record("two"), home.records) is None
    ask(home, "one", seconds=3)
    ask(home, "two", seconds=60)
    assert up(home, "one")
    assert "pinned (one)" in str(home.residency.refusal(home.record("two"), home.records))


def test_what_is_larger_than_the_machine_is_refused_with_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    home = house(Kind("huge", 5 * 2**30), total=4 * 2**30)
    refusal = home.residency.refusal(home.record("huge"), home.records)
    assert refusal == "huge needs 5.0 GiB on host, which has 4.0 GiB."
    ask(home, "huge", seconds=2)
    assert not home.story.loads
    assert (home.record("huge").wanted, home.record("huge").reason) == (False, refusal)
    ask(home, "huge", seconds=2)
    told = capsys.readouterr()
    lines = [line for line in (told.out + told.err).splitlines() if "model.refused" in line]
    assert len(lines) == 1, "it is told once, however often somebody asks"
    assert str(refusal) in lines[0]


def test_a_model_waits_while_other_programs_hold_its_memory_and_comes_when_they_give_it_back() -> None:
    home = house(Kind("one", LARGE), Kind("small", SMALL))
    home.taken = LARGE
    assert home.residency.refusal(home.record("one"), home.records) is None
    ask(home, "one", seconds=30)
    assert home.record("one").wanted
    assert "it waits until other programs" in str(home.record("one").waiting)
    ask(home, "small", seconds=4)
    assert up(home, "small"), "it does not wait behind what nobody here can make room for"
    home.taken = 0
    home.run([], 4)
    assert up(home, "one")


def test_models_that_are_loaded_at_the_start_have_to_fit_together() -> None:
    home = house(Kind("one", LARGE), Kind("two", LARGE), Kind("small", SMALL))
    home.residency.check_together([home.record("one"), home.record("small")])
    with pytest.raises(SetupError, match=r"two needs .* Take `preload` from two or another"):
        home.residency.check_together(home.records)


def test_what_was_learned_alone_keeps_no_server_from_starting(capsys: pytest.CaptureFixture[str]) -> None:
    home = house(Kind("one", LARGE), Kind("two", LARGE, least_bytes=SMALL))
    home.residency.check_together(home.records[:1])
    assert "memory.crowded" not in capsys.readouterr().out
    home.residency.check_together(home.records)
    told = capsys.readouterr().out
    assert told.count("memory.crowded") == 1
    assert "two needs" in told


def test_a_model_that_nobody_asks_for_is_unloaded_when_its_settings_say_so() -> None:
    home = house(Kind("one", LARGE, idle_unload_seconds=30), Kind("two", SMALL))
    home.run([Arrival(0, "one"), Arrival(20, "one"), Arrival(0, "two")], 45)
    assert up(home, "one")
    home.run([], 10)
    assert (up(home, "one"), up(home, "two")) == (False, True)
    assert not home.record("one").wanted
    ask(home, "one", seconds=3)
    assert up(home, "one")


def test_one_that_sleeps_keeps_no_idle_model_in_memory() -> None:
    home = house(Kind("one", LARGE, replicas=2, asleep_bytes=SMALL, idle_unload_seconds=30), total=2 * LARGE)
    ask(home, "one", seconds=4)
    asleep, awake = home.stands("one")
    asleep.ready_at, asleep.asleep_at, asleep.sleeps = None, home.now, True
    home.taken = SMALL  # it cannot be woken
    home.clock.advance(20)
    assert not home.residency.review(home.records, lambda _record: True)
    assert not awake.leaving
    home.clock.advance(11)
    home.residency.review(home.records, lambda _record: True)
    assert (awake.leaving, asleep.leaving, home.record("one").wanted) == (True, True, False)


def test_an_operators_load_of_one_that_sleeps_waits_for_memory_longer_than_it_may_idle() -> None:
    home = house(Kind("one", LARGE, asleep_bytes=SMALL, idle_unload_seconds=30))
    ask(home, "one", seconds=5)
    (asleep,) = home.stands("one")
    asleep.ready_at, asleep.asleep_at, asleep.sleeps = None, home.now, True
    home.taken = TOTAL - LARGE + 1
    home.record("one").want(home.now)
    home.record("one").ordered_at = home.now
    home.clock.advance(40)
    assert not home.residency.review(home.records, lambda _record: True)
    assert (asleep.leaving, home.record("one").wanted) == (False, True)


def test_an_announced_model_that_nobody_asks_for_does_not_wait_for_ever() -> None:
    home = house(Kind("one", LARGE, run_seconds=200), Kind("two", LARGE))
    ask(home, "one", seconds=4)
    home.record("two").want(home.now)
    home.run([], 10)
    assert home.record("two").waiting is not None
    home.run([], 25)
    assert (home.record("two").waiting, home.record("two").wanted) == (None, False)


def test_an_operators_load_is_as_good_as_a_caller() -> None:
    home = house(Kind("one", LARGE, run_seconds=5, slots=1), Kind("two", LARGE))
    home.run([Arrival(0, "one")] * 20, 5)
    home.record("two").want(home.now)
    home.record("two").ordered_at = home.now
    home.run([], 30)
    assert "two" in [name for _, name in home.story.loads]


def test_an_operators_load_takes_nothing_from_the_patience_of_those_in_line() -> None:
    home = house(Kind("one", LARGE, run_seconds=5, slots=1), Kind("two", LARGE))
    home.run([Arrival(0, "one")] * 40 + [Arrival(5, "two")], 20)
    home.record("two").ordered_at = home.now
    home.run([], 15)
    assert "two" in [name for _, name in home.story.loads]


def test_an_operators_load_of_what_is_up_says_nothing_of_later_starts() -> None:
    home = house(Kind("one", LARGE, run_seconds=30), Kind("two", LARGE))
    home.run([Arrival(0, "one", batch=True)] * 8, 5)
    home.record("one").ordered_at = home.now
    home.run([], 1)
    ask(home, "two", seconds=10)
    assert home.lines["one"]
    assert [name for _, name in home.story.loads] == ["one", "two"]


def test_one_that_sleeps_makes_no_other_replica_cheaper() -> None:
    home = house(Kind("one", LARGE, replicas=2, asleep_bytes=SMALL))
    ask(home, "one", seconds=3)
    (stand,) = home.stands("one")
    stand.ready_at, stand.asleep_at, stand.sleeps = None, home.now - 1, True
    home.record("one").want(home.now)
    starts = home.residency.review(home.records, lambda _record: True)
    assert len(starts) == 1, "one is woken; what another would take is more than there is beside it"


def test_nobody_leaves_for_a_second_replica() -> None:
    home = house(Kind("one", LARGE), Kind("two", 40, replicas=3))
    ask(home, "one", seconds=4)
    home.run([Arrival(each, "two") for each in range(100)], 100)
    assert up(home, "one")
    assert len(home.stands("two")) == 1
    home.record("one").let_go()
    home.run([Arrival(each, "two") for each in range(10)], 10)
    assert len(home.stands("two")) == 2


def test_a_model_that_cannot_start_is_the_first_to_leave() -> None:
    home = house(Kind("broken", LARGE, load_seconds=1000), Kind("two", LARGE))
    ask(home, "broken", seconds=1)
    home.stands("broken")[0].hopeful = False
    home.lines["broken"].clear()  # nobody waits for what does not come up
    assert home.residency.refusal(home.record("two"), home.records) is None
    ask(home, "two", seconds=3)
    assert up(home, "two")


def test_a_model_that_waits_out_its_back_off_leaves_for_others_though_it_has_a_line() -> None:
    home = house(Kind("broken", LARGE, load_seconds=1000), Kind("two", LARGE))
    ask(home, "broken", seconds=1)
    home.stands("broken")[0].retry_at_epoch = 5000.0
    ask(home, "two", seconds=19)
    assert home.lines["broken"]
    assert not home.stands("two")
    home.run([], 5)
    assert up(home, "two")


def test_two_batches_do_not_swap_more_often_than_they_must() -> None:
    home = house(Kind("one", LARGE, slots=2), Kind("two", LARGE, slots=2))
    home.run([Arrival(0, name, batch=True) for name in ("one", "two") for _ in range(200)], 300)
    assert len(home.story.served) == 400
    assert len(home.story.loads) <= 200 / RULES["batch_wait_seconds"] + 2


def mixed(seed: int, models: int, *, seconds: float, per_second: float, batch: float) -> tuple[House, list[Arrival]]:
    """Models of all sizes, and who asks for them: steadily, in bursts, or in turns."""
    chance = Random(seed)
    kinds = [
        Kind(
            f"model{each}",
            chance.choice([20, 35, 51, 60, 95]),
            load_seconds=chance.uniform(0.5, 5),
            run_seconds=chance.uniform(0.2, 4),
            slots=chance.choice([1, 2, 8]),
        )
        for each in range(models)
    ]
    arrivals, at, turn = [], 0.0, 0
    way = chance.choice(["steady", "bursts", "turns"])
    while at < seconds * 0.8:
        at += chance.expovariate(per_second) if way != "bursts" or chance.random() < 0.95 else chance.uniform(5, 40)
        turn += 1
        number = turn % models if way == "turns" else chance.randrange(models)
        arrivals.append(Arrival(at, f"model{number}", chance.random() < batch))
    return house(*kinds), arrivals


def bound(home: House) -> float:
    """The longest that a model may be away while somebody online asks for it: its patience, and everybody's turn."""
    others = len(home.kinds) - 1
    run = max(kind.run_seconds for kind in home.kinds.values())
    load = max(kind.load_seconds for kind in home.kinds.values())
    stop = max(kind.stop_seconds for kind in home.kinds.values())
    turn = RULES["residency_seconds"] + run + stop + load + 3 * STEP_SECONDS
    return RULES["swap_wait_seconds"] + others * turn + load


def test_no_model_waits_beyond_its_bound_and_swaps_are_bounded_whatever_comes(prove: bool) -> None:
    worst, swaps = 0.0, 0.0
    for seed in range(400 if prove else 8):
        home, arrivals = mixed(seed, 2 + seed % 5, seconds=200, per_second=1.5, batch=0.0)
        story = home.run(arrivals, 200)
        limit = bound(home)
        longest = max((seconds for _, seconds in story.absences), default=0.0)
        assert longest <= limit, f"seed {seed}: {longest} of {limit}"
        assert all(home.now - since <= limit for since in home.absent_since.values()), f"seed {seed}"
        assert story.most_bytes <= TOTAL, f"seed {seed}"
        assert min(story.stays, default=RULES["residency_seconds"]) >= RULES["residency_seconds"], f"seed {seed}"
        for name in home.kinds:
            times = [at for at, model in story.loads if model == name]
            assert all(later - earlier >= RULES["residency_seconds"] for earlier, later in pairwise(times))
        worst, swaps = max(worst, longest / limit), max(swaps, len(story.leaves) * 60 / 200)
    print(f"longest wait {worst:.0%} of its bound; most swaps {swaps:.1f} a minute")


def test_requests_that_alternate_between_two_models_are_collated() -> None:
    home = pair()
    story = home.run([Arrival(each / 4, ("one", "two")[each % 2]) for each in range(1000)], 300)
    switches = sum(one.model != other.model for (_, one), (_, other) in pairwise(story.served))
    print(f"{len(story.served)} requests, {len(story.loads)} loads, {switches} switches")
    assert len(story.served) == 1000
    assert switches <= 250 / RULES["residency_seconds"]


class Door:
    """Who leaves for batch work, and for how long nobody online had been there then; `look` at it after each step."""

    def __init__(self, home: House) -> None:
        self.quiet_seconds: list[float] = []
        self._home = home
        self._for_online: set[str] = set()
        self._gone: set[str] = set()
        home.residency.on_leave = self._told

    def _told(self, model: str) -> None:
        self._for_online |= {stand.id for stand in self._home.stands(model) if stand.leaving}
        self._home.clear_out(model)

    def look(self) -> None:
        home = self._home
        for name in home.kinds:
            for stand in home.stands(name):
                if stand.leaving and stand.id not in self._gone | self._for_online:
                    online_at = home.last.get((name, False), -inf)
                    self.quiet_seconds.append(home.now - STEP_SECONDS - online_at)
                self._gone |= {stand.id} if stand.leaving else set()


def test_batch_work_never_makes_a_model_leave_that_is_online(prove: bool) -> None:
    left = 0
    for seed in range(100 if prove else 3):
        home, arrivals = mixed(seed, 3, seconds=240, per_second=1.0, batch=0.5)
        online_only = house(*home.kinds.values())
        alone = online_only.run([each for each in arrivals if not each.batch], 240)
        door = Door(home)
        story = home.run(arrivals, 240, door.look)
        longest = max((seconds for _, seconds in story.absences), default=0.0)
        assert longest <= bound(home), f"seed {seed}: {longest}"
        assert story.most_bytes <= TOTAL
        assert len([one for _, one in story.served if not one.batch]) >= 0.8 * len(alone.served), f"seed {seed}"
        home.run([], 150, door.look)  # batch work that is left has its turn
        assert min(door.quiet_seconds, default=inf) >= RULES["online_seconds"], f"seed {seed}"
        left += len(door.quiet_seconds)
    assert left, "or nothing was checked"


def test_idle_models_leave_a_machine_that_needs_their_memory_and_no_more_of_them_than_it_takes() -> None:
    home = house(Kind("one", SMALL), Kind("two", SMALL), Kind("three", SMALL, pinned=True))
    for model in ("one", "two", "three"):
        ask(home, model, seconds=3)
    home.shut, home.relief = "The machine has little memory left.", LARGE
    home.run([], 5)
    assert up(home, "one"), "those who were asked for lately stay"
    home.run([], 65)
    assert [model for _, model in home.story.leaves] == ["one"]
    assert up(home, "two")
    home.relief = 0
    home.run([], 5)
    assert [model for _, model in home.story.leaves] == ["one", "two"]
    assert up(home, "three"), "what is pinned stays"
