"""What diffusers paints by itself, in a process of its own: the pictures that our engine is compared with.

It knows nothing of ours. Standard input has a JSON list of wishes: folder, pipeline, seed, and what the pipeline is called
with; standard output gets the pixels of each in base64.
"""

import json
import os
import subprocess
import sys
from base64 import b64decode, b64encode
from typing import Any


def paint(wishes: list[dict[str, Any]]) -> list[bytes]:
    """The pictures, in a process of its own."""
    answer = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(wishes).encode(),
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return [b64decode(each) for each in json.loads(answer.stdout.splitlines()[-1])]


def photo(width: int, height: int) -> bytes:
    """RGB pixels of a smooth picture."""
    return bytes(
        value
        for y in range(height)
        for x in range(width)
        for value in (255 * x // width, 255 * y // height, 255 * (x + y) // (width + height))
    )


def hole(width: int, height: int) -> bytes:
    """A mask whose right half is to be painted."""
    return (b"\0" * (width // 2) + b"\xff" * (width - width // 2)) * height


def _main() -> None:
    import torch
    from PIL import Image

    def picture(mode: str, wish: dict[str, Any], name: str) -> dict[str, Any]:
        pixels = wish.get(name)
        size = wish["width"], wish["height"]
        return {} if pixels is None else {name: Image.frombytes(mode, size, b64decode(pixels))}

    torch.set_num_threads(1)
    pipes: dict[tuple[str, str], Any] = {}
    made = []
    for wish in json.load(sys.stdin):
        key = wish["folder"], wish["pipeline"]
        if key not in pipes:
            pipes[key] = _loaded(wish)
        found = pipes[key](
            **wish["arguments"],
            **picture("RGB", wish, "image"),
            **picture("L", wish, "mask_image"),
            generator=torch.Generator("cpu").manual_seed(wish["seed"]),
        )
        made.append(b64encode(found.images[0].tobytes()).decode())
    print(json.dumps(made))


def _loaded(wish: dict[str, Any]) -> Any:
    """The pipeline of a folder, with another scheduler, transformer or LoRA where that was wished for."""
    import diffusers
    import torch

    folder, parts = wish["folder"], {}
    if name := wish.get("scheduler"):
        parts["scheduler"] = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    if path := wish.get("transformer_file"):
        parts["transformer"] = diffusers.FluxTransformer2DModel.from_single_file(
            path,
            config=folder,
            subfolder="transformer",
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
            dtype=torch.float32,
        )
    pipe = getattr(diffusers, wish["pipeline"]).from_pretrained(folder, **parts)
    for lora in wish.get("loras", ()):
        pipe.load_lora_weights(lora["file"], adapter_name="it")
        pipe.set_adapters(["it"], [lora["weight"]])
    return pipe


if __name__ == "__main__":
    _main()
