"""Following a job on a terminal until it ends: a bar with how far it is and the time left, or a line for each state in a log.

It refuses to give up because a connection broke off: the job is looked for again for a while.
"""

from contextlib import AbstractContextManager, aclosing
from typing import Any, Protocol

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from forebay.cli.api_client import ApiClient, NotNow, path_of
from forebay.clock import Clock, SystemClock
from forebay.errors import SetupError

_AGAIN_SECONDS = 1.0
_TRIES_MAX = 120  # in a row without news
_BY_SHARE = {"transcription"}  # kinds of job whose counts are shares of all the work
_PHASES = {"available": "in line", "queued": "in line", "run": "running", "join": "finishing"}


class View(AbstractContextManager[Any], Protocol):
    """Where progress is shown while its block lasts."""

    def show(self, job: dict[str, Any]) -> None:
        """Tell what is known of the job now."""
        ...

    def show_bytes(self, phase: str, sent: int, size: int) -> None:
        """Tell how much of a file is on its way."""
        ...

    def show_steps(self, phase: str, step: int, steps: int) -> None:
        """Tell how many of its steps are done."""
        ...


def view_of(name: str = "") -> View:
    """A bar on a terminal, otherwise lines. `name` is what several of them differ in."""
    console = Console(stderr=True)
    before = f"{name}: " if name else ""
    return _Bar(console, before) if console.is_terminal and not console.is_dumb_terminal else _Lines(before)


async def follow(client: ApiClient, job_id: str) -> dict[str, Any]:
    """Show the job until it is done; the job as it ended. Raises SetupError."""
    view = view_of()
    with view:
        return await show_until_done(client, job_id, view)


async def show_until_done(client: ApiClient, job_id: str, view: View, clock: Clock = SystemClock()) -> dict[str, Any]:
    """The same in a view that is open."""
    tries = 0
    while True:
        try:
            async with aclosing(client.events(path_of("jobs", job_id, "events"))) as events:
                async for event in events:
                    tries = 0
                    if event["event"] == "error":
                        raise SetupError(str(event["data"].get("error", {}).get("message")))
                    view.show(event["data"])
                    if event["event"] == "done":
                        return dict(event["data"])
            # A server that stops ends its streams in good order, and so does a proxy that has nobody behind it.
            raise NotNow(f"The connection to {client.url} broke off. Ask again.")
        except NotNow:
            if tries >= _TRIES_MAX:
                raise
        tries += 1
        await clock.sleep(_AGAIN_SECONDS)


def time_left(seconds: float | None) -> str:
    """`1 h 05 min`, for people; nothing if it is not known."""
    if seconds is None:
        return ""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min left"
    return f"{minutes} min {rest:02} s left" if minutes else f"{rest} s left"


def _phase(job: dict[str, Any]) -> str:
    position = job.get("queue_position")
    if job["status"] == "available" and position:
        return f"in line behind {position}"
    if job.get("cancel_requested_at") and not job.get("finished_at"):
        return "stopping"
    stage = str(job["progress"].get("stage") or job["status"])
    return _PHASES.get(stage, stage) if not job.get("finished_at") else str(job["status"])


def _amount(job: dict[str, Any]) -> str:
    """How far it is: lines where it has lines, otherwise a share of all the work."""
    progress = job["progress"]
    if job["kind"] in _BY_SHARE:
        return f"{progress['percent'] or 0:g} %"
    return f"{progress['completed'] + progress['failed']}/{progress['total']}"


class _Bar:
    """A bar that stays at the bottom of a terminal."""

    def __init__(self, console: Console, before: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TextColumn("{task.fields[note]}"),
        )
        self._before = before
        self._progress = Progress(*columns, console=console)
        self._bar = self._progress.add_task("", total=None, amount="", note="")

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, job: dict[str, Any]) -> None:
        """Draw what is known of the job now."""
        progress = job["progress"]
        failed = f"{progress['failed']} failed" if progress["failed"] else ""
        note = "  ".join(part for part in (failed, time_left(job.get("eta_seconds"))) if part)
        done = progress["completed"] + progress["failed"]
        self._draw(_phase(job), done, progress["total"], _amount(job), note)

    def show_bytes(self, phase: str, sent: int, size: int) -> None:
        """Draw how much of a file is on its way."""
        self._draw(phase, sent, size, f"{sent / 2**20:.1f}/{size / 2**20:.1f} MiB", "")

    def show_steps(self, phase: str, step: int, steps: int) -> None:
        """Draw how many of its steps are done."""
        self._draw(phase, step, steps, f"{step}/{steps}", "")

    def _draw(self, phase: str, done: int, total: int, amount: str, note: str) -> None:
        phase = escape(self._before + phase)
        self._progress.update(
            self._bar, description=phase, total=total or None, completed=done, amount=amount, note=note
        )


class _Lines:
    """A line whenever the state changes."""

    def __init__(self, before: str) -> None:
        self._before = before
        self._told = ""

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        return

    def show(self, job: dict[str, Any]) -> None:
        """Say what is new."""
        progress = job["progress"]
        counts = f"{progress['completed']} of {progress['total']} done, {progress['failed']} failed"
        amount = _amount(job) if job["kind"] in _BY_SHARE else counts
        self._tell(_phase(job), amount, time_left(job.get("eta_seconds")))

    def show_bytes(self, phase: str, _sent: int, size: int) -> None:
        """Say that a file is on its way."""
        self._tell(phase, f"{size / 2**20:.1f} MiB")

    def show_steps(self, phase: str, _step: int, steps: int) -> None:
        """Say how many steps there are."""
        self._tell(phase, f"{steps} steps")

    def _tell(self, phase: str, *more: str) -> None:
        if phase != self._told:
            self._told = phase
            typer.echo(self._before + ", ".join(part for part in (phase, *more) if part), err=True)
