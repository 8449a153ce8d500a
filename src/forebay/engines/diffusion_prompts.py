"""What the last prompts mean to a model, so that the pictures of one prompt need it to be read once.

It refuses to guess: what it remembers was asked for in the very same words, and in the same batch.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

_KEPT_MAX = 8  # of the largest models 8 MB each


class Remembered:
    """A function that reads prompts, and what it gave for the last ones. One thread may use it."""

    def __init__(self, read: Callable[..., Any]) -> None:
        self._read = read
        self._known: OrderedDict[str, Any] = OrderedDict()

    def __call__(self, *args: Any, **more: Any) -> Any:
        """What `read` gives."""
        key = repr((args, sorted(more.items())))
        found = self._known.pop(key, None)
        if found is None:
            found = self._read(*args, **more)
        self._known[key] = found
        if len(self._known) > _KEPT_MAX:
            self._known.popitem(last=False)
        return found

    def forget(self) -> None:
        """Give the memory back."""
        self._known.clear()
