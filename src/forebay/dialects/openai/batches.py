"""Batches on the wire: the body that makes one, the lines of its input, output and error files.

It refuses a line that could not be answered by its `custom_id`; whether the body of a line is right is found out where it
runs, as it would be online.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import from_json, to_json

from forebay.dialects.openai.call import Wire
from forebay.dialects.openai.errors import body_of
from forebay.errors import ForebayError, InvalidRequest

CUSTOM_ID_CHARS_MAX = 512
PREFIX_CHARS_MIN = 256  # below it an engine reads the words sooner than it finds them again
_PREFIX_CHARS_MAX = 1024
_FIELDS = {"custom_id", "method", "url", "body"}
_OF_MEDIA = ("/v1/audio/", "/v1/images/")
_WINDOW = re.compile(r"([1-9][0-9]{0,5})([smh])")
_UNITS = {"s": 1, "m": 60, "h": 3600}
_WINDOW_SECONDS_MAX = 86_400
_SHOWN_CHARS_MAX = 64


class ExpiresAfter(Wire):
    """When an output file goes, counted from its creation."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class BatchBody(Wire):
    """The body of POST /v1/batches. `priority` and `webhook_url` are ours."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=64)]
    endpoint: Annotated[str, Field(max_length=64)]
    completion_window: Annotated[str, Field(max_length=16)]
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    output_expires_after: ExpiresAfter | None = None
    priority: Annotated[int, Field(ge=-1, le=1)] = 0
    webhook_url: Annotated[str, Field(max_length=2048)] | None = None


@dataclass(frozen=True, slots=True)
class InputLine:
    """One line of an input file. `body` is not checked but for its model."""

    custom_id: str
    model: str
    body: dict[str, Any]

    @property
    def raw(self) -> bytes:
        """The body as a request has it."""
        return to_json(self.body)


def window_seconds(window: str, shortest: float) -> int:
    """`24h`, `30m` or `45s` in seconds. Raises InvalidRequest."""
    match = _WINDOW.fullmatch(window)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not shortest <= seconds <= _WINDOW_SECONDS_MAX:
        raise InvalidRequest(
            f"`completion_window` is `24h`, or shorter such as `2h`, `30m` or `45s`, but at least {shortest:g} s.",
            param="completion_window",
            code="invalid_value",
        )
    return seconds


def parse_line(data: bytes, endpoint: str) -> InputLine:
    """The line `data` of a file for `endpoint`. Raises InvalidRequest, whose message does not quote the line's body."""
    try:
        fields = from_json(data, allow_inf_nan=False)
    except ValueError:
        raise InvalidRequest("The line is not valid JSON in UTF-8.", code="invalid_json_line") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("The line is not a JSON object.", code="invalid_json_line")
    if len(fields) != len(_FIELDS) or fields.keys() != _FIELDS:
        _explain_fields(fields)
    custom_id, body = fields["custom_id"], fields["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= CUSTOM_ID_CHARS_MAX or "\0" in custom_id:
        raise InvalidRequest(
            f"`custom_id` is a text of 1 to {CUSTOM_ID_CHARS_MAX} characters, none of them NUL.",
            param="custom_id",
            code="invalid_custom_id",
        )
    if fields["method"] != "POST":
        raise InvalidRequest("`method` is `POST`.", param="method", code="invalid_method")
    if fields["url"] != endpoint:
        raise InvalidRequest(f"`url` is the endpoint of the batch, `{endpoint}`.", param="url", code="mismatched_url")
    if not isinstance(body, dict):
        raise InvalidRequest("`body` is a JSON object.", param="body", code="invalid_body")
    if body.get("stream") is True:
        raise InvalidRequest("A line of a batch cannot be streamed.", param="body.stream", code="stream_not_supported")
    if endpoint.startswith(_OF_MEDIA):
        _refuse_job(body)
    return InputLine(custom_id, _model(body), body)


def _refuse_job(body: dict[str, Any]) -> None:
    """A line has its batch, which has a job and tells somebody; the `background` of a picture may be its backdrop."""
    for name, asked in (("background", body.get("background") is True), ("webhook_url", bool(body.get("webhook_url")))):
        if asked:
            raise InvalidRequest(f"A line of a batch has no `{name}`.", param=f"body.{name}", code="invalid_body")


def _explain_fields(fields: dict[str, Any]) -> None:
    """Raise for the first field that is unknown or missing."""
    for name in fields:
        if name not in _FIELDS:
            raise InvalidRequest(
                f"Unrecognized field `{name[:_SHOWN_CHARS_MAX]}` in the line.",
                param=name[:_SHOWN_CHARS_MAX],
                code="unknown_field",
            )
    for name in sorted(_FIELDS - fields.keys()):
        raise InvalidRequest(f"The line has no `{name}`.", param=name, code="missing_required_parameter")


def _model(body: dict[str, Any]) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("`body` has no `model`.", param="body.model", code="missing_required_parameter")
    return model


def prefix_of(line: InputLine) -> bytes:
    """The beginning of the prompt that other lines may share; empty where it is too short to matter.

    A long system prompt is one by itself; otherwise the first kilobyte of all that is said.
    """
    instructions = line.body.get("instructions")
    if isinstance(instructions, str) and len(instructions) >= PREFIX_CHARS_MIN:
        return _long_enough(instructions)
    messages = line.body.get("messages")
    if not isinstance(messages, list):
        prompt = line.body.get("prompt")
        return _long_enough(prompt[:_PREFIX_CHARS_MAX]) if isinstance(prompt, str) else b""
    said = ""
    for message in messages:
        if not isinstance(message, dict):
            return b""
        content = message.get("content")
        text = content if isinstance(content, str) else to_json(content).decode()
        if message.get("role") in ("system", "developer") and len(text) >= PREFIX_CHARS_MIN:
            return _long_enough(said + text)
        said += text[:_PREFIX_CHARS_MAX]
        if len(said) >= _PREFIX_CHARS_MAX:
            break
    return _long_enough(said[:_PREFIX_CHARS_MAX])


def _long_enough(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass") if len(text) >= PREFIX_CHARS_MIN else b""


def line_id(batch_id: str, number: int) -> str:
    """The id of the output or error line of an input line: always the same, whoever writes it."""
    return "batch_req_" + hashlib.sha256(f"{batch_id}:{number}".encode()).hexdigest()[:32]


def answer_line(line_id: str, custom_id: str, request_id: str, body: bytes) -> bytes:
    """The output line of a request that was answered; `body` is the JSON that it would have got online."""
    head = to_json({"id": line_id, "custom_id": custom_id})[:-1]
    response = to_json({"status_code": 200, "request_id": request_id})[:-1]
    return b'%b,"response":%b,"body":%b},"error":null}\n' % (head, response, body)


def refusal_line(line_id: str, custom_id: str, request_id: str, error: ForebayError) -> bytes:
    """The error line of a request that was wrong, with the answer that it would have got online."""
    response = {"status_code": error.status, "request_id": request_id, "body": body_of(error)}
    return to_json({"id": line_id, "custom_id": custom_id, "response": response, "error": None}) + b"\n"


def failure_line(line_id: str, custom_id: str | None, code: str, message: str) -> bytes:
    """The error line of a request that has no answer."""
    error = {"code": code, "message": message}
    return to_json({"id": line_id, "custom_id": custom_id, "response": None, "error": error}) + b"\n"
