"""Following a job on a terminal until it ends: a bar with counts and the time left, or a line for each state in a log.

It refuses to give up because a connection broke off: the job is looked for again for a while.
"""

from contextlib import aclosing
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from forebay.cli.api_client import ApiClient, NotNow, path_of
from forebay.clock import SystemClock
from forebay.errors import SetupError

_AGAIN_SECONDS = 1.0
_TRIES_MAX = 120  # in a row without news
_PHASES = {"available": "in line", "run": "running", "join": "finishing"}


async def follow(client: ApiClient, job_id: str) -> dict[str, Any]:
    """Show the job until it is done; the job as it ended. Raises SetupError."""
    console = Console(stderr=True)
    view = _Bar(console) if console.is_terminal and not console.is_dumb_terminal else _Lines()
    clock = SystemClock()
    tries = 0
    with view:
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


class _Bar:
    """A bar that stays at the bottom of a terminal."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._progress = Progress(*columns, console=console)
        self._bar = self._progress.add_task("", total=None, note="")

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
        total = progress["total"] or None
        self._progress.update(self._bar, description=_phase(job), total=total, completed=done, note=note)


class _Lines:
    """A line whenever the state changes."""

    def __init__(self) -> None:
        self._told = ""

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        return

    def show(self, job: dict[str, Any]) -> None:
        """Say what is new."""
        phase = _phase(job)
        if phase != self._told:
            self._told = phase
            progress = job["progress"]
            left = time_left(job.get("eta_seconds"))
            counts = f"{progress['completed']} of {progress['total']} done, {progress['failed']} failed"
            typer.echo(", ".join(part for part in (phase, counts, left) if part), err=True)
