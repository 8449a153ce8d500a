"""The options of each engine, and the parts that all settings are made of.

It refuses unknown keys, and knows neither models nor files nor the environment.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from forebay.inference import Capability
from forebay.pipelines import Scheduler

Seconds = Annotated[float, Field(gt=0, le=604_800)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Bytes = Annotated[int, Field(ge=1, le=2**50)]
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
HeaderValue = Annotated[str, Field(pattern=r"^[ -~]{0,4096}$")]
Device = Annotated[str, Field(pattern=r"^(cpu|gpu[0-9]{1,3})$")]
_TEXT = (Capability.CHAT, Capability.COMPLETION)
_SPEECH = frozenset({Capability.TRANSCRIPTION, Capability.TRANSLATION, Capability.ALIGNMENT, Capability.DIARIZATION})
_PICTURES = frozenset({Capability.IMAGE_EDIT, Capability.IMAGE_GENERATION})
_REQUEST_BYTES_MAX = 60 * 2**20  # what our engines take at once, less a prompt
_SERVED = "What it serves: `chat`, `completion`, `embedding`, `rerank`."
_DEVICE = "Where it computes, `cpu`, `gpu0`, `gpu1`…: batch work makes way for requests to models of the same device."
_LOGITS = "Its rerank scores are raw logits, and not between 0 and 1 already."


def _text_alone(capabilities: tuple[Capability, ...]) -> tuple[Capability, ...]:
    if not _SPEECH.isdisjoint(capabilities):
        raise ValueError("recordings are served by the engines `whisper`, `speakers` and `aligner` alone")
    if not _PICTURES.isdisjoint(capabilities):
        raise ValueError("pictures are served by the engines `opencv`, `diffusion` and `fake` alone")
    return capabilities


AllCapabilities = Annotated[tuple[Capability, ...], Field(min_length=1)]
Capabilities = Annotated[AllCapabilities, AfterValidator(_text_alone)]


class Section(BaseModel):
    """A part of the settings: frozen, without unknown keys, and quiet about what was given."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class LlamaCppOptions(Section):
    """Options of the `llama.cpp` engine."""

    context: Annotated[int, Field(ge=256, le=4_194_304)] = Field(2048, description="Context in tokens of each slot.")
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(0, description="CPU threads; 0 takes one per core.")
    gpu_layers: Annotated[int, Field(ge=-1, le=10_000)] = Field(
        -1, description="Layers on the GPU; -1 lets llama.cpp fit as many as there is room for."
    )
    tensor_split: tuple[Annotated[float, Field(ge=0)], ...] = Field((), description="Share of the model on each GPU.")
    main_gpu: Annotated[int, Field(ge=0, le=127)] = Field(0, description="GPU for a model that is not split.")
    kv_type: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = Field(
        "f16", description="Number type of the KV cache."
    )
    flash_attention: Literal["auto", "on", "off"] = Field(
        "auto", description="Flash attention; a quantised KV cache needs it."
    )
    batch: Annotated[int, Field(ge=32, le=65_536)] = Field(
        512, description="Most tokens in one decoding step; a cancelled prompt stops after one."
    )
    cache_ram_bytes: Annotated[int, Field(ge=0)] = Field(
        512 * 2**20, description="Memory for cached prompts outside the slots."
    )
    chat_template_file: Path | None = Field(None, description="Jinja chat template that replaces the model's own.")
    embeddings: bool = Field(False, description="Serve embeddings instead of text.")
    rerank: bool = Field(
        False, description="Serve rerank instead of text; for models that score a query with a document."
    )
    pooling: Literal["model", "mean", "cls", "last"] = Field(
        "model", description="How the vectors of tokens become that of a text; `model` leaves it to the file."
    )
    mmproj_file: Path | None = Field(
        None,
        description="GGUF file of the image encoder (`mmproj`) that belongs to the model; with it, it takes images.",
    )


