"""Tables on a terminal or in a pipe.

It refuses to read markup or control characters out of what it shows.
"""

import datetime as dt
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from forebay.cli.options import PIPED_WIDTH


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under titles; the first column is never cut."""
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text("".join(char for char in cell if char.isprintable())) for cell in row))
    console = Console()
    console = console if console.is_terminal else Console(width=PIPED_WIDTH)
    console.print(table)


def clock_time(seconds: float | None) -> str:
    """A time in UTC, to the minute; nothing for none."""
    return "" if seconds is None else dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M")
