"""The program that draws for measurements: samples that differ, and sheets that say how much a picture was changed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image


def ask(*orders: dict[str, Any]) -> list[dict[str, Any]]:
    lines = "".join(json.dumps(order) + "\n" for order in orders)
    command = [sys.executable, "-P", "-m", "forebay.bench.picture_program"]
    ended = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_samples_and_sheets(tmp_path: Path) -> None:
    first, second, wide = ask(
        *(
            {"sample": {"folder": str(tmp_path), "edge": edge, "seed": seed}}
            for edge, seed in ((64, 1), (64, 2), (100, 3))
        )
    )
    image, mask = (Image.open(first[name]) for name in ("image", "mask"))
    assert (image.mode, image.size, mask.mode, set(mask.tobytes())) == ("RGB", (64, 64), "L", {0, 255})
    assert 0.15 < sum(map(bool, mask.tobytes())) / 64**2 < 0.25
    assert Image.open(second["image"]).tobytes() != image.tobytes()
    assert Image.open(wide["mask"]).size == (100, 100)

    kept, inside, outside = (tmp_path / f"{name}.png" for name in ("kept", "inside", "outside"))
    image.save(kept)
    Image.composite(Image.new("RGB", image.size, "black"), image, mask).save(inside)
    spoiled = image.copy()
    (place,) = [at for at in [(0, 63)] if not mask.getpixel(at)]
    red, green, blue = image.tobytes()[63 * 64 * 3 :][:3]
    spoiled.putpixel(place, (255 - red, 255 - green, 255 - blue))
    spoiled.save(outside)
    tiles = [{"path": str(path), "label": f"steps 1\n{path.stem}"} for path in (kept, inside, outside)]
    sheet = tmp_path / "sheet.png"
    order = {"image": first["image"], "mask": first["mask"], "white": True, "tiles": tiles, "out": str(sheet)}
    ((same, painted, one),) = (each["differences"] for each in ask({"sheet": order}))
    assert same == {"inside": 0, "outside": 0, "from_first": 0}
    assert painted["inside"] == painted["from_first"] > 50
    assert (painted["outside"], one["outside"], one["inside"]) == (0, 1, 0)
    assert Image.open(sheet).size[0] > 2 * 384
