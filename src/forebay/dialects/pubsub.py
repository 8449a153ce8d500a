"""What a platform pushes: the envelope of a Pub/Sub message, and the order for an edit that is in it.

It refuses an order that says how its answer is to be sent, for nobody waits for one, and one whose results would take the
place of what they are made of. What the platform adds to the envelope is passed over; of an order every field is known.
"""

import binascii
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AliasChoices, ConfigDict, Field
from pydantic_core import from_json

from forebay.dialects.imaging import Format
from forebay.dialects.openai.call import Wire, parse
from forebay.errors import CallerError, InvalidRequest

_ID_CHARS_MAX = 256
_ID = r"^[!-~]+$"  # printable ASCII without spaces: no database minds it
_ATTRIBUTES_MAX = 100  # as the platform has it
_NAME_CHARS_MAX = 1024
_ANSWERED = ("stream", "partial_images", "response_format", "webhook_url", "n", "images")
_FORMATS: Mapping[str, Format] = {".png": "png", ".webp": "webp"}
_NOTIFICATION = "eventType"  # what a store's own notifications have

Name = Annotated[str, Field(min_length=1, max_length=_NAME_CHARS_MAX)]


class Tolerant(Wire):
    """A part of what the platform writes: fields that nobody here knows are passed over."""

    model_config = ConfigDict(extra="ignore")


class Message(Tolerant):
    """One message. `data` is base64; the platform writes its id in two ways."""

    data: Annotated[str, Field(min_length=1)]
    message_id: Annotated[
        str,
        Field(max_length=_ID_CHARS_MAX, pattern=_ID, validation_alias=AliasChoices("messageId", "message_id")),
    ]
    publish_time: Annotated[
        str | None, Field(max_length=64, validation_alias=AliasChoices("publishTime", "publish_time"))
    ] = None
    attributes: (
        Annotated[
            dict[Annotated[str, Field(max_length=256)], Annotated[str, Field(max_length=1024)]],
            Field(max_length=_ATTRIBUTES_MAX),
        ]
        | None
    ) = None
    ordering_key: Annotated[
        str | None, Field(max_length=1024, validation_alias=AliasChoices("orderingKey", "ordering_key"))
    ] = None


class Envelope(Tolerant):
    """The body of POST /v1/intake/pubsub. `delivery_attempt` is there where the subscription has a dead-letter policy."""

    message: Message
    subscription: Annotated[str, Field(max_length=_ID_CHARS_MAX, pattern=_ID)]
    delivery_attempt: Annotated[int | None, Field(ge=0, le=2**31, validation_alias=AliasChoices("deliveryAttempt"))] = (
        None
    )


class _Objects(Tolerant):
    """The objects that an order names; the rest of it is the body of an edit."""

    image: Name
    mask: Name | None = None
    output: Name | None = None
    preview: Name | None = None


@dataclass(frozen=True, slots=True)
class Defaults:
    """What an order that says nothing of it means. The names are those beside the image."""

    model: str | None
    output_name: str
    preview_name: str
    compression: int


@dataclass(frozen=True, slots=True)
class ObjectNames:
    """Where an image and its mask are, and where the results go."""

    image: str
    mask: str | None
    output: str
    preview: str

    @property
    def by_field(self) -> dict[str, str]:
        """Every object by the field that names it."""
        found = {"image": self.image, "mask": self.mask, "output": self.output, "preview": self.preview}
        return {field: name for field, name in found.items() if name is not None}


@dataclass(frozen=True, slots=True)
class Order:
    """An edit of an object, and the body of that edit without its images."""

    names: ObjectNames
    body: Mapping[str, Any]


def data_of(message: Message) -> bytes:
    """What is in a message. Raises InvalidRequest."""
    try:
        return b64decode(message.data, validate=True)
    except (binascii.Error, ValueError):
        raise _refusal("The data of a message is base64.", "") from None


def order_of(data: bytes, attributes: Mapping[str, str], defaults: Defaults) -> Order:
    """The order that `data` is. Raises InvalidRequest, which names the field of `data`, or nothing for all of it."""
    try:
        fields = from_json(data, allow_inf_nan=False)
    except ValueError:
        raise _refusal("The data of a message is JSON in UTF-8.", "") from None
    if not isinstance(fields, dict):
        raise _refusal("The data of a message is a JSON object.", "")
    if _NOTIFICATION in attributes and "image" not in fields:
        raise _refusal(
            "A notification of the store itself does not say what is to be done. Publish a message that names the "
            "object as `image` and has the fields of an edit.",
            "image",
        )
    for field in _ANSWERED:
        if fields.get(field) is not None:
            raise _refusal(f"A pushed message makes one result and has no `{field}`.", field)
    if isinstance(fields.get("background"), bool):
        raise _refusal("A pushed message is worked on in the background anyway. Leave this out.", "background")
    named = parse(_Objects, data)
    output = named.output or beside(named.image, defaults.output_name)
    preview = named.preview or beside(named.image, defaults.preview_name)
    names = ObjectNames(named.image, named.mask, output, preview)
    _check_apart(names)
    return Order(names, _body(fields, output, defaults))


def beside(image: str, name: str) -> str:
    """The name of an object in the same place as `image`; `{stem}` in it is that of the image."""
    folder, slash, last = image.rpartition("/")
    stem = last.rpartition(".")[0] or last
    return folder + slash + name.replace("{stem}", stem)


def _body(fields: Mapping[str, Any], output: str, defaults: Defaults) -> dict[str, Any]:
    """The edit, written as the name of its result says where the order does not."""
    body = {name: value for name, value in fields.items() if name not in _Objects.model_fields}
    if body.get("model") is None and defaults.model is not None:
        body["model"] = defaults.model
    if body.get("output_format") is None:
        body["output_format"] = _FORMATS.get(PurePosixPath(output).suffix.lower(), "jpeg")
    if body.get("output_compression") is None and body["output_format"] != "png":
        body["output_compression"] = defaults.compression
    return body


def _check_apart(names: ObjectNames) -> None:
    """Refuse results in the place of each other, or of what they are made of: a second attempt would find those instead."""
    before: list[str] = []
    for field, name in names.by_field.items():
        if field in {"output", "preview"} and name in before:
            raise _refusal(f"`{field}` would take the place of another object of this message. Name another.", field)
        before.append(name)


def within(error: CallerError, place: str) -> CallerError:
    """The same error with its field named from `place` on."""
    error.param = f"{place}.{error.param}" if error.param else place
    return error


def _refusal(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param or None, code="invalid_value")
