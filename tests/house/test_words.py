"""Words that must not be there: drawers for names, left-over notes, unsafe calls, sleeps, addresses of this machine."""

import ast
import re
from collections import Counter

import pytest

from tests.house import source

DRAWERS = {
    "utils",
    "util",
    "common",
    "core",
    "base",
    "helpers",
    "helper",
    "manager",
    "handler",
    "misc",
    "task",
    "tasks",
}

# Where everything that can go wrong must be caught, because what runs there must not end: file -> how often.
BROAD_EXCEPTS: dict[str, int] = {
    "src/forebay/gateway/envelope.py": 1,  # the outermost of the gateway: a bug is one 500 and not the end
    "src/forebay/jobs/executor.py": 2,  # a bug in a kind becomes an outcome: in its attempt, and in what it has settled
    "src/forebay/replicas/keeper.py": 1,  # the supervisor's step: a bug here must not leave a model unwatched
    "src/forebay/store/writer.py": 1,  # carries what a caller's function raised back to that caller, and to nobody else
}

# Tests that wait for wall-clock time on purpose: file -> why.
SLEEPERS: dict[str, str] = {
    "tests/integration/test_whisper_engine.py": "measures processor time over an interval, and cancels at any moment",
    "tests/faults/test_long_recording.py": "measures memory all the time",
    "tests/faults/test_slow_clients.py": "the slowness of the client is what is tested",
    "tests/faults/test_kill_matrix.py": "the moment of a kill is what is chosen by chance",
    "tests/faults/test_paused_worker.py": "the length of a pause is what is tested",
    "tests/faults/test_five_models.py": "requests come at random times, and memory is looked at all the time",
}

_UNSAFE = {
    "pickle": r"\b(?:import|from) (?:pickle|marshal|shelve|dill|cloudpickle|joblib)\b",
    "eval and exec": r"(?<![\w.])(?:eval|exec)\(",
    "trust_remote_code": r"trust[_-]remote[_-]code",
    "a shell": r"shell\s*=\s*True|os\.system\(|create_subprocess_shell|os\.popen\(",
    "unverified TLS": r"verify\s*=\s*False|CERT_NONE|ssl\s*=\s*False|_create_unverified",
    "unsafe YAML": r"yaml\.(?:unsafe_)?load\(",
}
# Split, so that this file does not hold what it looks for.
_REGISTRIES = re.compile(r"\b(?:test\.)?pypi" + r"\.org\b|python" + r"hosted\.org|\bconda" + r"\.anaconda\.org")
_HOMES = re.compile(r"(?<![\w.])/(?:home|Users|root)" + r"/[\w.]+")
_NOTES = re.compile(r"\b(?:TODO|FIX" + r"ME|XXX|HACK)\b")


def test_no_module_is_a_drawer() -> None:
    for path in source.modules() + source.modules(source.ROOT / "tests"):
        assert not DRAWERS & {path.stem, path.parent.name}, f"{source.name(path)}: name the noun it holds"


def test_no_notes_are_left_over() -> None:
    this = source.ROOT / "tests" / "house" / "test_words.py"
    found = [source.name(path) for path, text in source.texts() if path != this and _NOTES.search(text)]
    assert not found, "Do it, or open an issue."


@pytest.mark.parametrize("what", _UNSAFE)
def test_nothing_unsafe_is_called(what: str) -> None:
    pattern = re.compile(_UNSAFE[what])
    found = [
        f"{source.name(path)}:{number}"
        for path in source.modules()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found


def _catches_everything(node: ast.AST) -> bool:
    if not isinstance(node, ast.ExceptHandler):
        return False
    names = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"BaseException"}
    passes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
    return bool(names & {"Exception", "BaseException"}) and not passes_on


def test_broad_excepts_are_only_where_they_are_named() -> None:
    found = Counter(
        source.name(path)
        for path in source.modules()
        for node in ast.walk(source.tree(path))
        if _catches_everything(node)
    )
    assert dict(found) == BROAD_EXCEPTS, "Catch what you expect. A place that must go on is listed in BROAD_EXCEPTS."


def _is_sleep(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "sleep":
        return False
    of = node.func.value
    yields = bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
    return isinstance(of, ast.Name) and of.id in {"time", "asyncio"} and not yields


def test_tests_wait_for_signals_and_not_for_time() -> None:
    tests = source.ROOT / "tests"
    found = {
        source.name(path)
        for path in source.modules(tests)
        if tests / "support" not in path.parents  # polling a condition with a deadline lives there
        for node in ast.walk(source.tree(path))
        if _is_sleep(node)
    }
    assert found == set(SLEEPERS)


def test_no_registry_and_no_home_is_named() -> None:
    for path, text in source.texts():
        for pattern in (_REGISTRIES, _HOMES):
            assert not (match := pattern.search(text)), f"{source.name(path)}: {match[0]}"


def test_every_module_says_what_it_does_and_what_it_refuses() -> None:
    for path in source.modules():
        if path.read_text(encoding="utf-8").strip() and "migrations" not in path.parts:
            assert ast.get_docstring(source.tree(path)), f"{source.name(path)} needs a docstring"


def test_every_public_function_and_class_has_a_docstring() -> None:
    found = [
        f"{source.name(path)}:{node.name}"
        for path in source.modules()
        if "migrations" not in path.parts
        for node in source.tree(path).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not found
