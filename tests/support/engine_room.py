"""The machine room as the scheduler sees it, with one real engine in it.

It refuses to replace the engine: a test that makes it fail has found something.
"""

from dataclasses import dataclass

from forebay.errors import ForebayError
from forebay.inference import Request
from forebay.replicas.replica import Replica


@dataclass(slots=True)
class EngineRoom:
    """A machine room with one engine that is always up."""

    replica: Replica

    def replicas(self, model: str) -> list[Replica]:
        return [self.replica]

    def summon(self, model: str) -> None:
        pass

    def trouble(self, model: str) -> ForebayError | None:
        return None

    def waits(self, model: str) -> bool:
        return False

    def check(self, request: Request) -> None:
        pass

    def condemn(self, replica: Replica) -> None:
        raise AssertionError("the engine did not stop when told to")
