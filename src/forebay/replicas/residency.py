"""Which models are in memory: who starts, who waits, who leaves for whom, and who leaves because nobody asks.

The ledger (memory.py) decides; this keeps the times that it asks for and carries out what it says. It refuses to start
what has no room, and to stop what works: whoever has to leave finishes what it runs, and keeps its line.

The memory of a model is reserved from the decision to start it until its last process is gone. Between a death and the
next start it stays reserved, but its model is the first to leave for another.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Protocol

from forebay.clock import Clock
from forebay.errors import SetupError
from forebay.replicas.commands import device_of
from forebay.replicas.keeper import Keeper
from forebay.replicas.memory import (
    HOST,
    Bytes,
    Evict,
    Fits,
    Holding,
    Need,
    Never,
    Plan,
    Rules,
    Wish,
    Yield,
    agenda,
    plan,
    relief,
)
from forebay.replicas.record import ModelRecord
from forebay.server_config import MemorySettings
from forebay.telemetry import Log, Metrics

_LINE_GAP_SECONDS = 5.0  # between one who gives up waiting and the next who comes for the same
_CLAIM_SECONDS = 30.0  # how long a model is kept in mind that somebody has announced and nobody has asked for since


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the hallway has for one model. Times are monotonic.

    `online` and `batch` wait in line, the oldest since then; `online_on` and `batch_on` are the replicas that work for
    them. `last_online_at` and `last_at` are now while there is anything, otherwise when it ended; None if there was none.
    """

    online: int = 0
    batch: int = 0
    oldest_online_at: float | None = None
    oldest_batch_at: float | None = None
    last_online_at: float | None = None
    last_at: float | None = None
    online_on: frozenset[str] = frozenset()
    batch_on: frozenset[str] = frozenset()

    @property
    def any(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.online or self.batch or self.online_on or self.batch_on)


class Books(Protocol):
    """What is known of memory: the machine's, and what models take of it."""

    def totals(self) -> Bytes:
        """What engines may take in all, by device."""
        ...

    def others(self) -> Bytes:
        """What the programs of others hold of what engines could take, by device: it is not in the totals."""
        ...

    def allowed(self) -> Bytes:
        """What engines may hold now: less than in all while the machine has too little left for all the rest."""
        ...

    def need(self, model: str) -> Bytes:
        """What one more replica of `model` will take."""
        ...

    def least(self, model: str) -> Bytes:
        """What a replica of `model` is sure to take, whatever was learned of it."""
        ...

    def held(self, model: str, keeper: Keeper) -> Bytes:
        """What a replica is charged with now."""
        ...

    def may_sleep(self, model: str, beside: Bytes) -> bool:
        """Whether the host has room for what a replica of `model` takes there when it sleeps, and for `beside`."""
        ...

    def closed(self) -> str | None:
        """Why nothing may be loaded now, if so."""
        ...

    def measured_at(self) -> float:
        """When engines were last measured."""
        ...

    def out_of_memory(self, model: str) -> None:
        """An engine of `model` found no memory."""
        ...


