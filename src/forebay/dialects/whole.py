"""The shape of answers that an engine sends as one JSON body.

It refuses to relay: such an answer is put together by somebody who has all of it.
"""

from forebay.dialects.answer import Progress
from forebay.dialects.openai.call import Call
from forebay.dialects.openai.events import Generation
from forebay.errors import EngineGarbled

WHOLE_BYTES_MAX = 256 * 2**20  # 2,048 vectors of 16,384 numbers, as base64


class WholeGatherer:
    """Collects the bytes of an engine's answer as they are."""

    def __init__(self) -> None:
        self.progress = Progress()
        self._body = bytearray()  # in one piece: memory for thousands of small ones would never be given back

    def feed(self, data: bytes) -> None:
        """Take in `data`. Raises EngineGarbled where it is more than an answer can be."""
        if len(self._body) + len(data) > WHOLE_BYTES_MAX:
            raise EngineGarbled("The engine's answer is larger than this server takes in. Ask for less at once.")
        self._body += data

    def body(self) -> bytes:
        """The whole answer."""
        return bytes(self._body)


class Whole(Generation):
    """Errors are OpenAI's; the body is the engine's own, for whoever puts the answer together."""

    def gatherer(self, call: Call) -> WholeGatherer:  # type: ignore[override]  # no stream to put together
        """For a whole body."""
        return WholeGatherer()


WHOLE = Whole()
