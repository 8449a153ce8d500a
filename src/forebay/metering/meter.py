"""What each project may still use: reserved before the work, settled after it, given back where nothing came of it.

It refuses a reservation that could go beyond a quota, and counts in memory alone: what it starts from, and what other
processes use, the books bring it. Between a look and what is taken nothing awaits, so a hundred callers at once get
exactly what is there.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace

from forebay.clock import Clock
from forebay.errors import Overloaded, QuotaExceeded
from forebay.quotas import (
    NOTHING,
    NOUNS,
    Account,
    Amounts,
    Counted,
    Period,
    ProjectLimits,
    Quota,
    Resource,
    Use,
    check_level,
    parts_of,
)

Record = Callable[[Account, Use], None]
Estimate = Callable[[], Amounts]
Aside = Callable[[], AbstractContextManager[None]]
_RETRY_SECONDS_MAX = 60.0  # clients wait no longer
_PATIENCE_SECONDS = 30.0  # that a job keeps its place while others of its project hold what it needs
_AGAIN_SECONDS = 10.0  # after which it may have a place again
_LOOKS_MAX = 3  # at the database, before a request is refused


@dataclass(slots=True)
class _Window:
    """What was used in one day or month: `base` is in the database, `moving` on its way there, `fresh` came after."""

    name: str
    base: Amounts = NOTHING
    moving: Amounts = NOTHING
    fresh: Amounts = NOTHING

    def used(self, resource: Resource) -> int:
        return self.base.of(resource) + self.moving.of(resource) + self.fresh.of(resource)


@dataclass(slots=True)
class _Balance:
    """The windows of one project, and what work under way may come to use.

    Of what is `doubtful` nobody knows whether `base` has it too: it was written into the database beside a look at it, and
    noted afterwards. The next look has it once; it begins with so much in doubt as is `resolving`.
    """

    windows: dict[Period, _Window] = field(default_factory=dict)
    reserved: Amounts = NOTHING
    doubtful: Amounts = NOTHING
    resolving: Amounts = NOTHING
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # there may be more than there was

    def at(self, period: Period, now: float) -> _Window:
        name = period.window(now)
        window = self.windows.get(period)
        if window is None or window.name != name:
            window = self.windows[period] = _Window(name)
        return window


class Reservation:
    """What one piece of work may use until it is settled or released; later calls of either do nothing."""

    def __init__(self, meter: "Meter", account: Account, estimate: Amounts) -> None:
        self._meter = meter
        self.project = account.project
        self.model = account.model  # that of whoever stands in, where somebody does
        self._account = account
        self._estimate = estimate
        self.open = True

    @property
    def account(self) -> Account:
        """On whose account it goes."""
        if self.model == self._account.model:
            return self._account
        return replace(self._account, model=self.model)

    async def raise_to(self, estimate: Estimate) -> None:
        """Reserve more, now that it is known how much it takes. Raises QuotaExceeded and keeps what it had.

        It never becomes less: what a stand-in takes is known in parts, as that of the first model was.
        """
        if self.open and self._meter.counts(self.project):
            amounts = self._estimate.at_least(estimate())
            await self._meter.look(self.project, amounts - self._estimate)
            self._meter.take(self.project, amounts - self._estimate)
            self._estimate = amounts

    async def raise_in_turn(self, estimate: Estimate, aside: Aside = nullcontext) -> None:
        """The same for work that can wait for others of its project. Raises QuotaExceeded, and then has nothing.

        It gives back what it had before it waits: of two who held on to theirs, each would wait for the other.
        """
        try:
            await self.raise_to(estimate)
        except QuotaExceeded:
            before, self._estimate = self._estimate, NOTHING
            amounts = before.at_least(estimate())
            self._meter.give_back(self.project, before)
            await self._meter.take_in_turn(self.project, amounts, aside)
            self._estimate = amounts

    def lower_to(self, use: Use) -> None:
        """So much was used, which is written down later."""
        if self.open and self._estimate != NOTHING:
            self._meter.give_back(self.project, self._estimate - use.amounts)
            self._estimate = use.amounts

    def settle(self, use: Use) -> None:
        """The work is done: write down what it has used, and give the rest back."""
        if self.open:
            self.release()
            self._meter.record(self.account, use)

    def settled_elsewhere(self, use: Use) -> None:
        """The same for what was written into the database together with its result."""
        if self.open:
            self.release()
            self._meter.note_stored(self.project, use.amounts)

    def release(self) -> None:
        """Nothing came of it."""
        if self.open:
            self.open = False
            self._meter.give_back(self.project, self._estimate)


class Meter:
    """The balances of the projects that one process works for, and their shares."""

    def __init__(self, defaults: Sequence[Quota], clock: Clock) -> None:
        self.defaults = tuple(defaults)
        self._clock = clock
        self._limits: Mapping[str, ProjectLimits] = {}
        self._quotas: dict[str, tuple[Quota, ...]] = {}
        self._balances: dict[str, _Balance] = {}
        self._known: set[str] = set()  # whose balances the books have brought
        self._load: Callable[[str], Awaitable[None]] | None = None
        self._record: Record | None = None

    def attach(self, load: Callable[[str], Awaitable[None]], record: Record) -> None:
        """Tell it where balances come from, and who writes down what is used."""
        self._load, self._record = load, record

    # What a project may do.

    def weight(self, project: str) -> float:
        """The share of a project where several want the same; 1 where nobody has said."""
        found = self._limits.get(project)
        return 1.0 if found is None else found.weight

    def quotas(self, project: str) -> tuple[Quota, ...]:
        """The quotas of a project that are in force."""
        quotas = self._quotas.get(project)
        if quotas is None:
            quotas = self._limits.get(project, ProjectLimits()).over(self.defaults)
            self._quotas[project] = quotas
        return quotas

    def counts(self, project: str) -> bool:
        """Whether the project has a quota of a day or a month."""
        return any(quota.period is not None for quota in self.quotas(project))

    def level(self, project: str, resource: Resource) -> int | None:
        """How much there may be at once of stored bytes or of queued lines; None for no bound."""
        return next((quota.limit for quota in self.quotas(project) if quota.resource is resource), None)

    def check_level(self, project: str, resource: Resource, held: int, wanted: int) -> None:
        """Raise QuotaExceeded if `wanted` more beside the `held` are too many; decide it where both cannot change."""
        check_level(resource, self.level(project, resource), held, wanted)

    # What is used.

    async def reserve(self, project: str, key_id: str, model: str, capability: str, estimate: Estimate) -> Reservation:
        """Take what a piece of work may use at most. Raises QuotaExceeded, and StoreUnavailable for a first look.

        `estimate` is asked only where the project has a quota.
        """
        account = Account(project, key_id, model, capability)
        if not self.counts(project):
            return Reservation(self, account, NOTHING)
        amounts = estimate()
        await self.look(project, amounts)
        self.take(project, amounts)
        return Reservation(self, account, amounts)

    async def reserve_in_turn(
        self, project: str, key_id: str, model: str, capability: str, estimate: Estimate, aside: Aside = nullcontext
    ) -> Reservation:
        """The same for work that can wait, as long as others of the project may give back enough of what they hold.

        It is `aside` while it waits, so that nobody else waits for it.
        """
        account = Account(project, key_id, model, capability)
        if not self.counts(project):
            return Reservation(self, account, NOTHING)
        amounts = estimate()
        await self.take_in_turn(project, amounts, aside)
        return Reservation(self, account, amounts)

    def reserve_anyway(self, account: Account, amounts: Amounts) -> Reservation:
        """Take `amounts` whether they are left or not: for what is done already, and counts."""
        self._balance(account.project).reserved += amounts
        return Reservation(self, account, amounts)

    @asynccontextmanager
    async def for_a_while(self) -> AsyncIterator[None]:
        """Bound the wait for others. Raises Overloaded at its end, so that whoever waits leaves its place to others."""
        try:
            async with self._clock.timeout(_PATIENCE_SECONDS):
                yield
        except TimeoutError:
            raise Overloaded(
                "Others of this project have reserved what is left of its quota. Try again later.",
                retry_after_seconds=_AGAIN_SECONDS,
            ) from None

    async def require(self, project: str, least: Amounts) -> None:
        """Raise QuotaExceeded where so much will not be left whatever others give back, and take nothing.

        It is for work that comes before: of what is received nobody knows yet whether it can wait.
        """
        if self.counts(project):
            await self.look(project, least)
            balance = self._balance(project)
            if not self._fits(project, least, balance.reserved + balance.doubtful):
                self._check(project, least)

    def headers(self, project: str) -> dict[str, str]:
        """What is left of each quota, for an answer; of a day's and a month's of one resource that with less."""
        told: dict[Resource, tuple[int, Quota]] = {}
        for quota, left in self._left(project):
            if quota.resource not in told or left < told[quota.resource][0]:
                told[quota.resource] = (left, quota)
        headers: dict[str, str] = {}
        for resource, (left, quota) in told.items():
            name = resource.replace("_", "-")
            headers[f"x-quota-limit-{name}"] = str(quota.limit)
            headers[f"x-quota-remaining-{name}"] = str(max(0, left) // parts_of(resource))
            headers[f"x-quota-reset-{name}"] = f"{self._seconds_left(quota)}s"
        return headers

    async def look(self, project: str, amounts: Amounts) -> None:
        """Have the books bring what is not known, and what is in doubt if `amounts` would be refused for that alone."""
        if project not in self._known and self._load is not None:
            await self._load(project)
        for _ in range(_LOOKS_MAX):
            doubtful = self._balance(project).doubtful
            if doubtful == NOTHING or self._load is None:
                return
            if self._fits(project, amounts) or not self._fits(project, amounts, doubtful):
                return
            await self._load(project)

    async def take_in_turn(self, project: str, amounts: Amounts, aside: Aside | None) -> None:
        """Reserve `amounts` as soon as they are there. Raises QuotaExceeded once they would not be whatever others do.

        Every fold wakes whoever waits as well: others of the database may have used what it waits for.
        """
        with ExitStack() as waiting:
            while True:
                await self.look(project, amounts)
                try:
                    self.take(project, amounts)
                    return
                except QuotaExceeded:
                    balance = self._balance(project)
                    if not self._fits(project, amounts, balance.reserved + balance.doubtful):
                        raise
                if aside is not None:
                    waiting.enter_context(aside())
                    aside = None
                balance.changed.clear()
                await balance.changed.wait()

    def take(self, project: str, amounts: Amounts) -> None:
        """Reserve `amounts`. Raises QuotaExceeded and takes nothing if they could go beyond a quota."""
        self._check(project, amounts)
        balance = self._balance(project)
        balance.reserved += amounts

    def give_back(self, project: str, amounts: Amounts) -> None:
        """What was reserved is free again."""
        balance = self._balance(project)
        balance.reserved -= amounts
        balance.changed.set()

    def record(self, account: Account, use: Use) -> None:
        """Count what was used and have it written down."""
        if self._record is not None:
            self._record(account, use)
        self._note(account.project, use.amounts)

    def note_stored(self, project: str, amounts: Amounts) -> None:
        """Count what is in the database already; if it is not, that is forgotten with the next look."""
        if self.counts(project):
            self._note(project, amounts)
            self._balance(project).doubtful += amounts

    # What the books bring.

    def set_limits(self, limits: Mapping[str, ProjectLimits]) -> None:
        """The limits of all projects that have some of their own."""
        before, self._limits = self._limits, limits
        for project in {*before, *limits}:
            if before.get(project) != limits.get(project):
                counted = self.counts(project) if project in self._quotas else False
                self._quotas.pop(project, None)
                if not counted:  # nothing was, so nobody knows
                    self._known.discard(project)
                if project in self._balances:
                    self._balances[project].changed.set()

    def watched(self) -> list[str]:
        """The projects whose balances have to be kept up to date."""
        return sorted(project for project in self._balances if self.counts(project))

    def begin_fold(self) -> None:
        """What is noted up to now will be in what `counted` brings, or `fold_failed` is told."""
        for window in self._every_window():
            window.moving += window.fresh
            window.fresh = NOTHING
        for balance in self._balances.values():
            balance.resolving = balance.doubtful

    def counted(self, found: Mapping[str, Counted]) -> None:
        """What the database holds by now, everything that was moving included."""
        now = self._clock.now()
        for project, counted in found.items():
            balance = self._balance(project)
            balance.doubtful, balance.resolving = balance.doubtful - balance.resolving, NOTHING
            for period, name, base in (
                (Period.DAY, counted.day, counted.of_day),
                (Period.MONTH, counted.month, counted.of_month),
            ):
                window = balance.at(period, now)
                if window.name == name:
                    window.base, window.moving = base, NOTHING
            self._known.add(project)
            balance.changed.set()

    def fold_failed(self) -> None:
        """Nobody knows what the database holds; what was moving counts on."""
        for window in self._every_window():
            window.fresh += window.moving
            window.moving = NOTHING

    # The inside.

    def _note(self, project: str, amounts: Amounts) -> None:
        if self.counts(project):
            for window in self._windows(project):
                window.fresh += amounts

    def _check(self, project: str, amounts: Amounts) -> None:
        for quota, left in self._left(project):
            if amounts.of(quota.resource) > max(0, left):
                raise self._exceeded(project, quota, amounts)

    def _fits(self, project: str, amounts: Amounts, further: Amounts = NOTHING) -> bool:
        """Whether `amounts` would be there if `further` were, too."""
        return all(
            amounts.of(quota.resource) <= max(0, left + further.of(quota.resource))
            for quota, left in self._left(project)
        )

    def _balance(self, project: str) -> _Balance:
        return self._balances.setdefault(project, _Balance())

    def _windows(self, project: str) -> Iterator[_Window]:
        now = self._clock.now()
        for period in Period:
            yield self._balance(project).at(period, now)

    def _every_window(self) -> Iterator[_Window]:
        for balance in self._balances.values():
            yield from balance.windows.values()

    def _left(self, project: str) -> Iterator[tuple[Quota, int]]:
        if not self.counts(project):
            return
        now, balance = self._clock.now(), self._balance(project)
        for quota in self.quotas(project):
            if quota.period is not None:
                taken = balance.at(quota.period, now).used(quota.resource) + balance.reserved.of(quota.resource)
                yield quota, (quota.parts or 0) - taken

    def _seconds_left(self, quota: Quota) -> int:
        assert quota.period is not None, "levels are in no header"
        now = self._clock.now()
        return math.ceil(quota.period.ends_at(now) - now)

    def _exceeded(self, project: str, quota: Quota, wanted: Amounts) -> QuotaExceeded:
        parts, noun = parts_of(quota.resource), NOUNS[quota.resource]
        seconds = self._seconds_left(quota)
        needed = math.ceil(wanted.of(quota.resource) / parts)
        error = QuotaExceeded(
            f"This project may use {quota.limit} {noun} in a {quota.period}, and what is left is less than the {needed} that"
            f" this may take. Ask for less, wait for the next {quota.period}, or ask the operator for more.",
            retry_after_seconds=seconds if seconds <= _RETRY_SECONDS_MAX else None,
        )
        error.headers = self.headers(project)
        return error