class OnnxOptions(Section):
    """Options of the `onnx` engine: text encoders for embeddings and rerank on ONNX Runtime."""

    capability: Literal["embedding", "rerank"] = Field(
        "embedding", description="What the model is for; `rerank` takes a cross-encoder with one logit or two classes."
    )
    context: Annotated[int, Field(ge=8, le=131_072)] = Field(
        512, description="Longest input in tokens that the model takes."
    )
    pooling: Literal["mean", "cls", "last"] = Field(
        "mean", description="How the vectors of tokens become that of a text; see the model's card."
    )
    normalise: bool = Field(True, description="Give vectors the length 1.")
    matryoshka: bool = Field(False, description="The model is trained for fewer `dimensions`; others refuse them.")
    dimensions_min: Annotated[int, Field(ge=1, le=16_384)] = Field(
        32, description="Fewest `dimensions` of a model with `matryoshka`."
    )
    query_prefix: str = Field("", max_length=1024, description="Put before a text that is sent as a query.")
    document_prefix: str = Field("", max_length=1024, description="Put before a text that is sent as a document.")
    tokenizer_file: Path | None = Field(
        None, description="The model's `tokenizer.json`; the one beside the model if absent."
    )
    provider: Literal["cpu", "cuda", "rocm"] = Field(
        "cpu", description="Device; the installed build of onnxruntime has to have it."
    )
    int8: bool = Field(
        False, description="Compute with 8-bit integers on a CPU: about a quarter faster, and a little less exact."
    )
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(0, description="CPU threads; 0 takes one per core.")
    batches_at_once: Annotated[int, Field(ge=0, le=64)] = Field(
        0, description="Batches that are computed at once and share the threads; 0 takes 2 on a CPU and 1 on a GPU."
    )
    batch_tokens: Annotated[int, Field(ge=8, le=1_048_576)] = Field(
        256, description="Tokens of one batch with their padding. On a CPU small ones are fastest; a GPU wants 16384."
    )
    small_tokens: Annotated[int, Field(ge=0, le=65_536)] = Field(
        128, description="A request with at most so many tokens does not wait for a running batch, but runs beside it."
    )

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the model can be asked for."""
        return (Capability(self.capability),)


class WhisperOptions(Section):
    """Options of the `whisper` engine: speech to text with Whisper models on CTranslate2."""

    device: Literal["cpu", "cuda"] = Field("cpu", description="Where it computes.")
    device_index: Annotated[int, Field(ge=0, le=127)] = Field(0, description="Which GPU.")
    compute_type: Literal[
        "auto", "int8", "int8_float16", "int8_bfloat16", "int8_float32", "int16", "float16", "bfloat16", "float32"
    ] = Field("auto", description="Number type; `auto` takes `int8` on a CPU and `float16` on a GPU.")
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(0, description="CPU threads; 0 takes one per core.")
    chunks_at_once: Annotated[int, Field(ge=1, le=256)] = Field(
        8, description="Chunks of up to 30 s that are computed at once, of one recording or of several."
    )

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the model can be asked for."""
        return (Capability.TRANSCRIPTION, Capability.TRANSLATION)


