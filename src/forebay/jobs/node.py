"""The name under which a process holds leases: one for each process that shares a data folder.

It refuses to be shared: the name is locked for as long as the process lives, so whoever gets a name knows that its last
bearer is dead and that its leases are free.
"""

from pathlib import Path

import filelock

from forebay.clock import new_id
from forebay.errors import SetupError

_NODES_MAX = 64


class Node:
    """A claimed name. The lock goes with the process, also by `kill -9`."""

    def __init__(self, name: str, lock: filelock.FileLock) -> None:
        self.name = name
        self._lock = lock

    @classmethod
    def claim(cls, data_dir: Path) -> "Node":
        """The first free name of the data folder. Raises SetupError if too many processes share it, or it is no folder."""
        folder = data_dir / "nodes"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return cls._first_free(folder)
        except OSError as error:
            raise SetupError(
                f"The folder {folder} cannot be used: {error.strerror}. Choose another data folder with FOREBAY_DATA_DIR."
            ) from None

    @classmethod
    def _first_free(cls, folder: Path) -> "Node":
        for number in range(_NODES_MAX):
            lock = filelock.FileLock(folder / f"{number}.lock", timeout=0)
            try:
                lock.acquire()
            except filelock.Timeout:
                continue
            return cls(_name(folder / f"{number}.name"), lock)
        raise SetupError(f"{_NODES_MAX} processes share this data folder. Stop some, or give this one another folder.")

    def release(self) -> None:
        """Give the name back."""
        self._lock.release()


def _name(path: Path) -> str:
    """What the file holds; a new name the first time. The folder may be one of many that share a database."""
    try:
        name = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        name = ""
    if not name:
        name = new_id("node")
        path.write_text(name, encoding="utf-8")
    return name
