"""Images in chat, through a real server to an engine that tells what reached it."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.support.batches import finished, line, results, submit, upload
from tests.support.images import bombs, data_url, encoded, message, part, picture, png
from tests.support.memory import forget_peak, peak
from tests.support.receiver import Answer, receiving
from tests.support.server import FAKE, Server, serving

CONFIG = f"""
{FAKE}
[models.fake.options]
vision = true
[models.blind]
engine = "fake"
"""
MIB = 2**20

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG, environment={"FOREBAY_LOG_FORMAT": "json", "FOREBAY_LOG_LEVEL": "debug"}) as one:
        yield one


async def ask(server: Server, *parts: dict[str, Any], key: str | None = None, **fields: Any) -> tuple[int, Any]:
    """Status and JSON of a chat that shows `parts`."""
    body = {"model": "fake", "messages": [message(parts)], **fields}
    headers = {"Authorization": f"Bearer {key or server.key}"}
    async with server.session.post(f"{server.url}/v1/chat/completions", json=body, headers=headers) as response:
        return response.status, await response.json()


async def seen(server: Server, *parts: dict[str, Any], **more: Any) -> list[list[str]]:
    """What reached the engine: type, size and checksum of each image."""
    status, answer = await ask(server, *parts, **more)
    assert status == 200, answer
    return [word.split(":") for word in answer["choices"][0]["message"]["content"].split()]


async def refusal(server: Server, *parts: dict[str, Any], **more: Any) -> tuple[int, str, str | None]:
    status, answer = await ask(server, *parts, **more)
    return status, answer["error"]["code"], answer["error"]["param"]


async def test_the_engine_sees_what_our_encoder_wrote(server: Server) -> None:
    plain = picture(64, 48, "red")
    note = PngInfo()
    note.add_text("comment", "hidden")
    noted = encoded(Image.new("RGB", (64, 48), "red"), pnginfo=note, compress_level=0)
    ((kind, size, digest),) = await seen(server, part(data_url(plain)))
    assert (kind, size) == ("png", "64x48")
    assert await seen(server, part(data_url(noted))) == [[kind, size, digest]], "the same picture is the same file"
    assert digest not in {hashlib.sha256(each).hexdigest() for each in (plain, noted)}


async def test_several_images_reach_it_in_their_order(server: Server) -> None:
    sizes = [(10, 20), (30, 40), (50, 60)]
    got = await seen(server, *(part(data_url(picture(*size))) for size in sizes))
    assert [size for _, size, _ in got] == ["10x20", "30x40", "50x60"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
async def test_every_type_that_is_taken(server: Server, kind: str) -> None:
    got = await seen(server, part(data_url(picture(kind=kind), kind.lower())))
    assert got[0][0] == ("png" if kind in {"PNG", "GIF"} else "jpeg")


async def test_detail_low_and_a_large_image_are_scaled_down(server: Server) -> None:
    large = data_url(png(4096, 1024))
    assert (await seen(server, part(large)))[0][1] == "2048x512"
    assert (await seen(server, part(large, detail="high")))[0][1] == "2048x512"
    assert (await seen(server, part(large, detail="low")))[0][1] == "512x128"


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_an_image_is_upright_as_the_camera_was_held(server: Server, orientation: int) -> None:
    """The upright picture is 40 x 20; what a camera stores of it depends on how it was held."""
    upright = Image.new("RGB", (40, 20), "white")
    upright.paste("black", (0, 0, 10, 10))
    turned = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    stored = upright if turned is None else upright.transpose(turned)
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = await seen(server, part(data_url(encoded(upright))))
    assert await seen(server, part(data_url(encoded(stored, "PNG", exif=exif)))) == expected


async def test_an_uploaded_file_is_an_image_for_its_own_project_alone(server: Server) -> None:
    file = await upload(server, picture(12, 34), purpose="vision")
    own = {"type": "file", "file": {"file_id": file["id"]}}
    assert (await seen(server, own))[0][1] == "12x34"
    stranger = await server.create_key("others")
    assert await refusal(server, own, key=stranger) == (404, "not_found", "messages[0].content[1].file.file_id")
    text = await upload(server, b"no image at all", purpose="vision")
    wrong = {"type": "file", "file": {"file_id": text["id"]}}
    assert (await refusal(server, wrong))[:2] == (400, "media_invalid")


async def test_a_model_that_sees_nothing_says_so(server: Server) -> None:
    status, code, _ = await refusal(server, part(data_url(picture())), model="blind")
    assert (status, code) == (400, "capability_not_supported")


async def test_too_many_images_are_refused(server: Server) -> None:
    status, code, param = await refusal(server, *[part(data_url(picture()))] * 17)
    assert (status, code, param) == (400, "invalid_value", "messages[0].content[17].image_url.url")


async def test_image_tokens_are_counted_and_bytes_are_not_tokens(server: Server) -> None:
    _, answer = await ask(server, part(data_url(picture())))
    assert answer["usage"]["prompt_tokens"] > 64


async def test_no_bomb_reaches_the_engine_or_the_servers_memory(server: Server) -> None:
    found = bombs()
    await seen(server, part(data_url(picture())))
    answered, before, engine = server.log.count("event=started"), server.rss(), server.engine_pid()
    assert answered
    forget_peak(server.pid)
    wrong = {}
    for name, (url, expected) in found.items():
        status, code, param = await refusal(server, part(url))
        if (status, code) != ({"media_invalid": 400, "media_too_large": 413}[expected], expected):
            wrong[name] = (status, code)
        assert param == "messages[0].content[1].image_url.url"
    assert not wrong
    print(f"grown {(peak(server.pid) - before) / MIB:.1f} MiB at most")
    assert peak(server.pid) - before <= 100 * MIB
    assert (server.log.count("event=started"), server.engine_pid()) == (answered, engine)
    await seen(server, part(data_url(picture())))


async def test_a_batch_line_with_images(server: Server) -> None:
    good = line("good", "")
    good["body"]["messages"] = [message([part(data_url(picture(21, 22)))])]
    bad = line("bad", "")
    bad["body"]["messages"] = [message([part(bombs()["SVG"][0])])]
    remote = line("remote", "")
    remote["body"]["messages"] = [message([part("http://127.0.0.1:9/x.png")])]
    batch = await finished(server, (await submit(server, [good, bad, remote]))["id"])
    output, errors = await results(server, batch)
    assert output[0]["response"]["body"]["choices"][0]["message"]["content"].startswith("png:21x22:")
    codes = {each["custom_id"]: each["response"]["body"]["error"]["code"] for each in errors}
    assert codes == {"bad": "media_invalid", "remote": "url_not_allowed"}


REMOTE = (
    CONFIG
    + """
