"""What is written about the project is true: links lead somewhere, versions agree, the lock covers what is declared."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import forebay
from forebay.cli.commands import HELP, load
from forebay.config import Settings
from forebay.gateway.server import create_app
from tests.house import source

_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
_PIN = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>\S+)(?: ; .*?)? \\\n    --hash=sha256:[0-9a-f]{64}", re.MULTILINE)


def _pages() -> list[Path]:
    return [path for path in source.project_files() if path.suffix == ".md"]


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", _pages(), ids=source.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        address, _, anchor = link.partition("#")
        target = (page.parent / address).resolve() if address else page
        assert target.exists(), f"{source.name(page)} links to {link}"
        if anchor:
            assert anchor in _anchors(target), f"{source.name(page)} links to {link}"


@pytest.mark.parametrize("page", _pages(), ids=source.name)
def test_a_page_has_one_title(page: Path) -> None:
    if ".github" in page.parts:
        return  # templates are parts of another page
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1


def test_the_changelog_has_this_version() -> None:
    text = (source.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(
        rf"^## \[{re.escape(forebay.__version__)}\] - (?:Unreleased|\d{{4}}-\d\d-\d\d)$", text, re.MULTILINE
    )


@pytest.mark.parametrize(
    "paper",
    ["LICENSE", "NOTICE", "README.md", "ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md"],
)
def test_the_paper_is_there(paper: str) -> None:
    assert len((source.ROOT / paper).read_text(encoding="utf-8")) > 40


def _declared() -> dict[str, Any]:
    return tomllib.loads((source.ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _pins(lock: str) -> dict[str, set[str]]:
    """The versions of each package in a lock; there may be several, for different Pythons."""
    found: dict[str, set[str]] = {}
    for match in _PIN.finditer((source.ROOT / lock).read_text(encoding="utf-8")):
        found.setdefault(canonicalize_name(match["name"]), set()).add(match["version"])
    return found


def _assert_covered(wanted: list[str], lock: str) -> None:
    pins = _pins(lock)
    for requirement in map(Requirement, wanted):
        versions = pins.get(canonicalize_name(requirement.name))
        assert versions, f"{requirement.name} is not in {lock} with a hash. Run `make lock`."
        for version in versions:
            assert requirement.specifier.contains(version), f"{requirement} but {lock} has {version}. Run `make lock`."


def test_the_lock_covers_what_is_declared() -> None:
    declared = _declared()
    dependencies, groups = declared["project"]["dependencies"], declared["dependency-groups"]
    _assert_covered([*dependencies, *groups["dev"], *declared["build-system"]["requires"]], "requirements.lock")


def test_the_lock_of_what_makes_pictures_covers_all_but_torch() -> None:
    extra = _declared()["project"]["optional-dependencies"]["diffusion"]
    torch = [each for each in extra if Requirement(each).name == "torch"]
    assert re.fullmatch(r"torch==[0-9.]+", *torch), "the Makefile takes exactly this version"
    _assert_covered([each for each in extra if each not in torch], "requirements-diffusion.lock")
    pins, of_all = _pins("requirements-diffusion.lock"), _pins("requirements.lock")
    assert not [name for name in pins if name.startswith(("torch", "nvidia", "triton"))]
    assert {name: pins[name] for name in pins.keys() & of_all} == {name: of_all[name] for name in pins.keys() & of_all}


def test_the_server_does_not_install_torch() -> None:
    text = (source.ROOT / "Makefile").read_text(encoding="utf-8")
    needs = {target: re.search(rf"^{target}: (.*?) ##", text, re.MULTILINE) for target in ("serve", "test", "prove")}
    assert {target: bool(found and "$(DIFFUSION)" in found[1]) for target, found in needs.items()} == {
        "serve": False, "test": True, "prove": True
    }  # fmt: skip


def test_every_target_is_explained() -> None:
    text = (source.ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("serve", "test", "check", "bench", "prove", "lock", "clean", "help"):
        assert re.search(rf"^{target}:.*## \S", text, re.MULTILINE), f"make {target} needs its ## line"


def test_the_python_versions_agree() -> None:
    workflow = (source.ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    declared = tomllib.loads((source.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    oldest = declared["project"]["requires-python"].removeprefix(">=")
    assert f'"{oldest}"' in workflow
    assert declared["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")


def test_every_route_is_documented() -> None:
    page = (source.ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    routes = {
        (method.upper(), path)
        for path, methods in create_app(Settings()).openapi()["paths"].items()
        for method in methods
    }
    assert len(routes) > 5
    assert not sorted(f"{method} {path}" for method, path in routes if f"`{method} {path}`" not in page)


def _commands() -> set[str]:
    """`serve`, `keys create`, … as the program has them."""
    found = set()
    for name in HELP:
        found |= {name, *(f"{name} {inner}" for inner in getattr(load(name), "commands", {}))}
    return found


@pytest.mark.parametrize("page", [*_pages(), source.ROOT / "Makefile"], ids=source.name)
def test_commands_that_a_page_names_exist(page: Path) -> None:
    commands = _commands()
    assert {"serve", "keys create"} <= commands
    word = r"[a-z]+(?:-[a-z]+)*"
    for words in re.findall(rf"(?:^|[`/(]|&& )forebay ({word}(?: {word})?)", page.read_text("utf-8"), re.MULTILINE):
        first = words.split()[0]
        assert first in commands, f"{source.name(page)}: there is no `forebay {first}`"
        if any(command.startswith(f"{first} ") for command in commands) and " " in words:
            assert words in commands, f"{source.name(page)}: there is no `forebay {words}`"
