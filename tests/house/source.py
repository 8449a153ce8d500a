"""The project as text and syntax trees, for the tests of the code itself."""

import ast
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "forebay"
_OWN = {".venv", ".git", "node_modules", "__pycache__", "data", "models", "dist", "build"}


def name(path: Path) -> str:
    """The path as a person would say it."""
    return path.relative_to(ROOT).as_posix()


def modules(folder: Path = SOURCE) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def project_files() -> tuple[Path, ...]:
    """Every file that is, or would be, in the repository; an unpacked archive has the same files without git."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=False
    )
    if listing.returncode == 0:
        paths = [ROOT / line for line in listing.stdout.decode().splitlines()]
    else:
        paths = [Path(top) / file for top, folders, files in os.walk(ROOT) if _prune(folders) for file in files]
    return tuple(sorted(path for path in paths if path.is_file()))


def _prune(folders: list[str]) -> bool:
    folders[:] = [folder for folder in folders if folder not in _OWN]
    return True


def texts() -> Iterator[tuple[Path, str]]:
    """Every project file that is text."""
    for path in project_files():
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