class SpeakersOptions(Section):
    """Options of the `speakers` engine: who spoke when."""

    threads: Annotated[int, Field(ge=0, le=1024)] = Field(0, description="CPU threads; 0 takes one per core.")
    window_seconds: Annotated[float, Field(ge=0.2, le=30)] = Field(
        1.6, description="Length of what one vector is computed of."
    )
    step_seconds: Annotated[float, Field(ge=0.05, le=30)] = Field(
        0.4, description="From the beginning of one window to the next; at most the length of one."
    )
    speakers_max: Annotated[int, Field(ge=1, le=64)] = Field(
        20, description="Most speakers that are told apart where a request does not say how many there are."
    )

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the model can be asked for."""
        return (Capability.DIARIZATION,)

    @model_validator(mode="after")
    def _without_gaps(self) -> Self:
        if self.step_seconds > self.window_seconds:
            raise ValueError("`step_seconds` is at most `window_seconds`, or something would not be heard")
        return self


class AlignerOptions(Section):
    """Options of the `aligner` engine: when each word of a known text was said."""

    backend: Literal["ctc", "pocketsphinx"] = Field(
        "ctc",
        description="`ctc` takes an ONNX model of letters, such as wav2vec2; `pocketsphinx` brings its own, for English.",
    )
    language: Annotated[str, Field(pattern="^[a-z]{2,3}$")] | None = Field(
        None,
        description="Language of the model, such as `en`; others are refused. If absent any, and English with `pocketsphinx`.",
    )
    batch_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        60, description="Of recordings that are listened to at once, with `ctc`."
    )
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(0, description="CPU threads; 0 takes one per core.")

    @model_validator(mode="before")
    @classmethod
    def _own_language(cls, said: Any) -> Any:
        """What brings a model of its own knows its language."""
        own = isinstance(said, dict) and said.get("backend") == "pocketsphinx"
        return {"language": "en", **said} if own else said

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the model can be asked for."""
        return (Capability.ALIGNMENT,)


class PictureOptions(Section):
    """What every engine that paints has: how large a picture it is given, and what is done to masks."""

    edge_max: Annotated[int, Field(ge=16, le=3840)] = Field(
        1024,
        description="Longest side in pixels of what it is given; larger images are made smaller, and what is painted larger.",
    )
    mask_dilation: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="Pixels by which a mask grows where a request does not say."
    )
    mask_feather: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="Width in pixels of the seam, inside what the mask has grown to, where a request does not say."
    )


class OpencvOptions(PictureOptions):
    """Options of the `opencv` engine: holes in images filled from what is around them, without a model."""

    method: Literal["telea", "ns"] = Field(
        "telea", description="`telea` marches inwards from the border; `ns` continues lines of the same brightness."
    )
    radius: Annotated[float, Field(ge=1, le=32)] = Field(
        3, description="How far around a pixel it looks, in pixels; time grows with its square."
    )
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="Pictures that are computed at once, each on one core; 0 takes one per core."
    )
    edge_max: Annotated[int, Field(ge=16, le=3840)] = Field(
        3840,
        description="Longest side in pixels of what it is given; larger images are made smaller, and what is painted larger.",
    )

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the model can be asked for."""
        return (Capability.IMAGE_EDIT,)


class PainterOptions(PictureOptions):
    """What engines have that paint in steps."""

    edge_factor: Annotated[int, Field(ge=1, le=256)] = Field(
        16, description="What both sides of a picture are multiples of."
    )
    steps: Annotated[int, Field(ge=1, le=1000)] = Field(28, description="Steps where a request does not say.")
    steps_max: Annotated[int, Field(ge=1, le=1000)] = Field(100, description="Most steps that a request may ask for.")
    guidance: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None,
        description="How closely it keeps to the prompt where a request does not say; if absent the pipeline's own.",
    )
    guidance_max: Annotated[float, Field(ge=0, le=100)] = Field(
        30, description="Most `guidance` that a request may ask for."
    )
    strength: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="How much of what was there is given up where a request does not say; if absent the pipeline's own.",
    )

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.steps > self.steps_max or (self.guidance or 0) > self.guidance_max:
            raise ValueError("`steps` and `guidance` are at most `steps_max` and `guidance_max`")
        if self.edge_factor > self.edge_max:
            raise ValueError("`edge_factor` is at most `edge_max`")
        return self


class Lora(Section):
    """A small file of changes to the weights of a model."""

    file: Path = Field(description="The safetensors file.")
    weight: Annotated[float, Field(ge=-4, le=4)] = Field(1, description="How strongly it changes them.")


class DiffusionOptions(PainterOptions):
    """Options of the `diffusion` engine: diffusion models on diffusers."""

    task: Literal["auto", "edit", "image_to_image", "generate"] = Field(
        "auto",
        description="What it does: `edit` fills in a mask, `image_to_image` paints an image anew, `generate` takes none; `auto` is all that the pipeline can.",
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where it computes.")
    device_index: Annotated[int, Field(ge=0, le=127)] = Field(0, description="Which GPU.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number type; `auto` takes `float32` on a CPU and `bfloat16` on a GPU."
    )
    offload: Literal["none", "model", "sequential"] = Field(
        "none",
        description="What waits in main memory until it is needed on the GPU: nothing, whole parts of the pipeline, or single layers.",
    )
    variant: Annotated[str, Field(pattern="^[a-z0-9_]{1,16}$")] | None = Field(
        None, description="Which files of the folder are taken where there are several of each, such as `fp16`."
    )
    transformer_file: Path | None = Field(
        None, description="GGUF or safetensors file that replaces the transformer of the folder."
    )
    loras: Annotated[tuple[Lora, ...], Field(max_length=8)] = Field(
        (), description="Changes to the weights, each `{ file = …, weight = … }`."
    )
    scheduler: Scheduler = Field(
        "model",
        description="How steps follow each other; `model` is the folder's own. Heun and PNDM compute, and tell, more steps than are asked for.",
    )
    compile: bool = Field(
        False,
        description="Compile the model: the start takes minutes longer, and so does the first picture of another size.",
    )
    batch_images: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="Pictures that are painted at once; 1 is best on a CPU."
    )
    lossy: Annotated[tuple[Literal["first_block_cache"], ...], Field(max_length=1)] = Field(
        (), description="What makes it faster and pictures a little different: `first_block_cache`."
    )
    step_seconds_max: Seconds = Field(300, description="Longest step; then the process is taken for hung.")
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(0, description="CPU threads; 0 takes one per core.")

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What the model can be asked for."""
        match self.task:
            case "auto":
                return (Capability.IMAGE_EDIT, Capability.IMAGE_GENERATION)
            case "generate":
                return (Capability.IMAGE_GENERATION,)
            case _:
                return (Capability.IMAGE_EDIT,)


