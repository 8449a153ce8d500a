"""Three hundred images and masks that are bad or odd: each a clear refusal or the right picture, and nothing else harmed."""

import asyncio
import io
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from forebay.dialects.imaging import ImageRules, ImageTask, MaskPlan
from forebay.errors import CallerError
from forebay.media.pictures import Inputs, Pictures, Prepared
from tests.support.bad_images import INVALID, LARGE, Case, bad_images, good, hole
from tests.support.image_program import PROGRAM
from tests.support.listening import pictures
from tests.support.memory import growth, of_family
from tests.support.picture_requests import send
from tests.support.processes import programs
from tests.support.server import FAKE, serving

SEED = 20_261_121
MIB = 2**20
GREEN = (0, 255, 0)
RULES = ImageRules(edge_max=64, edge_factor=8)
STATUS = {INVALID: 400, LARGE: 413}
SENT_OVER_HTTP = 40


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return list(bad_images(SEED))


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Pictures]:
    async with pictures(tmp_path) as one:
        yield one
        assert list((tmp_path / "pictures").iterdir()) == []
    assert not programs(PROGRAM)


@asynccontextmanager
async def _sent(made: Pictures, case: Case) -> AsyncIterator[Inputs]:
    async with AsyncExitStack() as stack:
        image = await stack.enter_async_context(made.spool())
        await image.write(case.image)
        if case.mask is None:
            yield Inputs((image,))
            return
        mask = await stack.enter_async_context(made.spool(mask=True))
        await mask.write(case.mask)
        yield Inputs((image,), mask)


async def _came_of(made: Pictures, case: Case) -> str | None:
    """The code of the refusal; none for a picture, which is looked at."""
    task = ImageTask("edit", "a", mask_plan=MaskPlan(case.mode), rules=RULES)
    async with _sent(made, case) as inputs:
        try:
            async with asyncio.timeout(60):
                ready = await made.prepare(inputs, task)
        except CallerError as error:
            assert error.code in case.codes, (case.name, str(error))
            assert error.status == STATUS[error.code]
            assert case.param in {None, error.param}, (case.name, error.param, str(error))
            assert " cannot be used. " in str(error) or " is too large. " in str(error) or "Send one as" in str(error)
            return error.code
        assert None in case.codes, f"{case.name} was taken"
        if case.pixels is not None:
            await _check(made, inputs, task, ready, case)
        return None


async def _check(made: Pictures, inputs: Inputs, task: ImageTask, ready: Prepared, case: Case) -> None:
    """What is green where it was marked, and as it was elsewhere."""
    assert case.pixels is not None
    assert case.marked is not None
    painted = bytes(GREEN) * ready.size.pixels
    picture = await made.finish(inputs, task, ready.size, painted, preview=False)
    image = Image.open(io.BytesIO(picture.data))
    assert image.size == case.pixels.shape[1::-1], case.name
    found = np.asarray(image)
    assert found.shape == case.pixels.shape, case.name
    assert (found[case.marked][:, :3] == GREEN).all(), case.name
    difference = np.abs(found[~case.marked].astype(int) - case.pixels[~case.marked])
    assert not difference.size or difference.mean() <= case.near, (case.name, difference.mean())
    if case.profile_matters:
        assert image.info.get("icc_profile") == case.profile, case.name


async def test_three_hundred_images_and_masks(made: Pictures, cases: list[Case]) -> None:
    assert len(cases) >= 300
    assert len({case.name for case in cases}) == len(cases)
    first = Case("first", good(), hole())
    assert await _came_of(made, first) is None
    before, came = programs(PROGRAM), Counter[str | None]()
    async with growth(of_family) as grown:
        for case in cases:
            came[await _came_of(made, case)] += 1
    print(f"{len(cases)} cases: {came}, {grown.bytes / MIB:.0f} MiB more at most")
    assert set(came) == {None, INVALID, LARGE}
    assert grown.bytes <= 512 * MIB
    assert await _came_of(made, first) is None
    assert programs(PROGRAM) == before, "no program had to be replaced"


async def test_some_of_them_over_http(cases: list[Case]) -> None:
    """Those with a mask: the fake engine needs none."""
    async with serving(FAKE) as server:
        for case in cases[:: len(cases) // SENT_OVER_HTTP]:
            if case.mask is None:
                continue
            status, text = await send(server, ("image", case.image), ("mask", case.mask), mask_mode=case.mode)
            assert status in {200 if code is None else STATUS[code] for code in case.codes}, (case.name, text[:300])
        status, text = await send(server, ("image", good()), ("mask", hole()))
        assert status == 200, text
        assert "Traceback" not in server.log
        assert "request.bug" not in server.log
        assert "engine.died" not in server.log
