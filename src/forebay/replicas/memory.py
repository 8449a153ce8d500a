"""The ledger of memory: what is held on each device, what the next model needs, and who leaves for it. Pure.

It owns no state, measures nothing and stops nobody: gauge.py measures, the supervisor asks and acts. It refuses to let
go of what is pinned, and to promise the same bytes twice.

A plan is decided in this order:
(1) what is more than the device will ever have: never;
(2) what is free: fits;
(3) what is more than the programs of others leave for now: wait;
(4) what is free once those are gone who are leaving: wait;
(5) those who are idle and whom nobody awaits, the one idle longest first, then the one that is back soonest, and last,
    for somebody online, those who have batch work alone: evict;
(6) after `swap_wait_seconds` those who work or have a line, too, once they have finished what they run: yield;
(7) otherwise: wait, and say for whom.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, log2

HOST = "host"
_GIB = 2**30
_NAMES_MAX = 5

Bytes = Mapping[str, int]
"""Bytes by device: `host`, `gpu0`…"""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the settings `[memory]` say of those who swap."""

    residency_seconds: float
    swap_wait_seconds: float
    online_seconds: float


@dataclass(frozen=True, slots=True)
class Need:
    """What one more replica of `model` will hold."""

    model: str
    bytes: Bytes


@dataclass(frozen=True, slots=True)
class Holding:
    """What one replica holds, from its launch until its process is gone. Times are of one monotonic clock."""

    model: str
    replica_id: str
    bytes: Bytes  # what it is charged with: see `charge`
    busy: bool  # it is starting, or something is in flight on it, paused or not
    pinned: bool
    awaited: bool  # somebody is in line for its model
    idle_since: float  # when it last became idle; when it became ready, if it was never used
    loaded_at: float  # when it became ready
    reload_seconds: float  # how long its next start would take
    last_online_at: float | None  # now, while anything online runs or waits for it; None if there never was any
    leaving: bool = False  # it was told to go, and gets no new work; its bytes are held until its process is gone
    batch_alone: bool = False  # what is in flight on it and in line for it is batch work, which makes way for others


@dataclass(frozen=True, slots=True)
class Wish:
    """A replica that somebody waits for. An `extra` one has a sister that serves already: nobody leaves for it."""

    need: Need
    for_batch: bool = False
    waited_seconds: float = 0.0
    extra: bool = False


@dataclass(frozen=True, slots=True)
class Fits:
    """It can be loaded now."""


