"""Batches from outside, through a real server with the fake engine."""

from tests.support.batches import finished, line, results, submit
from tests.support.server import serving

FAST = """
default_models = false
[models.fake]
engine = "fake"
preload = true
slots = 8
"""


async def test_every_line_is_answered_once() -> None:
    async with serving(FAST) as server:
        batch = await submit(server, [line(f"id-{i}", f"Line {i}. [[fake echo=1]]") for i in range(1000)])
        assert batch["status"] == "validating"
        ended = await finished(server, batch["id"])
        assert ended["status"] == "completed", ended
        output, errors = await results(server, ended)
        assert not errors
        for each in output:
            number = each["custom_id"].removeprefix("id-")
            assert each["error"] is None
            assert each["response"]["status_code"] == 200
            assert each["response"]["body"]["choices"][0]["message"]["content"].strip() == f"Line {number}."
