"""A hum as every kind of file that recordings come in, made by the library's own encoders."""

import io
from functools import cache
from math import pi, sin
from typing import Any

import av

# kind: container, codec, rate
_KINDS = {
    "wav": ("wav", "pcm_s16le", 44_100),
    "float": ("wav", "pcm_f32le", 48_000),
    "ulaw": ("wav", "pcm_mulaw", 8_000),
    "w64": ("w64", "pcm_s16le", 16_000),
    "mp3": ("mp3", "libmp3lame", 44_100),
    "flac": ("flac", "flac", 44_100),
    "vorbis": ("ogg", "vorbis", 44_100),
    "opus": ("ogg", "libopus", 48_000),
    "m4a": ("ipod", "aac", 44_100),
    "alac": ("ipod", "alac", 44_100),
    "webm": ("webm", "libopus", 48_000),
    "mka": ("matroska", "pcm_s16le", 44_100),
    "aac": ("adts", "aac", 44_100),
    "amr": ("amr", "libopencore_amrnb", 8_000),
    "aiff": ("aiff", "pcm_s16be", 44_100),
    "caf": ("caf", "pcm_s16be", 44_100),
    "avi": ("avi", "libmp3lame", 44_100),
    "mpeg": ("mpeg", "mp2", 44_100),
    "ts": ("mpegts", "aac", 44_100),
    "flv": ("flv", "aac", 44_100),
    "wma": ("asf", "wmav2", 44_100),
}
_VIDEOS = {"mp4": ("mp4", "aac", "mpeg4"), "film": ("webm", "libopus", "libvpx"), "mkv": ("matroska", "ac3", "mpeg4")}
KINDS = (*_KINDS, *_VIDEOS)


@cache
def hum(kind: str, seconds: float = 2.0) -> bytes:
    """A hum of 440 Hz; the kinds of videos show grey with it."""
    if kind in _KINDS:
        container, codec, rate = _KINDS[kind]
        return encoded(container, codec, rate, seconds)
    container, codec, picture = _VIDEOS[kind]
    return encoded(container, codec, 48_000, seconds, picture=picture)


def encoded(
    container: str,
    codec: str | None,
    rate: int,
    seconds: float,
    *,
    picture: str | None = None,
    metadata: dict[str, str] | None = None,
    **options: str,
) -> bytes:
    """A file of one mono hum, if there is a `codec`, and of a grey picture, if there is one for that."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as out:
        out.metadata.update(metadata or {})
        layout = "stereo" if codec == "vorbis" else "mono"
        more = {"strict": "experimental"} if codec == "vorbis" else {}
        sound: Any = out.add_stream(codec, rate, options=more, layout=layout) if codec else None
        if codec == "wmav2":
            sound.codec_context.bit_rate = 64_000
        film: Any = out.add_stream(picture, rate=10) if picture else None
        if film is not None:
            film.width, film.height, film.pix_fmt = 64, 64, "yuv420p"
            frame = av.VideoFrame(64, 64, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([128]) * plane.buffer_size)
            for number in range(round(10 * seconds)):
                frame.pts = number
                out.mux(film.encode(frame))
            out.mux(film.encode(None))
        if sound is not None:
            _hum_into(out, sound, rate, seconds)
    return file.getvalue()


def _hum_into(out: Any, sound: Any, rate: int, seconds: float) -> None:
    resampler = av.AudioResampler(sound.format, sound.layout, rate, frame_size=sound.codec_context.frame_size or 1024)
    frame = av.AudioFrame("s16", "mono", round(rate * seconds))
    frame.sample_rate = rate
    turn = [round(8000 * sin(2 * pi * 440 * place / rate)) for place in range(rate)]
    samples = b"".join(value.to_bytes(2, "little", signed=True) for value in turn)
    content = (samples * (round(seconds) + 1))[: frame.samples * 2]
    frame.planes[0].update(content.ljust(frame.planes[0].buffer_size, b"\0"))
    for part in [*resampler.resample(frame), *resampler.resample(None), None]:
        out.mux(sound.encode(part))
