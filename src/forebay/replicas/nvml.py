"""Asks NVIDIA's management library what the GPUs of this machine hold, how hot they are, and who holds it.

It speaks to the library of the driver, which no package of ours brings. It refuses to change anything on a GPU, and takes
what a driver does not tell for unknown.
"""

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_GPUS_MAX = 64
_PROCESSES_MAX = 1024
_UNKNOWN_BYTES = 2**64 - 1
_CORE_SENSOR = 0
_NUMBERS = re.compile(r"\s*\d+(\s*,\s*\d+)*\s*")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU at one moment. `processes` holds bytes by process id, as far as the driver tells them."""

    name: str
    total_bytes: int
    used_bytes: int
    processes: Mapping[int, int]
    utilisation: float | None
    celsius: float | None


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_uint64), ("free", ctypes.c_uint64), ("used", ctypes.c_uint64))


class _Utilisation(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("bytes", ctypes.c_uint64),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class Nvml:
    """The library, opened once for the life of the server. `open` gives None on a machine without it."""

    def __init__(self, library: Any, visible: str | None) -> None:
        self._library = library
        told = _NUMBERS.fullmatch(visible or "")
        self._visible = [int(word) for word in told[0].split(",")] if told else None

    @classmethod
    def open(cls, name: str = _LIBRARY, *, visible: str | None = None) -> "Nvml | None":
        """The library by that name or path; None if there is none, or if it finds no driver.

        `visible` are the numbers of the GPUs that engines see, as CUDA_VISIBLE_DEVICES has them: the first is `gpu0`.
        """
        try:
            library = ctypes.CDLL(name)
            ready = library.nvmlInit_v2() == 0
        except (OSError, AttributeError):  # no such file, or another library by that name
            return None
        return cls(library, visible) if ready else None

    def read(self) -> tuple[Gpu, ...]:
        """Every GPU that engines see, in their order, as `gpu0`, `gpu1`…; one whose memory cannot be read is left out."""
        count = ctypes.c_uint()
        if self._ask("nvmlDeviceGetCount_v2", ctypes.byref(count)) != 0:
            return ()
        there = range(count.value)
        numbers = there if self._visible is None else [number for number in self._visible if number in there]
        found = (self._gpu(place, number) for place, number in enumerate(numbers[:_GPUS_MAX]))
        return tuple(gpu for gpu in found if gpu is not None)

    def _gpu(self, place: int, number: int) -> Gpu | None:
        device, memory = ctypes.c_void_p(), _Memory()
        if self._ask("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(number), ctypes.byref(device)) != 0:
            return None
        if self._ask("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory)) != 0:
            return None
        return Gpu(
            f"gpu{place}",
            int(memory.total),
            int(memory.used),
            self._processes(device),
            self._utilisation(device),
            self._celsius(device),
        )

    def _utilisation(self, device: ctypes.c_void_p) -> float | None:
        rates = _Utilisation()
        known = self._ask("nvmlDeviceGetUtilizationRates", device, ctypes.byref(rates)) == 0
        return float(rates.gpu) / 100 if known else None

    def _celsius(self, device: ctypes.c_void_p) -> float | None:
        degrees = ctypes.c_uint()
        known = self._ask("nvmlDeviceGetTemperature", device, ctypes.c_int(_CORE_SENSOR), ctypes.byref(degrees)) == 0
        return float(degrees.value) if known else None

    def _processes(self, device: ctypes.c_void_p) -> dict[int, int]:
        """Those that compute, and those that draw, which some drivers list apart; one on both lists counts once."""
        return {
            **self._listed("nvmlDeviceGetGraphicsRunningProcesses_v3", device),
            **self._listed("nvmlDeviceGetComputeRunningProcesses_v3", device),
        }

    def _listed(self, function: str, device: ctypes.c_void_p) -> dict[int, int]:
        count = ctypes.c_uint(_PROCESSES_MAX)
        rows = (_Process * _PROCESSES_MAX)()
        if self._ask(function, device, ctypes.byref(count), rows) != 0:
            return {}
        told = rows[: min(count.value, _PROCESSES_MAX)]
        return {int(row.pid): int(row.bytes) for row in told if row.bytes != _UNKNOWN_BYTES}

    def _ask(self, function: str, *arguments: Any) -> int:
        """What the library answers: 0 is success. A function that an old driver lacks is a question without answer."""
        try:
            return int(getattr(self._library, function)(*arguments))
        except AttributeError:
            return -1
