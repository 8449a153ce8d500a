"""The steps between an image and a model that paints, each by itself: what is marked, what is blended, what stays."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from forebay.engines import image_output as output
from forebay.engines import image_steps as steps
from forebay.engines.fence import TOO_COSTLY, Refused
from forebay.engines.image_output import OutputPlan, encode, preview, size_of
from forebay.engines.image_steps import Bounds, MaskPlan, Unfit, Weights
from forebay.pixels import Size

Array = npt.NDArray[np.uint8]
RED = (255, 0, 0)
GIB = 2**30


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def bits_of(*rows: str) -> Array:
    return np.array([[each == "#" for each in row] for row in rows]).view(np.uint8)


def rows_of(bits: Any) -> list[str]:
    return ["".join("#" if each else "." for each in row) for row in np.asarray(bits)]


def whole(weights: Weights) -> Array:
    """The weights of every pixel of the image."""
    found = np.zeros((weights.size.height, weights.size.width), np.uint8)
    height, width = weights.values.shape
    found[weights.top : weights.top + height, weights.left : weights.left + width] = weights.values
    return found


def refused(bits: Array, plan: MaskPlan | None = None, bounds: Bounds | None = None) -> Unfit:
    with pytest.raises(Unfit) as found:
        steps.cleaned(bits, plan or MaskPlan(), bounds or Bounds())
    return found.value


def seen_through() -> Image.Image:
    """Four pixels: opaque black, opaque white, one that is nearly transparent, and one that is."""
    pixels = [[(0, 0, 0, 255), (255, 255, 255, 255), (255, 255, 255, 1), (255, 255, 255, 0)]]
    return Image.fromarray(np.array(pixels, np.uint8))


def test_a_mask_is_where_one_sees_through_it_entirely() -> None:
    assert rows_of(steps.chosen(seen_through(), "alpha")) == ["...#"]


def test_or_where_it_is_white() -> None:
    assert rows_of(steps.chosen(seen_through(), "white")) == [".#.."]
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).convert("RGB")
    assert rows_of(steps.chosen(grey, "white")) == ["..##"]


def test_a_mask_without_alpha_is_told_from_one_that_hides_everything() -> None:
    with pytest.raises(Unfit) as found:
        steps.chosen(Image.new("RGB", (4, 4)), "alpha")
    assert found.value.verdict == steps.MASK_NO_ALPHA
    assert not steps.chosen(Image.new("RGBA", (4, 4), "black"), "alpha").any()


def test_an_image_without_alpha_is_nowhere_transparent() -> None:
    assert not steps.transparent(Image.new("RGB", (5, 3))).any()
    assert rows_of(steps.transparent(seen_through())) == ["...#"]


def test_specks_are_dropped_up_to_an_area_and_pixels_that_touch_at_a_corner_are_one() -> None:
    bits = bits_of("#...##", "......", "..#...", ".#....", "......", "###..#")
    assert rows_of(steps.without_specks(bits, 1)) == ["....##", "......", "..#...", ".#....", "......", "###..."]
    assert rows_of(steps.without_specks(bits, 2)) == ["......"] * 5 + ["###..."]


def test_specks_are_counted_in_pieces_of_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = (noise(64, 64, 1)[..., 0] > 200).view(np.uint8)
    at_once = steps.without_specks(bits, 3)
    monkeypatch.setattr(steps, "_COUNTED_PIXELS", 100)
    assert np.array_equal(steps.without_specks(bits, 3), at_once)
    assert 0 < at_once.sum() < bits.sum()


def test_a_mask_grows_as_far_in_every_direction() -> None:
    bits = np.zeros((7, 7), np.uint8)
    bits[3, 3] = 1
    grown = ["...#...", "..###..", ".#####.", "#######", ".#####.", "..###..", "...#..."]
    assert rows_of(steps.grown(bits, 2)) == [
        ".......",
        "...#...",
        "..###..",
        ".#####.",
        "..###..",
        "...#...",
        ".......",
    ]
    assert rows_of(steps.grown(bits, 3))[0] == grown[0]
    assert steps.grown(np.ones((2, 2), np.uint8), 5).all()


def test_the_seam_rises_from_the_rim_inwards_and_the_edge_of_the_image_is_no_rim() -> None:
    bits = np.zeros((1, 9), np.uint8)
    bits[0, 2:] = 1
    assert steps.feathered(bits, 3).tolist() == [[0, 0, 64, 128, 191, 255, 255, 255, 255]]
    assert (steps.feathered(np.ones((3, 3), np.uint8), 8) == 255).all()


def test_a_small_mask_is_kept_as_the_part_that_matters() -> None:
    bits = np.zeros((100, 200), np.uint8)
    bits[40:50, 60:80] = 1
    weights = steps.cleaned(bits, MaskPlan(dilation=4, feather=2), Bounds())
    assert (weights.left, weights.top, weights.values.shape) == (55, 35, (20, 30))
    assert weights.size == Size(200, 100)


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(0, 2**32),
    st.integers(0, 12),
    st.integers(0, 6),
    st.integers(0, 9),
)
@settings(max_examples=150)
def test_the_part_alone_gives_the_same_as_the_whole(
    width: int, height: int, seed: int, dilation: int, feather: int, specks: int
) -> None:
    chance = np.random.default_rng(seed)
    bits = (chance.random((height, width)) < chance.choice([0.01, 0.2, 0.7])).view(np.uint8)
    bits[: height // 2] = 0
    plan = MaskPlan(specks=specks, dilation=dilation, feather=feather)
    kept = steps.without_specks(bits, specks) if specks else bits
    if not kept.any():
        assert refused(bits, plan).verdict in {steps.MASK_EMPTY, steps.MASK_TOO_SMALL}
        return
    expected = steps.grown(kept, dilation) if dilation else kept
    found = whole(steps.cleaned(bits, plan, Bounds()))
    assert np.array_equal(found, steps.feathered(expected, feather) if feather else expected * np.uint8(255))
    assert not found[expected == 0].any(), "the seam lies inside"
    assert found[expected == 1].all()


def test_masks_that_cannot_be_meant_are_refused_with_what_they_are() -> None:
    assert refused(np.zeros((10, 10), np.uint8)).verdict == steps.MASK_EMPTY
    few = bits_of("##..", "....", "....", "...#")
    assert refused(few, MaskPlan(specks=1), Bounds(pixels_min=3)).facts == {"pixels": 2}
    assert refused(few, MaskPlan(specks=9)).verdict == steps.MASK_TOO_SMALL
    many = refused(few, MaskPlan(dilation=1), Bounds(coverage_max=0.4))
    assert (many.verdict, many.facts) == (steps.MASK_TOO_LARGE, {"coverage": 0.5})
    assert steps.cleaned(few, MaskPlan(dilation=1), Bounds(coverage_max=0.5))


@given(st.integers(1, 90), st.integers(1, 70), st.integers(1, 64), st.integers(1, 64), st.integers(0, 2**32))
@settings(max_examples=100)
def test_what_is_painted_covers_every_pixel_that_counts(
    width: int, height: int, across: int, down: int, seed: int
) -> None:
    bits = (np.random.default_rng(seed).random((height, width)) < 0.05).view(np.uint8)
    bits[height // 2, width // 3] = 1
    weights = steps.cleaned(bits, MaskPlan(), Bounds())
    mask = np.frombuffer(steps.covering(weights, Size(across, down)), np.uint8).reshape(down, across)
    assert set(np.unique(mask)) <= {0, 255}
    expected = np.zeros_like(mask)
    for row, column in np.argwhere(bits):
        rows = slice(row * down // height, -(-(row + 1) * down // height))
        columns = slice(column * across // width, -(-(column + 1) * across // width))
        expected[rows, columns] = 255
    assert np.array_equal(mask, expected)


@given(
    st.integers(1, 80),
    st.integers(1, 60),
    st.sampled_from([3, 4]),
    st.integers(0, 2**32),
    st.integers(0, 9),
    st.integers(0, 9),
)
@settings(max_examples=150)
def test_every_pixel_outside_the_mask_stays_as_it_is(
    width: int, height: int, channels: int, seed: int, dilation: int, feather: int
) -> None:
    chance = np.random.default_rng(seed)
    old = noise(width, height, channels, seed)
    if channels == 4:
        old[..., 3] = chance.choice([0, 1, 128, 255], (height, width))
    bits = np.zeros((height, width), np.uint8)
    bits[chance.integers(height), chance.integers(width)] = 1
    weights = steps.cleaned(bits, MaskPlan(dilation=dilation, feather=feather), Bounds())
    image = Image.fromarray(old)
    across, down = (int(side) for side in chance.integers(1, 64, 2))
    painted = Image.fromarray(noise(across, down, seed=seed + 1))
    steps.put_in(image, painted, weights)
    new, outside = np.asarray(image), whole(weights) == 0
    assert np.array_equal(new[outside], old[outside])
    assert channels == 3 or (new[~outside][:, 3] == 255).all(), "what is painted hides what is behind it"
    if painted.size == image.size:
        fully = whole(weights) == 255
        assert np.array_equal(new[fully][:, :3], np.asarray(painted)[fully])


def test_bands_show_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    old, painted = noise(150, 120), Image.fromarray(noise(64, 48, seed=1))
    bits = np.ones((120, 150), np.uint8)
    bits[:, 140:] = 0
    weights = steps.cleaned(bits, MaskPlan(feather=5), Bounds())
    made = []
    for pixels in (2**19, 450):
        monkeypatch.setattr(steps, "_BAND_PIXELS", pixels)
        image = Image.fromarray(old)
        steps.put_in(image, painted, weights)
        made.append(np.asarray(image).astype(int))
    assert np.abs(made[0] - made[1]).max() <= 1
    wide = painted.resize((150, 48), Image.Resampling.LANCZOS)
    stretched = np.asarray(wide.resize((150, 120), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(made[0] - stretched)[:, :130].max() <= 1


def test_of_what_is_blended_only_that_counts_which_can_be_seen() -> None:
    old = np.array([[(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 0), (9, 9, 9, 7)]], np.uint8)
    new = np.full((1, 4, 3), 100, np.uint8)
    made = steps.blended(old, new, np.array([[51, 51, 255, 0]], np.uint8))
    assert made.tolist() == [[[180, 20, 20, 255], [100, 100, 100, 255], [100, 100, 100, 255], [9, 9, 9, 7]]]


def test_a_model_sees_paper_where_one_sees_through_or_what_is_hidden_there_if_that_is_asked_for() -> None:
    image = Image.new("RGBA", (8, 8), (*RED, 0))
    assert steps.shown(image, Size(4, 4)).getcolors() == [(16, (255, 255, 255))]
    assert steps.shown(image, Size(4, 4), hidden=True).getcolors() == [(16, RED)]
    plain = Image.fromarray(noise(8, 8))
    assert steps.shown(plain, Size(8, 8)).tobytes() == plain.tobytes()


def test_what_an_engine_painted_has_as_many_bytes_as_pixels() -> None:
    assert steps.canvas(bytes(24), Size(4, 2)).size == (4, 2)
    with pytest.raises(ValueError, match="Size"):
        steps.canvas(bytes(25), Size(4, 2))


def test_a_picture_has_the_shape_of_its_image_and_sides_that_its_format_can_hold() -> None:
    assert size_of(Size(1000, 667), OutputPlan(size=Size(1536, 1024)), GIB) == Size(1536, 1024)
    assert size_of(Size(70_000, 30_000), OutputPlan(), GIB) == Size(70_000, 30_000)
    assert size_of(Size(4500, 4500), OutputPlan("webp"), GIB) == size_of(Size(4500, 4500), OutputPlan("webp", 99), GIB)
    for source, plan, verdict in (
        (Size(1000, 667), OutputPlan(size=Size(1024, 1024)), output.OTHER_SHAPE),
        (Size(16_384, 9000), OutputPlan("webp"), output.TOO_LONG_SIDE),
        (Size(65_501, 30_000), OutputPlan("jpeg"), output.TOO_LONG_SIDE),
        (Size(5000, 5000), OutputPlan("webp", 100), TOO_COSTLY),
    ):
        with pytest.raises(Refused) as refused:
            size_of(source, plan, GIB)
        assert refused.value.verdict == verdict


def written(array: Array, plan: OutputPlan, profile: bytes | None = None) -> tuple[Image.Image, bytes]:
    out = io.BytesIO()
    encode(Image.fromarray(array), plan, profile, out)
    return Image.open(io.BytesIO(out.getvalue())), out.getvalue()


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("plan", [OutputPlan(), OutputPlan("webp"), OutputPlan("webp", 100), OutputPlan("png", 7)])
def test_formats_without_loss_lose_nothing_not_even_what_is_hidden(plan: OutputPlan, channels: int) -> None:
    old = noise(33, 21, channels)
    if channels == 4:
        old[..., 3][::2] = 0
    image, _ = written(old, plan)
    assert image.format == plan.format.upper()
    assert np.array_equal(np.asarray(image), old)


def test_the_others_lose_as_much_as_is_asked_for() -> None:
    old = noise(64, 64)
    for name in ("jpeg", "webp"):
        sizes = [len(written(old, OutputPlan(name, quality))[1]) for quality in (0, 50, 99)]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize(
    "plan", [OutputPlan("jpeg"), OutputPlan(backdrop="opaque"), OutputPlan("webp", None, "opaque")]
)
def test_what_cannot_or_shall_not_be_seen_through_is_on_white(plan: OutputPlan) -> None:
    image, _ = written(np.full((8, 8, 4), (0, 0, 0, 0), np.uint8), plan)
    assert image.mode == "RGB"
    assert image.getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_the_profile_goes_with_the_picture_and_nothing_else_does(name: Any) -> None:
    out, image = io.BytesIO(), Image.new("RGB", (8, 8))
    image.info |= {"exif": b"Exif\0\0nothing", "comment": b"by nobody", "dpi": (300, 300), "transparency": (0, 0, 0)}
    encode(image, OutputPlan(name), b"a profile", out)
    found = Image.open(io.BytesIO(out.getvalue()))
    assert found.info["icc_profile"] == b"a profile"
    assert not {"exif", "comment", "transparency"} & set(found.info)
    assert b"nobody" not in out.getvalue()


def test_a_preview_is_no_larger_than_its_picture() -> None:
    for size, edge, expected in (((2000, 1000), 512, (512, 256)), ((40, 30), 512, (40, 30)), ((800, 1), 32, (32, 1))):
        out = io.BytesIO()
        preview(Image.new("RGBA", size), edge, None, out)
        found = Image.open(io.BytesIO(out.getvalue()))
        assert (found.format, found.size) == ("JPEG", expected)
