"""Mutated requests to every route of responses: the server neither dies nor grows, and no fault is ours."""

import copy
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from urllib.parse import urlencode

import pytest
from yarl import URL

from tests.faults.test_fuzz import CONTENT_TYPES, ODD_HEADERS, check_refusal, swarm, unharmed
from tests.support.mutate import EVIL, RESPONSES, spoiled
from tests.support.server import FAKE, Server, serving

CONFIG = (
    FAKE
    + """
slots = 4
queue_places = 1000
options = { tools = true, vision = true }
[http]
body_bytes_max = 250000
[responses]
live_per_project_max = 1000
[jobs]
backoff_seconds_min = 0.05
"""
)
PLACE = "/v1/responses"
ODD_IDS = (
    *("resp_nothing", "resp_", "0", "-1", "null", "..", "%2e%2e", "%00", "%ff", "a%2Fb", "a%0d%0aX-Odd:%201", "input_items"),
    *("%E2%80%AE", "'; DROP TABLE responses; --".replace(" ", "%20"), "x" * 300, "x" * 6000, "cancel", "*", "%25s"),
)  # fmt: skip
NUMBERS = (
    *("0", "1", "-1", "2147483647", "2147483648", "9" * 400, "1.5", "1e3", "NaN", "0x1", "\u0663"),
    *("", " ", "true", "a"),
)
NAMES = (
    *("stream", "stream", "stream", "stream", "starting_after", "starting_after", "after", "after", "limit", "limit"),
    *("order", "include[]", "include_obfuscation", "", "\x00", "a" * 300),
)
METHODS = (*("GET",) * 10, "POST", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS")


async def created(server: Server) -> list[str]:
    """The ids of responses of every kind that is kept."""
    found = []
    for more in ({}, {"background": True}, {"background": True, "stream": True}):
        body = {"model": "fake", "input": "Hi [[fake tokens=3]]", **more}
        async with server.session.post(server.url + PLACE, json=body, headers=server.headers) as response:
            text = await response.text()
            assert response.status == 200, text
            found.append("resp_" + text.partition('"resp_')[2].partition('"')[0])
    return found


def value_for(chance: random.Random, name: str, known: list[str]) -> str:
    """A value that may be right for a parameter of a query, or is of another kind."""
    right = {
        "stream": ("true", "false"),
        "starting_after": ("0", "3", "-1"),
        "after": known,
        "limit": ("1", "100"),
        "order": ("asc", "desc"),
    }
    if name in right and chance.random() < 0.5:
        return chance.choice(right[name])
    return chance.choice((*NUMBERS, str(chance.choice(EVIL))[:2000]))


def odd_place(chance: random.Random, known: list[str]) -> str:
    """A path below that of responses, with a query."""
    place = chance.choice((*known, *known, *known, chance.choice(ODD_IDS), "resp_" + chance.randbytes(16).hex()))
    place += chance.choice(("", "", "/input_items", "/input_items", "/cancel", "/nothing", "/"))
    pairs = [(name, value_for(chance, name, known)) for name in chance.choices(NAMES, k=chance.randrange(4))]
    query = urlencode(pairs, errors="surrogatepass") + chance.choice(("", "", "", "&&==", "&stream", "%zz"))
    return f"{PLACE}/{place}?{query}" if query else f"{PLACE}/{place}"


def bug(server: Server) -> str:
    """The end of what the server says of the first bug that it met."""
    return server.log.partition("request.bug")[2][:20_000].partition("\n20")[0][-3_000:]


async def look(server: Server, method: str, place: str, data: bytes | None) -> str:
    """One request to a response that is or is not there; the outcome."""
    url = URL(server.url + place, encoded=True)
    async with server.session.request(
        method, url, data=data, headers=server.headers, allow_redirects=False
    ) as response:
        text = (await response.read()).decode()
        assert response.status < 500, (method, place, bug(server))
        if response.status < 400:
            assert response.status in {200, 307}, (method, place, response.status, text)
            return "ok"
        if method == "HEAD":
            return "head"
        return check_refusal(response.status, text)


async def create(server: Server, data: bytes, chance: random.Random) -> str:
    """POST `data`; the outcome."""
    headers = {**server.headers, "Content-Type": chance.choice(CONTENT_TYPES), **chance.choice(ODD_HEADERS)}
    async with server.session.post(server.url + PLACE, data=data, headers=headers) as response:
        text = (await response.read()).decode()
        assert response.status < 500, (data[:3000], bug(server))
        return "ok" if response.status == 200 else check_refusal(response.status, text)


@pytest.mark.timeout(900)
async def test_mutated_requests(prove: bool) -> None:
    count = 20_000 if prove else 3_000
    chance = random.Random(20264)
    async with serving(CONFIG) as server:
        made, seen = Counter[str](), Counter[str]()
        async with unharmed(server) as batch_done:
            for _ in range(10):
                known = [each for _ in range(5) for each in await created(server)]
                bodies = [spoiled(chance, copy.deepcopy(chance.choice(RESPONSES))) for _ in range(count // 10)]
                made += await swarm([partial(create, server, each, chance) for each in bodies], 8)
                jobs: list[Callable[[], Awaitable[str]]] = []
                for _ in range(count // 20):
                    data = chance.choice((None, None, b"{}", chance.randbytes(50)))
                    jobs.append(partial(look, server, chance.choice(METHODS), odd_place(chance, known), data))
                seen += await swarm(jobs, 8)
                batch_done()
        print(f"made: {dict(made)}; seen: {dict(seen)}")
        assert made.total() == count
        assert {"ok", "invalid_json", "invalid_value", "missing_required_parameter"} <= set(made)
        assert {"ok", "not_found", "invalid_request", "not_cancellable", "stream_not_supported"} <= set(seen)
