"""Runs the call of a batch line, on from what it had written where its place was taken back: the answer is the same.

It refuses to go on where the answer could be another: then the call begins anew.
"""

from collections.abc import Callable

from forebay.config import Settings
from forebay.dialects.openai.call import Call
from forebay.dialects.openai.continued import Continued, Written, can_continue
from forebay.errors import CallerError, ForebayError, Preempted, ServerError
from forebay.jobs.admission import Admission
from forebay.scheduler.gather import Gathered
from forebay.telemetry import Metrics

TOKENS_MIN = 4  # fewer are as soon written again


class Continuation:
    """The way of calls that may be interrupted to their whole answers."""

    def __init__(self, admission: Admission, settings: Settings, metrics: Metrics) -> None:
        self._admission = admission
        self._metrics = metrics
        self._wanted = settings.batches.resume_prefix and settings.scheduler.preempt

    async def run(self, call: Call, *, on_read: Callable[[], None], on_opened: Callable[[], None]) -> Gathered:
        """Wait for a place as long as it takes, and run; on or anew whenever the place was taken back."""
        model = call.request.model
        may = self._wanted and self._admission.continues(model) and can_continue(call)
        before: Written | None = None
        tokens_min = TOKENS_MIN
        while True:
            shape = Continued(before)
            asked = shape.of(call) if may else call
            try:
                return await self._admission.run(asked, yields=may, on_read=on_read, on_opened=on_opened)
            except Preempted:
                if before is not None and shape.refused:
                    # The engine has read these tokens in one step, and may have kept what it made of them.
                    tokens_min = before.tokens + TOKENS_MIN
                before = shape.written(tokens_min) if may else None
            except (CallerError, ServerError) as error:
                if before is None or shape.joined or not _is_refusal(error):
                    raise
                before, may = None, False  # the chat template takes no answer that has begun
            finally:
                self._count(model, shape)

    def _count(self, model: str, shape: Continued) -> None:
        if shape.before is None:
            return
        if shape.joined:
            self._metrics.resumes.labels(model, "resumed").inc()
            self._metrics.resumed_tokens.labels(model).inc(shape.before.tokens)
        elif shape.refused:
            self._metrics.resumes.labels(model, "anew").inc()


def _is_refusal(error: ForebayError) -> bool:
    """Whether the engine has looked at the request and said no: to what it cannot make a prompt of, some say 500."""
    return isinstance(error, CallerError) or error.code == "engine_error"
