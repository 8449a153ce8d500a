"""Turns a catalogue entry into the command that starts its engine, and says how that engine behaves.

It refuses to take anything from a request: argv and environment come from the configuration alone.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

from forebay.dialects.imaging import ImageRules
from forebay.dialects.openai.call import Extensions
from forebay.engine_options import CommandOptions, LlamaCppOptions, OnnxOptions, PainterOptions, Section
from forebay.errors import SetupError
from forebay.inference import Capability
from forebay.model_config import (
    AlignerModel,
    CommandModel,
    DiffusionModel,
    FakeModel,
    LlamaCppModel,
    Model,
    OnnxModel,
    OpencvModel,
    SpeakersModel,
    UpstreamModel,
    VllmModel,
    WhisperModel,
)
from forebay.replicas import gguf
from forebay.replicas.devices import llama_cpp_has_gpu
from forebay.replicas.launcher import EngineCommand

TOKENIZER = "tokenizer.json"
_TEMPLATE_BYTES_MAX = 1_048_576
_TRUNCATE = ("truncate", True)
_OF_MASKS = {"mask_dilation", "mask_feather"}  # done before an engine sees anything


@dataclass(frozen=True, slots=True)
class Traits:
    """How an engine behaves.

    `probe_path` answers only while the engine's main loop turns. `confirms_stop`: it closes a half-closed connection
    once it has stopped; `stops_after_step`: it closes it when it has taken note, and stops before it answers its next
    probe. `reuses_connections`: it keeps a connection open after an answer, for longer than we do; a request that meets
    the close of one would fail for nothing. `enforces_tool_choice`: it makes a model call a tool that must be called;
    llama.cpp takes `required` and lets the model chat on instead. `log_is_clean`: it prints nothing that a caller wrote.
    `extensions`: whose additions to the dialect it understands. `sees_images`: its messages may hold images.
    `counts_items`: it tells the tokens of each input or document;
    `truncation` is its field that lets it cut one that is too long; `logits`: it scores documents by logits;
    `input_types`: it reads queries in another way than documents. `metrics_path`: where it tells figures of its own.
    `sleep_level`: how it can give its device's memory back and keep its process; 0 if it cannot.
    `pausable`: it takes no harm from being stopped for minutes at any point. `continues`: it goes on with an answer that
    was begun, and tells how much of that was in its cache. `shares_prefixes`: what it has read of one prompt it need not
    read again for another that begins alike; llama.cpp has to in each of its slots.
    """

    probe_path: str
    health_path: str = "/health"
    confirms_stop: bool = True
    stops_after_step: bool = False
    reuses_connections: bool = True
    enforces_tool_choice: bool = True
    log_is_clean: bool = True
    remote_model: str | None = None
    extensions: Extensions | None = None
    sees_images: bool = False
    counts_items: bool = False
    truncation: tuple[str, Any] | None = None
    logits: bool = False
    input_types: bool = False
    metrics_path: str = ""
    pausable: bool = True
    sleep_level: int = 0
    continues: bool = False
    shares_prefixes: bool = True


def traits_of(model: Model) -> Traits:
    """The traits of a model's engine."""
    match model:
        case LlamaCppModel(options=llama):
            return Traits(
                "/slots",
                stops_after_step=True,
                reuses_connections=False,
                enforces_tool_choice=False,
                extensions="llama.cpp",
                sees_images=llama.mmproj_file is not None,
                logits=True,
                continues=llama.cache_ram_bytes > 0,
                shares_prefixes=False,
            )
        case OnnxModel(options=onnx):
            return Traits(
                "/slots",
                counts_items=True,
                truncation=_TRUNCATE,
                logits=True,
                input_types=bool(onnx.query_prefix or onnx.document_prefix),
                metrics_path="/metrics",
            )
        case WhisperModel() | SpeakersModel() | AlignerModel() | OpencvModel() | DiffusionModel():
            return Traits("/slots", metrics_path="/metrics")
        case FakeModel(options=fake):
            return Traits(
                "/slots",
                extensions="llama.cpp",
                sees_images=fake.vision,
                sleep_level=fake.sleep_level,
                counts_items=True,
                truncation=_TRUNCATE,
                logits=True,
            )
        case VllmModel(options=vllm):
            return Traits(
                "/health",
                reuses_connections=False,
                extensions="vllm",
                sees_images=vllm.vision,
                sleep_level=vllm.sleep_level,
                truncation=("truncate_prompt_tokens", -1),
                pausable=False,  # its processes watch each other by the clock
            )
        case CommandModel(options=options):
            return Traits(
                options.health_path,
                health_path=options.health_path,
                reuses_connections=False,
                log_is_clean=False,
                remote_model=options.remote_model,
                sees_images=options.vision,
                logits=options.logits,
                pausable=options.pausable,
            )
        case UpstreamModel(options=upstream):
            return Traits(
                "",
                confirms_stop=False,
                remote_model=upstream.remote_model,
                sees_images=upstream.vision,
                logits=upstream.logits,
                pausable=False,
            )
        case _:
            assert_never(model)


