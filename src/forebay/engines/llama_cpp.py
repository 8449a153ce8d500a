"""One model behind llama.cpp's own HTTP server, in a process of its own.

xllamacpp brings the server; this program turns our settings into llama.cpp's, loads the model and says where it listens. It
answers no request itself, and it keeps llama.cpp's file, adapter, tool and page doors shut.

The native loader holds the interpreter until the model is in memory, so nothing in Python runs meanwhile: SIGTERM then ends
the process by its default action, and what the loader says is watched by a small process of ours (`_Watch`).
"""

import json
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from forebay.engines.start import check_types, keep_stdout, read_spec, refuse_to_start, run_out_of_memory
from forebay.engines.threads import cores

_TAIL_BYTES = 8 * 1024
_MIB = 1024 * 1024
_MICRO_BATCH = 512
_WARNINGS = 2  # llama.cpp's next level logs every request, the one after that prompts
_MEMORY_WORDS = re.compile(
    r"bad_alloc|out of memory|insufficient memory|(failed|unable|cannot) to allocate|cannot allocate|OutOfDeviceMemory",
    re.IGNORECASE,
)
_REASONS = (
    (r"chat template parsing error", "The chat template of {name} is not valid Jinja. Correct it or leave it out."),
    (r"unknown model architecture", "This version of llama.cpp does not know the architecture of {file}. Upgrade xllamacpp."),
    (r"invalid magic|gguf_init|failed to read|tensor .* (missing|out of bounds)|wrong (type|shape)",
     "{file} is not a whole GGUF model. Remove it and pull the model again."),
    (r"failed to create(_| )context", "{name} cannot run with these settings. Check context, kv_type and flash_attention."),
    (r"couldn't bind|bind HTTP server", "The engine of {name} cannot listen on 127.0.0.1."),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How this engine is set up, from FOREBAY_ENGINE_SPEC."""

    name: str
    model_path: str
    slots: int = 1
    context: int = 2048
    threads: int = 0
    gpu_layers: int = -1
    tensor_split: tuple[float, ...] = ()
    main_gpu: int = 0
    kv_type: str = "f16"
    flash_attention: str | bool = "auto"
    batch: int = 2048
    cache_ram_bytes: int = 0
    chat_template: str | None = None
    embeddings: bool = False
    rerank: bool = False
    pooling: str = "model"
    mmproj_path: str = ""

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def file(self) -> str:
        """The model file's name, without the folder that holds it."""
        return os.path.basename(self.model_path)


def main() -> None:
    """Load the model, say where it listens, and serve until SIGTERM; with --describe, only say what the library has."""
    if sys.argv[1:] == ["--describe"]:
        describe()
        return
    spec, key = _sound_spec()
    out = keep_stdout()
    # An abort in llama.cpp would otherwise start a debugger on this process, which takes seconds and prints its memory.
    os.environ["GGML_NO_BACKTRACE"] = "1"
    # Threads that spin at a barrier collapse as soon as anything else wants a core: 4 tok/s instead of 60, measured.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import xllamacpp

    params = _parameters(spec, key, xllamacpp)
    watch = _Watch(spec)
    server = _load(spec, watch, lambda: xllamacpp.Server(params))
    watch.end()
    stop = _signal_descriptor()
    sys.stderr.write(f"llama_cpp: event=ready model={spec.name} slots={spec.slots} context={spec.context}\n")
    os.write(out, f"FOREBAY_ENGINE_LISTENING {server.listening_address}\n".encode())
    select.select([stop], [], [])
    os._exit(0)  # llama.cpp's destructors wait for its threads; nothing here is worth that


def describe() -> None:
    """Print the library's version and devices as one line of JSON."""
    import xllamacpp

    known = ("name", "description", "memory_free", "memory_total")
    devices = [
        {**{key: device[key] for key in known}, "type": device["type"].name.rpartition("_")[2]}
        for device in xllamacpp.get_device_info()
    ]
    print(json.dumps({"version": xllamacpp.__version__, "system": xllamacpp.get_system_info(), "devices": devices}))


def _sound_spec() -> tuple[Spec, str]:
    """The spec and the key, once they make sense."""
    spec, key = read_spec(Spec, "The llama.cpp engine")
    if min(spec.slots, spec.context, spec.batch) < 1:
        refuse_to_start(f"{spec.name} needs at least 1 for slots, context and batch.")
    if not os.path.isfile(spec.model_path):
        refuse_to_start(f"The model file {spec.file} of {spec.name} does not exist. Pull the model again.")
    if spec.mmproj_path and not os.path.isfile(spec.mmproj_path):
        refuse_to_start(f"The image encoder {os.path.basename(spec.mmproj_path)} of {spec.name} does not exist.")
    return spec, key


class _Watch:
    """A child process that passes the loader's lines on and remembers the last ones.

    It is not a thread, which could not run while the loader holds the interpreter, and not a file, which nobody would read
    out after a crash. It ends by itself when the last writer has gone.
    """

    def __init__(self, spec: Spec) -> None:
        self._stderr = os.dup(2)
        lines_in, lines_out = os.pipe()
        self._tail, tail_out = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.setpgid(0, 0)  # it may finish its line when the group is killed
            os.close(lines_out)
            os.dup2(self._stderr, 1)
            os.dup2(self._stderr, 2)
            try:
                _pass_on(lines_in, tail_out, spec)
            finally:
                os._exit(0)
        for descriptor in (lines_in, tail_out):
            os.close(descriptor)
        for standard in (1, 2):
            os.dup2(lines_out, standard)
        os.close(lines_out)

    def end(self) -> str:
        """Stop watching; what was said last."""
        for standard in (1, 2):
            os.dup2(self._stderr, standard)
        with os.fdopen(self._tail, "rb") as tail:
            said = tail.read(_TAIL_BYTES)
        os.waitpid(self._pid, 0)
        return said.decode(errors="replace")


def _pass_on(lines_in: int, tail_out: int, spec: Spec) -> None:
    """Copy every line to standard error, without the folder of the model, and the last ones to `tail_out` at the end."""
    tail = b""
    with os.fdopen(lines_in, "rb") as lines:
        while line := lines.readline(_TAIL_BYTES):
            shown = line.replace(os.fsencode(spec.model_path), os.fsencode(spec.file))
            os.write(2, shown)
            tail = (tail + shown)[-_TAIL_BYTES:]
    os.write(tail_out, tail)


def _give_up(spec: Spec, said: str) -> NoReturn:
    """End the process with the code and the sentence that fit what the loader has said."""
    if _MEMORY_WORDS.search(said):
        run_out_of_memory(f"{spec.name} needs more memory than there is. Lower its context or its slots.")
    for pattern, reason in _REASONS:
        if re.search(pattern, said):
            refuse_to_start(reason.format(name=spec.name, file=spec.file))
    refuse_to_start(f"llama.cpp cannot load {spec.file} for {spec.name}; the lines above say why.")


def _load(spec: Spec, watch: _Watch, start: Callable[[], Any]) -> Any:
    """The running server; ends the process with the fitting code when there is none."""
    try:
        return start()
    except MemoryError:
        said = f"{watch.end()} out of memory"
    except (RuntimeError, ValueError, AssertionError) as error:
        said = f"{watch.end()}\n{error}"
    _give_up(spec, said)


def _parameters(spec: Spec, key: str, xllamacpp: Any) -> Any:
    """Our settings in llama.cpp's words."""
    params = xllamacpp.CommonParams()
    params.model.path = spec.model_path
    if spec.mmproj_path:
        params.mmproj.path = spec.mmproj_path
        params.mmproj_use_gpu = spec.gpu_layers != 0
    params.model_alias = {spec.name}
    params.n_parallel = spec.slots
    params.n_ctx = spec.slots * spec.context
    params.n_batch = spec.batch
    params.n_ubatch = min(spec.batch, _MICRO_BATCH)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec.threads or cores()
    params.n_gpu_layers = spec.gpu_layers
    params.main_gpu = spec.main_gpu
    if spec.tensor_split:
        room = len(params.tensor_split)
        params.tensor_split = [*map(float, spec.tensor_split), *[0.0] * room][:room]
    params.cache_type_k = params.cache_type_v = _kv_type(spec, xllamacpp.ggml_type)
    params.flash_attn_type = _flash_attention(spec, xllamacpp.llama_flash_attn_type)
    params.cache_ram_mib = spec.cache_ram_bytes // _MIB
    params.cache_idle_slots = params.cache_ram_mib > 0
    params.use_jinja = True
    if spec.chat_template is not None:
        params.chat_template = spec.chat_template
    if spec.embeddings or spec.rerank:
        params.embedding = True
        params.n_batch = params.n_ubatch = max(spec.batch, spec.context)  # an input is read in one step or not at all
    if spec.rerank or spec.pooling != "model":
        kind = "RANK" if spec.rerank else spec.pooling.upper()
        params.pooling_type = xllamacpp.llama_pooling_type[f"LLAMA_POOLING_TYPE_{kind}"]
    params.warmup = True
    params.verbosity = _WARNINGS
    _close_doors(params, spec, key)
    return params


def _close_doors(params: Any, spec: Spec, key: str) -> None:
    """Loopback, one key, and only the routes that answer requests and probes."""
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [key]
    params.n_threads_http = (
        2 * spec.slots + 8
    )  # one for every stream, one for every stream that is just ending, and probes
    params.endpoint_slots = True
    params.endpoint_metrics = True
    params.endpoint_props = False
    params.ui = False
    params.slot_save_path = ""
    params.media_path = ""
    params.lora_adapters = []
    params.server_tools = []
    params.cors_origins = "http://127.0.0.1"


def _kv_type(spec: Spec, types: Any) -> Any:
    known = {kind.name.removeprefix("GGML_TYPE_").lower(): kind for kind in types}
    if spec.kv_type.lower() not in known:
        refuse_to_start(
            f"{spec.name} has the unknown kv_type {spec.kv_type!r}. Use f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or f32."
        )
    return known[spec.kv_type.lower()]


def _flash_attention(spec: Spec, types: Any) -> Any:
    name = {True: "ENABLED", False: "DISABLED", "on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}.get(
        spec.flash_attention
    )
    if name is None:
        refuse_to_start(f"{spec.name} has the unknown flash_attention {spec.flash_attention!r}. Use auto, on or off.")
    return types[f"LLAMA_FLASH_ATTN_TYPE_{name}"]


def _signal_descriptor() -> int:
    """A descriptor that becomes readable on SIGTERM, whichever of llama.cpp's threads the signal lands on."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)
    return reader


if __name__ == "__main__":
    main()
