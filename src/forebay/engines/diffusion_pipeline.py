"""Loads a diffusion model with diffusers: from a folder that was checked, as it is set up, onto its device.

It refuses to reach for a hub and to run what a model brings along; weights come from safetensors and GGUF alone.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch

from forebay.engines.diffusion_folder import Folder
from forebay.engines.diffusion_order import Rules
from forebay.engines.diffusion_prompts import Remembered
from forebay.engines.start import refuse_to_start
from forebay.pipelines import EDIT

_FLUX = "Flux"
_GGUF = ".gguf"
_FLOW = "FlowMatchEulerDiscreteScheduler"
_SHORTAGES = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate",
    "bad_alloc",
    "could not create a primitive",
)
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)
"""What libraries raise that are given files that they cannot read."""
_FIRST_BLOCK_CACHE_THRESHOLD = (
    0.08  # of change in the first block, below which the others are taken from the step before
)


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model is loaded; see `engine_options.DiffusionOptions`."""

    name: str
    folder: Folder
    kinds: Mapping[str, str]
    device: str
    dtype: str
    offload: str
    transformer_file: Path | None
    loras: Sequence[Mapping[str, Any]]
    scheduler: str
    compile: bool
    lossy: Sequence[str]


@dataclass(slots=True)
class Model:
    """A loaded model: its pipelines by what they do, which share all parts. One thread may use it."""

    pipelines: Mapping[str, Any]
    denoiser: str
    device: str
    dtype: str
    offload: str
    notices: list[str] = field(default_factory=list)
    offloaded: Any = None
    """The pipeline whose parts are moved between the device and main memory."""

    @property
    def any(self) -> Any:
        """One of the pipelines: what is asked of their parts is the same for all."""
        return next(iter(self.pipelines.values()))

    @property
    def is_flux(self) -> bool:
        """Whether latents are packed and prompts have no negative side."""
        return type(self.any).__name__.startswith(_FLUX)

    @property
    def factor(self) -> int:
        """What both sides of a picture are multiples of."""
        scale: int = self.any.vae_scale_factor
        return 2 * scale if self.is_flux else scale

    def rules(self, bounds: Mapping[str, Any]) -> Rules:
        """What it can do within the `bounds` that it was given."""
        kinds = {kind for kind, pipe in self.pipelines.items() if "strength" in takes(pipe)}
        return Rules(
            kinds=frozenset(self.pipelines),
            strength_kinds=frozenset(kinds),
            takes_negative=not self.is_flux,
            rounds_down=not self.is_flux,
            **{**bounds, "factor": max(self.factor, bounds["factor"])},
        )

    def used(self) -> dict[str, Any]:
        """What it takes to make a picture again, besides what a request says."""
        return {
            "engine": "diffusion",
            "engine_version": diffusers.__version__,
            "torch_version": torch.__version__,
            "scheduler": type(self.any.scheduler).__name__,
            "dtype": self.dtype,
            "device": self.device,
        }

    def place(self, offload: str) -> None:
        """Put the parts where they belong: all onto the device, or each when it is needed."""
        self.offload = offload
        self.forget()
        self.any.remove_all_hooks()
        self.offloaded = None
        if offload == "none":
            self.any.to(self.device)
        else:
            self.any.to("cpu")

    def forget(self) -> None:
        """Give back what is remembered of prompts."""
        for pipe in self.pipelines.values():
            pipe.encode_prompt.forget()

    def ready(self, kind: str) -> Any:
        """The pipeline that does this, with its parts in place."""
        pipe = self.pipelines[kind]
        if self.offload != "none" and self.offloaded is not pipe:
            self.any.remove_all_hooks()
            index = torch.device(self.device).index or 0
            if self.offload == "model":
                pipe.enable_model_cpu_offload(gpu_id=index)
            else:
                pipe.enable_sequential_cpu_offload(gpu_id=index)
            self.offloaded = pipe
        return pipe


def load(setup: Setup) -> Model:
    """The model in a folder. Ends the process with the reason where it cannot be loaded; raises MemoryError."""
    if setup.device.startswith("cuda") and not torch.cuda.is_available():
        _refuse(setup, "There is no GPU that PyTorch can use. Set `device` to `cpu`, or install a build for the GPU.")
    dtype = getattr(torch, setup.dtype)
    try:
        pipelines = _pipelines(setup, dtype)
    except _BROKEN as error:
        if is_shortage(error):
            raise MemoryError from None
        _refuse(setup, f"diffusers cannot load it: {' '.join(str(error).split())[:300]}")
    model = Model(pipelines, setup.folder.denoiser, setup.device, setup.dtype, setup.offload)
    model.place(setup.offload)
    _speed_up(model, setup)
    return model


