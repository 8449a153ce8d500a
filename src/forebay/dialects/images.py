"""What a request says about its images: where each one is, before anybody has looked at it.

It holds the reference alone, and refuses to fetch or to judge.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of a request: a `url` (`data:`, http or https), or the id of an uploaded file.

    `param` is its place in the body; with `low` a small version will do.
    """

    param: str
    url: str | None = None
    file_id: str | None = None
    low: bool = False
