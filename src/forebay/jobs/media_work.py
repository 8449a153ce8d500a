"""What jobs about recordings and pictures share: the rooms that they work in, and why one has to wait.

It refuses to know what is done with the media.
"""

from dataclasses import dataclass, replace

from forebay.blobs.blobs import Blobs
from forebay.clock import Clock, new_id
from forebay.dialects.openai.call import Call
from forebay.errors import InvalidRequest, ModelNotReady, Overloaded, ShuttingDown
from forebay.jobs.admission import Admission
from forebay.jobs.outcome import Snoozed
from forebay.metering.jobs import JobMeter
from forebay.replicas.calls import Calls
from forebay.store.jobs import JobStore
from forebay.store.media_jobs import MediaJobStore
from forebay.telemetry import Metrics

WAITS = (ModelNotReady, Overloaded, ShuttingDown)

_PULLING_SECONDS = 10.0
_BUSY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class MediaRooms:
    """Where they are worked on."""

    jobs: JobStore
    store: MediaJobStore
    blobs: Blobs
    calls: Calls
    admission: Admission
    meter: JobMeter
    clock: Clock
    metrics: Metrics

    async def compute(self, part: Call) -> bytes:
        """Run one request to an engine under a name of its own. Raises what `Admission.run` does."""
        named = replace(part, request=replace(part.request, id=new_id("req")))
        return (await self.admission.run(named)).body

    async def close(self, job_id: str) -> None:
        """Remove what came with a job that has ended, and what it has made in vain."""
        await self.store.close(self.blobs, job_id)


def later(trouble: ModelNotReady | Overloaded | ShuttingDown) -> Snoozed:
    """Others go on meanwhile, and what is kept stays."""
    if isinstance(trouble, ModelNotReady):
        return Snoozed(_PULLING_SECONDS)
    if isinstance(trouble, Overloaded):
        return Snoozed(trouble.retry_after_seconds or _BUSY_SECONDS)
    return Snoozed(0)


def gone(what: str) -> InvalidRequest:
    """What came with the request is no longer there: a `what`."""
    return InvalidRequest(f"The {what} went when its job ended. Send it again as a new request.", code=f"{what}_gone")
