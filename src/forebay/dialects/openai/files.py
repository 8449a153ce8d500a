"""Files and Uploads on the wire: what bodies and form fields mean.

It refuses a purpose, an expiry or a name that OpenAI would refuse, and makes of a file's name a label and nothing more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from forebay.dialects.openai.call import Wire
from forebay.errors import InvalidRequest, PayloadTooLarge

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
IMAGE_RESULT = "image_result"  # of the pictures that the server itself has made; nobody uploads for it
EXPIRY_SECONDS_MIN, EXPIRY_SECONDS_MAX = 3600, 2_592_000
PAGE_SIZE_MAX = 10_000
PART_IDS_MAX = 10_000
_FILENAME_CHARS_MAX = 255
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
FORM_FIELDS = frozenset({"purpose", _ANCHOR, _SECONDS})


class ExpiresAfter(Wire):
    """When a file is to be removed."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=EXPIRY_SECONDS_MIN, le=EXPIRY_SECONDS_MAX)]


class UploadBody(Wire):
    """The body that creates an upload."""

    bytes: Annotated[int, Field(ge=1, le=2**50)]
    filename: Annotated[str, Field(min_length=1, max_length=1024)]
    mime_type: Annotated[str, Field(min_length=1, max_length=128)]
    purpose: Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
    expires_after: ExpiresAfter | None = None


class CompleteBody(Wire):
    """The body that completes an upload."""

    part_ids: Annotated[tuple[Annotated[str, Field(max_length=128)], ...], Field(max_length=PART_IDS_MAX, min_length=1)]
    md5: Annotated[str, Field(pattern="^[0-9a-fA-F]{32}$")] | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """How large files may be and how long those for batches are kept."""

    file_bytes_max: int
    batch_bytes_max: int
    batch_keep_seconds: int


def purpose_of(fields: Mapping[str, str]) -> str:
    """The purpose that a form names. Raises InvalidRequest."""
    purpose = fields.get("purpose")
    if purpose is None:
        raise InvalidRequest("The form has no field `purpose`.", param="purpose", code="missing_required_parameter")
    if purpose not in PURPOSES:
        raise InvalidRequest(f"`purpose` is one of {', '.join(PURPOSES)}.", param="purpose", code="invalid_value")
    return purpose


def keep_seconds(purpose: str, expires_after: ExpiresAfter | None, limits: Limits) -> int | None:
    """How long a file is kept; None keeps it until somebody deletes it."""
    if expires_after is not None:
        return expires_after.seconds
    return limits.batch_keep_seconds if purpose == "batch" else None


def expiry_of(fields: Mapping[str, str]) -> ExpiresAfter | None:
    """The expiry that a form names. Raises InvalidRequest."""
    anchor, seconds = fields.get(_ANCHOR), fields.get(_SECONDS)
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest(f"`{_ANCHOR}` is `created_at`.", param=_ANCHOR, code="invalid_value")
    if seconds is None or not (seconds.isascii() and seconds.isdigit() and len(seconds) <= 10):
        raise InvalidRequest(f"`{_SECONDS}` is a whole number.", param=_SECONDS, code="invalid_value")
    if not EXPIRY_SECONDS_MIN <= int(seconds) <= EXPIRY_SECONDS_MAX:
        message = f"`{_SECONDS}` lies between {EXPIRY_SECONDS_MIN} and {EXPIRY_SECONDS_MAX}."
        raise InvalidRequest(message, param=_SECONDS, code="invalid_value")
    return ExpiresAfter(anchor="created_at", seconds=int(seconds))


def check_size(size: int, purpose: str | None, limits: Limits) -> None:
    """Raise PayloadTooLarge if a file for `purpose` may not have `size` bytes; None while it is not known."""
    most = min(limits.file_bytes_max, limits.batch_bytes_max) if purpose == "batch" else limits.file_bytes_max
    if size > most:
        kind = "A file for batches" if purpose == "batch" else "A file"
        raise PayloadTooLarge(f"{kind} has at most {most} bytes.", param="file")


def check_name(filename: str, purpose: str) -> None:
    """Raise InvalidRequest if a file of this name cannot be for `purpose`."""
    if purpose == "batch" and not filename.lower().endswith(".jsonl"):
        raise InvalidRequest("The name of a file for batches ends in `.jsonl`.", param="file", code="invalid_value")


def label_of(filename: str) -> str:
    """What is kept of a file's name: its last part without what cannot be shown, to be shown and for nothing else."""
    last = filename.replace("\\", "/").rsplit("/", 1)[-1]
    shown = "".join(char for char in last if char.isprintable()).strip()
    if len(shown) > _FILENAME_CHARS_MAX:
        stem, dot, extension = shown.rpartition(".")
        keep = len(dot + extension) if 0 < len(extension) <= 16 else 0
        shown = (stem if keep else shown)[: _FILENAME_CHARS_MAX - keep] + (dot + extension if keep else "")
    return shown if shown not in ("", ".", "..") else "file"