@dataclass(frozen=True, slots=True)
class Evict:
    """Stop these, who are idle; ask again when they are gone."""

    victims: tuple[Holding, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Yield:
    """Have these leave once they have finished what they run; ask again when they are gone."""

    victims: tuple[Holding, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask again when something changes, at the latest at `until`, if that is known.

    `promised`: those who are leaving make room for it. `outside`: programs that are not ours would have to, so that
    nothing is kept for it meanwhile.
    """

    reason: str
    until: float | None
    promised: bool = False
    outside: bool = False


@dataclass(frozen=True, slots=True)
class Never:
    """It cannot be loaded beside what is pinned, whoever leaves."""

    reason: str


Plan = Fits | Evict | Yield | Wait | Never


def charge(needed: int, measured: int | None, learned_peak: int | None, *, reserved: bool) -> int:
    """What a replica is charged with on one device: until it has worked, what it was said to need (`reserved`), or more.

    Later what is measured, at least what it is known to come to. Where nothing could be measured, what was needed.
    """
    if measured is None:
        return max(needed, learned_peak or 0)
    return max(measured, needed) if reserved else max(measured, learned_peak or 0)


def used(holdings: Iterable[Holding], device: str) -> int:
    """Bytes of `device` that are held."""
    return sum(holding.bytes.get(device, 0) for holding in holdings)


def agenda(
    wishes: Iterable[Wish],
    holdings: Sequence[Holding],
    totals: Bytes,
    now: float,
    rules: Rules,
    *,
    others: Bytes | None = None,
) -> list[tuple[Wish, Plan]]:
    """Plans for all who wait: online before batch, the longest wait first; none is promised what another was.

    Who has waited for `swap_wait_seconds` keeps what is free from those behind, so that small models cannot starve
    a large one.
    """
    claimed: dict[str, int] = {}
    plans: list[tuple[Wish, Plan]] = []
    for wish in sorted(wishes, key=lambda wish: (wish.extra, wish.for_batch, -wish.waited_seconds)):
        verdict = plan(
            wish.need,
            holdings,
            totals,
            now,
            rules,
            for_batch=wish.for_batch,
            waited_seconds=wish.waited_seconds,
            extra=wish.extra,
            claimed=claimed,
            others=others,
        )
        plans.append((wish, verdict))
        if isinstance(verdict, Evict | Yield):
            holdings = [replace(one, leaving=True) if one in verdict.victims else one for one in holdings]
        patient = wish.waited_seconds >= rules.swap_wait_seconds and not wish.extra
        if isinstance(verdict, Wait):
            kept = verdict.promised or (patient and not verdict.outside)
        else:
            kept = not isinstance(verdict, Never)
        if kept:
            for device, count in wish.need.bytes.items():
                claimed[device] = claimed.get(device, 0) + count
    return plans


def plan(
    need: Need,
    holdings: Sequence[Holding],
    totals: Bytes,
    now: float,
    rules: Rules,
    *,
    for_batch: bool = False,
    waited_seconds: float = 0.0,
    extra: bool = False,
    claimed: Bytes | None = None,
    others: Bytes | None = None,
) -> Plan:
    """What has to happen before `need` can be loaded. `claimed` is what others ahead of it will take.

    `others` is what programs that are not ours hold: it is not in `totals` now, and may be again.

    Ask again at every change. Whom a plan has named leaves, and is `leaving` from then on: no later plan takes it back.
    """
    case = _Case(need, holdings, totals, claimed or {}, now, rules, for_batch, others or {})
    never = case.never()
    if never is not None:
        return Never(never)
    if case.fits_without(()):
        return Fits()
    outside = case.outside()
    if outside is not None:
        return Wait(outside, None, outside=True)
    leaving = tuple(one for one in holdings if one.leaving)
    if case.fits_without(leaving):
        return Wait(f"{need.model} starts when {_names(leaving)} is gone.", None, promised=True)
    if extra:
        return Wait(f"Another replica of {need.model} waits for memory that nobody needs.", None)
    victims = case.fewest([one for one in case.candidates() if case.evictable(one)])
    if victims is not None:
        return Evict(victims, f"{_names(victims)} leaves for {need.model}.")
    if waited_seconds >= rules.swap_wait_seconds:
        victims = case.fewest([one for one in case.candidates() if case.may_yield(one)])
        if victims is not None and any(one.busy for one in victims):
            return Yield(victims, f"{_names(victims)} finishes what it runs and leaves for {need.model}.")
        if victims is not None:
            return Evict(victims, f"{_names(victims)} leaves for {need.model}.")
    return case.wait(waited_seconds)


def relief(holdings: Sequence[Holding], allowed: Bytes, now: float, rules: Rules) -> Evict | None:
    """Who leaves while more is held than is `allowed`: idle ones without online traffic lately, as few as will do.

    Where all of them are not enough they leave nevertheless.
    """
    case = _Case(Need("", dict.fromkeys(allowed, 0)), holdings, allowed, {}, now, rules, for_batch=True)
    gone = [one for one in holdings if one.leaving]
    victims: list[Holding] = []
    for one in case.candidates():
        short = case.short([*gone, *victims])
        if case.evictable(one) and any(one.bytes.get(device) for device in short):
            victims.append(one)
    reason = f"{_names(victims)} leaves: engines hold more than the machine can spare."
    return Evict(tuple(victims), reason) if victims else None


@dataclass(frozen=True, slots=True)
class _Case:
    """One need against one picture of the machine."""

    need: Need
    holdings: Sequence[Holding]
    totals: Bytes
    claimed: Bytes
    now: float
    rules: Rules
    for_batch: bool
    others: Bytes = field(default_factory=dict)

    def never(self) -> str | None:
        """The arithmetic, if no eviction could make room, and no other program."""
        for device, count in self.need.bytes.items():
            if device not in self.totals:
                return f"{self.need.model} needs {size(count)} on {device}, and this machine has no {device}."
            whole = self.totals[device] + self.others.get(device, 0)
            if count + used(self._pinned(device), device) > whole:
                return f"{self._arithmetic(device, whole)}."
        return None

    def outside(self) -> str | None:
        """The arithmetic, if no eviction could make room while other programs hold what they do."""
        for device, count in self.need.bytes.items():
            total, others = self.totals[device], self.others.get(device, 0)
            if others and count + used(self._pinned(device), device) > total:
                text = self._arithmetic(device, total + others)
                return (
                    f"{text}; it waits until other programs, which hold {size(others)} there, give enough of it back."
                )
        return None

    def _arithmetic(self, device: str, whole: int) -> str:
        pinned = self._pinned(device)
        text = f"{self.need.model} needs {size(self.need.bytes[device])} on {device}, which has {size(whole)}"
        held = size(used(pinned, device))
        return f"{text}, of which {held} is held by what is pinned ({_names(pinned)})" if pinned else text

    def _pinned(self, device: str) -> list[Holding]:
        """Those on `device` that stay whatever happens; an operator may have told one to go nevertheless."""
        return [one for one in self.holdings if one.pinned and not one.leaving and one.bytes.get(device)]

    def short(self, gone: Iterable[Holding]) -> list[str]:
        """The devices that lack room for it once `gone` are gone."""
        identities = {one.replica_id for one in gone}
        rest = [one for one in self.holdings if one.replica_id not in identities]
        return [
            device
            for device, count in self.need.bytes.items()
            if used(rest, device) + self.claimed.get(device, 0) + count > self.totals[device]
        ]

    def fits_without(self, gone: Iterable[Holding]) -> bool:
        return not self.short(gone)

    def candidates(self) -> list[Holding]:
        """Who could leave, the one that is missed least first."""
        return sorted(
            (one for one in self.holdings if not (one.pinned or one.leaving or one.model == self.need.model)),
            key=lambda one: (
                one.busy or one.awaited,
                -self._idle_class(one),
                one.reload_seconds,
                one.idle_since,
                one.replica_id,
            ),
        )

    def _idle_class(self, one: Holding) -> int:
        """Idle times within a factor of two count as equal: then the cost of the reload decides."""
        return 0 if one.busy else int(log2(1 + max(0.0, self.now - one.idle_since)))

    def evictable(self, one: Holding) -> bool:
        if one.batch_alone and not self.for_batch:
            return True
        return not (one.busy or one.awaited) and self.obstacle_ends(one) <= self.now

    def may_yield(self, one: Holding) -> bool:
        return self.obstacle_ends(one) <= self.now

    def obstacle_ends(self, one: Holding) -> float:
        """Until when time alone protects it: its shortest stay, and, from batch work, its online traffic."""
        unused = not one.busy and not one.awaited and one.idle_since <= one.loaded_at
        ends = -inf if unused else one.loaded_at + self.rules.residency_seconds
        if self.for_batch and one.last_online_at is not None:
            ends = max(ends, one.last_online_at + self.rules.online_seconds)
        return ends

    def fewest(self, candidates: Sequence[Holding]) -> tuple[Holding, ...] | None:
        """Those of `candidates` who have to leave, none of them in vain; None if all together are not enough."""
        leaving = tuple(one for one in self.holdings if one.leaving)
        victims: list[Holding] = []
        for one in candidates:
            short = self.short((*leaving, *victims))
            if not short:
                break
            if any(one.bytes.get(device) for device in short):
                victims.append(one)
        if self.short((*leaving, *victims)):
            return None
        for one in reversed(victims[:-1]):  # a larger one that came later may do alone
            rest = [other for other in victims if other is not one]
            if self.fits_without((*leaving, *rest)):
                victims = rest
        return tuple(victims)

    def wait(self, waited_seconds: float) -> Wait:
        """Who would have to leave, and why they do not yet."""
        victims = self.fewest(self.candidates()) or ()
        free = ", ".join(
            f"{size(count)} on {device}, of which {size(self._free(device))} is free"
            for device, count in self.need.bytes.items()
        )
        who = "; ".join(f"{one.model} {self._why(one)}" for one in victims[:_NAMES_MAX])
        swap_at = self.now + self.rules.swap_wait_seconds - waited_seconds
        times = [swap_at, *(self.obstacle_ends(one) for one in victims)]
        until = min((time for time in times if time > self.now), default=None)
        leave = f" {_names(victims)} would have to leave: {who}." if victims else " Others ahead of it take the rest."
        return Wait(f"{self.need.model} waits for memory: it needs {free}.{leave}", until)

    def _free(self, device: str) -> int:
        return max(0, self.totals[device] - used(self.holdings, device) - self.claimed.get(device, 0))

    def _why(self, one: Holding) -> str:
        if one.busy:
            return "is at work"
        if one.awaited:
            return "has a line"
        online = self.for_batch and one.last_online_at is not None
        if online and (one.last_online_at or 0.0) + self.rules.online_seconds > self.now:
            return "had online traffic lately"
        return "has just been loaded" if self.obstacle_ends(one) > self.now else "is idle"


def size(count: int) -> str:
    """Bytes for people: GiB with one decimal; MiB for what is less than a tenth of one."""
    return f"{count / _GIB:.1f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.0f} MiB"


def _names(holdings: Sequence[Holding]) -> str:
    names = list(dict.fromkeys(one.model for one in holdings))
    text = ", ".join(names[:_NAMES_MAX])
    return text if len(names) <= _NAMES_MAX else f"{text} and {len(names) - _NAMES_MAX} more"
