"""A job whose pictures are all kept has only to write down what they cost: that counts, before and after, whatever is left."""

import datetime as dt
from types import SimpleNamespace
from typing import Any, cast

from pydantic_core import to_json

from forebay.jobs.image import Asked, ImageWork
from forebay.jobs.kinds import Run
from forebay.jobs.outcome import Done
from forebay.metering.jobs import JobMeter
from forebay.metering.meter import Meter
from forebay.quotas import Amounts, parse_quotas
from forebay.store.job_records import Lease
from forebay.store.media_jobs import Part
from tests.support.clock import FakeClock

NOON = dt.datetime(2026, 11, 30, 12, tzinfo=dt.UTC).timestamp()
_FILE = {"id": "file_1", "bytes": 1, "sha256": "", "content_type": "image/png"}
_KEPT = {
    "picture": _FILE,
    "preview": None,
    "width": 1000,
    "height": 1000,
    "used": {"model": "m", "width": 1000, "height": 1000, "steps": 4},
}


async def test_what_is_painted_is_reserved_until_it_is_written_down() -> None:
    clock = FakeClock(now=NOON)
    meter = Meter(parse_quotas(["megapixel_steps=10/day"]), clock)
    request = SimpleNamespace(model="m", capability="image_generation")
    call = SimpleNamespace(request=request, picture=SimpleNamespace(n=2), otherwise=None, items=None, kind="image")
    job = SimpleNamespace(id="img_1", project_id="a", key_id="k", completed=0, model="m")
    kept = SimpleNamespace(request=Asked(b"{}").written(), path="/v1/images/generations", project_id="a", id="img_1")

    async def found(_job_id: str) -> Any:
        return kept

    async def parts(_job_id: str) -> list[Part]:
        return [Part("painting", image, to_json(_KEPT)) for image in range(2)]

    async def prepare(*_: object, **__: object) -> Any:
        return call

    rooms: Any = SimpleNamespace(
        meter=JobMeter(meter, cast(Any, None)),
        store=SimpleNamespace(get=found, parts=parts),
        calls=SimpleNamespace(prepare=prepare),
        admission=SimpleNamespace(expect=lambda _models: None),
        clock=clock,
    )
    nobody: Any = None
    work = ImageWork(rooms, nobody, nobody, nobody, nobody, cast(Any, SimpleNamespace(keep_seconds=1)))
    lease = cast(Lease, SimpleNamespace(id="img_1", attempt=2, job=job))
    run = Run(lease)
    taken = await meter.reserve("a", "k", "m", "image_generation", lambda: Amounts(1, pixel_steps=5_000_000))
    with run.at_end:
        assert isinstance(await work.perform(lease, run), Done)
        assert meter.headers("a")["x-quota-remaining-megapixel-steps"] == "0", "8 of 10 are painted, 5 taken"
        taken.release()
        assert meter.headers("a")["x-quota-remaining-megapixel-steps"] == "2"
    assert meter.headers("a")["x-quota-remaining-megapixel-steps"] == "2"
