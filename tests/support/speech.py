"""A recording with a reference: a telephone call of two people, 30 s, with who spoke when and what they said."""

from functools import cache
from pathlib import Path

from tests.support.models import pulled

_SAMPLE = "pypi:pyannote-audio==4.0.7/pyannote/audio/sample/sample"
SAMPLE_SECONDS = 30.0


@cache
def sample_wav() -> Path:
    """The call: mono, 16 kHz, 16 bits."""
    return pulled(f"{_SAMPLE}.wav", "c319b4abca767b124e41432d364fd7df006cb26bb79d09326c487d606a134e6e")


@cache
def sample_rttm() -> Path:
    """Who spoke when, in the format RTTM."""
    return pulled(f"{_SAMPLE}.rttm", "d78fe62c69d8e6dcbb42c26adfce83faccb374c5a1e6d987fe37f85f1c173c87")


@cache
def sample_stm() -> Path:
    """What they said, in the format STM: `sample 1 Diane 6.68 7.16 Hello?`."""
    return pulled(f"{_SAMPLE}.stm", "f861f3004927e1c4429199f9695bfd252def75d7d5e4bdf735d3d85fd4a667f7")


def sample_utterances() -> list[tuple[float, float, str]]:
    """What was said from when to when, in order."""
    rows = [line.split(maxsplit=5) for line in sample_stm().read_text(encoding="utf-8").splitlines()]
    return sorted((float(row[3]), float(row[4]), row[5]) for row in rows)


def sample_words() -> str:
    """All words of the call in order."""
    lines = sample_stm().read_text(encoding="utf-8").splitlines()
    return " ".join(line.split(maxsplit=5)[5] for line in lines)
