"""Lines of batches that are about recordings: fetch -> decode -> stretch after stretch -> the JSON that is asked for.

It refuses formats that are no JSON, and more recordings at once than a worker has room for.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from forebay.config import AudioSettings
from forebay.dialects.openai.audio_events import SpeechShape, usage_in_tokens
from forebay.dialects.openai.call import Call
from forebay.errors import InvalidRequest, Preempted
from forebay.media.recordings import Recordings
from forebay.quotas import Amounts, Use, milliseconds
from forebay.scheduler.gather import Gathered
from forebay.scheduler.transcriber import Compute, Kept, Transcriber
from forebay.speech import Segment

_FORMATS = ("json", "verbose_json", "diarized_json")


class SpeechLines:
    """Answers calls about recordings whole, for all lines of one worker."""

    def __init__(self, recordings: Recordings, transcriber: Transcriber, settings: AudioSettings) -> None:
        self._recordings = recordings
        self._transcriber = transcriber
        self._places = asyncio.Semaphore(settings.lines_at_once)

    async def answer(self, call: Call, compute: Compute, take: Callable[[Amounts], Awaitable[None]]) -> Gathered:
        """The answer to `call`; `compute` runs one stretch, again from its beginning where its place was taken back.

        `take` is told how much it takes before anything is computed, and may refuse.

        Raises InvalidRequest for a format that has no place in a line, what becomes of the recording, and what `compute`
        raises.
        """
        shape, speech = call.shape, call.speech
        assert isinstance(shape, SpeechShape), "these endpoints are about recordings"
        assert speech is not None, "so is the call"
        if shape.form not in _FORMATS:
            raise InvalidRequest(
                f"The `response_format` of a line is JSON: one of {', '.join(_FORMATS)}.",
                param="response_format",
                code="invalid_value",
            )
        assert speech.source is not None, "no recording comes with a line"
        async with self._places, self._recordings.spool() as spool:
            await self._recordings.fetch(spool, speech.source, call.request.project)
            async with self._recordings.decode(spool) as recording:
                await take(Amounts(1, audio_ms=milliseconds(recording.seconds)))
                finished = _Finished()
                while True:
                    try:
                        transcript = await self._transcriber.run(
                            call, recording, compute, finished, tuple(finished.stretches)
                        )
                        break
                    except Preempted:
                        continue
        written = await asyncio.to_thread(shape.written, transcript)
        used = Use(1, audio_ms=milliseconds(transcript.duration))
        return Gathered(written.body, usage_in_tokens(transcript), used)


class _Finished:
    """Keeps what is finished while the line runs, so that nothing of it is done again when a place is taken back."""

    def __init__(self) -> None:
        self.stretches: list[Kept] = []

    def stage(self, stage: str, percent: float) -> None:
        """A line has no progress of its own."""

    def segments(self, new: Sequence[Segment]) -> None:
        """Nobody hears them before the end."""

    async def kept(self, stretch: Kept) -> None:
        """A stretch is finished."""
        self.stretches.append(stretch)
