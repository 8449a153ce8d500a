"""`forebay edit` as a person and as a script run it, against a real server."""

import io
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from PIL import Image, ImageDraw

from tests.integration.test_cli_batch import ON_TERMINAL, forebay
from tests.support.jobs import until_ended
from tests.support.server import Server, eventually, serving
from tests.support.terminal import CTRL_C, on_terminal

CONFIG = """
default_models = false
[jobs]
watch_seconds = 0.05
[models.text]
engine = "fake"
preload = true
[models.text.options]
capabilities = ["chat"]
[models.telea]
engine = "opencv"
[models.fake]
engine = "fake"
preload = true
slots = 4
[models.fake.options]
capabilities = ["image_edit", "image_generation"]
steps = 3
"""
SLOW = "[[fake token_ms=300]]"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    async with serving(CONFIG) as running:
        yield running
        assert "request.bug" not in running.log


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With an image and a mask that is white in the middle."""
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(tmp_path / "photo.png")
    mask = Image.new("L", (96, 64), 0)
    ImageDraw.Draw(mask).rectangle((32, 16, 63, 47), fill=255)
    mask.save(tmp_path / "mask.png")
    return tmp_path


MASKED = ("edit", "photo.png", "--mask", "mask.png", "--mask-mode", "white")


def changed(folder: Path, name: str) -> tuple[bool, bool]:
    """Whether anything inside, and anything outside of the mask is not as in the image."""
    before, after = (Image.open(folder / each).convert("RGB") for each in ("photo.png", name))
    assert before.size == after.size
    mask = Image.open(folder / "mask.png").tobytes()
    pairs = zip(mask, *(zip(*[iter(each.tobytes())] * 3, strict=True) for each in (before, after)), strict=True)
    apart = {bool(inside) for inside, old, new in pairs if old != new}
    return True in apart, False in apart


async def test_what_the_mask_marks_is_changed_by_the_first_model_that_edits(server: Server, folder: Path) -> None:
    ended = await forebay(server, *MASKED, "--prompt", "a fox", "-o", "out.png", "--seed", "7", folder=folder)
    assert (ended.status, ended.out) == (0, ""), ended.err
    assert changed(folder, "out.png") == (True, False)
    assert "painting, 3 steps" in ended.err
    assert "Wrote out.png." in ended.err
    assert "The same again: --model fake --seed 7 --steps 3" in ended.err
    again = await forebay(server, *MASKED, "--prompt", "a fox", "-o", "again.png", "--seed", "7", folder=folder)
    assert again.status == 0, again.err
    assert (folder / "again.png").read_bytes() == (folder / "out.png").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["again.png", "mask.png", "out.png", "photo.png"]


async def test_a_model_without_prompts_needs_none(server: Server, folder: Path) -> None:
    ended = await forebay(server, *MASKED, "--model", "telea", "-o", "filled.webp", folder=folder)
    assert ended.status == 0, ended.err
    assert Image.open(folder / "filled.webp").format == "WEBP"
    refused = await forebay(server, *MASKED, "--model", "telea", "--steps", "4", "-o", "more.png", folder=folder)
    assert refused.status == 1
    assert "The model telea knows no steps. Leave `steps` out." in refused.err
    assert not (folder / "more.png").exists()


async def test_several_pictures_are_numbered_and_none_is_written_over(server: Server, folder: Path) -> None:
    several = (*MASKED, "--prompt", "a fox", "-n", "2", "--steps", "1", "-o", "made.jpg")
    ended = await forebay(server, *several, folder=folder)
    assert ended.status == 0, ended.err
    assert [Image.open(folder / f"made-{number}.jpg").format for number in (1, 2)] == ["JPEG", "JPEG"]
    assert (folder / "made-1.jpg").read_bytes() != (folder / "made-2.jpg").read_bytes()
    (folder / "made-1.jpg").unlink()
    (folder / "made-2.jpg").write_text("mine")
    refused = await forebay(server, *several, folder=folder)
    assert (refused.status, refused.err) == (
        1, "forebay: made-2.jpg is there already. Give --force to write over it, or another --output.\n",
    )  # fmt: skip
    assert (folder / "made-2.jpg").read_text() == "mine"
    assert not (folder / "made-1.jpg").exists()
    forced = await forebay(server, *several, "--force", folder=folder)
    assert forced.status == 0, forced.err
    assert Image.open(io.BytesIO((folder / "made-2.jpg").read_bytes())).format == "JPEG"


async def test_what_goes_wrong_is_a_sentence(server: Server, folder: Path) -> None:
    (folder / "noise.png").write_bytes(b"no image at all" * 100)
    for arguments, said in (
        (("edit", "nothing.png", "--prompt", "x", "-o", "a.png"), "nothing.png cannot be read: No such file"),
        ((*MASKED, "--prompt", "x"), "Say where the picture goes with --output."),
        ((*MASKED, "--prompt", "x", "-o", "a.gif"), "a.gif is no name of a picture. End it in .png, .jpg or .webp."),
        ((*MASKED, "--prompt", "x", "-o", "photo.png", "--force"), "photo.png is there already."),
        ((*MASKED, "--prompt", "x", "-o", "a.png", "--size", "big"), "Invalid value for 'size': write a size as"),
        ((*MASKED, "-o", "a.png"), "Missing required parameter: 'prompt'."),
        ((*MASKED, "--prompt", "x", "-o", "a.png", "--model", "text"), "The model text does not serve image_edit."),
        (("edit", "noise.png", "--prompt", "x", "-o", "a.png"), "The image cannot be used. It is no PNG,"),
        ((*MASKED, "--prompt", "x", "-o", "none/a.png"), "There is no folder none."),
        ((*MASKED, "--prompt", "[[fake crash_at=2]]", "-o", "a.png"), "The engine died while it was working"),
    ):
        ended = await forebay(server, *arguments, folder=folder)
        assert ended.status == 1, arguments
        assert said in ended.err
        assert "Traceback" not in ended.err
    assert not (folder / "a.png").exists()


async def test_what_is_handed_in_goes_on_alone(server: Server, folder: Path) -> None:
    ended = await forebay(server, *MASKED, "--prompt", "a fox", "--background", folder=folder)
    assert ended.status == 0, ended.err
    job_id = ended.out.strip()
    assert re.fullmatch(r"job_[0-9a-f]{32}", job_id)
    assert (await until_ended(server, job_id))["status"] == "completed"
    printed = await forebay(server, "jobs", "result", job_id, folder=folder)
    assert printed.status == 0, printed.err
    assert json.loads(printed.out)["data"]


async def test_a_bar_shows_the_steps_and_ctrl_c_stops(server: Server, folder: Path) -> None:
    slow = ("--prompt", SLOW, "--steps", "100", "-o", "never.png", "--url", server.url)
    async with on_terminal(*MASKED, *slow, environment=ON_TERMINAL, folder=folder) as terminal:
        await terminal.wait_for(r"painting.*?[1-9][0-9]*/100")
        terminal.press(CTRL_C)
        await terminal.wait_for(r"Stopped\. What was not finished is cancelled\.")
        assert await terminal.ended() == 130
    assert not (folder / "never.png").exists()

    async def nothing_runs() -> bool:
        return await server.load() == (0, 0)

    await eventually(nothing_runs, within_seconds=10, what="the engine to stop")
