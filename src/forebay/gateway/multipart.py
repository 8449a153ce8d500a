"""Forms with files in them, taken apart as they arrive.

It refuses to hold a file, in memory or on a disk of its own: its bytes go on to whoever takes them, piece by piece.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from forebay.errors import InvalidRequest, PayloadTooLarge, RequestCancelled

FIELDS_MAX = 32
FIELD_BYTES_MAX = 8192
_HEADERS_MAX = 8
_HEADER_BYTES_MAX = 4096
_AS_THEY_ARE = {"", "binary", "8bit", "7bit"}  # transfer encodings that change nothing


@dataclass(frozen=True, slots=True)
class FilePart:
    """A file of a form: the `number`-th of its field, from 0. Its `filename` has been checked by nobody."""

    field: str
    number: int = 0
    filename: str | None = None


@dataclass(slots=True)
class Form:
    """What has arrived of a form so far. `repeated` are the fields, with their names, that may be there several times."""

    fields: dict[str, str] = field(default_factory=dict)
    repeated: list[tuple[str, str]] = field(default_factory=list)
    files: list[FilePart] = field(default_factory=list)

    def count(self, name: str) -> int:
        """How many files have come in a field."""
        return sum(part.field == name for part in self.files)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a form may be. Of its fields `repeated` may be there several times, and `large` may have up to `bytes_max` bytes."""

    repeated: Collection[str] = ()
    large: Collection[str] = ()
    fields_max: int = FIELDS_MAX
    bytes_max: int = FIELDS_MAX * FIELD_BYTES_MAX  # of all its fields
    needs_file: bool = True


Take = Callable[[Form, FilePart, bytes], Awaitable[None]]
_PLAIN = Rules()


def is_form(request: Request) -> bool:
    """Whether the body calls itself a form."""
    return parse_options_header(request.headers.get("content-type"))[0] == b"multipart/form-data"


async def read_form(
    request: Request, files: Mapping[str, int], others: Collection[str], take: Take, rules: Rules = _PLAIN
) -> Form:
    """Read the whole body, handing each piece of a file to `take` with what is known by then.

    `files` are the fields that are files, and how many each may have; one of several may call itself `name[]`, too.
    The fields may come in any order. Raises InvalidRequest for whatever is no such form, PayloadTooLarge for fields that
    are too large, RequestCancelled when it is cut.
    """
    reader = _Reader(_boundary(request), files, others, rules)
    try:
        async for data in request.stream():
            for part, piece in reader.feed(data):
                await take(reader.form, part, piece)
    except ClientDisconnect:
        raise RequestCancelled from None
    reader.finish()
    return reader.form


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise InvalidRequest("Send a form: `Content-Type: multipart/form-data`.", code="invalid_multipart")
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise InvalidRequest("The `Content-Type` of the form names no boundary.", code="invalid_multipart")
    return boundary


class _Reader:
    """Keeps the state of one form between pieces of its body."""

    def __init__(self, boundary: bytes, files: Mapping[str, int], others: Collection[str], rules: Rules) -> None:
        self.form = Form()
        self._files = files
        self._others = others
        self._rules = rules
        self._parts = 0
        self._bytes_left = rules.bytes_max
        self._ended = False
        self._headers: dict[str, bytearray] = {}
        self._header = bytearray()
        self._value = bytearray()
        self._name: str | None = None  # of the field that is being read; none while it is a file
        self._pieces: list[tuple[FilePart, bytes]] = []
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begin,
                    "on_header_begin": self._header.clear,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._part_data,
                    "on_part_end": self._part_end,
                    "on_end": self._end,
                },
                max_header_count=_HEADERS_MAX,
                max_header_size=_HEADER_BYTES_MAX,
            )
        except FormParserError:
            raise InvalidRequest("The boundary of the form is too long.", code="invalid_multipart") from None

    def feed(self, data: bytes) -> list[tuple[FilePart, bytes]]:
        """Read on; the pieces of files that `data` held."""
        self._pieces = []
        try:
            self._parser.write(data)
        except FormParserError:
            raise InvalidRequest("The body is not a form as its headers say.", code="invalid_multipart") from None
        return self._pieces

    def finish(self) -> None:
        """Raise InvalidRequest unless the form came to its end and had a file."""
        if not self._ended:
            raise InvalidRequest("The form ends before its last boundary.", code="invalid_multipart")
        if self._rules.needs_file and not self.form.files:
            wanted = next(iter(self._files))
            raise InvalidRequest(f"The form has no file `{wanted}`.", param=wanted, code="missing_required_parameter")

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > self._rules.fields_max:
            raise InvalidRequest(f"The form has more than {self._rules.fields_max} fields.", code="invalid_multipart")
        self._headers = {}

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        name = self._header.decode("ascii", "replace").lower()
        self._headers.setdefault(name, bytearray()).extend(data[start:end])

    def _headers_finished(self) -> None:
        disposition, options = parse_options_header(bytes(self._headers.get("content-disposition", b"")))
        encoding = self._headers.get("content-transfer-encoding", b"").decode("ascii", "replace").strip().lower()
        if disposition != b"form-data" or b"name" not in options or encoding not in _AS_THEY_ARE:
            raise InvalidRequest("A part of the form is no plain form field.", code="invalid_multipart")
        name = options[b"name"].decode("utf-8", "replace")
        plain = name.removesuffix("[]")
        if name in self._files or self._files.get(plain, 0) > 1:
            self._begin_file(plain, options.get(b"filename"))
        else:
            self._begin_field(name, is_file=b"filename" in options)

    def _begin_file(self, name: str, filename: bytes | None) -> None:
        most, number = self._files[name], self.form.count(name)
        if number >= most:
            much = "one file at a time" if most == 1 else f"at most {most} files"
            raise InvalidRequest(f"Send {much} as `{name}`.", param=name, code="invalid_multipart")
        called = None if filename is None else filename.decode("utf-8", "replace")
        self.form.files.append(FilePart(name, number, called))
        self._name = None

    def _begin_field(self, name: str, *, is_file: bool) -> None:
        if name not in self._others:
            raise InvalidRequest(f"Unknown field `{name[:64]}`.", param=name[:64], code="invalid_value")
        if is_file or name in self.form.fields:
            problem = "is no file" if is_file else "is there twice"
            raise InvalidRequest(f"The field `{name}` {problem}.", param=name, code="invalid_value")
        self._name = name
        self._value.clear()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            self._pieces.append((self.form.files[-1], data[start:end]))
            return
        self._value += data[start:end]
        self._bytes_left -= end - start
        if len(self._value) > FIELD_BYTES_MAX and self._name not in self._rules.large:
            raise PayloadTooLarge(f"A field of a form has at most {FIELD_BYTES_MAX} bytes.", param=self._name)
        if self._bytes_left < 0:
            raise PayloadTooLarge(
                f"The fields of a form have at most {self._rules.bytes_max} bytes in all.", param=self._name
            )

    def _part_end(self) -> None:
        if self._name is None:
            return
        text = self._value.decode("utf-8", "replace")
        if self._name in self._rules.repeated:
            self.form.repeated.append((self._name, text))
        else:
            self.form.fields[self._name] = text

    def _end(self) -> None:
        self._ended = True
