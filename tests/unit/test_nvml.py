"""GPUs by the driver's library: a stand-in for it, compiled from C, so that what crosses the border is real."""

import shutil
import subprocess
from pathlib import Path

import pytest

from forebay.replicas.nvml import Gpu, Nvml

# Two GPUs. The first has two processes, one of them on both lists and one whose memory the driver does not tell; the
# second has no sensor, no rates and no lists.
STAND_IN = r"""
#include <stdint.h>
#include <stddef.h>
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int gpu, memory; } rates_t;
typedef struct { unsigned int pid; unsigned long long bytes; unsigned int gpu_instance, compute_instance; } process_t;
static int devices[2] = {0, 1};
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int i, void **device) { *device = &devices[i]; return i < 2 ? 0 : 2; }
int nvmlDeviceGetMemoryInfo(void *device, memory_t *m) {
    unsigned long long gib = 1ULL << 30;
    m->total = 80 * gib; m->used = *(int *)device ? 0 : 30 * gib; m->free = m->total - m->used;
    return 0;
}
int nvmlDeviceGetUtilizationRates(void *device, rates_t *rates) {
    rates->gpu = 42; rates->memory = 7;
    return *(int *)device ? 3 : 0;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned int *celsius) {
    *celsius = 61;
    return *(int *)device || sensor != 0 ? 3 : 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *count, process_t *rows) {
    if (*(int *)device) return 3;
    if (*count < 3) { *count = 3; return 7; }
    *count = 3;
    rows[0] = (process_t){100, 20ULL << 30, 0, 0};
    rows[1] = (process_t){200, 10ULL << 30, 0, 0};
    rows[2] = (process_t){300, ~0ULL, 0, 0};
    return 0;
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned int *count, process_t *rows) {
    if (*(int *)device) return 3;
    *count = 1;
    rows[0] = (process_t){100, 20ULL << 30, 0, 0};
    return 0;
}
"""
NO_DRIVER = "int nvmlInit_v2(void) { return 9; }"
COMPILER = shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler here")
GIB = 2**30


def compiled(folder: Path, code: str) -> str:
    source, library = folder / "library.c", folder / "library.so"
    source.write_text(code)
    assert COMPILER is not None
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


@needs_compiler
def test_what_the_library_tells_is_read(tmp_path: Path) -> None:
    nvml = Nvml.open(compiled(tmp_path, STAND_IN))
    assert nvml is not None
    assert nvml.read() == (
        Gpu("gpu0", 80 * GIB, 30 * GIB, {100: 20 * GIB, 200: 10 * GIB}, 0.42, 61.0),
        Gpu("gpu1", 80 * GIB, 0, {}, None, None),
    )


@needs_compiler
@pytest.mark.parametrize(("visible", "used"), [("1", [0]), ("1, 0", [0, 30]), ("0,7", [30]), ("GPU-8f1c", [30, 0])])
def test_gpus_count_as_engines_see_them(tmp_path: Path, visible: str, used: list[int]) -> None:
    nvml = Nvml.open(compiled(tmp_path, STAND_IN), visible=visible)
    assert nvml is not None
    assert [(gpu.name, gpu.used_bytes // GIB) for gpu in nvml.read()] == [
        (f"gpu{place}", gib) for place, gib in enumerate(used)
    ]


@needs_compiler
def test_without_a_driver_there_is_no_gpu(tmp_path: Path) -> None:
    assert Nvml.open(compiled(tmp_path, NO_DRIVER)) is None


def test_without_the_library_there_is_no_gpu(tmp_path: Path) -> None:
    assert Nvml.open(str(tmp_path / "absent.so")) is None


def test_another_library_by_that_name_is_none_of_ours() -> None:
    assert Nvml.open("libc.so.6") is None
