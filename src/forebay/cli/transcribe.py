"""`forebay transcribe`: have a running server write down what is said in recordings.

It refuses to write over what is there, and to leave a job behind when it is stopped.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from forebay.cli.api_client import LOCAL_SERVER, ApiClient, KeyFile, NotNow, ServerUrl, ask, path_of
from forebay.cli.options import EXIT_FAILED, looking, sentences
from forebay.cli.progress import View, show_until_done, view_of
from forebay.cli.results import write_whole
from forebay.cli.uploads import form_of
from forebay.errors import SetupError

_SUFFIXES = {"text": ".txt", "srt": ".srt", "vtt": ".vtt", "rttm": ".rttm"}
_STOPPED = "Stopped. What was not finished is cancelled."


class Form(StrEnum):
    """How a transcript is written."""

    TEXT = "text"
    SRT = "srt"
    VTT = "vtt"
    JSON = "json"
    VERBOSE_JSON = "verbose_json"
    DIARIZED_JSON = "diarized_json"
    RTTM = "rttm"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A recording, and where its transcript goes."""

    recording: Path
    out: Path
    name: str  # where there are several


def transcribe(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recordings, as audio or video.")],
    form: Annotated[Form, typer.Option("--format", help="How it is written.")] = Form.TEXT,
    model: Annotated[str, typer.Option(help="Name of the model, as in the catalogue.")] = "whisper-base",
    language: Annotated[str | None, typer.Option(help="What is spoken, such as en; else it is found out.")] = None,
    translate: Annotated[bool, typer.Option("--translate", help="Write it in English, whatever is spoken.")] = False,
    diarize: Annotated[bool, typer.Option("--diarize", help="Tell who speaks.")] = False,
    speakers: Annotated[int | None, typer.Option(min=1, help="How many people speak, if you know.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Names and words that occur in it.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for what is written; else beside each recording.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there.")] = False,
    background: Annotated[
        bool, typer.Option("--background", help="Only hand them in and print the ids of their jobs.")
    ] = False,
    url: ServerUrl = LOCAL_SERVER,
    key_file: KeyFile = None,
) -> None:
    """Write down what is said in recordings, as text, subtitles or JSON."""
    with sentences(), looking():
        if speakers is not None and not diarize:
            raise SetupError("`--speakers` needs `--diarize`.")
        if translate and form is Form.DIARIZED_JSON:
            raise SetupError("A translation is not written as diarized_json. Give --format verbose_json --diarize.")
        wanted = _wanted(files, output, form, force=force or background)
    fields = _fields(form, model, language, prompt, speakers, diarize=diarize or form in _OF_SPEAKERS)
    path = path_of("audio", "translations" if translate else "transcriptions")

    async def work(client: ApiClient) -> bool:
        well = True
        for each in wanted:
            try:
                await _one(client, path, fields, each, form, wait=not background)
            except NotNow:
                raise  # the next one would meet the same
            except SetupError as error:
                if len(wanted) == 1:
                    raise
                typer.echo(f"{each.recording}: {error}", err=True)
                well = False
        return well

    if not ask(url, key_file, work, _STOPPED):
        raise typer.Exit(EXIT_FAILED)


_OF_SPEAKERS = frozenset({Form.DIARIZED_JSON, Form.RTTM})
_ASKED_FOR = frozenset({Form.SRT, Form.VTT, Form.VERBOSE_JSON, Form.DIARIZED_JSON})  # they take more than the text


def _wanted(files: Sequence[Path], output: Path | None, form: Form, *, force: bool) -> list[_Wanted]:
    """What is to be written where, before anything is sent. Raises SetupError."""
    found: dict[Path, _Wanted] = {}
    for recording in files:
        if not recording.is_file():
            raise SetupError(f"There is no file {recording}.")
        folder = recording.parent if output is None else output
        out = folder / (recording.stem + _SUFFIXES.get(form, ".json"))
        if out in found:
            raise SetupError(f"{found[out].recording} and {recording} would both be written as {out}. Rename one.")
        if out.exists() and (not force or out.samefile(recording)):
            raise SetupError(f"{out} is there already. Give --force to write over it, or another --output.")
        found[out] = _Wanted(recording, out, recording.name if len(files) > 1 else "")
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SetupError(f"The folder {output} cannot be made: {error.strerror}.") from None
    return list(found.values())


def _fields(
    form: Form, model: str, language: str | None, prompt: str | None, speakers: int | None, *, diarize: bool
) -> dict[str, str]:
    """The fields of the request. A job can write what it finds in any format; those that need more are named before."""
    fields = {"model": model, "language": language, "prompt": prompt, "background": "true"}
    if form in _ASKED_FOR:
        fields["response_format"] = form
    if diarize:
        fields |= {"diarize": "true", "speakers": None if speakers is None else str(speakers)}
    return {name: value for name, value in fields.items() if value is not None}


async def _one(
    client: ApiClient, path: str, fields: dict[str, str], wanted: _Wanted, form: Form, *, wait: bool
) -> None:
    """One recording from its upload to its transcript. Raises SetupError."""
    view = view_of(wanted.name)
    with view:
        job = await _send(client, path, fields, wanted.recording, view)
        if wait:
            job = await _followed(client, job, view)
    if not wait:
        typer.echo(str(job["id"]))
        return
    if job["status"] != "completed":
        reason = (job.get("error") or {}).get("message") or "Look at it with `forebay jobs show`."
        raise SetupError(f"The job {job['id']} is {job['status']}. {reason}")
    async with client.request("GET", path_of("jobs", str(job["id"]), "result", format=form)) as response:
        await write_whole(response.content.iter_chunked(2**18), wanted.out)


async def _followed(client: ApiClient, job: dict[str, Any], view: View) -> dict[str, Any]:
    """The job as it ended; whoever stops waiting cancels it."""
    try:
        return await show_until_done(client, str(job["id"]), view)
    except asyncio.CancelledError:
        with suppress(SetupError):  # the server is away, and its deadline ends the job
            await client.call("POST", path_of("jobs", str(job["id"]), "cancel"))
        raise


async def _send(client: ApiClient, path: str, fields: dict[str, str], recording: Path, view: View) -> dict[str, Any]:
    with form_of(fields, {"file": recording}, view) as form:
        return await client.call("POST", path, data=form)