def _pipelines(setup: Setup, dtype: Any) -> Mapping[str, Any]:
    folder, kinds, parts = setup.folder, setup.kinds, {}
    if setup.transformer_file is not None:
        parts[folder.denoiser] = _denoiser(folder, setup.transformer_file, dtype)
    first = getattr(diffusers, folder.pipeline).from_pretrained(
        str(folder.path),
        dtype=dtype,
        variant=folder.variant,
        use_safetensors=True,
        local_files_only=True,
        **parts,
    )
    _adapt(first, setup)
    first.scheduler = _scheduler(first.scheduler, setup.scheduler)
    if _whole_images_alone(first):
        kinds = {kind: name for kind, name in kinds.items() if kind == EDIT}
        if not kinds:
            raise ValueError("it can do nothing but fill in a mask; set `task` to `edit`")
    return {kind: _like(first, getattr(diffusers, name)) for kind, name in kinds.items()}


def _adapt(pipe: Any, setup: Setup) -> None:
    """Change the weights as the LoRA files say: for good, where they are not quantised."""
    names = [f"lora{number}" for number in range(len(setup.loras))]
    for name, lora in zip(names, setup.loras, strict=True):
        path = Path(lora["file"])
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name, local_files_only=True)
    if names:
        pipe.set_adapters(names, adapter_weights=[float(lora["weight"]) for lora in setup.loras])
        if setup.transformer_file is None or setup.transformer_file.suffix != _GGUF:
            pipe.fuse_lora(adapter_names=names)
            pipe.unload_lora_weights()


def _whole_images_alone(pipe: Any) -> bool:
    """Whether it was trained to see what a mask leaves, and can do nothing else."""
    denoiser = getattr(pipe, "unet", None)
    return denoiser is not None and denoiser.config.in_channels == 9


def _denoiser(folder: Folder, path: Path, dtype: Any) -> Any:
    kind = diffusers.FluxTransformer2DModel if folder.denoiser == "transformer" else diffusers.UNet2DConditionModel
    quantised = path.suffix == _GGUF
    more = {"quantization_config": diffusers.GGUFQuantizationConfig(compute_dtype=dtype)} if quantised else {}
    return kind.from_single_file(
        str(path), config=str(folder.path), subfolder=folder.denoiser, dtype=dtype, local_files_only=True, **more
    )


def _scheduler(found: Any, name: str) -> Any:
    if name == "model":
        return found
    if (type(found).__name__ == _FLOW) != (name == _FLOW):
        raise ValueError(f"{name} does not fit a model that was trained for {type(found).__name__}")
    return getattr(diffusers, name).from_config(found.config)


def _like(pipe: Any, kind: Any) -> Any:
    """A pipeline of another kind with the same parts."""
    if isinstance(pipe, kind):
        made = pipe
    else:
        wanted, settings = kind._get_signature_keys(kind)  # noqa: SLF001  `from_pipe` would change the type of all weights
        said = {name: pipe.config[name] for name in settings if name in pipe.config}
        made = kind(**{name: getattr(pipe, name, None) for name in wanted}, **said)
    made.set_progress_bar_config(disable=True)
    made.encode_prompt = Remembered(made.encode_prompt)
    return made


def _speed_up(model: Model, setup: Setup) -> None:
    """What was asked for. Attention is PyTorch's own fused one anyway."""
    denoiser = getattr(model.any, model.denoiser)
    if "first_block_cache" in setup.lossy:
        if not hasattr(denoiser, "enable_cache"):
            _refuse(setup, "`first_block_cache` is for models with a transformer. Leave it out of `lossy`.")
        denoiser.enable_cache(diffusers.FirstBlockCacheConfig(threshold=_FIRST_BLOCK_CACHE_THRESHOLD))
        model.notices.append("A step may reuse what the step before has computed; pictures differ a little for that.")
    if setup.compile:
        denoiser.compile()


def takes(pipe: Any) -> frozenset[str]:
    """What a pipeline can be told."""
    return frozenset(inspect.signature(type(pipe).__call__).parameters)


def is_shortage(error: BaseException) -> bool:
    """Whether an error of a library means that there was not enough memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in said for sign in _SHORTAGES)


def computes(edge: int) -> bool:
    """Whether a convolution over so many pixels can still be computed.

    The library for CPUs computes nothing of a new size any more once it has been short of memory in the wrong place.
    """
    try:
        torch.nn.functional.conv2d(torch.zeros(1, 16, edge, edge), torch.zeros(16, 16, 3, 3))
    except RuntimeError:
        return False
    return True


def _refuse(setup: Setup, reason: str) -> NoReturn:
    refuse_to_start(f"{setup.name} cannot be loaded. {reason}")
