"""The whole way of an alignment: a form, the decoder, the line of the model, the engine, and subtitles."""

import io
import wave
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from tests.support import tiny_letters
from tests.support.server import Server, serving
from tests.support.tiny_letters import RATE, said

TEXT = "Well, in 1985 — it was here."


def _form(samples: np.ndarray, **fields: str) -> aiohttp.FormData:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, RATE, 0, "NONE", ""))
        writer.writeframes(samples.tobytes())
    form = aiohttp.FormData({"model": "letters", **fields})
    form.add_field("file", file.getvalue(), filename="said.wav")
    return form


async def _aligned(server: Server, form: aiohttp.FormData) -> tuple[int, Any]:
    url = f"{server.url}/v1/audio/alignments"
    async with server.session.post(url, data=form, headers=server.headers) as response:
        kind = response.content_type
        return response.status, await response.json() if kind == "application/json" else await response.text()


async def test_a_text_is_aligned_by_a_model_of_letters(tmp_path: Path) -> None:
    path = tiny_letters.save(tmp_path / "model")
    config = f'default_models = false\n[models.letters]\nengine = "aligner"\nsource = "file:{path}"\noptions.language = "en"\n'
    samples, times = said(TEXT, 0.6, 9)
    async with serving(config) as server:
        status, made = await _aligned(server, _form(samples, transcript=TEXT, character_alignments="true"))
        assert status == 200, made
        words = made["words"]
        assert [word["word"] for word in words] == TEXT.split()
        for word, (start, _) in zip(words, times, strict=True):
            if word["word"] != "—":
                assert word["start"] == pytest.approx(start, abs=0.1)
        assert words[0]["characters"][0]["start"] == words[0]["start"]
        status, subtitles = await _aligned(server, _form(samples, transcript=TEXT, response_format="srt"))
        assert status == 200, subtitles
        assert "Well, in 1985 — it was here." in " ".join(subtitles.split())
        status, refused = await _aligned(server, _form(samples, transcript=TEXT, language="de"))
        assert (status, refused["error"]["param"]) == (400, "language")
