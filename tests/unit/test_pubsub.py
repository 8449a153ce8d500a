"""The envelope of a pushed message and the order in it: what is read, and which field a refusal names."""

import json
from base64 import b64encode
from typing import Any

import pytest

from forebay.dialects.openai.call import parse
from forebay.dialects.pubsub import Defaults, Envelope, beside, data_of, order_of
from forebay.errors import InvalidRequest

DEFAULTS = Defaults("painter", "edited.jpg", "preview.jpg", 95)


def envelope(**changes: Any) -> dict[str, Any]:
    """What the platform sends, with all that it adds."""
    message = {
        "data": b64encode(b'{"image": "a.jpg"}').decode(),
        "messageId": "2070443601311540",
        "message_id": "2070443601311540",
        "publishTime": "2026-11-21T19:13:55.749Z",
        "publish_time": "2026-11-21T19:13:55.749Z",
        "attributes": {"key": "value"},
        "orderingKey": "",
        "something": "new",
        **changes.pop("message", {}),
    }
    return {"message": message, "subscription": "projects/p/subscriptions/s", "deliveryAttempt": 3, "new": 1, **changes}


def read(body: Any) -> Envelope:
    return parse(Envelope, json.dumps(body).encode())


def order(**fields: Any) -> Any:
    return order_of(json.dumps(fields).encode(), {}, DEFAULTS)


def refused_param(function: Any, *arguments: Any, **named: Any) -> str | None:
    with pytest.raises(InvalidRequest) as raised:
        function(*arguments, **named)
    assert str(raised.value).endswith(".")
    return raised.value.param


def test_what_the_platform_sends_is_read_and_what_it_adds_is_passed_over() -> None:
    found = read(envelope())
    assert (found.message.message_id, found.subscription) == ("2070443601311540", "projects/p/subscriptions/s")
    assert (found.delivery_attempt, found.message.attributes) == (3, {"key": "value"})
    assert data_of(found.message) == b'{"image": "a.jpg"}'


def test_either_spelling_will_do_and_most_may_be_missing() -> None:
    found = read({"message": {"data": "e30=", "message_id": "1"}, "subscription": "s"})
    assert (found.message.message_id, found.delivery_attempt, found.message.attributes) == ("1", None, None)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"subscription": "s"}, "message"),
        (envelope(message={"data": None}), "message.data"),
        (envelope(message={"data": ""}), "message.data"),
        (envelope(message={"data": {"image": "a"}}), "message.data"),
        (envelope(message={"messageId": ""}), "message.messageId"),
        (envelope(message={"messageId": 7}), "message.messageId"),
        (envelope(message={"messageId": "x" * 257}), "message.messageId"),
        (envelope(message={"messageId": "a\0b"}), "message.messageId"),
        (envelope(message={"attributes": {"a": 1}}), "message.attributes.a"),
        (envelope(message={"attributes": {str(n): "" for n in range(101)}}), "message.attributes"),
        (envelope(message={"publishTime": 5}), "message.publishTime"),
        (envelope(subscription=""), "subscription"),
        (envelope(subscription="a b"), "subscription"),
        (envelope(deliveryAttempt="3"), "deliveryAttempt"),
        (envelope(deliveryAttempt=-1), "deliveryAttempt"),
    ],
)
def test_a_bad_envelope_is_refused_by_its_field(body: Any, param: str) -> None:
    assert refused_param(read, body) == param


@pytest.mark.parametrize("data", ["e30", "e3 0=", "%%%=", "e30=\n", "ä"])
def test_data_is_base64_and_nothing_else(data: str) -> None:
    assert refused_param(data_of, read(envelope(message={"data": data})).message) is None


def test_results_lie_beside_the_image_where_the_order_names_no_other_place() -> None:
    found = order(image="inbox/7/photo.png", prompt="A red door.")
    assert found.names.by_field == {
        "image": "inbox/7/photo.png",
        "output": "inbox/7/edited.jpg",
        "preview": "inbox/7/preview.jpg",
    }
    assert found.body == {
        "prompt": "A red door.",
        "model": "painter",
        "output_format": "jpeg",
        "output_compression": 95,
    }


def test_an_order_has_its_own_names_model_and_form() -> None:
    found = order(image="a.jpg", mask="m.png", output="x/b.PNG", preview="x/c.jpg", model="other", seed=7)
    assert found.names.by_field == {"image": "a.jpg", "mask": "m.png", "output": "x/b.PNG", "preview": "x/c.jpg"}
    assert found.body == {"model": "other", "seed": 7, "output_format": "png"}
    assert order(image="a", output="b.webp").body["output_format"] == "webp"
    assert order(image="a", output="b.png", output_format="webp", output_compression=5).body == {
        "model": "painter",
        "output_format": "webp",
        "output_compression": 5,
    }


def test_the_stem_of_the_image_may_be_in_the_name() -> None:
    assert beside("a/b/photo.tar.gz", "{stem}-edited.jpg") == "a/b/photo.tar-edited.jpg"
    assert beside("photo", "{stem}.jpg") == "photo.jpg"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "image"),
        ({"image": ""}, "image"),
        ({"image": ["a"]}, "image"),
        ({"image": "x" * 1025}, "image"),
        ({"image": "a", "mask": 5}, "mask"),
        ({"image": "a", "output": ""}, "output"),
        ({"image": "a", "output": "a"}, "output"),
        ({"image": "a", "mask": "m", "output": "m"}, "output"),
        ({"image": "x/edited.jpg"}, "output"),
        ({"image": "a", "output": "b", "preview": "b"}, "preview"),
        ({"image": "a", "preview": "a"}, "preview"),
        ({"image": "a", "background": True}, "background"),
        *(({"image": "a", field: 1}, field) for field in ("stream", "partial_images", "n", "images", "webhook_url")),
    ],
)
def test_a_bad_order_is_refused_by_its_field(fields: dict[str, Any], param: str) -> None:
    assert refused_param(order, **fields) == param


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b"[]", b"5", b'{"image": "a", "seed": NaN}', b"[" * 5000])
def test_what_is_no_object_is_refused_as_a_whole(data: bytes) -> None:
    assert refused_param(order_of, data, {}, DEFAULTS) is None


def test_a_notification_of_the_store_is_told_what_is_missing() -> None:
    resource = json.dumps({"kind": "storage#object", "name": "a.jpg", "bucket": "b"}).encode()
    with pytest.raises(InvalidRequest, match="notification of the store") as raised:
        order_of(resource, {"eventType": "OBJECT_FINALIZE", "objectId": "a.jpg"}, DEFAULTS)
    assert raised.value.param == "image"
