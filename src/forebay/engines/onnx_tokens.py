"""Texts to tokens, by the tokenizer.json of a model.

It refuses a text that is longer than the model can take, unless it was asked to cut it, and token ids that there are not.
"""

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from forebay.engines.connection import Refused
from forebay.engines.start import refuse_to_start

_INLINE_CHARS = 4096
_PIECE_CHARS = 65_536
_CHARS_PER_TOKEN = 16  # a text with more of them than that for all tokens of the model is looked at by its beginning
_PAD_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")

Pair = tuple[tuple[int, ...], tuple[int, ...]]


class Tokens:
    """A tokenizer with the limit of a model."""

    def __init__(self, path: str, tokens_max: int) -> None:
        """Ends the process when there is no such tokenizer."""
        self._max = tokens_max
        self._tokenizer = _load(path)
        self._cutter = _load(path)
        self._cutter.enable_truncation(tokens_max)
        self._vocabulary = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.pad = next(filter(None, map(self._tokenizer.token_to_id, _PAD_TOKENS)), 0)
        self._before, self._after = self._frame()

    def _frame(self) -> Pair:
        """The special tokens that stand before and after a text."""
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a").ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return tuple(full[:start]), tuple(full[start + len(bare) :])
        return (), ()

    def of_text(self, text: str) -> tuple[int, ...]:
        """The tokens of one text, whatever its length."""
        return tuple(self._tokenizer.encode(text).ids)

    async def tokenize(self, text: str) -> tuple[int, ...]:
        """The tokens of one text, computed in a thread when it is long."""
        return self.of_text(text) if len(text) <= _INLINE_CHARS else await asyncio.to_thread(self.of_text, text)

    async def of_inputs(
        self, inputs: Sequence[str | list[int]], prefix: str, *, truncate: bool
    ) -> list[tuple[int, ...]]:
        """The tokens of each input. Raises Refused."""
        texts = [
            await self._beginning(prefix + each, "input", index, truncate=truncate)
            for index, each in enumerate(inputs)
            if isinstance(each, str)
        ]
        encoded = iter(await self._encode(texts, truncate=truncate))
        found = []
        for index, each in enumerate(inputs):
            tokens = next(encoded).ids if isinstance(each, str) else self._framed(each, index, truncate=truncate)
            self._check_length(len(tokens), "input", index)
            found.append(tuple(tokens))
        return found

    async def of_pairs(self, query: str, documents: Sequence[str], tokens_max: int, *, truncate: bool) -> list[Pair]:
        """The tokens of the query with each document, and which of the two each token is of. Raises Refused.

        Nothing is encoded where the query, once for each document, is more than `tokens_max` could be.
        """
        query = await self._beginning(query, "query", None, truncate=truncate)
        if len(query) * len(documents) > tokens_max * _CHARS_PER_TOKEN:
            raise Refused(
                400, f"`query` is too long for {len(documents)} documents. Send several requests.", param="query"
            )
        if not truncate:
            self._check_length(len(await self.tokenize(query)), "query", None)
        pairs = [
            (query, await self._beginning(each, "documents", index, truncate=truncate))
            for index, each in enumerate(documents)
        ]
        found = []
        for index, encoding in enumerate(await self._encode(pairs, truncate=truncate)):
            self._check_length(len(encoding.ids), "documents", index)
            found.append((tuple(encoding.ids), tuple(encoding.type_ids)))
        return found

    async def _encode(self, texts: Sequence[str | tuple[str, str]], *, truncate: bool) -> list[Encoding]:
        """In pieces, so that whoever gave up is noticed soon; in a thread unless it is little."""
        tokenizer = self._cutter if truncate else self._tokenizer
        if sum(map(_chars, texts)) <= _INLINE_CHARS:
            return [tokenizer.encode(text) if isinstance(text, str) else tokenizer.encode(*text) for text in texts]
        found: list[Encoding] = []
        for piece in _pieces(texts):
            found += await asyncio.to_thread(tokenizer.encode_batch, piece)
        return found

    async def _beginning(self, text: str, param: str, index: int | None, *, truncate: bool) -> str:
        """As much of a text as the model could take, and more: the tokens of all of it would be a hundred times its size.

        Raises Refused where that much shows that the text is too long and it may not be cut.
        """
        chars = self._max * _CHARS_PER_TOKEN
        while chars < len(text):
            start = text[:chars]
            if (tokens := len(await asyncio.to_thread(self.of_text, start))) > 2 * self._max:
                if truncate:
                    return start
                raise self._too_long(param, index, f"at least {tokens}", n_prompt_tokens_min=tokens)
            chars *= 2
        return text

    def _framed(self, tokens: list[int], index: int, *, truncate: bool) -> tuple[int, ...]:
        """Token ids with the special tokens of a text, unless they have them."""
        self._check_ids(tokens, index)
        before, after = self._before, self._after
        if (
            before + after
            and tuple(tokens[: len(before)]) == before
            and tuple(tokens[len(tokens) - len(after) :]) == after
        ):
            tokens = tokens[len(before) : len(tokens) - len(after)]
        room = max(0, self._max - len(before) - len(after))
        return (*before, *(tokens[:room] if truncate else tokens), *after)

    def _check_ids(self, tokens: Sequence[int], index: int) -> None:
        if min(tokens) < 0 or max(tokens) >= self._vocabulary:
            raise Refused(
                400,
                f"A token id is not in the vocabulary of {self._vocabulary} tokens.",
                param="input",
                index=index,
            )

    def _check_length(self, length: int, param: str, index: int | None) -> None:
        if length > self._max:
            raise self._too_long(param, index, str(length), n_prompt_tokens=length)

    def _too_long(self, param: str, index: int | None, length: str, **counted: Any) -> Refused:
        which = f"`{param}`" if index is None else f"`{param}[{index}]`"
        return Refused(
            400,
            f"{which} has {length} tokens, and this model takes {self._max} at most. Shorten it, or send `truncate` as "
            "true.",
            "context_length_exceeded",
            param=param,
            index=index,
            n_ctx=self._max,
            **counted,
        )


def _load(path: str) -> Tokenizer:
    # The library raises the one class that nobody should catch, so its error is looked at and not caught.
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(Tokenizer.from_file, path)
    if (error := loading.exception()) is not None:
        refuse_to_start(f"The tokenizer {Path(path).name} cannot be read: {str(error).replace(path, '…')[:300]}")
    tokenizer = loading.result()
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _chars(text: str | tuple[str, str]) -> int:
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])


def _pieces(texts: Sequence[str | tuple[str, str]]) -> Iterator[list[str | tuple[str, str]]]:
    left = iter(texts)
    for first in left:
        piece, chars = [first], _chars(first)
        while chars < _PIECE_CHARS and (more := list(islice(left, 1))):
            piece += more
            chars += _chars(more[0])
        yield piece