class Residency:
    """The models that are in memory, and those that wait for it. Used by the supervisor alone, on one event loop."""

    def __init__(self, books: Books, settings: MemorySettings, clock: Clock, metrics: Metrics, log: Log) -> None:
        self.demand: Callable[[str], Wanted] = lambda _model: Wanted()
        self.on_leave: Callable[[str], None] = lambda _model: None  # it leaves for somebody online
        self.on_verdict: Callable[[str], None] = lambda _model: None  # it waits for memory, or no longer, or is refused
        self._books = books
        self._rules = Rules(settings.residency_seconds, settings.swap_wait_seconds, settings.online_seconds)
        self._batch_delay_seconds = max(0.0, settings.batch_wait_seconds - settings.swap_wait_seconds)
        self._clock = clock
        self._metrics = metrics
        self._log = log

    def review(self, records: Sequence[ModelRecord], present: Callable[[ModelRecord], bool]) -> list[ModelRecord]:
        """Let go of what nobody asks for; of the models that lack replicas, those that may start one now."""
        now = self._clock.monotonic()
        wanted = {record.name: self.demand(record.name) for record in records}
        for record in records:
            if any(keeper.ready_at is not None and not keeper.leaving for keeper in record.keepers):
                record.ordered_at = None
            self._forget(record, wanted[record.name], now)
            self._rest(record, wanted[record.name], now)
            self._note_line(record, wanted[record.name], now)
        self._relieve(records, wanted, now)
        lacking = {record.name: record for record in records if record.missing > 0 and present(record)}
        if not lacking:
            return []
        closed = self._books.closed()
        if closed is not None:
            for record in lacking.values():
                self._wait(record, closed)
            lacking = {name: record for name, record in lacking.items() if not self._books.need(name)}
        wishes = [wish for record in lacking.values() for wish in self._wishes(record, wanted[record.name], now)]
        holdings = self._holdings(records, wanted, now)
        starts = []
        for wish, verdict in self._agenda(wishes, holdings, now):
            record = lacking[wish.need.model]
            if isinstance(verdict, Fits):
                self._start(record)
                starts.append(record)
            elif isinstance(verdict, Never) and not wish.extra:
                self._refuse(record, verdict.reason)
            elif not wish.extra:
                self._wait(record, verdict.reason)
                self._act(wish, verdict, records, wanted, now)
        return starts

    def refusal(self, record: ModelRecord, records: Sequence[ModelRecord], *, least: bool = False) -> str | None:
        """The arithmetic, if there will be no memory for `record` whoever leaves; of all the `least` if so asked."""
        if record.keepers:
            return None
        now = self._clock.monotonic()
        need = Need(record.name, (self._books.least if least else self._books.need)(record.name))
        if not need.bytes:
            return None
        holdings = self._holdings(records, {each.name: Wanted() for each in records}, now)
        if least:
            holdings = [replace(one, bytes=self._books.least(one.model)) for one in holdings]
        verdict = plan(need, holdings, self._books.totals(), now, self._rules, others=self._books.others())
        return verdict.reason if isinstance(verdict, Never) else None

    def check_together(self, records: Sequence[ModelRecord]) -> None:
        """Raise SetupError if `records`, which are loaded at the start, cannot all be in memory at once.

        What was learned alone is no reason for that, or a server that has run would not start again: they take turns.
        """
        crowded = self._crowded(records, self._books.least)
        if crowded is not None:
            name, reason = crowded
            raise SetupError(
                f"The models that are loaded at the start do not fit into memory together: {reason} "
                f"Take `preload` from {name} or another, lower `replicas`, or give engines more with "
                "`memory.host_bytes`."
            )
        crowded = self._crowded(records, self._books.need)
        if crowded is not None:
            self._log.warning("memory.crowded", model=crowded[0], reason=crowded[1])

    def give_way(self, record: ModelRecord, reason: str) -> None:
        """Do without a model at the start for which what is pinned has left no room."""
        self._refuse(record, reason)
        record.swapped = True

    def _crowded(self, records: Iterable[ModelRecord], takes: Callable[[str], Bytes]) -> tuple[str, str] | None:
        """The first of `records` that has no room beside those before it if each `takes` that, and the arithmetic."""
        totals, others = self._books.totals(), self._books.others()
        held: list[Holding] = []
        for record in records:
            for number in range(record.settings.processes):
                need = Need(record.name, takes(record.name))
                verdict = plan(need, held, totals, 0.0, self._rules, others=others)
                if isinstance(verdict, Never):
                    return record.name, verdict.reason
                held.append(_pinned(need, f"{record.name} {number}"))
        return None

    # What waits.

    def _agenda(self, wishes: list[Wish], holdings: list[Holding], now: float) -> list[tuple[Wish, Plan]]:
        return agenda(wishes, holdings, self._books.totals(), now, self._rules, others=self._books.others())

    def _wishes(self, record: ModelRecord, wanted: Wanted, now: float) -> list[Wish]:
        """One for each replica that is missing; for all but its first one nobody leaves. Those that sleep come first."""
        needs = [Need(record.name, count) for count in self._to_come(record)]
        need, extra = needs[0], [Wish(each, for_batch=True, extra=True) for each in needs]
        if record.awake:
            return extra
        # Nobody leaves for callers who have gone, although those who come after them need not wait anew.
        awaited_since = record.awaited_since if wanted.oldest_online_at is not None else None
        times = (record.ordered_at, wanted.oldest_online_at, awaited_since)
        asked = [time for time in times if time is not None]
        if asked:
            first = Wish(need, waited_seconds=now - max(min(asked), record.left_at))
        elif wanted.oldest_batch_at is not None:
            waited = now - max(wanted.oldest_batch_at, record.left_at) - self._batch_delay_seconds
            first = Wish(need, for_batch=True, waited_seconds=max(0.0, waited))
        else:
            first = Wish(need, for_batch=True)
        return [first, *extra[1:]]

    def _note_line(self, record: ModelRecord, wanted: Wanted, now: float) -> None:
        """Since when it is waited for: the bound is on that, or callers who give up and come again would never be served."""
        if record.waiting is not None and wanted.oldest_online_at is not None:
            record.awaited_since = min(wanted.oldest_online_at, record.awaited_since or inf)
            record.awaited_at = now
        elif record.waiting is None or now - record.awaited_at > _LINE_GAP_SECONDS:
            record.awaited_since = None

    def _to_come(self, record: ModelRecord) -> list[Bytes]:
        """What each replica that is missing will take beside what it has: one that sleeps is there in part."""
        need = self._books.need(record.name)
        there = [self._books.held(record.name, asleep) for asleep in record.sleepers[: record.missing]]
        there += [{}] * (record.missing - len(there))
        return [{device: max(0, count - held.get(device, 0)) for device, count in need.items()} for held in there]

    def _wait(self, record: ModelRecord, reason: str) -> None:
        if record.awake or not self._books.need(record.name):
            return
        begins, record.waiting = record.waiting is None, reason
        if begins:
            self._log.info("model.waiting", model=record.name, reason=reason)
            self.on_verdict(record.name)

    def _start(self, record: ModelRecord) -> None:
        waited, record.waiting, record.ordered_at = record.waiting is not None, None, None
        if waited:
            self.on_verdict(record.name)

    def _refuse(self, record: ModelRecord, reason: str) -> None:
        if record.waiting != reason:  # told once, however often somebody asks
            self._log.warning("model.refused", model=record.name, reason=reason)
        record.refuse(reason)
        self.on_verdict(record.name)

    def _forget(self, record: ModelRecord, wanted: Wanted, now: float) -> None:
        """Let go of a model that was announced, waits for memory, and is asked for by nobody."""
        idle = record.ordered_at is None and not wanted.any and now - record.asked_at > _CLAIM_SECONDS
        if record.wanted and record.waiting is not None and not record.awake and idle:
            record.let_go()

    # What leaves.

    def _act(
        self, wish: Wish, verdict: Plan, records: Iterable[ModelRecord], wanted: dict[str, Wanted], now: float
    ) -> None:
        if not isinstance(verdict, Evict | Yield):
            return
        leaving = {victim.replica_id for victim in verdict.victims}
        for record in records:
            going = [keeper for keeper in record.keepers if keeper.id in leaving]
            if going:
                self._metrics.swaps.labels(record.name).inc()
                self._log.info("model.swapped", model=record.name, reason=verdict.reason)
                self._leave(record, going, wanted[record.name], now, wish.need)
                if not wish.for_batch:
                    self.on_leave(record.name)

    def _relieve(self, records: Sequence[ModelRecord], wanted: dict[str, Wanted], now: float) -> None:
        """Have idle models leave while engines hold more than they may: they have grown, or others want the memory."""
        allowed = self._books.allowed()
        verdict = relief(self._holdings(records, wanted, now), allowed, now, self._rules)
        if verdict is not None:
            wish = Wish(Need("", dict.fromkeys(allowed, 0)), for_batch=True)
            self._act(wish, verdict, records, wanted, now)

    def _rest(self, record: ModelRecord, wanted: Wanted, now: float) -> None:
        """Unload a model that nobody has asked for as long as its settings say."""
        seconds = record.settings.idle_unload_seconds
        if seconds is None or not record.wanted or not record.awake or wanted.any:
            return
        times = [keeper.ready_at for keeper in record.awake]
        last = max(wanted.last_at or -inf, record.asked_at, *(inf if time is None else time for time in times))
        if now - last >= seconds:
            self._log.info("model.idle", model=record.name, idle_seconds=round(now - last, 1))
            self._leave(record, record.keepers, wanted, now)

    def _leave(
        self, record: ModelRecord, going: Sequence[Keeper], wanted: Wanted, now: float, need: Need | None = None
    ) -> None:
        """Stop these once they have finished what they run. A model with a line stays wanted: it comes back.

        Those of whom `need` wants what they give back by sleeping do that.
        """
        record.left_at, record.swapped = now, True
        staying = [keeper for keeper in record.awake if not keeper.leaving and keeper not in going]
        if not (wanted.online or wanted.batch or staying):
            record.let_go()
        for keeper in going:
            (keeper.ask_sleep if need is not None and self._may_sleep(record, keeper, need) else keeper.ask_stop)()

    def _may_sleep(self, record: ModelRecord, keeper: Keeper, need: Need) -> bool:
        device = device_of(record.settings)
        gives = keeper.sleep_level > 0 and need.bytes.get(HOST if device == "cpu" else device, 0) > 0
        return gives and self._books.may_sleep(record.name, need.bytes)

    # What is held.

    def _holdings(self, records: Iterable[ModelRecord], wanted: dict[str, Wanted], now: float) -> list[Holding]:
        return [
            self._holding(record, keeper, wanted[record.name], now) for record in records for keeper in record.keepers
        ]

    def _holding(self, record: ModelRecord, keeper: Keeper, wanted: Wanted, now: float) -> Holding:
        replica = keeper.replica
        name = replica.id if replica is not None else ""
        online, running = name in wanted.online_on, name in wanted.online_on | wanted.batch_on
        due = keeper.hopeful and keeper.retry_at_epoch is None  # one that waits out its back-off keeps nobody waiting
        starting = keeper.ready_at is None and keeper.asleep_at is None and due
        # What one that has just fallen asleep gives back is known when it is measured again.
        settling = keeper.asleep_at is not None and keeper.asleep_at >= self._books.measured_at()
        busy = starting or running or not (replica is None or replica.idle.is_set())
        awaited = keeper.hopeful and bool(wanted.online or wanted.batch)
        ready_at = keeper.ready_at if keeper.ready_at is not None else now if starting else -inf
        return Holding(
            record.name,
            keeper.id,
            self._books.held(record.name, keeper),
            busy=busy,
            pinned=record.settings.pinned,
            awaited=awaited,
            idle_since=now if busy else max(0.0, ready_at, wanted.last_at or 0.0),
            loaded_at=ready_at,
            reload_seconds=keeper.load_seconds,
            last_online_at=now if online or wanted.online else wanted.last_online_at,
            leaving=keeper.leaving or settling,
            batch_alone=not (starting or online or wanted.online) and (running or awaited),
        )


def _pinned(need: Need, name: str) -> Holding:
    return Holding(
        need.model,
        name,
        need.bytes,
        busy=False,
        pinned=True,
        awaited=False,
        idle_since=0.0,
        loaded_at=0.0,
        reload_seconds=0.0,
        last_online_at=None,
    )