[outbound]
allowed_networks = ["127.0.0.2/32"]
[media]
fetch_hosts = ["127.0.0.2", "localhost"]
image_bytes_max = 100000
"""
)


async def test_images_are_fetched_where_the_settings_say_so() -> None:
    async with serving(REMOTE) as server, receiving("127.0.0.2") as host, receiving("127.0.0.3") as other:
        host.then = Answer(200, {"content-type": "text/plain"}, picture(31, 32))
        assert (await seen(server, part(f"{host.url}/a.png")))[0][1] == "31x32"
        assert "authorization" not in host.received[0].headers
        assert await _refused(server, f"{other.url}/a.png") == (400, "url_not_allowed")
        assert await _refused(server, "http://localhost:9/a.png") == (400, "url_not_allowed"), "not a public address"
        assert other.received == []
        for answer, expected in (
            (Answer(302, {"location": "/b.png"}), (400, "media_invalid")),
            (Answer(404), (400, "media_invalid")),
            (Answer(200, body=b"<html>"), (400, "media_invalid")),
            (Answer(200, body=bytes(100_001)), (413, "media_too_large")),
            (Answer(200, endless=True), (413, "media_too_large")),
            (Answer(503), (502, "url_unreachable")),
            (Answer(drop=True), (502, "url_unreachable")),
        ):
            host.then = answer
            assert await _refused(server, f"{host.url}/a.png") == expected, answer


async def test_a_host_that_stalls_is_given_up() -> None:
    async with serving(REMOTE + "fetch_timeout_seconds = 1") as server, receiving("127.0.0.2") as host:
        host.then = Answer(200, stalls=True)
        assert await _refused(server, f"{host.url}/a.png") == (502, "url_unreachable")


async def test_nothing_is_fetched_for_a_caller_who_has_left() -> None:
    async with serving(REMOTE + "fetch_timeout_seconds = 25") as server, receiving("127.0.0.2") as host:
        host.then = Answer(never=True)
        asking = asyncio.create_task(ask(server, part(f"{host.url}/a.png")))
        await host.until(1)
        asking.cancel()
        await asyncio.wait_for(host.left.wait(), 10)
        host.then = Answer(200, body=picture(31, 32))
        assert (await seen(server, part(f"{host.url}/a.png")))[0][1] == "31x32"
        assert "request.bug" not in server.log


async def test_nothing_is_fetched_for_a_key_that_has_used_up_its_rate() -> None:
    async with serving(REMOTE) as server, receiving("127.0.0.2") as host:
        host.then = Answer(200, body=picture())
        key = await server.create_key("slow", "member", "--requests-per-minute", "1")
        assert (await ask(server, part(f"{host.url}/a.png"), key=key))[0] == 200
        body = {"model": "fake", "messages": [message([part(f"{host.url}/b.png")])]}
        headers = {"Authorization": f"Bearer {key}"}
        async with server.session.post(f"{server.url}/v1/chat/completions", json=body, headers=headers) as refused:
            assert refused.status == 429
            assert (await refused.json())["error"]["code"] == "rate_limit_exceeded"
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        image = {"type": "input_image", "image_url": f"{host.url}/c.png"}
        response = {"model": "fake", "input": [{"role": "user", "content": [image]}]}
        async with server.session.post(f"{server.url}/v1/responses", json=response, headers=headers) as refused:
            assert refused.status == 429
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert len(host.received) == 1
        assert "never awaited" not in server.log


async def _refused(server: Server, url: str) -> tuple[int, str]:
    status, code, _ = await refusal(server, part(url))
    return status, code
