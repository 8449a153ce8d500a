"""A diffusion model behind HTTP, in a process of its own: edits images and paints new ones, step by step.

It refuses what the model cannot do, naming the field, and it opens no images: it is given pixels, and gives pixels back.
"""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forebay.engines import picture_records, reports
from forebay.engines.compute import Failed, StepFailed
from forebay.engines.connection import Answer, Refused, Route, Visit
from forebay.engines.diffusion_folder import Folder, Unusable, check, check_file
from forebay.engines.diffusion_order import read_order
from forebay.engines.reports import one_line
from forebay.engines.serving import OutOfMemory, Service, run
from forebay.engines.start import check_types, read_spec, refuse_to_start
from forebay.engines.threads import cores
from forebay.pipelines import AUTO, PIPELINES, SCHEDULERS
from forebay.pixels import Size

if TYPE_CHECKING:
    from forebay.engines.diffusion_pipeline import Setup

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "gguf", "peft")
_CHOICES = {
    "device": ("cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "offload": ("none", "model", "sequential"),
    "scheduler": ("model", *SCHEDULERS),
    "task": (AUTO, *sorted({kind for kinds in PIPELINES.values() for kind in kinds})),
}

_say = partial(reports.say, "diffusion")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How this engine is set up, from FOREBAY_ENGINE_SPEC; what it means is said in `engine_options.DiffusionOptions`."""

    name: str
    model_path: str
    slots: int = 1
    task: str = AUTO
    device: str = "cpu"
    device_index: int = 0
    dtype: str = "auto"
    offload: str = "none"
    variant: str | None = None
    transformer_file: str | None = None
    loras: Sequence[Mapping[str, Any]] = ()
    scheduler: str = "model"
    compile: bool = False
    lossy: Sequence[str] = ()
    batch_images: int = 1
    edge_max: int = 1024
    edge_factor: int = 1
    steps: int = 28
    steps_max: int = 100
    guidance: float | None = None
    guidance_max: float = 30.0
    strength: float | None = None
    step_seconds_max: float = 300.0
    threads: int = 0
    oom_cooldown_seconds: float = 300.0

    def __post_init__(self) -> None:
        check_types(self)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} has to be one of {', '.join(choices)}")
        if min(self.slots, self.batch_images, self.steps, self.edge_max, self.edge_factor) < 1:
            raise ValueError("slots, batch_images, steps, edge_max and edge_factor have to be at least 1")
        if self.offload != "none" and self.device == "cpu":
            raise ValueError("offload is for a device other than the cpu")

    def setup(self, folder: Folder) -> "Setup":
        """How the model in `folder` is loaded."""
        from forebay.engines.diffusion_pipeline import Setup

        dtype = self.dtype
        if dtype == "auto":
            dtype = "float32" if self.device == "cpu" else "bfloat16"
        return Setup(
            name=self.name,
            folder=folder,
            kinds=folder.kinds(self.task),
            device=self.device if self.device == "cpu" else f"{self.device}:{self.device_index}",
            dtype=dtype,
            offload=self.offload,
            transformer_file=Path(self.transformer_file) if self.transformer_file else None,
            loras=self.loras,
            scheduler=self.scheduler,
            compile=self.compile,
            lossy=self.lossy,
        )

    def bounds(self) -> dict[str, Any]:
        """What a request may ask for, and what holds where it does not say."""
        return {
            "factor": self.edge_factor,
            "edge_max": self.edge_max,
            "steps": self.steps,
            "steps_max": self.steps_max,
            "guidance": self.guidance,
            "guidance_max": self.guidance_max,
            "strength": self.strength,
        }


class Engine:
    """The routes of one loaded model. Made in the loading thread; the routes run in the event loop."""

    def __init__(self, spec: Spec, folder: Folder, loop: asyncio.AbstractEventLoop) -> None:
        import torch

        from forebay.engines.diffusion_pipeline import load
        from forebay.engines.diffusion_run import Studio

        torch.set_num_threads(spec.threads or cores())
        model = load(spec.setup(folder))
        self.rules = model.rules(spec.bounds())
        self._spec = spec
        self._used = model.used()
        self._pipelines = {kind: type(pipe).__name__ for kind, pipe in model.pipelines.items()}
        self._notices = tuple(model.notices)
        self._visits = 0
        studio = Studio(model)
        try:
            studio.warm_up()
            if spec.compile:
                studio.warm_up(spec.edge_max)  # each size takes long the first time
        except StepFailed as error:
            refuse_to_start(f"{spec.name} cannot paint: its parts do not fit together. {one_line(str(error))}")
        self._work = asyncio.run_coroutine_threadsafe(self._begin(studio), loop).result()

    async def _begin(self, studio: Any) -> Any:
        from forebay.engines.diffusion_work import Work

        spec = self._spec
        return Work(studio, spec.batch_images, spec.oom_cooldown_seconds, spec.step_seconds_max)

    @property
    def routes(self) -> Mapping[tuple[str, str], Route]:
        """What this engine answers."""
        return {
            ("GET", "/slots"): self._slots,
            ("GET", "/metrics"): self._metrics,
            ("POST", "/v1/images/edits"): partial(self._paint, edits=True),
            ("POST", "/v1/images/generations"): partial(self._paint, edits=False),
        }

    async def _paint(self, visit: Visit, *, edits: bool) -> Answer:
        begun, ended, reason, pictures = time.monotonic(), "cancelled", "", 0
        self._visits += 1
        try:
            order = read_order(visit.body, self.rules, edits=edits)
            pictures = len(order.seeds)
            await self._work.run(order, _Easel(visit, order.settings.size, self._notices))
            ended = "finished"
        except Failed as failed:
            ended, reason = "failed", f" reason={one_line(failed.reason)}"
            raise
        except Refused as refused:
            ended, reason = "refused", f" reason={one_line(str(refused))}"
            raise
        finally:
            self._visits -= 1
            seconds = time.monotonic() - begun
            _say(f"event={ended} {visit.ids} pictures={pictures} seconds={seconds:.4f}{reason}")
        used = {**self._used, "pipeline": self._pipelines[order.settings.kind], "notices": self._notices}
        visit.tell(picture_records.done(**used))
        return b""

    async def _slots(self, visit: Visit) -> Answer:
        return reports.slots(self._spec.slots, self._visits)

    async def _metrics(self, visit: Visit) -> Answer:
        work = self._work
        gauges = {"pictures_waiting": work.waiting, "pictures_running": work.painting, "savings": work.savings}
        return reports.metrics(asdict(work.figures), **gauges, requests_running=self._visits)


class _Easel:
    """Writes the records of one visit."""

    def __init__(self, visit: Visit, size: Size, notices: Sequence[str]) -> None:
        """`notices` is what there is to say about every picture."""
        self._visit = visit
        self._notices = notices
        self._width = size.width

    def step(self, image: int, step: int, steps: int) -> None:
        self._visit.tell(picture_records.step(image, step, steps))

    def rows(self, image: int, pixels: bytes, partial: int | None = None) -> None:
        for record in picture_records.rows(image, pixels, self._width, partial):
            self._visit.tell(record)

    def finished(self, image: int, steps: int, notices: Sequence[str]) -> None:
        notices = [*self._notices, *notices]
        self._visit.tell(picture_records.ended(image, steps_computed=steps, notices=notices))

    def alive(self) -> None:
        self._visit.tell(b"")


def _folder(spec: Spec) -> Folder:
    """What is loaded, checked before any library is: that takes seconds."""
    try:
        folder = check(Path(spec.model_path), variant=spec.variant, replaced=spec.transformer_file is not None)
        folder.kinds(spec.task)
        for path in (spec.transformer_file, *(lora["file"] for lora in spec.loras)):
            if path is not None:
                check_file(Path(path))
    except Unusable as reason:
        refuse_to_start(f"{spec.name} cannot be loaded. {reason}")
    return folder


def main() -> None:
    """Load the model and serve until SIGTERM."""
    spec, key = read_spec(Spec, "The engine")
    if any(find_spec(package) is None for package in _PACKAGES):
        refuse_to_start("The packages that paint are not installed. Run `pip install 'forebay[diffusion]'`.")
    folder = _folder(spec)
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DIFFUSERS_VERBOSITY": "error",
    }.items():
        os.environ[name] = value  # before the libraries are imported, which look at it then

    def load(loop: asyncio.AbstractEventLoop) -> Service:
        try:
            engine = Engine(spec, folder, loop)
        except OutOfMemory:
            raise MemoryError from None
        _say(f"event=ready model={spec.name} device={spec.device} can={','.join(sorted(engine.rules.kinds))}")
        return engine

    run(key, load)


if __name__ == "__main__":
    main()
