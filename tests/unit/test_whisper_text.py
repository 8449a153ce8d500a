from dataclasses import asdict
from typing import Any

import pytest

from forebay.engines.whisper_options import Options
from forebay.engines.whisper_text import Part, Tries, Try, split

T = 1000


def _at(seconds: float) -> int:
    return T + round(seconds / 0.02)


def _times(found: list[Part]) -> list[tuple[float, float]]:
    return [(round(part.start, 2), round(part.end, 2)) for part in found]


def test_a_segment_ends_where_two_times_follow_one_another() -> None:
    tokens = [_at(0), 1, 2, _at(2), _at(2.5), 3, _at(4)]
    parts, rest = split(tokens, T, 10, whole=True)
    assert _times(parts) == [(0, 2), (2.5, 4)]
    assert [part.tokens for part in parts] == [tuple(tokens[:4]), tuple(tokens[4:])]
    assert rest is None


def test_what_was_begun_and_not_written_is_heard_again() -> None:
    tokens = [_at(0), 1, _at(2), _at(2)]
    parts, rest = split(tokens, T, 10, whole=True)
    assert (_times(parts), rest) == ([(0, 2)], 2)
    assert split(tokens, T, 2.5, whole=True)[1] is None
    assert split(tokens, T, 6, whole=True, rest_min=5)[1] is None


def test_words_without_an_end_reach_to_the_end_of_the_chunk() -> None:
    parts, rest = split([_at(0), 1, _at(2), _at(2), 3, 4], T, 10, whole=True)
    assert (_times(parts), rest) == ([(0, 2), (2, 10)], None)
    parts, rest = split([1, 2], T, 10, whole=True)
    assert (_times(parts), rest) == ([(0, 10)], None)


def test_words_for_which_there_was_no_room_are_heard_again() -> None:
    parts, rest = split([_at(0), 1, _at(2), _at(2), 3, 4], T, 10, whole=False)
    assert (_times(parts), rest) == ([(0, 2)], 2)
    parts, rest = split([_at(0), 1, 2, 3], T, 10, whole=False)
    assert (_times(parts), rest) == ([(0, 10)], None)


def test_times_beyond_the_chunk_end_with_it() -> None:
    parts, _ = split([_at(0), 1, _at(12), _at(13), 3, _at(14)], T, 10, whole=True)
    assert _times(parts) == [(0, 10), (10, 10)]
    assert split([], T, 10, whole=True) == ([], None)


def _try(
    text: str = "quite ordinary words", logprob: float = -0.3, silence: float = 0.1, temperature: float = 0
) -> Try:
    return Try((1, 2), text, temperature, logprob, silence)


def _tries(*found: Try, **options: Any) -> Tries:
    return Tries({**asdict(Options()), **options}, list(found))


@pytest.mark.parametrize(
    ("found", "options", "ended"),
    [
        (_try(), {}, True),
        (_try("again " * 50), {}, False),
        (_try("again " * 50), {"compression_ratio_threshold": None}, True),
        (_try(logprob=-1.5), {}, False),
        (_try(logprob=-1.5), {"log_prob_threshold": None}, True),
        (_try(logprob=-1.5, silence=0.9), {}, True),
        (_try(logprob=-1.5), {"temperatures": [0.0]}, True),
    ],
)
def test_poor_text_is_written_again(found: Try, options: dict[str, Any], ended: bool) -> None:
    assert _tries(found, **options).ended is ended
    assert not _tries(**options).ended


def test_each_try_has_the_next_temperature_and_the_best_is_kept() -> None:
    tries = _tries(temperatures=[0.0, 0.5, 1.0])
    found = [_try("again " * 50, -0.1), _try(logprob=-2.0, temperature=0.5), _try(logprob=-1.2, temperature=1.0)]
    for each in found:
        assert not tries.ended
        assert tries.temperature == each.temperature
        tries.all.append(each)
    assert tries.ended
    assert tries.best() == found[2]
    tries.all[2] = found[0]
    assert tries.best() == found[1]
    assert _tries(found[0], temperatures=[0.0]).best() == found[0]


def test_silence_is_what_is_likely_none_and_unlikely_a_text() -> None:
    assert _tries().silent(_try(logprob=-1.5, silence=0.9))
    assert not _tries().silent(_try(logprob=-0.2, silence=0.9))
    assert not _tries().silent(_try(logprob=-1.5, silence=0.2))
    assert _tries(log_prob_threshold=None).silent(_try(silence=0.9))
    assert not _tries(no_speech_threshold=None).silent(_try(logprob=-9, silence=1))
