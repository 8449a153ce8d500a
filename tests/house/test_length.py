"""Functions fit a screen and files a sitting; what is longer is listed, and the list may only shrink."""

import ast
import statistics

from tests.house import source

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 700

LONGER_FUNCTIONS: dict[str, int] = {}  # "src/forebay/room.py:function" -> its lines


def _functions() -> dict[str, int]:
    found = {}
    for path in source.modules() + source.modules(source.ROOT / "tests"):
        for node in ast.walk(source.tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                found[f"{source.name(path)}:{node.name}"] = node.end_lineno - node.lineno + 1
    return found


def test_no_function_is_longer_than_a_screen() -> None:
    longer = {place: lines for place, lines in _functions().items() if lines > FUNCTION_LINES_MAX}
    grown = {place: lines for place, lines in longer.items() if lines > LONGER_FUNCTIONS.get(place, 0)}
    assert not grown, f"Cut these into named steps ({FUNCTION_LINES_MAX} lines at most): {grown}"
    settled = {place for place, lines in LONGER_FUNCTIONS.items() if longer.get(place, 0) < lines}
    assert not settled, f"These have become shorter: lower or remove them in LONGER_FUNCTIONS: {settled}"


def test_no_file_is_longer_than_a_sitting() -> None:
    files = source.modules() + source.modules(source.ROOT / "tests")
    lines = {source.name(path): path.read_text(encoding="utf-8").count("\n") for path in files}
    assert not {name: count for name, count in lines.items() if count > FILE_LINES_MAX}


def test_most_functions_are_a_few_lines() -> None:
    lines = sorted(count for place, count in _functions().items() if place.startswith("src/"))
    assert statistics.median(lines) < 10
    assert lines[int(len(lines) * 0.95)] <= 40


def test_the_ratchet_sees_functions_at_all() -> None:
    assert _functions()["src/forebay/config.py:load"] > 1
