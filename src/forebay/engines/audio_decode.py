"""Decodes recordings that strangers sent, each in a forked child with little memory, bounded time and no files.

It answers with bare samples, or with the reason why there are none; it opens no address and no file, follows nothing that
a recording points at, and no recording is decoded in the process that talks to the server.

Standard input is a socket. On it comes, again and again, `>Q` (the most samples) with two descriptors: the recording, to be
read, and an empty file for mono samples, 16 kHz, signed 16-bit, little-endian. Back go single bytes: percent while it
works, and at the end 128 and the verdict. Limits come as JSON in the first argument, the id of the
server's process in the second.
"""

import contextlib
import errno
import io
import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import av

from forebay.engines import fence
from forebay.engines.audio_kinds import demuxer
from forebay.engines.descriptors import Source
from forebay.engines.fence import Refused
from forebay.speech import SAMPLE_BYTES, SAMPLE_RATE

NOT_A_RECORDING, BROKEN, NO_AUDIO, TOO_LONG, NO_ROOM = 1, fence.BROKEN, 3, 4, 6
_END = 128
_RATE_MIN, _RATE_MAX = 1000, 768_000
_CHANNELS_MAX = 64  # more than that the resampler does not take
_FAILED_FRAMES_MAX = 200  # damaged ones, beyond as many as could be decoded
# What a recording has is decoded by these or not at all: pictures and films are not, not even to learn their size.
_DECODERS = (
    *(
        "aac",
        "aac_latm",
        "ac3",
        "eac3",
        "alac",
        "amrnb",
        "amrwb",
        "dca",
        "flac",
        "gsm",
        "gsm_ms",
        "ilbc",
        "mp1",
        "mp1float",
    ),
    *("mp2", "mp2float", "mp3", "mp3float", "nellymoser", "opus", "libopus", "qdm2", "speex", "vorbis", "wmalossless"),
    *("wmapro", "wmav1", "wmav2", "wmavoice", "adpcm_ima_qt", "adpcm_ima_wav", "adpcm_ms", "adpcm_swf", "adpcm_yamaha"),
    *("g722", "g726", "g726le", "mace3", "mace6", "truespeech", "pcm_alaw", "pcm_mulaw", "pcm_bluray", "pcm_dvd"),
    *(f"pcm_f{bits}{end}" for bits in (32, 64) for end in ("be", "le")),
    *(f"pcm_{sign}{bits}{end}" for sign in "su" for bits in (16, 24, 32) for end in ("be", "le")),
    *("pcm_s8", "pcm_u8", "pcm_s64be", "pcm_s64le", "pcm_s16be_planar", "pcm_s16le_planar", "pcm_s24le_planar"),
    *("pcm_s32le_planar", "pcm_s8_planar"),
)


