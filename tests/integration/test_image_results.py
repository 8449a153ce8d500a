"""Pictures that are files of their project: under a signed address that ends, and by their ids."""

import asyncio
import base64
import io
import json
import random
import socket
from collections.abc import AsyncIterator, Mapping
from urllib.parse import parse_qs, urlsplit

import aiohttp
import openai
import pytest
import pytest_asyncio
from PIL import Image

from tests.support.images import encoded
from tests.support.jobs import result, until_ended
from tests.support.picture_jobs import EDITS, GENERATIONS, IMAGE, handed_in, pictures_of
from tests.support.picture_requests import as_json, edited, events_of, form
from tests.support.server import FAKE, Server, eventually, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(FAKE) as one:
        yield one
        assert "request.bug" not in one.log


async def fetched(url: str) -> tuple[int, bytes, Mapping[str, str]]:
    """GET without any key."""
    async with aiohttp.ClientSession() as stranger, stranger.get(url) as response:
        return response.status, await response.read(), response.headers


async def test_an_address_shows_the_picture_to_whoever_has_it(server: Server) -> None:
    expected = base64.b64decode((await edited(server))["data"][0]["b64_json"])
    body = await edited(server, response_format="url")
    url = body["data"][0]["url"]
    assert "b64_json" not in body["data"][0]
    assert url.startswith(f"{server.url}/v1/images/results/file_")
    status, data, headers = await fetched(url)
    assert (status, data) == (200, expected)
    assert (headers["x-content-type-options"], headers["content-type"]) == ("nosniff", "image/png")
    assert headers["content-disposition"].startswith("attachment;")
    file = next(each for each in await pictures_of(server) if each["id"] in url)
    assert 3500 < file["expires_at"] - file["created_at"] <= 3600
    await server.client().files.delete(file["id"])
    assert (await fetched(url))[0] == 404


async def test_a_signature_is_for_one_picture_and_one_time(server: Server) -> None:
    urls = [each["url"] for each in (await edited(server, response_format="url", n=2))["data"]]
    first, second = (urlsplit(url) for url in urls)
    query = parse_qs(first.query)
    expires, signature = query["expires"][0], query["signature"][0]
    uploaded = await server.client().files.create(file=("a.png", IMAGE), purpose="vision")
    own = first.path
    wrong = [
        f"{own}?expires={int(expires) + 1}&signature={signature}", f"{own}?expires={expires}&signature={signature[:-1]}",
        f"{own}?expires={expires}&signature={signature}A", f"{own}?expires={expires}", f"{own}?signature={signature}",
        own, f"{own}?expires=&signature=", f"{own}?expires=0{expires}&signature={signature}",
        f"{own}?expires=%2B{expires}&signature={signature}", f"{own}?expires={expires}%00&signature={signature}",
        f"{own}?expires={expires}&signature={signature.swapcase()}", f"{own}?expires={expires}&signature=%ff%fe",
        f"{own}?expires={expires}&signature={'x' * 9000}", f"{own}?expires=nan&signature={signature}",
        f"{second.path}?{first.query}", f"/v1/images/results/{uploaded.id}?{first.query}",
        f"/v1/images/results/nothing?{first.query}", f"{own}%0A{expires}?{first.query}", f"{own}/?{first.query}",
        f"{own}?expires={expires}&signature={signature}&signature=x",
    ]  # fmt: skip
    answers = set()
    for path in wrong:
        status, data, _ = await fetched(server.url + path)
        assert status == 404, path
        if not path.startswith(f"{own}/"):
            answers.add(data)
    assert len(answers) == 1, "nobody learns why"
    assert (await fetched(urls[0]))[0] == 200
    async with server.session.post(urls[0], headers=server.headers) as response:
        assert response.status == 405


async def test_addresses_end_and_may_begin_otherwise() -> None:
    config = FAKE + "[images]\nurl_seconds = 1\n[http]\npublic_url = 'https://pictures.example.com/forebay/'\n"
    async with serving(config) as server:
        _, body = await as_json(server, GENERATIONS, size="64x48", response_format="url")
        url = body["data"][0]["url"]
        beginning = "https://pictures.example.com/forebay"
        assert url.startswith(f"{beginning}/v1/images/results/")
        here = url.replace(beginning, server.url)

        async def gone() -> bool:
            return (await fetched(here))[0] == 404

        await eventually(gone, within_seconds=5, what="the end of the address")


async def test_what_a_reader_has_not_taken_counts_as_held() -> None:
    """The result of a job is read as bytes by one who is slow: there is memory for him alone."""
    size = (1500, 1500)
    noise = encoded(Image.frombytes("RGB", size, random.Random(1).randbytes(3 * size[0] * size[1])))
    hole = Image.new("RGBA", size, (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (16, 16, 400, 400))
    async with serving(f"{FAKE}[images]\nheld_bytes_max = 8388608\n") as server:
        job_id = await handed_in(server, noise, hole=encoded(hole), model="fake")
        assert (await until_ended(server, job_id))["status"] == "completed"
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((urlsplit(server.url).hostname, urlsplit(server.url).port))
            path = f"/v1/jobs/{job_id}/result?format=b64_json"
            slow.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n\r\n".encode())
            assert (await asyncio.to_thread(slow.recv, 12)) == b"HTTP/1.1 200"
            status, body = await result(server, job_id, "b64_json")
            assert (status, json.loads(body)["error"]["code"]) == (429, "queue_full"), body[:200]
            assert (await result(server, job_id, "url"))[0] == 200

        async def free() -> bool:
            return (await result(server, job_id, "b64_json"))[0] == 200

        await eventually(free, what="memory that is given back")


@pytest.mark.parametrize("host", ["x/health?", "a@b", "", "x y", "evil.example.com/#"])
async def test_a_host_that_is_none_begins_no_address(server: Server, host: str) -> None:
    body = {"model": "fake", "prompt": "a", "size": "64x48", "response_format": "url"}
    headers = {**server.headers, "Host": host}
    async with server.session.post(server.url + GENERATIONS, json=body, headers=headers) as response:
        assert response.status == 400, await response.text()


async def test_files_of_pictures(server: Server) -> None:
    body = await edited(server, response_format="file_id", n=2, output_format="jpeg")
    files = [each["file_id"] for each in body["data"]]
    client = server.client()
    for file_id in files:
        content = (await client.files.content(file_id)).read()
        assert Image.open(io.BytesIO(content)).format == "JPEG"
        file = await client.files.retrieve(file_id)
        assert (str(file.purpose), file.filename) == ("image_result", f"{file_id}.jpeg")
        assert file.bytes == len(content)
        assert file.expires_at is not None
        assert file.expires_at - file.created_at > 86_400
    form_data = form({"stream": True, "response_format": "file_id"}, ("image", IMAGE))
    events = await events_of(server, EDITS, form_data)
    assert str((await client.files.retrieve(events[-1]["file_id"])).purpose) == "image_result"
    strange = server.client(api_key=await server.create_key("other"))
    with pytest.raises(openai.NotFoundError, match="There is no such file"):
        await strange.files.retrieve(files[0])
