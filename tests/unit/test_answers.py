"""What an error tells a client beside its body."""

import pytest

from forebay import errors
from forebay.gateway.answers import RETRY_AFTER_SECONDS_MAX, error_answer

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ForebayError)]

FOR_GOOD = (errors.QuotaExceeded, errors.ModelTooLarge)  # no client should wait for what may last a month


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seconds", [None, 0.2, 7.5, 9_999.0])
def test_429_and_503_always_say_when_to_come_back_or_that_it_is_no_use(
    kind: type[errors.ForebayError], seconds: float | None
) -> None:
    headers = error_answer(kind(retry_after_seconds=seconds)).headers
    value = headers.get("retry-after")
    if seconds is None and kind in FOR_GOOD:
        assert (value, headers["x-should-retry"]) == (None, "false")
    elif seconds is None and kind.status not in {429, 503}:
        assert value is None
    else:
        assert value is not None
        assert 1 <= int(value) <= RETRY_AFTER_SECONDS_MAX
