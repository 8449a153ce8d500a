"""Where a model's file comes from: the forms of a catalogue `source`, as values.

It refuses whatever could lead out of a folder, carry a password or start a plain-text download; it does no I/O.
"""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import SplitResult, urlsplit

from forebay.errors import SetupError

_TEXT_MAX = 2048
_SHOWN_MAX = 128
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._+-]{0,127})"
_HUB = re.compile(rf"(?P<repository>{_PART}/{_PART})@(?P<revision>{_PART})(?:/(?P<file>.+))?")
_PACKAGE = re.compile(
    r"(?P<package>[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]{0,63})"
    r"/(?P<member>.+)"
)
_PLUS = re.compile(r" \+ (?=(?:hf|pypi|https?|file):)")
_PART_NUMBER = re.compile(r"\.(?:part)?[0-9]{1,4}")


@dataclass(frozen=True, slots=True)
class HubSource:
    """A file of a model hub's repository, or the whole repository when `file` is None."""

    repository: str
    revision: str
    file: str | None


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A file inside the wheel of a package; with `inner`, a file inside a zip archive there."""

    package: str
    version: str
    member: str
    inner: str | None = None


@dataclass(frozen=True, slots=True)
class WebSource:
    """A file behind an address."""

    url: str


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file, or for vLLM a folder, that is already on this machine and is used where it lies."""

    path: Path


@dataclass(frozen=True, slots=True)
class JoinedSource:
    """A file in several parts, each from a source of its own."""

    parts: tuple[HubSource | PackageSource | WebSource, ...]


Source = HubSource | PackageSource | WebSource | FileSource | JoinedSource


def parse(text: str) -> Source:
    """Read a `source`. Raises SetupError that says the right form."""
    if len(text) > _TEXT_MAX or not text.isprintable():
        raise _wrong(text, f"it has at most {_TEXT_MAX} characters, all of them printable")
    parts = _PLUS.split(text)
    return _parse_one(text) if len(parts) == 1 else JoinedSource(tuple(map(_parse_part, parts)))


def _parse_part(text: str) -> HubSource | PackageSource | WebSource:
    match _parse_one(text):
        case HubSource(file=str()) | PackageSource() | WebSource() as part:
            return part
    raise _wrong(text, "a part is one file that can be pulled")


def _parse_one(text: str) -> HubSource | PackageSource | WebSource | FileSource:
    scheme, _, rest = text.partition(":")
    match scheme:
        case "hf":
            return _hub(text, rest)
        case "pypi":
            return _package(text, rest)
        case "https" | "http":
            check_address(text)
            return WebSource(text)
        case "file":
            return _file(text, rest)
    raise _wrong(
        text, "it starts with `hf:` (repo@revision/file), `pypi:` (package==version/file), `https://` or `file:`"
    )


def file_name(source: Source) -> str:
    """The last part of the file's path at its source; empty when there is none."""
    match source:
        case HubSource(file=file):
            return PurePosixPath(file or "").name
        case PackageSource(member=member, inner=inner):
            return PurePosixPath(inner or member).name
        case WebSource(url=url):
            return PurePosixPath(urlsplit(url).path).name
        case FileSource(path=path):
            return path.name
        case JoinedSource(parts=parts):
            first = PurePosixPath(file_name(parts[0]))
            return first.stem if _PART_NUMBER.fullmatch(first.suffix) else first.name


def check_address(url: str) -> SplitResult:
    """The parts of an address that we may fetch: https, or http to this machine; no credentials in it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise _wrong(url, "it is not an address") from None
    if not host or parts.username is not None or parts.password is not None or parts.fragment:
        raise _wrong(url, "an address is `https://host/path`, without credentials and without `#`")
    if "\\" in url or ".." in PurePosixPath(parts.path).parts:
        raise _wrong(url, "an address has no `..` and no backslash")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        raise _wrong(url, "only `https://` is fetched, and `http://` from this machine itself")
    return parts


def is_loopback(host: str) -> bool:
    """Whether a host of an address is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hub(text: str, rest: str) -> HubSource:
    match = _HUB.fullmatch(rest)
    if match is None or (match["file"] is not None and not _stays_inside(match["file"])):
        raise _wrong(text, "the form is `hf:owner/name@revision/path/file`, without `..`")
    return HubSource(match["repository"], match["revision"], match["file"])


def _package(text: str, rest: str) -> PackageSource:
    match = _PACKAGE.fullmatch(rest)
    member, _, inner = match["member"].partition("!/") if match else ("", "", "")
    if match is None or not _stays_inside(member) or (match["member"] != member and not _stays_inside(inner)):
        raise _wrong(
            text,
            "the form is `pypi:package==version/path/in/the/wheel`, without `..`; a file in a zip archive there is "
            "`…/archive.zip!/path`",
        )
    return PackageSource(match["package"], match["version"], member, inner or None)


def _file(text: str, rest: str) -> FileSource:
    path = rest.removeprefix("//") if rest.startswith("///") else rest
    if not path or path.startswith("//") or "\\" in path or ".." in path.split("/"):
        raise _wrong(text, "the form is `file:/absolute/path` or `file:path/from/the/working/folder`, without `..`")
    return FileSource(Path(path))


def _stays_inside(path: str) -> bool:
    """Whether a relative path has only plain parts."""
    return "\\" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def _wrong(text: str, remedy: str) -> SetupError:
    shown = "".join(character if character.isprintable() else "?" for character in text[:_SHOWN_MAX])
    return SetupError(f"`{shown}` is not a model source: {remedy}.")