_OURS = ("s16", "mono", SAMPLE_RATE)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one recording may cost."""

    memory_bytes_max: int
    seconds_max: int


@dataclass(frozen=True, slots=True)
class Work:
    """One recording: its descriptor, that of the samples, and how many of these are wanted at most."""

    recording: int
    samples: int
    samples_max: int


def main() -> None:
    """Serve until the server closes the socket or ends."""
    limits = Limits(**json.loads(sys.argv[1]))
    libc = fence.begin(int(sys.argv[2]))
    av.logging.set_level(None)
    _warm_up()
    server = socket.socket(fileno=0)
    with contextlib.suppress(OSError):  # the server has gone
        while (work := _receive(server)) is not None:
            server.send(bytes((_END + _run(work, limits, libc, server),)))


def _receive(server: socket.socket) -> Work | None:
    """The next recording; None when the server has gone."""
    head, descriptors, _, _ = socket.recv_fds(server, 8, 2)
    if len(head) < 8 or len(descriptors) < 2:
        return None
    return Work(*descriptors, *struct.unpack(">Q", head))


def _run(work: Work, limits: Limits, libc: Any, server: socket.socket) -> int:
    """Decode one recording in a child; this process only passes percents on."""
    child, reader = fence.fork(lambda writer: _look(work, writer), cost(work, limits), libc)
    for descriptor in (work.recording, work.samples):
        os.close(descriptor)
    with os.fdopen(reader, "rb", buffering=0) as percents:
        if not _relay(percents, server):
            os.kill(child, signal.SIGKILL)
    return fence.verdict(child, NO_ROOM)


def _relay(percents: io.RawIOBase, server: socket.socket) -> bool:
    """Pass on what the child says until it ends; whether the server is still there."""
    poll = select.poll()
    poll.register(percents, select.POLLIN)
    poll.register(server, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if server.fileno() in ready:  # it says nothing while we work: it has gone
            return False
        said = percents.read(64)
        if not said:
            return True
        try:
            server.send(bytes((min(said[-1], 99),)))
        except OSError:
            return False


def cost(work: Work, limits: Limits) -> fence.Cost:
    """What the child that decodes may take."""
    samples_bytes_max = (work.samples_max + SAMPLE_RATE) * SAMPLE_BYTES
    return fence.Cost(limits.memory_bytes_max, limits.seconds_max, samples_bytes_max)


def _look(work: Work, writer: int) -> None:
    """What the child does."""
    try:
        Decoding(Source(work.recording), Sink(work.samples, work.samples_max), _teller(writer)).run()
    except OSError as error:
        raise Refused(NO_ROOM if error.errno in {errno.ENOSPC, errno.EDQUOT} else BROKEN) from None


def _teller(writer: int) -> Callable[[int], None]:
    last = -1

    def tell(percent: int) -> None:
        nonlocal last
        if percent > last:
            last = percent
            os.write(writer, bytes((min(percent, 99),)))

    return tell


class Sink:
    """Where samples go: one second more than are wanted at most."""

    def __init__(self, descriptor: int, samples_max: int) -> None:
        self._descriptor = descriptor
        self._samples_max = samples_max
        self.samples = 0

    def write(self, samples: memoryview) -> None:
        """Add samples. Raises Refused when there are too many."""
        left = (self._samples_max + SAMPLE_RATE - self.samples) * SAMPLE_BYTES
        view = samples[:left]
        self.samples += len(view) // SAMPLE_BYTES
        fence.write(self._descriptor, view)
        if self.samples > self._samples_max:
            raise Refused(TOO_LONG)


class Decoding:
    """One recording on its way to samples, frame by frame."""

    def __init__(self, source: Source, sink: Sink, tell: Callable[[int], None]) -> None:
        self._source = source
        self._sink = sink
        self._tell = tell
        self._resampler: Resampler | None = None
        self._frames = 0
        self._failed = 0

    def run(self) -> None:
        """Decode it all. Raises Refused, MemoryError, and OSError of the sink."""
        name = demuxer(self._source)
        if name is None:
            raise Refused(NOT_A_RECORDING)
        self._source.seek(0)
        with _opened(self._source, name) as container:
            if not container.streams.audio:
                raise Refused(NO_AUDIO)
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise Refused(BROKEN)
            stream.codec_context.thread_count = 1
            for packet in _packets(container, stream):
                self._decode(packet)
                # By its place in the file: what a recording claims of its length may be anything.
                self._tell(int(100 * (packet.pos or 0) / self._source.bytes))
            self._flush()
        if not self._frames:
            raise Refused(BROKEN)
        if not self._sink.samples:  # shorter than one sample of ours
            self._sink.write(memoryview(bytes(SAMPLE_BYTES)))

    def _decode(self, packet: Any) -> None:
        try:
            frames = packet.decode()
        except (MemoryError, EOFError):
            raise
        except av.FFmpegError:  # a damaged frame is left out, as players do
            self._failed += 1
            if self._failed > self._frames + _FAILED_FRAMES_MAX:
                raise Refused(BROKEN) from None
            return
        for frame in frames:
            self._take(frame)

    def _take(self, frame: Any) -> None:
        if not frame.samples:
            return
        if self._resampler is None or not self._resampler.fits(frame):
            self._flush()
            self._resampler = Resampler(frame)
        self._frames += 1
        for samples in self._resampler.samples(frame):
            self._sink.write(samples)

    def _flush(self) -> None:
        if self._resampler is not None:
            for samples in self._resampler.samples(None):
                self._sink.write(samples)
            self._resampler = None


class Resampler:
    """Makes frames of one form ours: mono, 16 kHz, signed 16-bit."""

    def __init__(self, frame: Any) -> None:
        self._form = _form(frame)
        self._graph = None if self._form == _OURS else self._filters(frame)

    def _filters(self, frame: Any) -> Any:
        if not _RATE_MIN <= frame.sample_rate <= _RATE_MAX or not 1 <= frame.layout.nb_channels <= _CHANNELS_MAX:
            raise Refused(BROKEN)
        graph = av.filter.Graph()
        graph.threads = 1  # there can be no more
        nodes = [
            graph.add(
                "abuffer",
                sample_rate=str(frame.sample_rate),
                sample_fmt=frame.format.name,
                channel_layout=frame.layout.name,
                time_base=f"1/{frame.sample_rate}",
            ),
            *self._mix(graph, frame.layout),
            graph.add("aformat", sample_rates=str(SAMPLE_RATE), sample_fmts="s16", channel_layouts="mono"),
            graph.add("abuffersink"),
        ]
        graph.link_nodes(*nodes).configure()
        return graph

    def _mix(self, graph: Any, layout: Any) -> list[Any]:
        """Channels of which nobody said where they are count alike."""
        if any(channel.name == "NONE" for channel in layout.channels) or layout.name.endswith("channels"):
            share = "+".join(f"{1 / layout.nb_channels:.6f}*c{number}" for number in range(layout.nb_channels))
            return [graph.add("pan", f"mono|c0={share}")]
        return []

    def fits(self, frame: Any) -> bool:
        """Whether the frame has the form of the first."""
        return _form(frame) == self._form

    def samples(self, frame: Any) -> Iterator[memoryview]:
        """What comes out when `frame` goes in; the rest for None."""
        if self._graph is None:
            if frame is not None:
                yield memoryview(frame.planes[0])[: frame.samples * SAMPLE_BYTES]
            return
        if frame is not None:
            frame.pts = None  # what a recording claims of its times must move nothing
        self._graph.push(frame)
        while True:
            try:
                out: Any = self._graph.pull()
            except (av.error.BlockingIOError, EOFError):
                return
            yield memoryview(out.planes[0])[: out.samples * SAMPLE_BYTES]


def _form(frame: Any) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _opened(source: Any, name: str) -> Any:
    """The container of `source`, which opens nothing but that. Raises Refused."""
    fences = {
        "protocol_whitelist": "none",
        "format_whitelist": name,
        "codec_whitelist": ",".join(_DECODERS),
    }
    try:
        return av.open(source, "r", format=name, options=fences, metadata_errors="replace")
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError, OSError):
        raise Refused(BROKEN) from None


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """The packets of the stream until the recording ends or cannot be read on."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (
            StopIteration,
            IndexError,
        ):  # the latter at the end of one in which further streams turned up on the way
            return
        except MemoryError:
            raise
        except av.FFmpegError:
            return
        if packet.stream.index == stream.index:
            yield packet


def _warm_up() -> None:
    """Load what is loaded at the first use: a child can import nothing."""
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 100, b"WAVE", b"fmt ", 16, 1, 2, 44100, 176400, 4, 16, b"data", 64
    )
    with _opened(io.BytesIO(head + bytes(64)), "wav") as container:
        frames: Iterator[Any] = container.decode(container.streams.audio[0])
        for frame in frames:
            list(Resampler(frame).samples(frame))


if __name__ == "__main__":
    main()
