"""Who stands in for whom: order, mistakes in the configuration, and which errors are a reason."""

from typing import Any, get_args

import pytest

from forebay import errors
from forebay.config import Settings
from forebay.errors import ForebayError, SetupError
from forebay.model_config import FakeModel, Model, Trouble
from forebay.replicas.catalog import Catalog
from forebay.replicas.fallbacks import trouble_of


def catalog(**fallbacks: Any) -> Catalog:
    models: dict[str, Model] = {name: FakeModel(engine="fake", fallback=others) for name, others in fallbacks.items()}
    return Catalog(Settings(default_models=False, models=models))


def test_each_is_followed_by_its_own_and_none_comes_twice() -> None:
    found = catalog(a=("b", "c"), b=("d", "c"), c=("e",), d=(), e=())
    assert found.fallbacks("a") == ("b", "d", "c", "e")
    assert found.fallbacks("b") == ("d", "c", "e")
    assert found.fallbacks("e") == ()


@pytest.mark.parametrize(
    ("fallbacks", "said"),
    [
        ({"alpha": ("alpha",)}, "back to where it began: `alpha` -> `alpha`"),
        ({"alpha": ("beta",), "beta": ("gamma",), "gamma": ("alpha",)}, "`alpha` -> `beta` -> `gamma` -> `alpha`"),
        ({"alpha": ("betta",), "beta": ()}, "`betta`, which is no model. Did you mean `beta`"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_at_the_start(fallbacks: dict[str, Any], said: str) -> None:
    with pytest.raises(SetupError, match=said):
        catalog(**fallbacks)


def test_one_that_serves_nothing_of_it_cannot_stand_in() -> None:
    text = FakeModel.model_validate({"engine": "fake", "options": {"capabilities": ["chat"]}, "fallback": ["vectors"]})
    vectors = FakeModel.model_validate({"engine": "fake", "options": {"capabilities": ["embedding"]}})
    with pytest.raises(SetupError, match="serves nothing"):
        Catalog(Settings(default_models=False, models={"text": text, "vectors": vectors}))


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (errors.CircuitOpen(), "circuit_open"),
        (errors.EngineUnavailable(), "unavailable"),
        (errors.ModelNotReady(), "not_ready"),
        (errors.Overloaded(), "queue_full"),
        (errors.Overloaded(code="queue_timeout"), "queue_full"),
        (errors.UpstreamError(), "failed"),
        (errors.EngineTimeout(), "failed"),
        (errors.EngineCrashed(), "failed"),
        (errors.ServerError(code="engine_error"), "failed"),
        (errors.RateLimited(), None),
        (errors.ShuttingDown(), None),
        (errors.Quarantined(), None),
        (errors.InvalidRequest(), None),
        (errors.RequestCancelled(), None),
        (errors.StoreUnavailable(), None),
    ],
)
def test_the_word_for_an_error(error: ForebayError, word: str | None) -> None:
    assert trouble_of(error) == word
    assert word is None or word in get_args(Trouble)
