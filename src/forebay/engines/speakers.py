"""Who spoke when, behind HTTP, in a process of its own.

It refuses to let NumPy start threads: several for one product of small matrices wait for each other more than they compute.
"""

import asyncio
import os
from dataclasses import dataclass

from forebay.engines.reports import say
from forebay.engines.serving import Service, run
from forebay.engines.start import check_types, read_spec, refuse_to_start

_SPEAKERS_MAX = 100
_WINDOW_SECONDS = (0.2, 30)
_STEP_SECONDS_MIN = 0.05
_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How this engine is set up, from FOREBAY_ENGINE_SPEC."""

    name: str
    model_path: str
    slots: int = 1
    threads: int = 0
    window_seconds: float = 1.6
    step_seconds: float = 0.4
    speakers_max: int = 20
    rehearse_windows_max: int = 0  # a batch of more windows runs out of memory; 0 never does

    def __post_init__(self) -> None:
        check_types(self)


def main() -> None:
    """Load the model and serve until SIGTERM."""
    spec, key = read_spec(Spec, "The speakers engine")
    if spec.slots < 1 or not 1 <= spec.speakers_max <= _SPEAKERS_MAX:
        refuse_to_start(f"{spec.name} needs at least 1 slot, and a `speakers_max` from 1 to {_SPEAKERS_MAX}.")
    shortest, longest = _WINDOW_SECONDS
    if (
        not shortest <= spec.window_seconds <= longest
        or not _STEP_SECONDS_MIN <= spec.step_seconds <= spec.window_seconds
    ):
        refuse_to_start(f"{spec.name} needs windows of 0.2 to 30 s, and steps of 0.05 s to the length of a window.")

    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))  # NumPy looks at them when it is imported, which is below

    def load(loop: asyncio.AbstractEventLoop) -> Service:
        from forebay.engines.speakers_engine import Engine
        from forebay.engines.torch_weights import NotWeights

        try:
            engine = Engine(spec)
        except (NotWeights, OSError) as error:
            reason = "its weights cannot be opened" if isinstance(error, OSError) else str(error)
            refuse_to_start(f"{spec.name} cannot start: {reason}")
        say("speakers", f"event=ready model={spec.name}")
        return engine

    run(key, load)


if __name__ == "__main__":
    main()
