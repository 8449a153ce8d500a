"""A server that everybody uses for a while holds no more at the end than in the middle, and is no slower.

Chat, embeddings, rerank, speech and images online, batches, jobs of speech and images in the background with webhooks that
tell of their end, all at once. What finished is kept for seconds only, so that the tables come to rest as well. OpenCV is
real; the other engines are fakes, whose pace does not change, so that what drifts is the server. Half a minute here, half
an hour with `--prove`; `SECONDS` may be three minutes where there is time for that.
"""

import pytest

from tests.support.server import Server, serving
from tests.support.soak import NETWORK, Seen, soak

SECONDS, PROVE_SECONDS = 30.0, 1800.0
CONFIG = f"""
default_models = false
[jobs]
keep_seconds = 4
prune_seconds = 1
[responses]
keep_seconds = 4
[outbound]
allowed_networks = ["{NETWORK}/32"]
[models.fake]
engine = "fake"
preload = true
slots = 8
[models.embedder]
engine = "fake"
preload = true
slots = 8
options.capabilities = ["embedding"]
[models.ranker]
engine = "fake"
preload = true
slots = 8
options.capabilities = ["rerank"]
[models.whisper]
engine = "fake"
preload = true
slots = 4
[models.opencv]
engine = "opencv"
preload = true
"""
FLAT = 1.05
# What a quarter may have more of at its quietest moment: work that is always under way. Of a few rows 5 % would be none.
SLACK = {"bytes of the server": 2**20, "bytes of the engines": 2**20, "file descriptors": 8, "threads": 4, "tasks": 8}
ROWS_SLACK = 12
KEPT_FOR_A_DAY = (
    "rows of idempotency_keys"  # one for each batch, and for each recording and picture, which are always the same
)
# In half a minute a slice has a handful of requests, so its p99 is its slowest: bounds that only a leak of time would break.
DRIFT, DRIFT_SHORT = 1.1, 1.5
DRIFT_SECONDS, DRIFT_SECONDS_SHORT = 0.025, 0.15
ONLINE_MIN = {"chat": 60, "embeddings": 60, "rerank": 40, "speech": 20, "images": 15}
BACKGROUND_MIN = {"batch": 10, "speech in the background": 8, "images in the background": 8}
MIN_SECONDS = 60.0  # in which so many are done at least; in less time as large a share


def check_flat(seen: Seen) -> None:
    """Nothing grows from the third quarter of the time to the fourth."""
    for what in seen.looks.keys() - {KEPT_FOR_A_DAY}:
        middle, end = seen.quarters(what)
        slack = ROWS_SLACK if what.startswith("rows of ") else SLACK.get(what, 0)
        assert end <= middle * FLAT + slack, (what, middle, end, seen.looks[what])
    assert seen.looks[KEPT_FOR_A_DAY][-1][1] <= len(seen.done["batch"]) + 2


def check_pace(seen: Seen, drift: float, seconds: float) -> None:
    """Nobody who waits online waits longer in the fourth quarter than in the third; what is done meanwhile may."""
    for kind in ONLINE_MIN:
        middle, end = seen.slowest(kind)
        assert end <= middle * drift + seconds, (kind, middle, end)


async def check_health(server: Server) -> None:
    """Nobody died, nothing was given up, and no work is left."""
    for model in ("fake", "embedder", "ranker", "whisper", "opencv"):
        assert await server.load(model) == (0, 0)
        assert await server.metric("forebay_engine_deaths_total", model=model) == 0
        assert await server.metric("forebay_engine_starts_total", model=model) == 1
    assert not (await server.get("/v1/files"))["data"], "everybody has tidied up"


@pytest.mark.timeout(PROVE_SECONDS + 600)
async def test_a_server_that_is_used_for_long_is_as_it_was(prove: bool) -> None:
    async with serving(CONFIG) as server:
        seconds = PROVE_SECONDS if prove else SECONDS
        seen = await soak(server, seconds)
        done = {kind: len(each) for kind, each in seen.done.items()}
        share = min(1.0, seconds / MIN_SECONDS)
        assert all(done[kind] >= share * least for kind, least in {**ONLINE_MIN, **BACKGROUND_MIN}.items()), done
        for what in seen.looks:
            print(what, *(f"{value:.0f}" for value in seen.quarters(what)))
        for kind in ONLINE_MIN:
            print(kind, done[kind], *(f"{1000 * value:.0f} ms" for value in seen.slowest(kind)))
        check_flat(seen)
        check_pace(seen, DRIFT if prove else DRIFT_SHORT, DRIFT_SECONDS if prove else DRIFT_SECONDS_SHORT)
        await check_health(server)