def device_of(model: Model) -> str:
    """What a model computes on: `cpu`, or the first of its GPUs as `gpu0`, `gpu1`…; empty for what runs elsewhere.

    llama.cpp takes a GPU where there is one; with `gpu_layers = 0` it does not.
    """
    match model:
        case CommandModel(options=named) | FakeModel(options=named):
            return named.device
        case LlamaCppModel(options=llama):
            on_gpu = llama.gpu_layers != 0 and llama_cpp_has_gpu()
            return f"gpu{_first_gpu(llama)}" if on_gpu else "cpu"
        case OnnxModel(options=onnx):
            return "cpu" if onnx.provider == "cpu" else "gpu0"
        case WhisperModel(options=options) | DiffusionModel(options=options):
            return "cpu" if options.device == "cpu" else f"gpu{options.device_index}"
        case VllmModel():
            return "gpu0"
        case UpstreamModel():
            return ""
        case _:
            return "cpu"


def _first_gpu(llama: LlamaCppOptions) -> int:
    """The one that is named, unless the model is split over others."""
    shares = [number for number, share in enumerate(llama.tensor_split) if share > 0]
    return llama.main_gpu if llama.main_gpu in shares or not shares else shares[0]


def capabilities_of(model: Model) -> frozenset[Capability]:
    """What a model can be asked for."""
    if not isinstance(model, LlamaCppModel):
        return frozenset(model.options.capabilities)
    if model.options.rerank:
        return frozenset({Capability.RERANK})
    if model.options.embeddings:
        return frozenset({Capability.EMBEDDING})
    return frozenset({Capability.CHAT, Capability.COMPLETION})


def picture_rules(model: Model, fingerprint: str) -> ImageRules:
    """What a model can paint, and how it does where a request does not say."""
    match model:
        case OpencvModel(options=opencv):
            return ImageRules(
                edge_max=opencv.edge_max,
                edge_factor=1,
                takes_prompt=False,
                mask_dilation=opencv.mask_dilation,
                mask_feather=opencv.mask_feather,
                fingerprint=fingerprint,
            )
        case DiffusionModel(options=diffusion):
            return _painter_rules(diffusion, fingerprint, needs_mask=diffusion.task == "edit")
        case FakeModel(options=fake):
            rules = _painter_rules(fake, fingerprint, needs_mask=False, images_max=fake.images_max)
            known = None if fake.guidance is None else fake.guidance_max
            return replace(rules, guidance_max=known, takes_strength=fake.strength is not None)
        case _:
            return ImageRules()


def _painter_rules(options: PainterOptions, fingerprint: str, *, needs_mask: bool, images_max: int = 1) -> ImageRules:
    return ImageRules(
        edge_max=options.edge_max,
        edge_factor=options.edge_factor,
        images_max=images_max,
        needs_mask=needs_mask,
        steps=options.steps,
        steps_max=options.steps_max,
        guidance=options.guidance,
        guidance_max=options.guidance_max,
        strength=options.strength,
        takes_strength=True,
        mask_dilation=options.mask_dilation,
        mask_feather=options.mask_feather,
        fingerprint=fingerprint,
    )


def command_for(
    name: str,
    model: Model,
    slots: int,
    path: Path | None,
    key: str,
    port: int,
    *,
    oom_cooldown_seconds: float | None = None,
) -> EngineCommand:
    """The command for one process of `model` with `slots` places; `port` is used by engines that cannot choose one.

    `oom_cooldown_seconds` is for engines that make smaller batches after a shortage; None leaves it to them.
    """
    cooldown = {} if oom_cooldown_seconds is None else {"oom_cooldown_seconds": oom_cooldown_seconds}
    match model:
        case LlamaCppModel(options=options):
            return _ours("llama_cpp", _llama_cpp_spec(name, options, slots, path), key)
        case OnnxModel(options=onnx):
            return _ours("onnx_text", _onnx_spec(name, onnx, slots, path) | _tokens_max(model) | cooldown, key)
        case WhisperModel():
            return _ours("whisper", _speech_spec(name, model, slots, _folder(path)) | cooldown, key)
        case SpeakersModel():
            return _ours("speakers", _speech_spec(name, model, slots, path), key)
        case AlignerModel():
            return _ours("aligner", _speech_spec(name, model, slots, path) | cooldown, key)
        case OpencvModel(options=opencv):
            return _ours("opencv", _options(opencv, _OF_MASKS) | {"name": name, "slots": slots}, key)
        case DiffusionModel(options=diffusion):
            spec = _options(diffusion, _OF_MASKS) | {"name": name, "slots": slots, "model_path": str(path or "")}
            return _ours("diffusion", spec | cooldown, key)
        case FakeModel(options=fake):
            spec = _options(fake, {*PainterOptions.model_fields, "images_max", "device"}) | {
                "name": name,
                "slots": slots,
            }
            return _ours("fake", spec | _tokens_max(model), key)
        case CommandModel(options=command):
            return _command(command, str(path or ""), key, port)
        case VllmModel():
            return _vllm(name, model, slots, path, key, port)
        case UpstreamModel():
            raise SetupError(f"The model {name} is an upstream and has no process.")
        case _:
            assert_never(model)