class CommandOptions(Section):
    """Options of the `command` engine: any command line that starts an OpenAI-compatible server."""

    argv: tuple[str, ...] = Field(
        min_length=1,
        description="Program and arguments; `{port}`, `{model}` and `{key}` are filled in. Arguments show in the process list, so prefer FOREBAY_ENGINE_KEY from the environment to `{key}`.",
    )
    environment: dict[str, str] = Field(
        {}, description="Further environment variables; `{port}`, `{model}` and `{key}` are filled in."
    )
    health_path: str = Field("/health", pattern="^/", description="Answers 200 when the engine can serve.")
    capabilities: Capabilities = Field(_TEXT, description=_SERVED)
    logits: bool = Field(False, description=_LOGITS)
    remote_model: str | None = Field(None, description="Model name sent to the engine; the catalogue name if absent.")
    vision: bool = Field(False, description="Whether the model takes images in messages.")
    device: Device = Field("cpu", description=_DEVICE)
    pausable: bool = Field(
        True,
        description="Whether its processes may be stopped for minutes, so that batch work makes way for requests to other models of its device; `false` for one whose work runs elsewhere, as in a container.",
    )


_SLEEPS = (
    "How it leaves its GPU to another model: 0 ends its process, 1 keeps it and the weights in the host's memory, 2 keeps "
    "it alone. Other than 0 it runs in vLLM's development mode, whose routes anybody on this machine can call."
)


class VllmOptions(Section):
    """Options of the `vllm` engine, a preset of `command`."""

    context: Annotated[int, Field(ge=256, le=4_194_304)] | None = Field(
        None, description="Longest context in tokens; the model's own if absent."
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Share of GPU memory that vLLM takes."
    )
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = Field(1, description="GPUs that share the model.")
    arguments: tuple[str, ...] = Field((), description="Further arguments for `vllm serve`.")
    sleep_level: Literal[0, 1, 2] = Field(0, description=_SLEEPS)
    capabilities: Capabilities = Field(_TEXT, description=_SERVED)
    vision: bool = Field(False, description="Whether the model takes images in messages.")


