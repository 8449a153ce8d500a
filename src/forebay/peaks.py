"""What models came to: the noun by which the engine room and the filing room speak of measured memory.

It refuses to know who measures and where it is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory that one replica of a model was seen to hold on one device while it worked on inputs of a size.

    `fingerprint` stands for all of its settings that matter to it; `input_class` is 0 for no input at all. The time is in
    seconds since the epoch: when it last came to about as much.
    """

    model: str
    fingerprint: str
    device: str
    input_class: int
    peak_bytes: int
    load_seconds: float
    measured_at: float


class PeakStore(Protocol):
    """Where peaks last."""

    async def load(self, since: float) -> list[Peak]:
        """All that were measured at `since` or later; older ones are forgotten."""
        ...

    async def save(self, peaks: Sequence[Peak], since: float) -> None:
        """Keep each where it is more than what is known, or where what is known is older than `since`."""
        ...


def input_class(size: int) -> int:
    """The class of an input of `size` bytes: those from 2^(n-1) up to 2^n - 1 are in class n."""
    return size.bit_length()