def _ours(program: str, spec: dict[str, object], key: str) -> EngineCommand:
    environment = {"FOREBAY_ENGINE_SPEC": json.dumps(spec), "FOREBAY_ENGINE_KEY": key}
    # -P: a json.py in the folder where the server was started is no part of the engine.
    return EngineCommand((sys.executable, "-P", "-m", f"forebay.engines.{program}"), environment)


def _llama_cpp_spec(name: str, options: LlamaCppOptions, slots: int, path: Path | None) -> dict[str, object]:
    spec = options.model_dump(mode="json", exclude={"chat_template_file", "mmproj_file"})
    template = options.chat_template_file
    return {
        **spec,
        "name": name,
        "model_path": str(path),
        "mmproj_path": str(_sound_encoder(options.mmproj_file)) if options.mmproj_file else "",
        "slots": slots,
        "chat_template": _read_template(template) if template else None,
    }


def _sound_encoder(path: Path) -> Path:
    """The file of an image encoder, whose header passes the check. Raises SetupError."""
    try:
        gguf.check(path)
    except SetupError as error:
        raise SetupError(f"The image encoder cannot be used. {error}") from None
    return path


def _options(options: Section, without: set[str]) -> dict[str, object]:
    return options.model_dump(mode="json", exclude=without)


def _tokens_max(model: Model) -> dict[str, object]:
    return {"input_tokens_max": model.input_tokens_max}


def _onnx_spec(name: str, options: OnnxOptions, slots: int, path: Path | None) -> dict[str, object]:
    spec = options.model_dump(mode="json", exclude={"tokenizer_file"})
    model = path or Path()
    tokenizer = options.tokenizer_file or model.parent / TOKENIZER
    return {**spec, "name": name, "model_path": str(model), "tokenizer_path": str(tokenizer), "slots": slots}


def _speech_spec(
    name: str, model: WhisperModel | SpeakersModel | AlignerModel, slots: int, path: Path | None
) -> dict[str, object]:
    spec = model.options.model_dump(mode="json")
    return {**spec, "name": name, "model_path": "" if path is None else str(path), "slots": slots}


def _folder(path: Path | None) -> Path | None:
    """Where a Whisper model lies, given its folder or its `model.bin`."""
    return path if path is None or path.is_dir() else path.parent


def _read_template(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(_TEMPLATE_BYTES_MAX)
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"The chat template {path} cannot be read: {type(error).__name__}.") from None


def _command(options: CommandOptions, path: str, key: str, port: int) -> EngineCommand:
    def fill(text: str) -> str:
        return text.replace("{port}", str(port)).replace("{key}", key).replace("{model}", path)

    environment = {name: fill(value) for name, value in options.environment.items()}
    return EngineCommand(
        tuple(fill(part) for part in options.argv),
        {"FOREBAY_ENGINE_KEY": key, "FOREBAY_ENGINE_PORT": str(port), **environment},
        address=f"http://127.0.0.1:{port}",
    )


def _vllm(name: str, model: VllmModel, slots: int, path: Path | None, key: str, port: int) -> EngineCommand:
    options = model.options
    source = str(path) if path else (model.source or "").removeprefix("hf:")
    repository, _, revision = source.partition("@")
    argv = ["vllm", "serve", repository, "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--max-num-seqs", str(slots), "--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    argv += ["--tensor-parallel-size", str(options.tensor_parallel)]
    if revision:
        argv += ["--revision", revision]
    if options.context:
        argv += ["--max-model-len", str(options.context)]
    environment = {"VLLM_API_KEY": key}
    if options.sleep_level:
        argv.append("--enable-sleep-mode")
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # without it there is no way to have it sleep
    return EngineCommand((*argv, *options.arguments), environment, address=f"http://127.0.0.1:{port}")
