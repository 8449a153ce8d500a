"""What a call may use at most: never less than what a model can come to count."""

import json
import math
from typing import Any

import pytest
from PIL import Image

from forebay.config import MediaSettings
from forebay.dialects.anthropic.messages import MessagesBody, messages_call
from forebay.dialects.openai.call import Call, Context, parse
from forebay.dialects.openai.chat import ChatBody, chat_call
from forebay.dialects.openai.completions import CompletionBody, completion_call
from forebay.dialects.openai.responses import ResponseBody, response_call
from forebay.engines.image_check import _encode
from forebay.errors import QuotaExceeded
from forebay.metering.estimate import at_most
from forebay.metering.meter import Meter
from forebay.quotas import Amounts, Use, parse_quotas
from tests.support.clock import FakeClock
from tests.support.images import data_url, part, picture

WRITTEN = 10


def context(*images: str) -> Context:
    return Context("req_1", "p", None, WRITTEN, 4, images=images)


def chat(content: Any, *images: str, **fields: Any) -> Call:
    body = {"model": "m", "messages": [{"role": "user", "content": content}], **fields}
    return chat_call(parse(ChatBody, json.dumps(body).encode()), context(*images))


def shown(*images: str) -> Call:
    return chat([part(each) for each in images], *images)


def of_images(call: Call) -> int:
    """What is reserved for images alone."""
    text = len(call.request.body) - call.image_chars
    return at_most(call).tokens - WRITTEN - text - (at_most(chat("Hi")).tokens - WRITTEN - len(chat("Hi").request.body))


def encoded(width: int, height: int, kind: str, **info: Any) -> str:
    """As the program that checks images writes it."""
    image = Image.new("RGB", (width, height))
    image.info.update(info)
    return _encode(image, lossless=kind == "PNG").decode()


def patches(width: int, height: int) -> int:
    """Tokens of a model like Qwen2.5-VL, which sees an image in its full size."""
    return math.ceil(width / 28) * math.ceil(height / 28) + 2


def tiles(width: int, height: int) -> int:
    """Tokens of a model like Phi-4-multimodal, which sees it in tiles of 448 pixels and once more in small."""
    columns, rows = math.ceil(width / 448), math.ceil(height / 448)
    return 256 * columns * rows + 16 * rows + 256 + 16 + 1


EDGE = MediaSettings().edge_pixels_max
SIZES = [(EDGE, EDGE), (EDGE, EDGE // 2), (1, 200), (449, 897), (4096, 3000), (16_384, 82), (6000, 6000)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_of_any_size_takes_no_more_than_is_reserved(size: tuple[int, int], kind: str) -> None:
    found = of_images(shown(encoded(*size, kind)))
    assert max(patches(*size), tiles(*size), 64 * 65) <= found
    assert found <= max(4224, tiles(*size) + 1)


def test_a_comment_of_the_sender_hides_no_size() -> None:
    plain, large = encoded(EDGE, EDGE, "JPEG"), encoded(EDGE, EDGE, "JPEG", comment=b"x" * 65_000)
    assert len(large) > len(plain) + 65_000
    assert of_images(shown(large)) == of_images(shown(plain)) > patches(EDGE, EDGE)


def test_each_image_counts_and_none_that_a_text_names() -> None:
    one = data_url(picture())
    assert of_images(shown(one, one)) == 2 * of_images(shown(one))
    quoted = f'{{"url":"{one}"}}'
    beside = chat([{"type": "text", "text": quoted}, part(one)], one)
    assert of_images(beside) == of_images(shown(one))


@pytest.mark.parametrize("content", ["AAAA" * 9000, "", "A", "AA==", "iVBORw0KGgo=", "!"])
def test_an_image_without_a_size_takes_a_token_for_each_character(content: str) -> None:
    url = "data:image/jpeg;base64," + content
    assert of_images(shown(url)) == len(url)


def test_every_door_reserves_the_same_for_an_image() -> None:
    url = encoded(EDGE, EDGE, "PNG")
    source = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
    content = [{"type": "image", "source": source}]
    message = {"model": "m", "max_tokens": WRITTEN, "messages": [{"role": "user", "content": content}]}
    asked = {"model": "m", "input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}
    calls = (
        messages_call(parse(MessagesBody, json.dumps(message).encode()), context(url)),
        response_call(parse(ResponseBody, json.dumps(asked).encode()), context(url)),
    )
    assert [of_images(call) for call in calls] == [of_images(shown(url))] * 2


async def test_what_a_template_adds_beyond_the_margin_counts_and_the_next_is_refused() -> None:
    call = chat("Hi")
    reserved = at_most(call)
    meter = Meter(parse_quotas([f"tokens={reserved.tokens * 2}/day"]), FakeClock())
    under_way = [await meter.reserve("p", "k", "m", "chat", lambda: reserved) for _ in range(2)]
    for each in under_way:
        each.settle(Use(1, reserved.tokens + 1))
    assert meter.headers("p")["x-quota-remaining-tokens"] == "0"
    with pytest.raises(QuotaExceeded):
        await meter.reserve("p", "k", "m", "chat", lambda: Amounts(1, 1))


def test_a_chat_has_a_margin_for_what_its_template_adds_and_a_prompt_has_none() -> None:
    call = chat("Hi", n=3)
    assert at_most(call).tokens == 3 * (len(call.request.body) + 256 + WRITTEN)
    body = json.dumps({"model": "m", "prompt": "Hi"}).encode()
    prompt = completion_call(parse(CompletionBody, body), context())
    assert at_most(prompt).tokens == len(prompt.request.body) + WRITTEN
