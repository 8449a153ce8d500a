"""Options of the whole suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--prove", action="store_true", default=False, help="run the long versions: more kills, more mutations"
    )


@pytest.fixture(scope="session")
def prove(pytestconfig: pytest.Config) -> bool:
    """Whether this is a long run; a test picks its counts by it and asserts the same either way."""
    return bool(pytestconfig.getoption("--prove"))
