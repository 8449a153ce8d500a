"""The events of a streamed transcription, and the shape of answers about recordings.

It refuses to tell who spoke before it is known: those events come at the end, after the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from forebay.dialects.openai.audio_formats import (
    TOKENS_PER_SECOND,
    Look,
    Written,
    logprobs_of,
    segments_of_speakers,
    written,
)
from forebay.dialects.openai.events import Generation
from forebay.inference import Usage
from forebay.speech import Segment, Transcript


@dataclass(frozen=True, slots=True)
class SpeechShape(Generation):
    """How the answer about one recording is written."""

    form: str
    look: Look

    def written(self, transcript: Transcript) -> Written:
        """The whole answer."""
        return written(transcript, self.form, self.look)

    def events(self) -> "TextEvents":
        """For a stream."""
        return TextEvents(self.form, self.look)


class TextEvents:
    """Writes the events of one transcription; the deltas put together are the text."""

    def __init__(self, form: str, look: Look) -> None:
        self._form = form
        self._look = look
        self._begun = False
        self._space = ""  # at the end of what was told: it belongs to the text only if something follows

    def told(self, segments: Sequence[Segment]) -> bytes:
        """What was said next; may be nothing."""
        text = self._space + "".join(segment.text for segment in segments)
        text = text if self._begun else text.lstrip()
        delta = text.rstrip()
        if not delta:
            self._space = text
            return b""
        self._begun, self._space = True, text[len(delta) :]
        event: dict[str, Any] = {"type": "transcript.text.delta", "delta": delta}
        if self._look.logprobs:
            event["logprobs"] = logprobs_of(segments)
        return _event(event)

    def ended(self, transcript: Transcript) -> bytes:
        """Who said what, where that was asked, and the end."""
        events = segments_of_speakers(transcript) if self._form == "diarized_json" else []
        used = usage_in_tokens(transcript)
        done: dict[str, Any] = {"type": "transcript.text.done", "text": transcript.text}
        if transcript.language is not None:
            done["languages"] = [{"code": transcript.language}]
        if self._look.logprobs:
            done["logprobs"] = logprobs_of(transcript.segments)
        done["usage"] = {  # the event has no usage by time
            "type": "tokens",
            "input_tokens": used.prompt_tokens,
            "input_token_details": {"audio_tokens": used.prompt_tokens, "text_tokens": 0},
            "output_tokens": used.completion_tokens,
            "total_tokens": used.total_tokens,
        }
        return b"".join(map(_event, [*events, done]))


def usage_in_tokens(transcript: Transcript) -> Usage:
    """What a recording counts for where tokens are counted."""
    return Usage(
        round(transcript.duration * TOKENS_PER_SECOND), sum(len(segment.tokens) for segment in transcript.segments)
    )


def _event(event: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % to_json(event)
