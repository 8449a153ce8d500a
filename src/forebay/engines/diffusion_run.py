"""Paints one batch with a loaded model, step by step, in the thread that calls.

It refuses to keep anything of a batch that has failed, and to compute a step more than one after nobody wants it. When there
is not enough memory it knows ways to do with less, one after the other; whoever calls decides when.
"""

import ctypes
import gc
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image

from forebay.engines.compute import StepFailed
from forebay.engines.diffusion_order import Order, Result, Row, Settings, Watch
from forebay.engines.diffusion_pipeline import Model, computes, is_shortage, takes
from forebay.engines.serving import OutOfMemory
from forebay.engines.start import run_out_of_memory
from forebay.engines.threads import Unwanted
from forebay.pipelines import EDIT, GENERATE
from forebay.pixels import Size

TILES = "tiles"
SLICES = "slices"
MODEL = "model"
SEQUENTIAL = "sequential"

_WARM_UP_EDGE = 64
_PROBE_EDGE = 90  # larger ones are computed by the library in question, smaller ones not
_BLANKED = "The safety checker of the model has blanked the picture."
_REFUSED = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError)
"""What the library raises for a batch that it cannot paint."""


class Studio:
    """A model and what it does with less memory. One thread may use it."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._offload = model.offload
        self._savings: list[str] = []
        self._probe_edge = _PROBE_EDGE

    def paint(self, rows: Sequence[Row], watch: Watch) -> list[Result]:
        """The pictures of a batch. Raises OutOfMemory, StepFailed, and Unwanted; nothing of the batch is kept then."""
        failure: Exception
        try:
            painted = _Painting(self._model, rows, watch).run()
            if self._savings:
                self._trim()
            return painted
        except Unwanted as error:
            traceback.clear_frames(error.__traceback__)
            failure = Unwanted()
        except (MemoryError, *_REFUSED) as error:
            traceback.clear_frames(error.__traceback__)  # they hold the tensors
            failure = OutOfMemory() if is_shortage(error) else StepFailed(f"{type(error).__name__}: {error}")
        self._tidy()
        if isinstance(failure, OutOfMemory) and not self._computes():
            run_out_of_memory("A library ran out of memory where it cannot go on from.")
        raise failure

    def warm_up(self, edge: int = _WARM_UP_EDGE) -> None:
        """Paint one step of something, so that what does not fit together shows at the start. Raises as `paint` does."""
        kind = next(iter(self._model.pipelines))
        edge = max(1, edge // self._model.factor) * self._model.factor
        size = Size(edge, edge)
        settings = Settings(kind, size, steps=1, guidance=None, strength=None, partials=0)
        image = memoryview(bytes(3 * size.pixels)) if kind != GENERATE else None
        mask = memoryview(b"\xff" * size.pixels) if kind == EDIT else None
        self.paint([Row(Order(settings, "warm", "", (0,), False, image, mask), 0)], _Nobody())

    def save(self) -> str | None:
        """Do with less memory from now on; the way in which, none where there is no other."""
        way = next((each for each in self._ways() if each not in self._savings), None)
        if way is not None:
            self._savings.append(way)
            self._set(way, on=True)
        return way

    def spend(self, but: Sequence[str] = ()) -> None:
        """Do with as much memory as there was; `but` are savings that stay."""
        for way in [each for each in self._savings if each not in but]:
            self._savings.remove(way)
            self._set(way, on=False)

    @property
    def savings(self) -> tuple[str, ...]:
        """The ways in which it does with less memory now."""
        return tuple(self._savings)

    def _ways(self) -> list[str]:
        model = self._model
        ways = [TILES]
        if hasattr(getattr(model.any, model.denoiser), "set_attention_slice"):
            ways.append(SLICES)
        if model.device.startswith("cuda"):
            offloads = ["none", MODEL, SEQUENTIAL]
            ways += offloads[offloads.index(self._offload) + 1 :]
        return ways

    def _set(self, way: str, *, on: bool) -> None:
        model = self._model
        if way == TILES:
            (model.any.vae.enable_tiling if on else model.any.vae.disable_tiling)()
            (model.any.vae.enable_slicing if on else model.any.vae.disable_slicing)()
        elif way == SLICES:
            model.any.set_attention_slice("max" if on else None)
        else:
            offloads = [each for each in self._savings if each in {MODEL, SEQUENTIAL}]
            try:
                model.place(offloads[-1] if offloads else self._offload)
            except RuntimeError as error:
                if on or not is_shortage(error):
                    raise
                self._savings.append(way)  # there is still no room for all of it
                model.place(way)

    def _computes(self) -> bool:
        self._probe_edge += 1  # another one each time, as what is known from before may still be there
        return self._model.device != "cpu" or computes(self._probe_edge)

    def _tidy(self) -> None:
        """Give memory back that a failed batch has held."""
        self._model.forget()
        for pipe in self._model.pipelines.values():
            if self._model.offloaded in {None, pipe}:
                pipe.maybe_free_model_hooks()
        gc.collect()
        if self._model.device.startswith("cuda"):
            torch.cuda.empty_cache()
        self._trim()

    def _trim(self) -> None:
        """Give the heap's free pages back to the kernel, which others on the machine may be short of too."""
        if self._model.device == "cpu" and sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
            if trim is not None:
                trim(0)


