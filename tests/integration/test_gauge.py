"""The gauge, over real processes and over folders that look like the kernel's."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from forebay.replicas.gauge import Gauge, Reading
from forebay.replicas.memory import HOST
from forebay.replicas.nvml import Gpu
from forebay.server_config import MemorySettings
from tests.support.engines import eventually

GIB = 2**30
MIB = 2**20
# A family of three: a grandchild holds 60 MiB of its own, the child 20, and a thread started the grandchild.
FAMILY = """
import subprocess, sys, threading
child = '''
import subprocess, sys, threading
mine = bytearray(20 * 2**20)
grandchild = "mine = bytearray(60 * 2**20); print(1, flush=True); input()"
def start():
    global started
    started = subprocess.Popen([sys.executable, "-c", grandchild])
thread = threading.Thread(target=start)
thread.start()
thread.join()
started.wait()
'''
subprocess.run([sys.executable, "-c", child])
"""


@pytest.fixture
def family() -> Iterator[int]:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the grandchild has what it wants
        yield process.pid
        process.communicate()


def gauge(root: Path = Path("/"), **settings: object) -> Gauge:
    return Gauge(MemorySettings(**settings), None, root)  # type: ignore[arg-type]


def test_a_family_holds_what_all_of_it_holds(family: int) -> None:
    members = [psutil.Process(family), *psutil.Process(family).children(recursive=True)]
    assert len(members) == 3

    def agree() -> bool:
        """What other processes share with it is theirs, too, as long as they are there."""
        held = gauge().read([family]).held[family][HOST]
        told = sum(member.memory_full_info().pss for member in members)
        assert told > 80 * MIB
        return held == pytest.approx(told, rel=0.03)

    eventually(agree, 10)


PEAK = "mine = bytearray(200 * 2**20); del mine; print(1, flush=True); input()"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel starts no count anew here")
def test_what_was_held_between_two_readings_and_given_back_is_told_once() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", PEAK], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        measuring = gauge()
        first, second = measuring.read([process.pid]), measuring.read([process.pid])
        process.communicate()
    held, still = first.held[process.pid][HOST], second.held[process.pid][HOST]
    assert held < 60 * MIB
    assert first.peaks[process.pid][HOST] == pytest.approx(held + 200 * MIB, rel=0.05)
    assert second.peaks[process.pid][HOST] == pytest.approx(still, rel=0.05)


def test_a_family_that_is_gone_is_left_out() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert gauge().read([process.pid]).held == {}


def test_without_the_kernels_lists_of_children_the_same_family_is_found(family: int, tmp_path: Path) -> None:
    def agree() -> bool:
        listed = gauge().read([family]).held[family][HOST]
        searched = gauge(tmp_path).read([family]).held[family][HOST]
        return searched == pytest.approx(listed, rel=0.03)

    eventually(agree, 10)


def test_the_machine_has_what_it_has(tmp_path: Path) -> None:
    reading = gauge(tmp_path).read()  # no control groups there
    assert reading.total_bytes == psutil.virtual_memory().total
    assert 0 < reading.available_bytes <= reading.total_bytes
    assert reading.cpu_share >= 0
    assert reading.gpus == ()


def group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content)


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts_and_what_it_could_drop_does_not(tmp_path: Path, version: int) -> None:
    limit, used, inactive, active, mapped = (
        ("memory.max", "memory.current", "inactive_file", "active_file", "file_mapped")
        if version == 2
        else (
            *("memory.limit_in_bytes", "memory.usage_in_bytes"),
            *("total_inactive_file", "total_active_file", "total_mapped_file"),
        )
    )
    mount = tmp_path / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory")
    group(tmp_path / "proc/self", {"cgroup": "0::/outer/inner\n" if version == 2 else "4:memory:/outer/inner\n"})
    unlimited = "max" if version == 2 else str(2**63 - 4096)
    group(mount / "outer/inner", {limit: unlimited, used: str(10 * MIB), "memory.stat": f"{inactive} 0\n"})
    stat = f"anon 5\n{inactive} {10 * MIB}\n{active} {12 * MIB}\n{mapped} {7 * MIB}\n"
    group(mount / "outer", {limit: str(200 * MIB), used: str(50 * MIB), "memory.stat": stat})
    measuring = gauge(tmp_path)
    reading = measuring.read()
    assert reading.total_bytes == 200 * MIB
    assert reading.available_bytes == 165 * MIB
    assert measuring.totals(reading, {}) == {HOST: 160 * MIB}


def test_a_container_that_sees_its_own_group_at_the_mount_has_its_limit(tmp_path: Path) -> None:
    group(tmp_path / "proc/self", {"cgroup": "0::/../../elsewhere\n"})
    group(tmp_path / "sys/fs/cgroup", {"memory.max": str(64 * MIB), "memory.current": "0"})
    assert gauge(tmp_path).read().total_bytes == 64 * MIB


def test_bytes_go_before_a_share() -> None:
    measuring = gauge(host_bytes=3 * GIB, host_share=0.1)
    assert measuring.totals(measuring.read(), {}) == {HOST: 3 * GIB}


def test_what_others_hold_of_a_gpu_is_taken_off() -> None:
    gpu = Gpu("gpu0", 80 * GIB, 50 * GIB, {1: 10 * GIB, 2: 20 * GIB, 3: 20 * GIB}, 0.5, 60.0)
    held = {1: {HOST: 0, "gpu0": 30 * GIB}}  # of the processes 1 and 2
    reading = Reading(100 * GIB, 50 * GIB, 0.5, None, (gpu,), held, held)
    assert gauge(gpu_share=0.75, host_share=0.5).totals(reading, {}) == {HOST: 50 * GIB, "gpu0": 40 * GIB}
    hidden = replace(reading, unseen={"gpu0": 12 * GIB})
    assert gauge(gpu_share=0.75).totals(hidden, {"gpu0": 15 * GIB})["gpu0"] == 52 * GIB
    assert gauge(gpu_share=0.75).totals(hidden, {"gpu0": 5 * GIB})["gpu0"] == 45 * GIB
    assert gauge(gpu_share=0.75).totals(reading, {"gpu0": 5 * GIB})["gpu0"] == 40 * GIB


def test_engines_get_no_more_of_a_gpu_than_is_free_or_theirs() -> None:
    silent = Gpu("gpu0", 80 * GIB, 75 * GIB, {}, None, None)
    reading = Reading(100 * GIB, 50 * GIB, 0.5, None, (silent,), {}, {})
    measuring = gauge(gpu_share=0.75)
    assert measuring.totals(reading, {})["gpu0"] == 5 * GIB, "the driver does not tell whose the rest is"
    assert measuring.totals(reading, {"gpu0": 20 * GIB})["gpu0"] == 25 * GIB, "engines were charged with that"
    held = {1: {HOST: 0, "gpu0": 30 * GIB}}
    told = replace(reading, gpus=(replace(silent, processes={1: 30 * GIB}),), held=held, peaks=held)
    assert measuring.totals(told, {})["gpu0"] == 35 * GIB
    empty = replace(reading, gpus=(replace(silent, used_bytes=GIB),))
    assert measuring.totals(empty, {})["gpu0"] == 60 * GIB


class Driver:
    """What says that this process holds a GiB of a GPU."""

    def read(self) -> tuple[Gpu, ...]:
        return (
            Gpu("gpu0", 2 * GIB, GIB, {os.getpid(): GIB, 1: 5}, None, None),
            Gpu("gpu1", 2 * GIB, 0, {}, None, None),
        )


def test_what_a_family_holds_of_a_gpu_is_what_the_driver_tells() -> None:
    reading = Gauge(MemorySettings(), Driver()).read([os.getpid()])  # type: ignore[arg-type]
    assert reading.held[os.getpid()]["gpu0"] == GIB
    assert "gpu1" not in reading.held[os.getpid()]
    assert reading.unseen == {"gpu0": 0, "gpu1": 0}


def test_what_is_not_to_be_seen_from_here_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "proc/1").mkdir(parents=True)
    assert Gauge(MemorySettings(), Driver(), tmp_path).read().unseen == {"gpu0": GIB, "gpu1": 0}  # type: ignore[arg-type]
