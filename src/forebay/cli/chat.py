"""`forebay chat`: talk to a running server from a terminal, or through a pipe.

It refuses to take a key on the command line, where every process of the machine could read it.
"""

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from forebay.cli.api_client import LOCAL_SERVER, KeyFile, ServerUrl, api_key
from forebay.cli.conversation import Conversation
from forebay.cli.options import EXIT_INTERRUPTED, sentences
from forebay.errors import SetupError

_HISTORY_MAX = 1000
_LINES_MAX = 10_000
_PIPE_CHARS_MAX = 4 * 2**20
_HELP = """\
  /help           this
  /model [NAME]   show the model, or choose another one
  /models         the models of the server
  /system [TEXT]  show the system prompt, or set it (a lone - removes it)
  /reset          forget what was said
  /stats          how fast the last answer came
  /save FILE      write the conversation as JSON
  /exit           leave; so do Ctrl-D, and Ctrl-C at an empty prompt
A line that ends in \\ goes on in the next one; so does everything between two lines of \"\"\".
Ctrl-C while an answer comes stops the answer."""


def chat(
    model_name: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    url: ServerUrl = LOCAL_SERVER,
    model: Annotated[str | None, typer.Option(help="Which model; the first that is ready without it.")] = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    key_file: KeyFile = None,
) -> None:
    """Talk to a model of a running server. Type /help inside. `echo question | forebay chat` works too."""
    with sentences():
        talk = Conversation(url, api_key(key_file), model or model_name or "", system)
        asyncio.run(_Terminal(talk).run())


class _Terminal:
    """The person's side: lines in, answers out."""

    def __init__(self, talk: Conversation) -> None:
        self._talk = talk
        self._person = sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], object]] = {
            "help": lambda _: _note(_HELP),
            "system": self._system,
            "reset": self._reset,
            "stats": lambda _: _note(str(self._talk.figures)),
            "save": self._save,
        }

    async def run(self) -> None:
        """Talk until the person leaves, or once with all that a pipe brings."""
        async with self._talk:
            await self._choose(self._talk.model)
            if not self._person:
                await self._answer(_piped(), fail=True)
                return
            _note(f"{self._talk.model} at {self._talk.url}. /help shows the commands.")
            signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio's would not reach a waiting prompt
            with _line_editing():
                while (said := _read()) is not None:
                    if said.startswith("/"):
                        if not await self._command(said):
                            return
                    elif said:
                        await self._answer(said)

    async def _choose(self, name: str) -> None:
        """Use `name`, or the first model that is ready. Raises SetupError."""
        models = await self._talk.models()
        known = [str(model["id"]) for model in models]
        if name and name not in known:
            raise SetupError(f"The server has no model `{name}`. It has {', '.join(known) or 'none'}.")
        ready = [str(model["id"]) for model in models if model.get("state") == "ready"]
        if not (name or known):
            raise SetupError("The server has no models.")
        self._talk.model = name or (ready or known)[0]

    async def _answer(self, question: str, *, fail: bool = False) -> None:
        """Print the answer as it comes. Ctrl-C ends it alone; for a pipe (`fail`) everything ends with it."""
        if not question:
            return
        with _interruptible() as interrupted:
            try:
                async with contextlib.aclosing(self._talk.ask(question)) as pieces:
                    await _print(pieces)
            except SetupError as error:
                if fail:
                    raise
                _note(str(error))
                return
            except asyncio.CancelledError:
                if not interrupted():
                    raise
        if interrupted():
            _uncancel()
            sys.stdout.write("\n")
            if fail:
                raise typer.Exit(EXIT_INTERRUPTED)
            _note(f"[stopped; {self._talk.figures}]")
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        if self._person:
            _note(f"[{self._talk.figures}]")

    async def _command(self, said: str) -> bool:
        """Do what a line with a slash asks for; False to leave."""
        word, _, rest = said[1:].partition(" ")
        rest = rest.strip()
        if word in {"exit", "quit"}:
            return False
        try:
            if word == "models":
                for model in await self._talk.models():
                    _note(f"  {model['id']}  {model.get('state', '')}")
            elif word == "model":
                if rest:
                    await self._choose(rest)
                _note(f"The model is {self._talk.model}.")
            elif word in self._commands:
                self._commands[word](rest)
            else:
                _note(f"There is no command /{word}. /help shows the ones there are.")
        except SetupError as error:
            _note(str(error))
        return True

    def _system(self, text: str) -> None:
        if text:
            self._talk.system = "" if text == "-" else text
        _note(f"The system prompt is: {self._talk.system}" if self._talk.system else "There is no system prompt.")

    def _reset(self, _: str) -> None:
        self._talk.messages.clear()
        _note("What was said is forgotten.")

    def _save(self, name: str) -> None:
        if not name:
            raise SetupError("Say where: /save FILE.")
        system = [{"role": "system", "content": self._talk.system}] if self._talk.system else []
        said = {"model": self._talk.model, "messages": [*system, *self._talk.messages]}
        text = json.dumps(said, ensure_ascii=False, indent=2) + "\n"
        try:
            Path(name).expanduser().write_bytes(text.encode())
        except (OSError, RuntimeError, ValueError) as error:  # no such user; a name or a text that no file can have
            why = getattr(error, "strerror", None) or str(error).rstrip(".")
            raise SetupError(f"{name} cannot be written: {why}.") from None
        _note(f"The conversation is in {name}.")


