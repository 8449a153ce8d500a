"""Work of several kinds for one machine: what is asked of each model, how long it takes alone, and a Poisson load of all.

It refuses to wait for an answer before it sends the next request: what is sent late counts as waited for.
"""

import asyncio
import base64
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic_core import to_json

from forebay.bench.caller import calling
from forebay.bench.edits import drawing, sample
from forebay.bench.embed import text_of
from forebay.bench.recordings import LEAD_SECONDS, Recording, cut
from forebay.bench.stage import CHAT, ToBody
from forebay.bench.wire import Reply, Target, now
from forebay.clock import Random, seeded
from forebay.dialects.openai.audio import TRANSCRIPTIONS
from forebay.dialects.openai.embeddings import PATH as EMBEDDINGS
from forebay.dialects.openai.images import EDITS

TOKENS = 32  # of an answer in chat
TEXT_WORDS = (8, 64)
PIECES, PIECE_SECONDS = 8, 8.0
PICTURES, EDGE = 4, 256
_PLACES = {"chat": 8, "embeddings": 16, "recordings": 2, "images": 2}
"""How many are asked for at once to see what the machine can do, for each kind that there is."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of work: `subject` is what a request is about, and `body` makes a request of that."""

    name: str
    path: str
    target: Target
    body: ToBody
    subject: Callable[[Random], str]

    @property
    def streams(self) -> bool:
        """Whether an answer comes token by token."""
        return self.name == "chat"

    def request(self, chance: Random) -> bytes:
        """Any request."""
        return self.target.request(self.subject(chance), TOKENS, stream=self.streams)

    def line(self, number: int, chance: Random) -> bytes:
        """Any line of a batch."""
        head = {"custom_id": f"{self.name}-{number}", "method": "POST", "url": self.path}
        return to_json(head)[:-1] + b',"body":' + self.body(self.subject(chance), TOKENS, False) + b"}\n"


Subjects = dict[str, Callable[[Random], str]]
Answers = dict[str, list[Reply]]


@asynccontextmanager
async def kinds(url: str, key: str, models: Mapping[str, str], call: Recording) -> AsyncIterator[dict[str, Kind]]:
    """The kinds that are asked of the server at `url`: a model for each. `call` is what there is to be heard."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        subjects = await _subjects(url, key, models, call, Path(folder))
    for name, subject in subjects.items():
        path, counted, body_of = _ASKED[name]
        body = body_of(models[name])
        target = Target(name, url, key, body, path=path, counted=counted)
        found[name] = Kind(name, path, target, body, subject)
    try:
        yield found
    finally:
        for kind in found.values():
            kind.target.close()


async def _subjects(url: str, key: str, models: Mapping[str, str], call: Recording, folder: Path) -> Subjects:
    subjects: Subjects = {
        "chat": lambda chance: f"Write a long story about {text_of(chance, (3, 5))}.",
        "embeddings": lambda chance: text_of(chance, TEXT_WORDS),
    }
    if "recordings" in models:
        recordings = await _recordings(url, key, call, folder)
        subjects["recordings"] = lambda chance: chance.choice(recordings)
    if "images" in models:
        pictures = await _pictures(folder)
        subjects["images"] = lambda chance: chance.choice(pictures)
    return {name: subject for name, subject in subjects.items() if name in models}


async def _recordings(url: str, key: str, call: Recording, folder: Path) -> list[str]:
    """The ids of pieces of the call, which are files of the server."""
    ids, piece = [], folder / "piece.wav"
    async with calling(url, key, TRANSCRIPTIONS) as caller:
        for number in range(PIECES):
            cut(call, piece, LEAD_SECONDS + number * 2, PIECE_SECONDS)
            ids.append(await caller.upload(piece, "user_data"))
    return ids


async def _pictures(folder: Path) -> list[str]:
    """Images and their masks, as two `data:` URLs."""
    made = []
    async with drawing() as program:
        for number in range(PICTURES):
            subject = await sample(program, folder, EDGE, number)
            made.append(f"{_data_url(subject.image)} {_data_url(subject.mask)}")
    return made


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _embeddings(model: str) -> ToBody:
    return lambda text, _tokens, _stream: to_json({"model": model, "input": text, "encoding_format": "base64"})


def _transcriptions(model: str) -> ToBody:
    said = {"model": model, "language": "en", "beam_size": 1, "response_format": "verbose_json"}
    return lambda file_id, _tokens, _stream: to_json({**said, "file_id": file_id})


def _edits(model: str) -> ToBody:
    def body(pictures: str, _tokens: int, _stream: bool) -> bytes:
        image, mask = pictures.split()
        shown = {"images": [{"image_url": image}], "mask": {"image_url": mask}, "mask_mode": "white"}
        return to_json({"model": model, **shown, "mask_dilation": 2})

    return body


_ASKED: Mapping[str, tuple[str, str, Callable[[str], ToBody]]] = {
    "chat": (CHAT.path, CHAT.counted, CHAT.for_server),
    "embeddings": (EMBEDDINGS, "prompt_tokens", _embeddings),
    "recordings": (TRANSCRIPTIONS, "seconds", _transcriptions),
    "images": (EDITS, "mask_dilation", _edits),
}
"""Where each kind is asked for, a number that a good answer ends with, and how."""


async def alone(kind: Kind, seconds: float, seed: int, at_once_max: int) -> tuple[float, list[Reply]]:
    """Seconds that the machine takes for one of this kind when it has nothing else and enough of these."""
    chance, replies = seeded(seed), list[Reply]()
    began = now()

    async def client() -> None:
        replies.append(await kind.target.ask(kind.request(chance)))
        while now() - began < seconds:
            replies.append(await kind.target.ask(kind.request(chance)))

    await asyncio.gather(*(client() for _ in range(min(at_once_max, _PLACES[kind.name]))))
    return (now() - began) / len(replies), replies


async def offer(kinds: Mapping[str, Kind], rates: Mapping[str, float], seconds: float, seed: int, salt: int) -> Answers:
    """What becomes of a Poisson load of so many requests per second of each kind.

    The same seed brings as many requests at the same moments; another salt makes them about something else.
    """
    answers: Answers = {name: [] for name in rates}
    began = now()
    async with asyncio.TaskGroup() as group:
        for number, (name, rate) in enumerate(rates.items()):
            due = [began + at for at in moments(seeded(seed * 10 + number), rate, seconds)]
            group.create_task(_send(kinds[name], due, seeded(seed * 1000 + salt * 10 + number), answers[name]))
    return answers


def moments(chance: Random, rate: float, seconds: float) -> list[float]:
    """When requests of a Poisson process come, given how many they are: one at least, and no more by chance than usual."""
    return sorted(chance.uniform(0, seconds) for _ in range(max(1, round(rate * seconds))))


async def _send(kind: Kind, due: list[float], chance: Random, answers: list[Reply]) -> None:
    async def ask(request: bytes, at: float) -> None:
        answers.append(await kind.target.ask(request, at))

    async with asyncio.TaskGroup() as group:
        for at in due:
            request = kind.request(chance)
            await asyncio.sleep(max(0.0, at - now()))
            group.create_task(ask(request, at))
