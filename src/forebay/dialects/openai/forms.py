"""The forms that a text or its tokens may have in a body: one or several, as text or as token ids.

It refuses to try all forms on millions of items, which would take minutes: the first item decides.
"""

from typing import Annotated, Any

from pydantic import Field

TOKEN_IDS_MAX = 1_048_576

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = Annotated[tuple[Token, ...], Field(min_length=1, max_length=TOKEN_IDS_MAX, fail_fast=True)]


def form_of(value: Any) -> str:
    """The tag of a form: `str`, `texts`, `tokens` or `token_lists`."""
    if not isinstance(value, list | tuple):
        return "str"
    first = value[0] if value else ""
    return "texts" if isinstance(first, str) else "token_lists" if isinstance(first, list | tuple) else "tokens"
