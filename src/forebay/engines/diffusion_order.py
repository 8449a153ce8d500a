"""What a request to a diffusion engine asks for: read from a body and checked; and how what paints it tells of it.

It refuses what the model cannot do and what is out of bounds, naming the field, before anything is computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from forebay.engines.connection import Refused
from forebay.engines.parted import flag, number, parted, whole
from forebay.pipelines import EDIT, GENERATE, IMAGE_TO_IMAGE
from forebay.pixels import MASK_BYTES, RGB_BYTES, Size

_HEADER_BYTES_MAX = 2**20
_PROMPT_CHARS_MAX = 32_000
_SEED_MAX = 2**32 - 1
_PICTURES_MAX = 64
_PARTIALS_MAX = 3
_WHAT = {EDIT: "fill in a mask", IMAGE_TO_IMAGE: "paint an image anew", GENERATE: "paint from a prompt alone"}


@dataclass(frozen=True, slots=True)
class Rules:
    """What the model can do. `strength_kinds` are those of `kinds` that know it; `rounds_down` says how they count steps."""

    kinds: frozenset[str]
    strength_kinds: frozenset[str]
    factor: int
    edge_max: int
    steps: int
    steps_max: int
    guidance: float | None
    guidance_max: float
    strength: float | None
    takes_negative: bool
    rounds_down: bool


@dataclass(frozen=True, slots=True)
class Settings:
    """What all pictures of a batch have in common."""

    kind: str
    size: Size
    steps: int
    guidance: float | None
    strength: float | None
    partials: int
    has_negative: bool = False
    """Whether there is a negative prompt; to some models an empty one is another than none."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a request asks for."""

    settings: Settings
    prompt: str
    negative_prompt: str
    seeds: tuple[int, ...]
    reproducible: bool
    image: memoryview | None = field(repr=False, default=None)
    mask: memoryview | None = field(repr=False, default=None)


@dataclass(frozen=True, slots=True)
class Row:
    """One picture of a batch."""

    order: Order
    seed: int


class Watch(Protocol):
    """Who follows a batch, called in the thread that paints."""

    def stepped(self, step: int, steps: int) -> bool:
        """A step has ended; whether anybody still wants the pictures."""
        ...

    def partial(self, number: int, pixels: Sequence[bytes]) -> None:
        """How the pictures look now, one for each row."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """A painted picture, and how many steps it took: with less strength than 1 they are fewer than were asked for."""

    pixels: bytes
    steps: int
    notices: tuple[str, ...] = ()


def read_order(body: bytes, rules: Rules, *, edits: bool) -> Order:
    """What a body asks for. Raises Refused."""
    header, pixels = parted(body, _HEADER_BYTES_MAX)
    size = _size(header, "width", "height", rules)
    masked = flag(header, "mask")
    kind = (EDIT if masked else IMAGE_TO_IMAGE) if edits else GENERATE
    if kind not in rules.kinds:
        known = " and ".join(_WHAT[each] for each in sorted(rules.kinds))
        raise Refused(400, f"This model cannot {_WHAT[kind]}; it can {known}.", param="mask" if edits else "model")
    if kind not in rules.strength_kinds and header.get("strength") not in {None, rules.strength}:
        raise Refused(
            400, f"This model knows no `strength` where it is to {_WHAT[kind]}. Leave it out.", param="strength"
        )
    image, mask = _pixels(pixels, size, header.get("images"), masked=masked, edits=edits)
    settings = Settings(
        kind=kind,
        size=size,
        steps=_number_of_steps(header, rules),
        guidance=_given(header, "guidance", rules.guidance, 0, rules.guidance_max),
        strength=_given(header, "strength", rules.strength, 0, 1) if kind in rules.strength_kinds else None,
        partials=whole(0, _PARTIALS_MAX)("partial_images", header.get("partial_images", 0)),
        has_negative=header.get("negative_prompt") is not None,
    )
    _check_strength(settings, rules)
    return Order(
        settings,
        _text(header, "prompt"),
        _negative(header, rules),
        _seeds(header),
        flag(header, "reproducible"),
        image,
        mask,
    )


def _size(header: Mapping[str, Any], wide: str, high: str, rules: Rules) -> Size:
    size = Size(*(whole(1, rules.edge_max)(name, header.get(name)) for name in (wide, high)))
    if size.width % rules.factor or size.height % rules.factor:
        raise Refused(400, f"Both sides have to be multiples of {rules.factor} pixels.", param="size")
    return size


def _pixels(
    pixels: memoryview, size: Size, images: Any, *, masked: bool, edits: bool
) -> tuple[memoryview | None, memoryview | None]:
    wanted = [{"width": size.width, "height": size.height}] if edits else []
    if images != wanted:
        what = "one image of the size that is painted" if edits else "no images"
        raise Refused(400, f"This model takes {what}.", param="images")
    image_bytes, mask_bytes = RGB_BYTES * size.pixels * edits, MASK_BYTES * size.pixels * masked
    if len(pixels) != image_bytes + mask_bytes:
        raise Refused(400, "There are other pixels than those that are told of.", param="images")
    return pixels[:image_bytes] if edits else None, pixels[image_bytes:] if masked else None


def _number_of_steps(header: Mapping[str, Any], rules: Rules) -> int:
    given = header.get("steps")
    return rules.steps if given is None else whole(1, rules.steps_max)("steps", given)


def _given(header: Mapping[str, Any], name: str, otherwise: float | None, low: float, high: float) -> float | None:
    given = header.get(name)
    return otherwise if given is None else number(low, high)(name, given)


def _check_strength(settings: Settings, rules: Rules) -> None:
    """With little strength few of the steps are computed; none at all would give the image back."""
    if settings.strength is None:
        return
    steps = settings.strength * settings.steps
    if steps <= 0 or (rules.rounds_down and int(steps) < 1):
        raise Refused(400, "So little `strength` leaves no step to compute. Ask for more of it.", param="strength")


def _text(header: Mapping[str, Any], name: str) -> str:
    given = header.get(name)
    if not isinstance(given, str) or len(given) > _PROMPT_CHARS_MAX:
        raise Refused(400, f"`{name}` has to be a text of at most {_PROMPT_CHARS_MAX} characters.", param=name)
    return given


def _negative(header: Mapping[str, Any], rules: Rules) -> str:
    if header.get("negative_prompt") is None:
        return ""
    if not rules.takes_negative:
        raise Refused(400, "This model has no `negative_prompt`. Leave it out.", param="negative_prompt")
    return _text(header, "negative_prompt")


def _seeds(header: Mapping[str, Any]) -> tuple[int, ...]:
    found = header.get("seeds")
    if not isinstance(found, list) or not 0 < len(found) <= _PICTURES_MAX:
        raise Refused(400, f"`seeds` has to be a list of 1 to {_PICTURES_MAX} numbers.", param="seeds")
    check = whole(0, _SEED_MAX)
    return tuple(check("seeds", each) for each in found)
