"""The books of one process: what is used goes into its journal at once, and from there into the database every second.

Each record is counted once, whatever ends the process and whenever: one transaction adds up what a journal holds and notes
how far that was. It refuses to fail an answer because nothing can be written down: what finds no room in the journal
waits in memory for the database.
"""

import asyncio
from collections import defaultdict
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from forebay.clock import Clock, new_token
from forebay.commit_points import reach
from forebay.errors import InsufficientStorage, ServerError, SetupError, StoreUnavailable
from forebay.metering.journal import Entry, Journal, Reading, abandoned, journals, read, remove_drafts
from forebay.metering.meter import Meter
from forebay.quotas import Account, Use, day_of
from forebay.server_config import UsageSettings
from forebay.store.projects import ProjectStore
from forebay.store.usage import Fold, UsageStore
from forebay.telemetry import Log

_SWEEP_SECONDS = 60.0
_DRAFT_SECONDS = 3600.0
_NAME_BYTES = 9

Totals = dict[tuple[str, Account], Use]
_AWAY = (StoreUnavailable, InsufficientStorage)


@dataclass(slots=True)
class _Page:
    """A journal, what of it is in no transaction yet, and what was handed to one whose end is not known."""

    journal: Journal
    totals: Totals = field(default_factory=lambda: defaultdict(Use))
    frozen: Fold | None = None
    folds: int = 0

    def freeze(self) -> None:
        """Set aside what is to be folded, while what comes next is added up anew."""
        assert self.frozen is None, "what was tried before goes first, as it was"
        if self.totals:
            self.folds += 1
            self.frozen = Fold(self.journal.name, self.folds, self.journal.size, dict(self.totals))
            self.totals.clear()

    @property
    def folded(self) -> bool:
        """Whether all of it is in the database."""
        return self.frozen is None and not self.totals


