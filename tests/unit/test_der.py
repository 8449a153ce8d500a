import pytest

from tests.support.der import der

REFERENCE = [(0.0, 10.0, "ann"), (10.0, 16.0, "bob")]


def test_what_is_the_same_by_other_names_has_no_errors() -> None:
    assert der(REFERENCE, [(0.0, 10.0, "1"), (10.0, 16.0, "0")]).rate == 0


def test_each_kind_of_error_is_counted_in_seconds() -> None:
    found = [(1.0, 8.0, "x"), (8.0, 12.0, "y"), (12.0, 18.0, "y")]
    errors = der(REFERENCE, found)
    assert (errors.missed, errors.invented, errors.confused, errors.total) == pytest.approx((1, 2, 2, 16))
    assert errors.rate == pytest.approx(5 / 16)


def test_overlap_that_only_one_is_found_in_is_missed_once() -> None:
    errors = der([(0, 4, "a"), (2, 6, "b")], [(0, 3, "x"), (3, 6, "y")])
    assert (errors.missed, errors.invented, errors.confused, errors.total) == pytest.approx((2, 0, 0, 8))


def test_with_more_or_fewer_speakers_the_best_pairs_count() -> None:
    assert der(REFERENCE, [(0.0, 16.0, "x")]).confused == pytest.approx(6)
    assert der(REFERENCE, [(0, 4, "x"), (4, 10, "z"), (10, 16, "y")]).confused == pytest.approx(4)


def test_nothing_counts_near_a_boundary_of_the_reference() -> None:
    found = [(0.2, 10.2, "x"), (10.2, 16.2, "y")]
    assert der(REFERENCE, found, collar=0.25).rate == 0
    assert der(REFERENCE, found).rate == pytest.approx(0.6 / 16)