async def _print(pieces: AsyncIterator[str]) -> None:
    async for piece in pieces:
        sys.stdout.write(_printable(piece))
        sys.stdout.flush()


def _printable(text: str) -> str:
    """Without control characters: what a model writes must not steer the terminal."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """While inside, Ctrl-C cancels what runs; the yielded function says whether it did."""
    pressed: list[bool] = []
    current, loop = asyncio.current_task(), asyncio.get_running_loop()

    def press() -> None:
        if not pressed and current is not None:
            pressed.append(True)
            current.cancel()

    loop.add_signal_handler(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _uncancel() -> None:
    current = asyncio.current_task()
    while current is not None and current.cancelling():
        current.uncancel()


def _read() -> str | None:
    """What the person says next, all its lines; None to leave. Ctrl-C drops what was typed, or leaves if that is nothing."""
    lines: list[str] = []
    quoted = False
    try:
        while len(lines) < _LINES_MAX:
            line = _line("... " if lines or quoted else "> ")
            if line.strip() == '"""':
                quoted = not quoted
                if quoted:
                    continue
                break
            if quoted or line.endswith("\\"):
                lines.append(line if quoted else line[:-1])
                continue
            lines.append(line)
            break
    except EOFError:
        sys.stdout.write("\n")
        return None
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        return "" if lines or quoted or _typed() else None
    return "\n".join(lines).strip()


def _line(prompt: str) -> str:
    """The next line that is text; the person is told of one that is none."""
    while True:
        try:
            line = input(prompt)
            line.encode()  # where Python decodes leniently, the bytes that are no text have passed until here
            return line
        except UnicodeError:
            _note("That line is not UTF-8 and is left out. Type it again.")


def _piped() -> str:
    """All that a pipe brings. Raises SetupError if that is no text."""
    try:
        text = sys.stdin.read(_PIPE_CHARS_MAX).strip()
        text.encode()  # as with a line
    except UnicodeError:
        raise SetupError("Standard input is not UTF-8. Convert it first, for instance with `iconv`.") from None
    return text


def _typed() -> str:
    """What stands at the prompt."""
    try:
        import readline  # noqa: PLC0415  # not every Python has it
    except ImportError:
        return ""
    return readline.get_line_buffer()


@contextmanager
def _line_editing() -> Iterator[None]:
    """Arrow keys and the history of this conversation; nothing is written to disk."""
    try:
        import readline  # noqa: PLC0415  # not every Python has it
    except ImportError:
        yield
        return
    readline.set_history_length(_HISTORY_MAX)
    readline.clear_history()
    yield


def _note(text: str) -> None:
    """A line of the program's own, apart from what a model says."""
    typer.echo(text, err=True)
