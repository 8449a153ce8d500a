"""Tiny random diffusion models in diffusers' layout; the same bytes every time.

Torch takes seconds to load, so a process of its own makes them: `folder("flux-fill")`.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from forebay.bench import painters

BUILDER = Path(painters.__file__).with_name("tiny_pipelines.py")
CACHE = Path(__file__).parents[2] / ".cache" / "tiny-pipelines"
KINDS = ("flux-fill", "flux", "sd", "sd-inpaint", "xl")
FACTOR = 8


@cache
def folder(kind: str) -> Path:
    """The folder of a tiny model. The first who asks makes all of them, and again when their builder has changed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = CACHE / ".made"
        if not stamp.exists() or stamp.stat().st_mtime < BUILDER.stat().st_mtime:
            for each in KINDS:
                shutil.rmtree(CACHE / each, ignore_errors=True)
            subprocess.run(
                [sys.executable, BUILDER],
                input=b"\n".join(json.dumps({"kind": each, "folder": str(CACHE / each)}).encode() for each in KINDS),
                check=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.DEVNULL,
            )
            stamp.touch()
    return CACHE / kind
