"""A recording whose words are known, and pieces of it.

It refuses to measure a recording that is not the one it knows: its checksum is part of its name.
"""

import re
import wave
from dataclasses import dataclass
from pathlib import Path

from forebay.clock import SystemClock
from forebay.config import Settings
from forebay.model_config import ModelFile, OnnxModel
from forebay.replicas.catalog import Catalog
from forebay.replicas.pull import pull

LEAD_SECONDS = 6.0  # nobody speaks before; a file begins somewhere in it, so that no two are alike
_NAME = "a-telephone-call"
_SOURCE = "pypi:pyannote-audio==4.0.7/pyannote/audio/sample/sample"
_FILES = OnnxModel(  # only for its files: no engine ever runs it
    engine="onnx",
    source=f"{_SOURCE}.wav",
    sha256="c319b4abca767b124e41432d364fd7df006cb26bb79d09326c487d606a134e6e",
    files={
        "sample.stm": ModelFile(
            source=f"{_SOURCE}.stm",
            sha256="f861f3004927e1c4429199f9695bfd252def75d7d5e4bdf735d3d85fd4a667f7",
        )
    },
)


@dataclass(frozen=True, slots=True)
class Recording:
    """A file, and the words that are said in it."""

    path: Path
    words: list[str]


async def telephone_call(settings: Settings) -> Recording:
    """A telephone call of two people, 30 s; it is pulled if it is not here."""
    catalog = Catalog(settings.model_copy(update={"models": {_NAME: _FILES}}))
    path = await pull(_NAME, catalog, settings.pull, SystemClock(), lambda _done, _total: None)
    lines = path.with_name("sample.stm").read_text(encoding="utf-8").splitlines()
    return Recording(path, [word for line in lines for word in words_of(line.split(maxsplit=5)[5])])


def words_of(text: str) -> list[str]:
    """Its words, without case and punctuation."""
    return re.sub(r"[^\w\s]", "", text.lower()).split()


def cut(recording: Recording, path: Path, begin: float, seconds: float | None = None) -> Path:
    """Write what it has from `begin` on, for so many seconds or to its end."""
    with wave.open(str(recording.path)) as whole, wave.open(str(path), "wb") as piece:
        piece.setparams(whole.getparams())
        whole.setpos(round(begin * whole.getframerate()))
        piece.writeframes(
            whole.readframes(whole.getnframes() if seconds is None else round(seconds * whole.getframerate()))
        )
    return path


def seconds_of(path: Path) -> float:
    """How long a file is."""
    with wave.open(str(path)) as file:
        frames, rate = int(file.getnframes()), int(file.getframerate())
        return frames / rate