class UpstreamOptions(Section):
    """Options of the `upstream` engine: a server that somebody else runs."""

    base_url: str = Field(
        pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$", description="Base URL up to and including `/v1`."
    )
    key_env: str | None = Field(None, description="Environment variable that holds the key.")
    key_file: Path | None = Field(None, description="File that holds the key.")
    caller_key: bool = Field(
        False,
        description="Requests bring the caller's own key for it, in the header `X-Upstream-Authorization`; batches cannot.",
    )
    headers: dict[HeaderName, HeaderValue] = Field({}, description="Further request headers.")
    connect_timeout_seconds: Seconds = Field(10, description="Time to reach it.")
    first_byte_timeout_seconds: Seconds = Field(
        120, description="Time for the first byte of an answer, connecting included; then 504."
    )
    retries_max: Annotated[int, Field(ge=0, le=10)] = Field(
        2,
        description="Further tries where no connection could be made, or after 429 or 503 with a Retry-After; never after the first byte of an answer.",
    )
    retry_wait_seconds_max: Annotated[float, Field(ge=0, le=120)] = Field(
        5, description="Longest Retry-After that is waited out here; a longer one is passed on."
    )
    circuit_failures: Annotated[int, Field(ge=1, le=1000)] = Field(
        5, description="Failures in a row after which it is left alone."
    )
    circuit_cooldown_seconds: Seconds = Field(
        30,
        description="How long it is left alone before one request tries it again; meanwhile requests get 503 at once.",
    )
    capabilities: Capabilities = Field(_TEXT, description=_SERVED)
    logits: bool = Field(False, description=_LOGITS)
    remote_model: str | None = Field(None, description="Model name sent upstream; the catalogue name if absent.")
    vision: bool = Field(False, description="Whether the model takes images in messages.")

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        own = self.key_env or self.key_file or "authorization" in {name.lower() for name in self.headers}
        if self.caller_key and own:
            raise ValueError("with `caller_key` it gets no key of this server; leave the other keys out")
        return self


class FakeOptions(PainterOptions):
    """Options of the `fake` engine, a deterministic program for tests and benchmarks."""

    start_delay_seconds: Annotated[float, Field(ge=0, le=600)] = Field(0, description="Time before it is ready.")
    fail_start: Literal["no", "exit", "oom", "never_ready"] = Field("no", description="How its start goes wrong.")
    memory_slots_max: Annotated[int, Field(ge=0)] = Field(
        0, description="Requests at once above which it runs out of memory; 0 never does."
    )
    ballast_bytes: Annotated[int, Field(ge=0, le=2**40)] = Field(0, description="Memory that it holds for nothing.")
    sleep_level: Literal[0, 1, 2] = Field(0, description="Whether it can sleep; without its ballast, at either level.")
    tools: bool = Field(True, description="Whether its chat template has tools.")
    capabilities: AllCapabilities = Field(
        tuple(Capability), description="What it serves, of all that a model can be asked for."
    )
    dimensions: Annotated[int, Field(ge=1, le=16_384)] = Field(384, description="Numbers of an embedding.")
    vision: bool = Field(False, description="Whether the model takes images in messages.")
    images_max: Annotated[int, Field(ge=1, le=16)] = Field(4, description="Images that one request may bring.")
    device: Device = Field("cpu", description=_DEVICE)
    steps: Annotated[int, Field(ge=1, le=1000)] = Field(4, description="Steps where a request does not say.")
    guidance: Annotated[float, Field(ge=0, le=100)] | None = Field(
        5, description="How closely it would keep to the prompt; none for a model that knows no such thing."
    )
    strength: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.8, description="How much it would give up; none for a model that knows no such thing."
    )

    @model_validator(mode="after")
    def _within_reason(self) -> Self:
        if (3 * self.images_max + 1) * self.edge_max**2 > _REQUEST_BYTES_MAX:
            raise ValueError("so many images of that size are too much at once; lower `images_max` or `edge_max`")
        return self
