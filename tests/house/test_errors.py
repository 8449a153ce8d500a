"""The error tree is complete: what is drawn is what there is."""

import re
from itertools import pairwise

from forebay import errors
from forebay.errors import ForebayError
from tests.house import source

_LINE = re.compile(r"^(?P<bars>[│ ├└─]*)(?P<name>[A-Z]\w+)(?:\s+(?P<status>\d{3}|---))?")


def _classes(top: type[ForebayError] = ForebayError) -> dict[str, type[ForebayError]]:
    found = {top.__name__: top}
    for child in top.__subclasses__():
        if child.__module__ == errors.__name__:
            found |= _classes(child)
    return found


def _drawn() -> dict[str, tuple[str | None, str | None]]:
    """Class name -> (name of its parent, status), as the docstring draws it."""
    assert errors.__doc__ is not None
    drawing = errors.__doc__.split("\n\n")[1]
    stack: list[str] = []
    found = {}
    for line in drawing.splitlines():
        match = _LINE.match(line)
        assert match, f"This line of the drawing cannot be read: {line!r}"
        depth = len(match["bars"]) // 4
        stack[depth:] = [match["name"]]
        found[match["name"]] = (stack[depth - 1] if depth else None, match["status"])
    return found


def test_the_drawing_has_every_class_below_its_parent() -> None:
    real = {name: None if error is ForebayError else error.__bases__[0].__name__ for name, error in _classes().items()}
    assert {name: parent for name, (parent, _) in _drawn().items()} == real


def test_the_drawing_has_the_right_statuses() -> None:
    drawn = {name: int(status) for name, (_, status) in _drawn().items() if status and status != "---"}
    assert drawn == {name: _classes()[name].status for name in drawn}
    leaves = {name for name, error in _classes().items() if not error.__subclasses__()} - {"SetupError"}
    assert leaves <= set(drawn), "Every error that reaches a caller has its status in the drawing."


def test_every_docstring_is_a_sentence_for_the_caller() -> None:
    for name, error in _classes().items():
        text = vars(error).get("__doc__") or ""
        assert re.fullmatch(r"[A-Z].*[.]", text, re.DOTALL), f"{name} needs a docstring that is a whole sentence"
        assert str(error()) == text


def test_every_code_belongs_to_one_class_and_is_documented() -> None:
    codes = sorted((error.__dict__["code"], name) for name, error in _classes().items() if "code" in error.__dict__)
    assert not [(left, right) for left, right in pairwise(codes) if left[0] == right[0]]
    page = (source.ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    outward = [code for code, name in codes if name != "SetupError"]
    source_text = "\n".join(path.read_text("utf-8") for path in source.modules())
    outward += re.findall(r'\bcode="([a-z_]+)"', source_text)
    assert not [code for code in outward if f"`{code}`" not in page], "docs/api.md must list every error code."


def test_every_error_is_raised_or_named_somewhere() -> None:
    words = set(re.findall(r"\w+", "\n".join(path.read_text("utf-8") for path in source.modules())))
    assert set(_classes()) <= words
    elsewhere = "\n".join(path.read_text("utf-8") for path in source.modules() if path.name != "errors.py")
    leaves = {name for name, error in _classes().items() if not error.__subclasses__()}
    assert not {name for name in leaves if not re.search(rf"\b{name}\b", elsewhere)}, "Remove errors that nobody uses."
