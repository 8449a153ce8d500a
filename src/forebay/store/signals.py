"""Waking those who wait for news: an event for each listener, set when a transaction with news for it has committed.

It refuses to carry the news themselves: whoever is woken looks into the database. A wake may come without news.
"""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

_CHANNEL = "forebay"  # one for all of ours: the payload names the channel, so that one LISTEN is enough
_NOTIFY = sa.text(f"SELECT pg_notify('{_CHANNEL}', :channel)")
_PROBE_SECONDS = 20  # a connection that a network has silently dropped is noticed after this long
_BACKOFF_SECONDS_MIN, _BACKOFF_SECONDS_MAX = 0.05, 2.0


class Signals:
    """The listeners of this process."""

    def __init__(self) -> None:
        self._listeners: dict[str, set[asyncio.Event]] = {}

    @contextmanager
    def listen(self, channel: str) -> Iterator[asyncio.Event]:
        """An event that is set at each wake of `channel`; whoever waits for it clears it."""
        event = asyncio.Event()
        self._listeners.setdefault(channel, set()).add(event)
        try:
            yield event
        finally:
            listeners = self._listeners[channel]
            listeners.discard(event)
            if not listeners:
                del self._listeners[channel]

    def wake(self, channels: Iterable[str]) -> None:
        """Set the events of those who listen to one of `channels`."""
        for channel in channels:
            for event in self._listeners.get(channel, ()):
                event.set()

    def wake_all(self) -> None:
        """Set every event, where something may have been missed."""
        self.wake(list(self._listeners))


def tell_others(connection: sa.Connection, channels: Iterable[str]) -> None:
    """Have PostgreSQL tell every process when the transaction commits."""
    for channel in sorted(channels):
        connection.execute(_NOTIFY, {"channel": channel})


class PostgresEar:
    """One LISTEN connection that brings what other processes tell, and comes back by itself when it is lost."""

    def __init__(self, engine: AsyncEngine, signals: Signals, driver_errors: tuple[type[Exception], ...]) -> None:
        self._engine = engine  # opens a connection of its own each time
        self._signals = signals
        self._lost: tuple[type[Exception], ...] = (SQLAlchemyError, OSError, TimeoutError, *driver_errors)

    async def run(self) -> None:
        """Listen until cancelled."""
        backoff = _BACKOFF_SECONDS_MIN
        while True:
            try:
                async with self._engine.connect() as connection:
                    raw = await connection.get_raw_connection()
                    ended = asyncio.Event()
                    driver = raw.driver_connection
                    assert driver is not None
                    driver.add_termination_listener(lambda _, ended=ended: ended.set())
                    await driver.add_listener(_CHANNEL, lambda _c, _p, _n, channel: self._signals.wake([channel]))
                    self._signals.wake_all()
                    backoff = _BACKOFF_SECONDS_MIN
                    await self._until(ended, driver)
            except self._lost:
                pass  # it is away; the next round tries again
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, _BACKOFF_SECONDS_MAX)

    async def _until(self, ended: asyncio.Event, driver: Any) -> None:
        """Return when the connection has ended, or raise when it no longer answers."""
        while not ended.is_set():
            try:
                async with asyncio.timeout(_PROBE_SECONDS):
                    await ended.wait()
            except TimeoutError:
                await driver.execute("SELECT 1", timeout=_PROBE_SECONDS)
