"""A program for a process of its own: edits images with diffusers driven directly, one after another, at its best.

It refuses to import anything else of this package, so that its memory is that of the libraries.
"""

import inspect
import io
import json
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

_AS_THE_SERVER = {"compress_level": 1, "compress_type": zlib.Z_RLE}


def main() -> None:
    """Answer each line with an edit on standard input with a line of what it took, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    import diffusers  # noqa: PLC0415  # what it prints when it is loaded goes there as well
    import torch  # noqa: PLC0415

    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    pipe = _loaded(diffusers, settings, getattr(torch, settings["dtype"]))
    version = f"diffusers {diffusers.__version__}, torch {torch.__version__}, {type(pipe).__name__}"
    with ThreadPoolExecutor(1) as thread:  # outside of the main thread the C library keeps memory for the next picture
        for line in sys.stdin:
            order = json.loads(line)
            began = time.perf_counter()
            Path(order["out"]).write_bytes(thread.submit(_edited, torch, pipe, order).result())
            _answer(answers, {"seconds": time.perf_counter() - began, "version": version})


def _loaded(diffusers: Any, settings: dict[str, Any], dtype: Any) -> Any:
    """The pipeline of a folder that fills in masks."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        settings["folder"],
        dtype=dtype,
        variant=settings["variant"],
        use_safetensors=True,
        local_files_only=True,
    )
    if "mask_image" not in inspect.signature(pipe.__call__).parameters:
        pipe = diffusers.AutoPipelineForInpainting.from_pipe(pipe, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(settings["device"])


def _edited(torch: Any, pipe: Any, order: dict[str, Any]) -> bytes:
    """From two files to a PNG."""
    from PIL import Image, ImageOps  # noqa: PLC0415

    image = ImageOps.exif_transpose(Image.open(order["image"])).convert("RGB")
    mask = Image.open(order["mask"]).convert("L").point(lambda value: 255 if value > 127 else 0)
    size = order["width"], order["height"]
    asked = {
        "prompt": order["prompt"],
        "image": image if image.size == size else image.resize(size, Image.Resampling.LANCZOS),
        "mask_image": mask if mask.size == size else mask.resize(size, Image.Resampling.NEAREST),
        "width": size[0],
        "height": size[1],
        "num_inference_steps": order["steps"],
        "guidance_scale": order["guidance"],
        "strength": order["strength"],
        "generator": torch.Generator("cpu").manual_seed(order["seed"]),
    }
    known = inspect.signature(pipe.__call__).parameters
    given = {name: value for name, value in asked.items() if value is not None and name in known}
    with torch.inference_mode():
        painted = pipe(**given).images[0]
    painted = painted if painted.size == image.size else painted.resize(image.size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    Image.composite(painted, image, mask).save(out, "PNG", **_AS_THE_SERVER)
    return out.getvalue()


def _answer(answers: TextIO, said: dict[str, Any]) -> None:
    answers.write(json.dumps(said) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
