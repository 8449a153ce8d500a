"""The ledger: what fits, who leaves for whom, and what they are told who wait."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.replicas.memory import (
    HOST,
    Evict,
    Fits,
    Holding,
    Need,
    Never,
    Rules,
    Wait,
    Wish,
    Yield,
    agenda,
    charge,
    plan,
    relief,
    size,
    used,
)

GIB = 2**30
RULES = Rules(residency_seconds=10, swap_wait_seconds=20, online_seconds=60)
NOW = 1000.0
TOTALS = {HOST: 10 * GIB}


def holding(model: str, gib: float = 4, **changes: object) -> Holding:
    """An idle resident that has been there for long."""
    resident = Holding(
        model=model,
        replica_id=f"replica_{model}",
        bytes={HOST: int(gib * GIB)},
        busy=False,
        pinned=False,
        awaited=False,
        idle_since=NOW - 100,
        loaded_at=NOW - 500,
        reload_seconds=1.0,
        last_online_at=None,
    )
    return replace(resident, **changes)  # type: ignore[arg-type]


def need(gib: float = 4, model: str = "new") -> Need:
    return Need(model, {HOST: int(gib * GIB)})


def victims(decision: object) -> list[str]:
    assert isinstance(decision, Evict | Yield), decision
    return [one.model for one in decision.victims]


def test_what_is_free_is_given() -> None:
    assert plan(need(6), [holding("a")], TOTALS, NOW, RULES) == Fits()
    assert plan(need(6.1), [holding("a")], TOTALS, NOW, RULES) != Fits()


def test_a_model_on_no_device_of_ours_always_fits() -> None:
    assert plan(Need("upstream", {}), [holding("a", 20)], TOTALS, NOW, RULES) == Fits()


def test_the_one_idle_longest_leaves_first() -> None:
    residents = [holding("young", idle_since=NOW - 20), holding("old", idle_since=NOW - 400)]
    assert victims(plan(need(), residents, TOTALS, NOW, RULES)) == ["old"]


def test_of_those_idle_about_equally_long_the_one_that_is_back_soonest_leaves() -> None:
    slow = holding("slow", idle_since=NOW - 101, reload_seconds=30)
    quick = holding("quick", idle_since=NOW - 99, reload_seconds=2)
    assert victims(plan(need(), [slow, quick], TOTALS, NOW, RULES)) == ["quick"]


@pytest.mark.parametrize(
    "change",
    [{"busy": True}, {"pinned": True}, {"awaited": True}, {"loaded_at": NOW - 9, "idle_since": NOW - 8}],
    ids=["busy", "pinned", "awaited", "young"],
)
def test_who_may_not_leave_does_not(change: dict[str, object]) -> None:
    kept = holding("kept", **{"idle_since": NOW - 400, "reload_seconds": 0.0, **change})
    assert victims(plan(need(), [kept, holding("other", idle_since=NOW - 7)], TOTALS, NOW, RULES)) == ["other"]
    assert isinstance(plan(need(7), [kept], TOTALS, NOW, RULES), Wait | Never)


def test_a_model_that_was_never_used_need_not_stay() -> None:
    resident = holding("preloaded", 8, idle_since=NOW - 1, loaded_at=NOW - 1)
    assert victims(plan(need(), [resident], TOTALS, NOW, RULES)) == ["preloaded"]


def test_nobody_leaves_in_vain() -> None:
    small, large = holding("small", 1, idle_since=NOW - 400), holding("large", 8, idle_since=NOW - 50)
    assert victims(plan(need(4), [small, large], TOTALS, NOW, RULES)) == ["large"]


def test_several_leave_where_one_is_not_enough() -> None:
    residents = [holding("a", 3), holding("b", 3, idle_since=NOW - 90), holding("c", 3, idle_since=NOW - 1)]
    assert victims(plan(need(6), residents, TOTALS, NOW, RULES)) == ["a", "b"]


def test_each_device_has_its_own_room() -> None:
    totals = {HOST: 10 * GIB, "gpu0": 8 * GIB, "gpu1": 8 * GIB}
    idle_on_host = holding("host", 9, idle_since=NOW - 400)
    first = holding("first", bytes={HOST: 0, "gpu0": 6 * GIB})
    second = holding("second", bytes={HOST: 0, "gpu1": 6 * GIB})
    wanted = Need("new", {HOST: GIB, "gpu1": 4 * GIB})
    assert victims(plan(wanted, [idle_on_host, first, second], totals, NOW, RULES)) == ["second"]
    both = Need("new", {HOST: 2 * GIB, "gpu0": 4 * GIB})
    assert sorted(victims(plan(both, [idle_on_host, first, second], totals, NOW, RULES))) == ["first", "host"]


def test_batch_work_leaves_those_alone_who_had_online_traffic_lately() -> None:
    lately = holding("lately", 8, last_online_at=NOW - 59)
    for waited in (0.0, 1e6):
        decision = plan(need(), [lately], TOTALS, NOW, RULES, for_batch=True, waited_seconds=waited)
        assert isinstance(decision, Wait)
        assert "lately had online traffic lately" in decision.reason
        assert decision.until == NOW + 1
    assert victims(plan(need(), [lately], TOTALS, NOW, RULES)) == ["lately"]
    before = replace(lately, last_online_at=NOW - 60)
    assert victims(plan(need(), [before], TOTALS, NOW, RULES, for_batch=True)) == ["lately"]


def test_who_has_waited_long_makes_one_yield_that_works() -> None:
    busy = holding("busy", 8, busy=True, awaited=True)
    early = plan(need(), [busy], TOTALS, NOW, RULES, waited_seconds=19)
    assert isinstance(early, Wait)
    assert early.until == NOW + 1
    late = plan(need(), [busy], TOTALS, NOW, RULES, waited_seconds=20)
    assert isinstance(late, Yield)
    assert victims(late) == ["busy"]
    told = replace(busy, leaving=True)
    gone = Wait("new starts when busy is gone.", None, promised=True)
    assert plan(need(), [told], TOTALS, NOW, RULES, waited_seconds=20) == gone


def test_an_idle_one_with_a_line_leaves_at_once_for_who_has_waited_long() -> None:
    lined = holding("lined", 8, awaited=True)
    assert isinstance(plan(need(), [lined], TOTALS, NOW, RULES, waited_seconds=19), Wait)
    assert isinstance(plan(need(), [lined], TOTALS, NOW, RULES, waited_seconds=20), Evict)


def test_the_shortest_stay_holds_whoever_waits() -> None:
    young = holding("young", 8, busy=True, loaded_at=NOW - 9)
    decision = plan(need(), [young], TOTALS, NOW, RULES, waited_seconds=1e6)
    assert isinstance(decision, Wait)
    assert decision.until == NOW + 1


def test_who_is_leaving_is_waited_for_and_nobody_else_leaves() -> None:
    residents = [holding("leaving", leaving=True), holding("idle", 4)]
    decision = plan(need(), residents, TOTALS, NOW, RULES)
    assert decision == Wait("new starts when leaving is gone.", None, promised=True)
    assert victims(plan(need(7), residents, TOTALS, NOW, RULES)) == ["idle"]


def test_what_never_fits_is_refused_with_the_arithmetic() -> None:
    pinned = holding("chat", 7.5, pinned=True)
    decision = plan(need(4.2), [pinned, holding("idle", 1)], TOTALS, NOW, RULES)
    assert decision == Never(
        "new needs 4.2 GiB on host, which has 10.0 GiB, of which 7.5 GiB is held by what is pinned (chat)."
    )
    assert plan(need(10.5), [], TOTALS, NOW, RULES) == Never("new needs 10.5 GiB on host, which has 10.0 GiB.")


def test_what_other_programs_hold_is_waited_for_and_not_refused() -> None:
    totals, others = {HOST: GIB, "gpu0": 5 * GIB}, {"gpu0": 4 * GIB}
    pinned = holding("chat", bytes={"gpu0": 2 * GIB}, pinned=True)
    wanted = Need("new", {HOST: 0, "gpu0": 6 * GIB})
    decision = plan(wanted, [pinned, holding("idle", bytes={"gpu0": GIB})], totals, NOW, RULES, others=others)
    assert decision == Wait(
        "new needs 6.0 GiB on gpu0, which has 9.0 GiB, of which 2.0 GiB is held by what is pinned (chat); "
        "it waits until other programs, which hold 4.0 GiB there, give enough of it back.",
        None,
        outside=True,
    )
    assert plan(wanted, [pinned], {**totals, "gpu0": 9 * GIB}, NOW, RULES) == Fits()
    larger = Need("new", {"gpu0": 7 * GIB + 1})
    assert plan(larger, [pinned], totals, NOW, RULES, others=others) == Never(
        "new needs 7.0 GiB on gpu0, which has 9.0 GiB, of which 2.0 GiB is held by what is pinned (chat)."
    )


def test_nothing_is_kept_for_one_that_waits_for_other_programs() -> None:
    wishes = [Wish(need(8, "large"), waited_seconds=1e6), Wish(need(4, "small"))]
    plans = agenda(wishes, [], {HOST: 5 * GIB}, NOW, RULES, others={HOST: 5 * GIB})
    assert [(wish.need.model, type(verdict)) for wish, verdict in plans] == [("large", Wait), ("small", Fits)]


def test_a_pinned_one_that_an_operator_has_told_to_go_is_no_reason_to_refuse_another() -> None:
    going = holding("chat", 8, pinned=True, leaving=True)
    assert plan(need(), [going], TOTALS, NOW, RULES) == Wait("new starts when chat is gone.", None, promised=True)


def test_a_device_that_is_not_there_is_named() -> None:
    decision = plan(Need("new", {"gpu0": GIB}), [], TOTALS, NOW, RULES)
    assert decision == Never("new needs 1.0 GiB on gpu0, and this machine has no gpu0.")


def test_who_waits_is_told_for_whom_and_why() -> None:
    decision = plan(need(), [holding("chat", 8, busy=True)], TOTALS, NOW, RULES)
    assert isinstance(decision, Wait)
    assert decision.reason == (
        "new waits for memory: it needs 4.0 GiB on host, of which 2.0 GiB is free. "
        "chat would have to leave: chat is at work."
    )


def test_sizes_are_in_words_of_people() -> None:
    assert size(3 * GIB + GIB // 2) == "3.5 GiB"
    assert size(90 * 2**20) == "90 MiB"


@pytest.mark.parametrize(
    ("needed", "measured", "learned", "reserved", "charged"),
    [
        (100, None, None, True, 100),
        (100, 40, None, True, 100),
        (100, 140, None, True, 140),
        (100, 40, None, False, 40),
        (100, 40, 70, False, 70),
        (100, 90, 70, False, 90),
        (100, None, 140, False, 140),
    ],
)
def test_what_a_replica_is_charged_with(
    needed: int, measured: int | None, learned: int | None, reserved: bool, charged: int
) -> None:
    assert charge(needed, measured, learned, reserved=reserved) == charged


def test_what_one_is_promised_another_does_not_get() -> None:
    wishes = [Wish(need(6, "late"), waited_seconds=1), Wish(need(6, "early"), waited_seconds=2)]
    plans = agenda(wishes, [], TOTALS, NOW, RULES)
    assert [(wish.need.model, type(verdict)) for wish, verdict in plans] == [("early", Fits), ("late", Wait)]


def test_batch_work_makes_way_for_online_work_at_once_and_for_batch_work_never() -> None:
    batch = holding("batch", 8, busy=True, awaited=True, batch_alone=True)
    assert victims(plan(need(), [batch], TOTALS, NOW, RULES)) == ["batch"]
    assert isinstance(plan(need(), [batch], TOTALS, NOW, RULES, for_batch=True), Wait)


def test_nobody_leaves_for_a_further_replica_of_a_model_that_serves() -> None:
    idle = holding("idle", 8)
    assert isinstance(plan(need(), [idle], TOTALS, NOW, RULES, waited_seconds=1e6, extra=True), Wait)
    wishes = [Wish(need(4, "extra"), waited_seconds=1e6, extra=True), Wish(need(8, "first"))]
    assert [type(verdict) for _, verdict in agenda(wishes, [], TOTALS, NOW, RULES)] == [Fits, Wait]


def test_no_model_leaves_for_itself() -> None:
    assert isinstance(plan(need(), [holding("new", 8)], TOTALS, NOW, RULES, waited_seconds=1e6), Wait)


def test_two_who_wait_do_not_evict_the_same_one() -> None:
    wishes = [Wish(need(5, "one"), waited_seconds=2), Wish(need(5, "two"), waited_seconds=1)]
    plans = agenda(wishes, [holding("a", 5), holding("b", 5, idle_since=NOW - 20)], TOTALS, NOW, RULES)
    assert [victims(verdict) for _, verdict in plans] == [["a"], ["b"]]


def test_online_goes_before_batch_however_long_that_waited() -> None:
    wishes = [Wish(need(6, "batch"), for_batch=True, waited_seconds=99), Wish(need(6, "online"))]
    plans = agenda(wishes, [], TOTALS, NOW, RULES)
    assert [(wish.need.model, type(verdict)) for wish, verdict in plans] == [("online", Fits), ("batch", Wait)]


def test_a_large_one_that_has_waited_long_keeps_what_is_free_from_small_ones() -> None:
    resident = [holding("busy", 6, busy=True)]
    small = Wish(need(3, "small"))
    for waited, expected in ((19.0, Fits), (20.0, Wait)):
        plans = agenda([Wish(need(8, "large"), waited_seconds=waited), small], resident, TOTALS, NOW, RULES)
        assert isinstance({wish.need.model: verdict for wish, verdict in plans}["small"], expected)


def test_relief_takes_idle_ones_as_few_as_will_do_and_all_where_they_are_not_enough() -> None:
    old, young = holding("old", 2, idle_since=NOW - 400), holding("young", 2, idle_since=NOW - 100)
    online = holding("online", 2, last_online_at=NOW - 5)
    rest = [holding("busy", 2, busy=True), holding("pinned", 2, pinned=True), online]
    assert relief([young, old, *rest], {HOST: 10 * GIB}, NOW, RULES) is None
    assert victims(relief([young, old, *rest], {HOST: 9 * GIB}, NOW, RULES)) == ["old"]
    assert relief([young, replace(old, leaving=True), *rest], {HOST: 9 * GIB}, NOW, RULES) is None
    assert victims(relief([young, old, *rest], {HOST: 1 * GIB}, NOW, RULES)) == ["old", "young"]


HOLDINGS = st.lists(
    st.builds(
        Holding,
        model=st.sampled_from("abcdef"),
        replica_id=st.just(""),
        bytes=st.fixed_dictionaries({HOST: st.integers(0, 6), "gpu0": st.integers(0, 6)}),
        busy=st.booleans(),
        pinned=st.sampled_from([False, False, False, True]),
        awaited=st.booleans(),
        idle_since=st.floats(NOW - 500, NOW),
        loaded_at=st.floats(NOW - 500, NOW),
        reload_seconds=st.floats(0, 60),
        last_online_at=st.none() | st.floats(NOW - 200, NOW),
        leaving=st.booleans(),
        batch_alone=st.booleans(),
    ),
    max_size=7,
).map(lambda rows: [replace(row, replica_id=str(n)) for n, row in enumerate(rows)])
NEEDS = st.builds(
    Need, model=st.just("new"), bytes=st.dictionaries(st.sampled_from([HOST, "gpu0"]), st.integers(0, 10), max_size=2)
)
SMALL = {HOST: 10, "gpu0": 8}


def fits(wanted: Need, residents: list[Holding]) -> bool:
    return all(used(residents, device) + count <= SMALL[device] for device, count in wanted.bytes.items())


@given(NEEDS, HOLDINGS, st.booleans(), st.floats(0, 60))
def test_plans_hold_what_they_promise(
    wanted: Need, residents: list[Holding], for_batch: bool, waited_seconds: float
) -> None:
    decision = plan(wanted, residents, SMALL, NOW, RULES, for_batch=for_batch, waited_seconds=waited_seconds)
    pinned = [one for one in residents if one.pinned and not one.leaving]
    assert isinstance(decision, Fits) == (fits(wanted, residents) and fits(wanted, pinned))
    assert isinstance(decision, Never) == (not fits(wanted, pinned))
    if isinstance(decision, Wait):
        assert decision.until is None or decision.until > NOW
    if not isinstance(decision, Evict | Yield):
        return
    gone = decision.victims
    rest = [one for one in residents if one not in gone and not one.leaving]
    assert fits(wanted, rest)
    for one in gone:  # none of them in vain
        assert not fits(wanted, [*rest, one])
        assert not one.pinned
        assert not one.leaving
        assert not (for_batch and one.last_online_at and NOW - one.last_online_at < 60)
        makes_way = one.batch_alone and not for_batch
        if isinstance(decision, Evict) and not makes_way:
            assert not one.busy
            assert not one.awaited or waited_seconds >= RULES.swap_wait_seconds
    if isinstance(decision, Yield):
        assert waited_seconds >= RULES.swap_wait_seconds
        assert any(one.busy for one in gone)


@given(NEEDS, HOLDINGS, st.booleans(), st.floats(0, 60))
def test_whenever_idle_ones_alone_make_room_they_do(
    wanted: Need, residents: list[Holding], for_batch: bool, waited_seconds: float
) -> None:
    decision = plan(wanted, residents, SMALL, NOW, RULES, for_batch=for_batch, waited_seconds=waited_seconds)
    if not isinstance(decision, Wait):
        return
    staying = [one for one in residents if not one.leaving]
    free_to_go = [
        one
        for one in staying
        if not (one.busy or one.pinned or one.awaited)
        and NOW - one.loaded_at >= RULES.residency_seconds
        and not (for_batch and one.last_online_at and NOW - one.last_online_at < RULES.online_seconds)
    ]
    if fits(wanted, staying):
        return  # it waits for those who are leaving
    for count in range(1, len(free_to_go) + 1):
        for gone in itertools.combinations(free_to_go, count):
            assert not fits(wanted, [one for one in staying if one not in gone])


@given(st.lists(st.tuples(NEEDS, st.booleans(), st.floats(0, 60)), max_size=4), HOLDINGS)
def test_an_agenda_never_promises_more_than_there_is(
    rows: list[tuple[Need, bool, float]], residents: list[Holding]
) -> None:
    wishes = [Wish(wanted, for_batch, waited) for wanted, for_batch, waited in rows]
    plans = agenda(wishes, residents, SMALL, NOW, RULES)
    assert len(plans) == len(wishes)
    told = [one.replica_id for _, verdict in plans if isinstance(verdict, Evict | Yield) for one in verdict.victims]
    assert len(told) == len(set(told))
    now = {device: used(residents, device) for device in SMALL}
    for wish, verdict in plans:
        if isinstance(verdict, Fits):
            for device, count in wish.need.bytes.items():
                now[device] += count
                assert now[device] <= SMALL[device]
