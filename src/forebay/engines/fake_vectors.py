"""What the fake engine makes of inputs and documents: vectors and scores that nothing but their content decides.

Texts that share words have similar vectors. It refuses what a real engine would: an input that is longer than the context
and may not be cut. An input may hold a directive of `fake_answers`; its `tokens` and all that shapes text mean nothing here.
"""

import hashlib
import json
import math
import zlib
from array import array
from base64 import b64encode
from dataclasses import dataclass
from typing import Any

from forebay.engines.fake_answers import Directive, Refused, read_directive

_NOISE = 0.05


@dataclass(slots=True)
class Reading:
    """One request for vectors or scores, read. It has the parts of a job that the engine asks for."""

    directive: Directive
    contents: list[list[str]]
    wanted: dict[str, Any]
    name: str
    dimensions: int
    choices: int = 1
    stream: bool = False

    @property
    def tokens(self) -> list[int]:
        """Of each content; a real one adds its marks to an empty one, too."""
        return [max(1, len(words)) for words in self.contents]

    def answer(self) -> bytes:
        """The whole answer."""
        total = sum(self.tokens)
        head = {"model": self.name, "tokens": self.tokens, "usage": {"prompt_tokens": total, "total_tokens": total}}
        if "query" in self.wanted:
            query = str(self.wanted["query"]).split()
            return json.dumps({**head, "scores": [_logit(query, words) for words in self.contents]}).encode()
        size = self.wanted.get("dimensions") or self.dimensions
        data = [
            {"object": "embedding", "index": index, "embedding": b64encode(_vector(words, size)).decode()}
            for index, words in enumerate(self.contents)
        ]
        return json.dumps({**head, "object": "list", "data": data}).encode()


def read_reading(body: bytes, name: str, context: int, dimensions: int, tokens_max: int) -> Reading:
    """Check the request, or raise Refused."""
    try:
        wanted = json.loads(body)
        field = "documents" if "documents" in wanted else "input"
        texts = wanted[field]
        contents = [each.split() if isinstance(each, str) else [str(token) for token in each] for each in texts]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused(400, "The body is not a request for vectors or scores.") from None
    directive = read_directive(" ".join(each for each in [*texts, wanted.get("query", "")] if "[[fake" in str(each)))
    if directive.status:
        raise Refused(directive.status, f"Asked to answer {directive.status}.", "server_error")
    longest = max(map(len, contents), default=0)
    if directive.context_error or (longest > context and not wanted.get("truncate")):
        message = f"input ({longest} tokens) exceeds the available context size ({context} tokens)"
        place = {"param": field, "index": max(range(len(contents)), key=lambda index: len(contents[index]), default=0)}
        raise Refused(400, message, "exceed_context_size_error", n_prompt_tokens=longest, n_ctx=context, **place)
    total = sum(len(words[:context]) for words in contents)
    if total > tokens_max:
        raise Refused(400, f"The request has {total} tokens, and this model takes {tokens_max} at once.", param=field)
    if (wanted.get("dimensions") or 1) > dimensions:
        raise Refused(400, f"There are {dimensions} dimensions.", param="dimensions")
    return Reading(directive, [words[:context] for words in contents], wanted, name, dimensions)


def _vector(words: list[str], size: int) -> bytes:
    """The sum of a direction for each word, of length 1."""
    total = [0.0] * size
    for word in words or [""]:
        direction = hashlib.shake_128(word.encode("utf-8", "surrogatepass")).digest(size)
        total = [value + byte - 127.5 for value, byte in zip(total, direction, strict=True)]
    length = math.hypot(*total) or 1.0
    return array("f", [value / length for value in total]).tobytes()


def _logit(query: list[str], words: list[str]) -> float:
    """More for every word of the query that is in the document."""
    shared = len(set(query) & set(words)) / len(set(query) or {""})
    return 8 * shared - 4 + _NOISE * (zlib.crc32(" ".join(words).encode("utf-8", "surrogatepass")) % 1000) / 1000