class Books:
    """Writes down what is used, and brings the meter what there is to know."""

    def __init__(
        self,
        usage: UsageStore,
        projects: ProjectStore,
        meter: Meter,
        folder: Path,
        node: str,
        settings: UsageSettings,
        clock: Clock,
    ) -> None:
        self._usage = usage
        self._projects = projects
        self._meter = meter
        self._folder = folder
        self._node = node
        self._settings = settings
        self._clock = clock
        self._log = Log()
        self._turn = asyncio.Lock()
        self._page: _Page | None = None
        self._full: _Page | None = None  # the one before, until all of it is in the database
        self._in_trouble = False
        self._begun = self._ended = 0  # folds
        self._failure: ServerError | None = None  # why the one that ended last came to nothing
        self._asked: set[str] = set()  # projects that somebody waits to know about
        meter.attach(self.load, self.record)

    async def open(self) -> None:
        """Fold what dead processes have left, and begin a journal. Raises SetupError and StoreUnavailable."""
        await self._sweep()
        await self._usage.forget_missing(self._node, await asyncio.to_thread(self._names))
        self._page = _Page(await asyncio.to_thread(self._new_journal))
        await self._fold()

    async def run(self) -> None:
        """Fold every so often, until cancelled."""
        swept_at, away = self._clock.monotonic(), False
        while True:
            await self._clock.sleep(self._settings.fold_seconds)
            try:
                await self._fold()
                if self._clock.monotonic() > swept_at + _SWEEP_SECONDS:
                    swept_at = self._clock.monotonic()
                    await self._sweep()
            except (*_AWAY, OSError) as error:
                if not away:
                    self._log.warning("usage.fold_failed", reason=str(error))
                away = True
            else:
                away = False

    async def close(self) -> None:
        """Fold what is left; what cannot be folded now is by the next process."""
        with suppress(*_AWAY):
            await self._fold()
            await self._retire_full()
        page, self._page = self._page, None
        for each in filter(None, (page, self._full)):
            each.journal.close(remove=each.folded)
            if each.folded:
                with suppress(*_AWAY):
                    await self._usage.forget(each.journal.name)

    def record(self, account: Account, use: Use) -> None:
        """Write down what was used; nothing awaits, and it is done when this returns."""
        page = self._page
        if page is None:
            return  # the process ends
        entry = Entry(day_of(self._clock.now()), account, use)
        try:
            page.journal.append(entry)
            self._in_trouble = False
        except OSError as error:
            if not self._in_trouble:
                self._log.warning("usage.journal_failed", reason=error.strerror or str(error))
            self._in_trouble = True
        page.totals[entry.day, account] += use
        reach("usage.journaled")

    async def refresh(self) -> None:
        """Bring the meter what is set by now. Raises StoreUnavailable and InsufficientStorage."""
        await self._fold()

    async def load(self, project: str) -> None:
        """Bring the meter what a project has used. Raises StoreUnavailable and InsufficientStorage."""
        await self._fold(project)

    # The inside.

    async def _fold(self, *projects: str) -> None:
        """Bring everything that is written down by now into the database, and what it holds to the meter.

        A fold that begins now is for all who have asked by now, and so is its failure.
        """
        before = self._begun
        self._asked.update(projects)
        async with self._turn:
            if self._ended <= before:
                await self._fold_for_all()
            elif self._failure is not None:
                raise self._failure

    async def _fold_for_all(self) -> None:
        self._begun += 1
        asked, self._asked = self._asked, set()
        try:
            await self._fold_frozen()
            self._turn_page()
            await self._fold_pages(asked)
            self._ended, self._failure = self._begun, None
        except ServerError as error:
            self._ended, self._failure = self._begun, error
            raise
        finally:
            if self._ended < self._begun:  # cancelled: whoever comes next does it for the others
                self._asked |= asked
        await self._retire_full()

    async def _fold_pages(self, asked: set[str]) -> None:
        now = self._clock.now()
        # Nothing awaits in between: what the meter sets aside is what the pages do.
        self._meter.begin_fold()
        for page in self._pages:
            page.freeze()
        try:
            await self._fold_frozen()
            watched = sorted({*self._meter.watched(), *asked})
            counted = await self._usage.counted(watched, day_of(now)) if watched else {}
            limits = await self._projects.limits()
        except ServerError:
            self._meter.fold_failed()
            raise
        self._meter.set_limits(limits)
        self._meter.counted(counted)

    @property
    def _pages(self) -> list[_Page]:
        return [page for page in (self._full, self._page) if page is not None]

    async def _fold_frozen(self) -> None:
        for page in self._pages:
            if page.frozen is not None:
                await self._usage.fold(self._node, page.frozen)
                page.frozen = None
                reach("usage.folded")

    def _turn_page(self) -> None:
        """Begin a new journal where this one is long enough and the one before is done with.

        Nothing awaits: a journal that a cancelled caller has begun would be in nobody's hands, and locked.
        """
        page = self._page
        if page is None or self._full is not None or page.journal.size <= self._settings.journal_bytes_max:
            return
        with suppress(SetupError):  # then this one goes on
            self._page, self._full = _Page(self._new_journal()), page

    async def _retire_full(self) -> None:
        if self._full is not None and self._full.folded:
            full, self._full = self._full, None
            full.journal.close(remove=True)
            reach("usage.journal_removed")
            await self._usage.forget(full.journal.name)

    async def _sweep(self) -> None:
        """Fold the journals of dead processes and remove them."""
        for path in await asyncio.to_thread(lambda: journals(self._folder)):
            with abandoned(path) as free:
                if free:
                    await self._fold_abandoned(path)
        await asyncio.to_thread(remove_drafts, self._folder, self._clock.now() - _DRAFT_SECONDS)

    async def _fold_abandoned(self, path: Path) -> None:
        folds, offset = await self._usage.place(path.stem)
        while (reading := await asyncio.to_thread(read, path, offset)).entries:
            known = await self._usage.project_names({entry.account.project for entry in reading.entries})
            if unknown := [entry for entry in reading.entries if entry.account.project not in known]:
                # The database is older than the journal, or another one.
                self._log.warning("usage.unknown_project", records=len(unknown))
            folds, offset = folds + 1, reading.end
            await self._usage.fold(self._node, Fold(path.stem, folds, offset, _added_up(reading, known)))
        reach("usage.left_folded")
        if reading.rest:
            self._log.warning("usage.torn", bytes=reading.rest)
        await asyncio.to_thread(path.unlink)
        await self._usage.forget(path.stem)

    def _new_journal(self) -> Journal:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return Journal.create(self._folder, f"{self._node}.{new_token(_NAME_BYTES)}")
        except OSError as error:
            raise SetupError(f"No journal of usage can be begun in {self._folder}: {error.strerror}.") from None

    def _names(self) -> set[str]:
        return {path.stem for path in journals(self._folder)}


def _added_up(reading: Reading, projects: Container[str]) -> Totals:
    totals: Totals = defaultdict(Use)
    for entry in reading.entries:
        if entry.account.project in projects:
            totals[entry.day, entry.account] += entry.use
    return dict(totals)
