"""Which models stand in for which, in what order, and for what kind of trouble.

It refuses chains that come back to where they began, names that are not in the catalogue, and stand-ins that serve
nothing that the model does.
"""

import difflib
from collections.abc import Mapping

from forebay.errors import (
    CircuitOpen,
    EngineCrashed,
    EngineGarbled,
    EngineTimeout,
    EngineUnavailable,
    ForebayError,
    ModelNotReady,
    Overloaded,
    RateLimited,
    ServerError,
    SetupError,
    UpstreamError,
)
from forebay.model_config import Model, Trouble
from forebay.replicas.commands import capabilities_of


def chains(models: Mapping[str, Model]) -> dict[str, tuple[str, ...]]:
    """For each model those that stand in for it: each of its own, followed by that one's. Raises SetupError."""
    for name, model in models.items():
        for other in model.fallback:
            _check(name, model, other, models)
    return {name: tuple(dict.fromkeys(_chain(models, (name,)))) for name in models}


def _check(name: str, model: Model, other: str, models: Mapping[str, Model]) -> None:
    if other not in models:
        near = difflib.get_close_matches(other, list(models), n=1, cutoff=0.4)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise SetupError(f"The `fallback` of the model `{name}` names `{other}`, which is no model.{hint}")
    if not capabilities_of(model) & capabilities_of(models[other]):
        raise SetupError(
            f"The `fallback` of the model `{name}` names `{other}`, which serves nothing that `{name}` does."
        )


def _chain(models: Mapping[str, Model], path: tuple[str, ...]) -> list[str]:
    found = []
    for other in models[path[-1]].fallback:
        if other in path:
            circle = " -> ".join(f"`{each}`" for each in (*path[path.index(other) :], other))
            raise SetupError(f"The `fallback` of the model `{path[-1]}` leads back to where it began: {circle}.")
        found += [other, *_chain(models, (*path, other))]
    return found


def trouble_of(error: ForebayError) -> Trouble | None:
    """The word of `fallback_on` for `error`; None for what another model would not change."""
    match error:
        case CircuitOpen():
            return "circuit_open"
        case EngineUnavailable():
            return "unavailable"
        case ModelNotReady():
            return "not_ready"
        case RateLimited():
            return None
        case Overloaded():
            return "queue_full"
        case EngineTimeout() | EngineCrashed() | EngineGarbled() | UpstreamError():
            return "failed"
        case _:
            return "failed" if type(error) is ServerError else None
