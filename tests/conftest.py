"""Options of the whole suite."""

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Threads of NumPy's for matrices as small as ours wait for each other, on a busy machine for tens of times as long as they
# compute. NumPy looks at this when it is first imported, which is after this.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


# A clock on the wall says nothing of a property where any process may be stopped for seconds. What a run tries is the same
# each time; only a long one (--prove) looks where none has looked before.
settings.register_profile("seeded", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("prove", deadline=None, suppress_health_check=[HealthCheck.too_slow])


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("prove" if config.getoption("--prove") else "seeded")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--prove", action="store_true", default=False, help="run the long versions: more kills, more mutations"
    )


@pytest.fixture(scope="session")
def prove(pytestconfig: pytest.Config) -> bool:
    """Whether this is a long run; a test picks its counts by it and asserts the same either way."""
    return bool(pytestconfig.getoption("--prove"))


@pytest.fixture
def no_collections() -> Iterator[None]:
    """For a test that measures how long we compute at once: a collection stands still for what all tests before it left."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
