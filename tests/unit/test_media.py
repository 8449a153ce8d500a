"""Who gets a turn when many images are to be looked at, and from which hosts they may come."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from forebay.clock import SystemClock
from forebay.config import MediaSettings, OutboundSettings
from forebay.dialects.images import ImageRef
from forebay.errors import InvalidRequest, NotFound, Overloaded, PayloadTooLarge, Unreachable
from forebay.media.images import Images
from forebay.media.medium import Medium
from forebay.outbound import Outbound
from tests.support.images import data_url, encoded, picture

FILE = (ImageRef("messages[0]", file_id="file-1"),)


class Slow:
    """Files that come when they are told to, and are not there then."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.reads = 0

    async def read(self, _medium: Medium, project: str, file_id: str, bytes_max: int) -> bytes:
        self.reads += 1
        await self.go.wait()
        raise NotFound


def images(stored: Slow, **settings: int) -> Images:
    clock = SystemClock()
    return Images(MediaSettings(**settings), Outbound(OutboundSettings(), clock), stored, clock)


async def begun(*tasks: asyncio.Task[tuple[str, ...]]) -> None:
    """Let them run until they wait."""
    for _ in range(10):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


async def test_the_front_door_has_a_bounded_line_and_batches_wait_as_long_as_it_takes() -> None:
    stored = Slow()
    room = images(stored, fetches_at_once=4, checks_at_once=2)
    online = [asyncio.create_task(room.inline(FILE, "p", patient=False)) for _ in range(64)]
    await begun(*online)
    assert stored.reads == 6, "the others wait with nothing but their bodies in memory"
    with pytest.raises(Overloaded) as refused:
        await room.inline(FILE, "p", patient=False)
    assert refused.value.retry_after_seconds == 1
    lines = [asyncio.create_task(room.inline(FILE, "p", patient=True)) for _ in range(100)]
    await begun(*lines)
    assert stored.reads == 8, "half of the fetches are for batches at most"
    stored.go.set()
    ended = await asyncio.gather(*online, *lines, return_exceptions=True)
    assert {type(each) for each in ended} == {NotFound}
    assert {getattr(each, "param", None) for each in ended} == {"messages[0]"}


async def test_a_slow_host_holds_up_no_image_that_is_already_here() -> None:
    asked = asyncio.Queue[str]()

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.put_nowait(host)
        return await asyncio.get_running_loop().create_future()

    clock = SystemClock()
    settings = MediaSettings(fetch_hosts=["*"], fetches_at_once=3, checks_at_once=1, fetch_timeout_seconds=300)
    room = Images(settings, Outbound(OutboundSettings(), clock, resolve), Slow(), clock)
    there = (ImageRef("messages[0]", url="http://slow.example/a.png"),)
    slow = [asyncio.create_task(room.inline(there, "p", patient=False)) for _ in range(32)]
    for _ in range(3):
        await asyncio.wait_for(asked.get(), 10)
    await begun(*slow)
    try:
        with pytest.raises(Overloaded):
            await room.inline(there, "p", patient=False)
        async with asyncio.timeout(120):  # less than a fetch may take
            assert await room.inline((ImageRef("messages[0]", url=data_url(picture())),), "p", patient=False)
        assert asked.empty()
    finally:
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        await room.close()


async def test_images_that_grow_in_our_hands_have_a_bound_for_each_request() -> None:
    tile = np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    file = encoded(Image.fromarray(np.tile(tile, (8, 8, 1))), "WEBP", lossless=True)
    assert len(file) < 100_000
    refs = [ImageRef(f"messages[{number}]", url=data_url(file, "webp")) for number in range(3)]
    room = images(Slow(), inlined_bytes_max=4_000_000)
    try:
        assert sum(map(len, await room.inline(refs[:2], "p", patient=False))) > 2_000_000
        with pytest.raises(PayloadTooLarge) as refused:
            await room.inline(refs, "p", patient=False)
        assert (refused.value.code, refused.value.param) == ("media_too_large", "messages[2]")
    finally:
        await room.close()


async def test_a_request_without_images_waits_for_nothing() -> None:
    stored = Slow()
    room = images(stored)
    assert await room.inline((), "p", patient=False) == ()


@pytest.mark.parametrize(
    ("hosts", "url", "allowed"),
    [
        (["images.example.com"], "http://images.example.com/a.png", True),
        (["Images.Example.com"], "https://IMAGES.example.com:8443/a.png", True),
        (["images.example.com"], "http://example.com/a.png", False),
        (["images.example.com"], "http://images.example.com.evil.net/a.png", False),
        (["images.example.com"], "http://evil-images.example.com/a.png", False),
        (["*.example.com"], "http://a.b.example.com/", True),
        (["*.example.com"], "http://example.com/", False),
        (["*.example.com"], "http://evilexample.com/", False),
        (["*"], "http://anything.example/", True),
        ([], "http://anything.example/", False),
        (["example.com"], "http://example.com@evil.net/", False),
    ],
)
async def test_an_image_is_fetched_from_hosts_that_are_named(hosts: list[str], url: str, *, allowed: bool) -> None:
    asked = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return []

    way = Outbound(OutboundSettings(), SystemClock(), resolve)
    with pytest.raises(Unreachable if allowed else InvalidRequest):
        await way.get(url, hosts=hosts, timeout_seconds=1, bytes_max=1)
    assert bool(asked) is allowed, "a host that is not named is not even looked up"
