"""A program for a process of its own: a sample image with its mask, and sheets of pictures with how they differ.

It refuses to import anything else of this package: nothing that measures knows a library of images.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from PIL import Image, ImageChops, ImageDraw, ImageOps, ImageStat

_TILE = 384  # longest side of a picture on a sheet
_MARGIN, _LINE = 12, 16
_INK, _PAPER = (30, 30, 30), (245, 245, 245)


def main() -> None:
    """Answer each line of standard input with one, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    for line in sys.stdin:
        order = json.loads(line)
        _answer(answers, _sample(**order["sample"]) if "sample" in order else _sheet(**order["sheet"]))


def _answer(answers: TextIO, said: dict[str, Any]) -> None:
    answers.write(json.dumps(said) + "\n")
    answers.flush()


def _sample(folder: str, edge: int, seed: int) -> dict[str, Any]:
    """An image with gradients, noise and an ellipse, none of which two seeds share, and a mask that is white there."""
    ramp = Image.linear_gradient("L").resize((edge, edge))
    noise = Image.effect_noise((edge, edge), 24)
    bands = [ImageChops.add(ramp.rotate(90 * turn + seed % 7), noise, 1.5) for turn in range(3)]
    image, mask = Image.merge("RGB", bands), Image.new("L", (edge, edge), 0)
    left, top = (edge * (5 + seed * step % 20) // 100 for step in (3, 7))
    where = (left, top, left + edge // 2, top + edge // 2)
    ImageDraw.Draw(image).ellipse(where, fill=(200, seed * 37 % 256, 40))
    ImageDraw.Draw(mask).ellipse(where, fill=255)
    paths = [Path(folder) / f"{name}-{seed}.png" for name in ("image", "mask")]
    for picture, path in zip((image, mask), paths, strict=True):
        picture.save(path)
    return {"image": str(paths[0]), "mask": str(paths[1])}


def _sheet(image: str, mask: str, white: bool, tiles: list[dict[str, str]], out: str) -> dict[str, Any]:
    """Write all pictures, the image itself first, side by side; how much of each is not as in the image.

    Differences are means over colours and pixels, of 255; what lies outside of the mask is a count of pixels.
    """
    before = _opened(image)
    changed = (
        Image.open(mask).convert("L") if white else ImageChops.invert(Image.open(mask).convert("RGBA").getchannel("A"))
    )
    inside = changed.resize(before.size).point(lambda value: 255 if value > 127 else 0)
    pictures = [_opened(tile["path"]).resize(before.size) for tile in tiles]
    labels = ["before", *(tile["label"] for tile in tiles)]
    _drawn([before, *pictures], labels).save(out)
    found = []
    for picture in pictures:
        away = ImageChops.difference(before, picture)
        outside = ImageChops.multiply(_any(away), ImageChops.invert(inside))
        found.append(
            {
                "inside": _mean(away, inside),
                "outside": sum(outside.histogram()[1:]),
                "from_first": _mean(ImageChops.difference(pictures[0], picture), inside),
            }
        )
    return {"differences": found}


def _opened(path: str) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def _any(away: Image.Image) -> Image.Image:
    """White where a colour differs."""
    red, green, blue = away.split()
    return ImageChops.lighter(ImageChops.lighter(red, green), blue).point(lambda value: 255 if value else 0)


def _mean(away: Image.Image, mask: Image.Image) -> float:
    means = ImageStat.Stat(away, mask).mean if mask.getbbox() else [0.0]
    return round(sum(means) / len(means), 3)


def _drawn(pictures: list[Image.Image], labels: list[str]) -> Image.Image:
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    small = [ImageOps.contain(picture, (_TILE, _TILE)) for picture in pictures]
    lines = max(label.count("\n") + 1 for label in labels)
    width, height = _TILE + _MARGIN, max(each.height for each in small) + lines * _LINE + _MARGIN
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, (picture, label) in enumerate(zip(small, labels, strict=True)):
        left, top = _MARGIN + place % columns * width, _MARGIN + place // columns * height
        sheet.paste(picture, (left, top))
        pen.text((left, top + picture.height + 2), label, fill=_INK)
    return sheet


if __name__ == "__main__":
    main()
