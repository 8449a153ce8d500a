"""A repository of a model hub in the layout of diffusers: what lies in it, and which of that a folder here needs.

It refuses names that lead out of the folder, weights in formats that can run code, and more files and bytes than are
allowed; it asks no hub, and writes nothing.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from forebay.errors import SetupError
from forebay.pipelines import PIPELINES, denoiser_of, parts_in

INDEX = "model_index.json"
INDEX_BYTES_MAX = 2**20
MANIFEST = "forebay-files.json"

_MANIFEST_BYTES_MAX = 4 * 2**20
_FILES_MAX = 1000
_SUFFIXES = frozenset({".json", ".txt", ".model", ".safetensors", ".gguf"})
_UNSAFE = frozenset({".bin", ".pt", ".pth", ".ckpt", ".msgpack"})
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_SHARD = r"(?:-[0-9]{5}-of-[0-9]{5})?"
_WEIGHTS = re.compile(
    rf"[A-Za-z0-9_-]+?(?:\.(?P<before>[a-z0-9_]+))?{_SHARD}(?:\.(?P<behind>[a-z0-9_]+))?\.safetensors"
    r"(?P<index>\.index(?:\.(?P<of_index>[a-z0-9_]+))?\.json)?"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a repository. `oid` changes with what is in it; `sha256` is told of large ones alone."""

    path: str
    size_bytes: int
    oid: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of a repository is wanted: weights of which variant, and none of what paints where a file replaces it."""

    variant: str | None = None
    replaced: bool = False


def manifest(folder: Path) -> list[Entry] | None:
    """The files of a pulled folder, whole or not yet; None where there is no list of them."""
    try:
        with (folder / MANIFEST).open(encoding="utf-8") as file:
            return [Entry(**each) for each in json.loads(file.read(_MANIFEST_BYTES_MAX))]
    except (OSError, ValueError, TypeError):
        return None


def digest(folder: Path, beside: Sequence[Path] = ()) -> str:
    """Changes with any file of a folder, and with the files `beside` it.

    A pulled folder is known by what its hub says of its contents, so it is the same wherever it was pulled; any other
    by the sizes and times of its files.
    """
    known = manifest(folder)
    said = [repr(sorted((entry.path, entry.oid) for entry in known or ()))]
    files = [] if known is not None else sorted(islice(folder.rglob("*"), _FILES_MAX))
    for path in (*files, *beside):
        try:
            status = path.stat()
        except OSError:
            continue
        said.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(said).encode("utf-8", "surrogateescape")).hexdigest()


def parts_of(index: bytes, repository: str) -> frozenset[str]:
    """The folders that `model_index.json` names, for a pipeline that is served. Raises SetupError."""
    try:
        said = json.loads(index)
        pipeline = said.get("_class_name")
        parts = frozenset(parts_in(said))
    except (ValueError, AttributeError, RecursionError):
        pipeline, parts = None, frozenset()
    if not parts or not all(_NAME.fullmatch(name) for name in parts):
        raise SetupError(f"The {INDEX} of {repository} names no parts of a model. Check the model's `source`.")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise SetupError(f"The pipeline of {repository} is not served. Take one of {', '.join(PIPELINES)}.")
    return parts


def choose(found: Iterable[Entry], parts: frozenset[str], wanted: Wanted, bytes_max: int) -> list[Entry]:
    """The files that a folder needs, the list of parts first. Raises SetupError."""
    inside: dict[str, list[Entry]] = {part: [] for part in sorted(parts)}
    chosen = []
    for entry in sorted(found, key=lambda entry: entry.path):
        part, _, name = entry.path.rpartition("/")
        if entry.path == INDEX:
            chosen.append(entry)
        elif part in inside and _NAME.fullmatch(name):
            inside[part].append(entry)
    denoiser = denoiser_of(parts)
    for part, files in inside.items():
        chosen += _of_part(part, files, wanted, weights=not (wanted.replaced and part == denoiser))
    total = sum(entry.size_bytes for entry in chosen)
    if len(chosen) > _FILES_MAX or total > bytes_max:
        raise SetupError(
            f"The model has {len(chosen)} files of {total} bytes in all, and at most {_FILES_MAX} of {bytes_max} are "
            "pulled. Raise FOREBAY_PULL_FOLDER_BYTES_MAX if it is the right one."
        )
    return chosen


def _of_part(part: str, files: Sequence[Entry], wanted: Wanted, *, weights: bool) -> Iterator[Entry]:
    """What is needed of one part; of several variants of its weights one alone."""
    variants = {entry: _variant(entry) for entry in files if _is_weights(entry)}
    known = {variants[entry] for entry in variants if entry.path.endswith(".safetensors")}
    variant = wanted.variant if wanted.variant in known else None
    if weights and known and variant not in known:
        names = ", ".join(sorted(each or "" for each in known))
        raise SetupError(f"The part `{part}` has weights of the variants {names} alone. Name one as `options.variant`.")
    if weights and not known and any(PurePosixPath(entry.path).suffix in _UNSAFE for entry in files):
        raise SetupError(
            f"The part `{part}` has its weights in a format that can run code alone. Take a repository that has them as "
            "safetensors."
        )
    for entry in files:
        if entry in variants:
            if weights and variants[entry] == variant:
                yield entry
        elif PurePosixPath(entry.path).suffix in _SUFFIXES and (weights or not entry.path.endswith(".gguf")):
            yield entry


def _is_weights(entry: Entry) -> bool:
    return _WEIGHTS.fullmatch(PurePosixPath(entry.path).name) is not None


def _variant(entry: Entry) -> str | None:
    match = _WEIGHTS.fullmatch(PurePosixPath(entry.path).name)
    return None if match is None else match["before"] or match["behind"] or match["of_index"]


def read_page(page: bytes, repository: str) -> list[Entry]:
    """The files of one page of the list. Raises SetupError."""
    try:
        return [_entry(each) for each in json.loads(page) if each["type"] == "file"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SetupError(f"The list of files of {repository} cannot be read. Check FOREBAY_PULL_HUB_URL.") from None


def _entry(said: Mapping[str, Any]) -> Entry:
    path, size, large = said["path"], said["size"], said.get("lfs")
    if not isinstance(path, str) or not isinstance(size, int) or size < 0:
        raise ValueError("no file")
    if "\\" in path or not path.isprintable() or any(part in {"", ".", ".."} for part in path.split("/")):
        raise SetupError("The repository has a file whose name leads out of it. Do not use this repository.")
    sha256 = None if large is None else str(large["oid"])
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError("no checksum")
    return Entry(path, size, str(said.get("oid", "")), sha256)
