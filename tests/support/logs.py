"""What no process of ours may ever log."""

SIGNS = (".bug", "Traceback", "never retrieved")
_LINES_BEFORE, _LINES_AFTER, _CHARS_MAX = 5, 60, 8_000


def unforeseen(log: str) -> str:
    """The first thing in `log` that nobody foresaw, with the lines around it; empty if there is none."""
    lines = log.splitlines()
    for place, line in enumerate(lines):
        if any(sign in line for sign in SIGNS):
            return "\n".join(lines[max(0, place - _LINES_BEFORE) : place + _LINES_AFTER])[:_CHARS_MAX]
    return ""
