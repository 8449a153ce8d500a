"""Says whether llama.cpp computes on a GPU here: the machine has one, and the installed build can use it.

It refuses to load a library or to start a program for that: it looks at files.
"""

import functools
import importlib.util
import mmap
import sys
from pathlib import Path

_GPU_FILES = ("/dev/nvidia0", "/dev/kfd")
_BUILDS = (b"ggml_cuda_init", b"ggml_vk_instance_init")  # functions of the builds for GPUs; ROCm's has the first too


@functools.cache
def llama_cpp_has_gpu() -> bool:
    """Whether models with layers on the GPU get one."""
    if sys.platform == "darwin":
        return True
    if not any(Path(file).exists() for file in _GPU_FILES):
        return False
    found = importlib.util.find_spec("xllamacpp")
    folder = Path(found.origin).parent if found is not None and found.origin else None
    return folder is not None and any(_for_gpus(library) for library in folder.glob("*.so"))


def _for_gpus(library: Path) -> bool:
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        return any(code.find(name) >= 0 for name in _BUILDS)