class _Painting:
    """One batch under way."""

    def __init__(self, model: Model, rows: Sequence[Row], watch: Watch) -> None:
        self._model = model
        self._rows = rows
        self._watch = watch
        self._settings = rows[0].order.settings
        self._pipe = model.ready(self._settings.kind)
        self._steps = 0

    def run(self) -> list[Result]:
        """Paint. Raises Unwanted, and whatever the library does."""
        alone = self._model.offload == "none"
        denoiser = getattr(self._pipe, self._model.denoiser)
        cached = getattr(denoiser, "is_cache_enabled", False)
        with (
            torch.inference_mode() if alone else torch.no_grad(),  # what is moved about has to stay an ordinary tensor
            denoiser.cache_context("cond") if cached else nullcontext(),
        ):
            made = self._pipe(**self._arguments())
        blanked = getattr(made, "nsfw_content_detected", None) or [False] * len(self._rows)
        return [
            Result(picture.tobytes(), self._steps, (_BLANKED,) if blank else ())
            for picture, blank in zip(made.images, blanked, strict=True)
        ]

    def _arguments(self) -> dict[str, Any]:
        """What the pipeline is called with: only what it knows, and only what was said."""
        settings, orders = self._settings, [row.order for row in self._rows]
        said = {
            "prompt": [order.prompt for order in orders],
            "negative_prompt": [order.negative_prompt for order in orders] if settings.has_negative else None,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
            "strength": settings.strength,
            "generator": [torch.Generator("cpu").manual_seed(row.seed) for row in self._rows],
            "callback_on_step_end": self._stepped,
        }
        known = takes(self._pipe)
        if {"width", "height"} <= known:
            said |= {"width": settings.size.width, "height": settings.size.height}
        if settings.kind != GENERATE:
            said["image"] = [_picture("RGB", settings.size, order.image) for order in orders]
        if settings.kind == EDIT:
            said["mask_image"] = [_picture("L", settings.size, order.mask) for order in orders]
        if "_auto_resize" in known:  # of a model that would choose another size by itself
            said |= {"_auto_resize": False, "max_area": settings.size.pixels}
        return {name: value for name, value in said.items() if value is not None}

    def _stepped(self, pipe: Any, index: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline has computed a step. Raises Unwanted."""
        step, steps = index + 1, pipe.num_timesteps
        self._steps = step
        if not self._watch.stepped(step, steps):
            raise Unwanted
        partials = self._settings.partials
        for number in range(partials):
            if step == max(1, steps * (number + 1) // (partials + 1)):
                self._watch.partial(number, self._decoded(tensors["latents"]))
        return {}

    def _decoded(self, latents: Any) -> list[bytes]:
        """How unfinished pictures look; the way in which the pipelines decode their last latents."""
        pipe, size = self._pipe, self._settings.size
        vae, config = pipe.vae, pipe.vae.config
        if self._model.is_flux:
            latents = pipe._unpack_latents(latents, size.height, size.width, pipe.vae_scale_factor)  # noqa: SLF001
            latents = latents / config.scaling_factor + config.shift_factor
        else:
            latents = latents / config.scaling_factor
        widened = vae.dtype == torch.float16 and config.force_upcast
        if widened:
            vae.to(dtype=torch.float32)
        pictures = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        if widened:
            vae.to(dtype=torch.float16)
        return [each.tobytes() for each in pipe.image_processor.postprocess(pictures, output_type="pil")]


class _Nobody(Watch):
    def stepped(self, step: int, steps: int) -> bool:
        return True

    def partial(self, number: int, pixels: Sequence[bytes]) -> None:
        pass


def _picture(mode: str, size: Size, pixels: memoryview | None) -> Image.Image:
    assert pixels is not None
    return Image.frombytes(mode, (size.width, size.height), bytes(pixels))
