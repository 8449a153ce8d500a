import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.engines.word_times import Heard, spread, timed, words_of
from forebay.speech import Character, Segment

RULES = ("nearest", "linear", "ignore")
TIMES = st.floats(-2, 12, allow_nan=False)


@given(st.text())
def test_words_put_together_are_the_text(text: str) -> None:
    words = words_of(text)
    assert "".join(words) == text.rstrip()
    assert all(word.strip() for word in words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" Well, I never.", [" Well,", " I", " never."]),
        ("今日は、いい 天気。", ["今", "日", "は、", "い", "い", " 天", "気。"]),
        ("GPT東京 5", ["GPT", "東", "京", " 5"]),
        ("  \n ", []),
        ("… — !", ["…", " —", " !"]),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    assert words_of(text) == words


HEARD = st.lists(
    st.none() | st.builds(lambda a, b, p: Heard(min(a, b), max(a, b), p), TIMES, TIMES, st.none() | st.floats(0, 1.5)),
    max_size=12,
)


@given(HEARD, TIMES, TIMES, st.sampled_from(RULES), st.booleans())
def test_no_word_is_lost_whatever_was_heard(
    heard: list[Heard | None], first: float, last: float, rule: str, characters: bool
) -> None:
    words = [f" w{place}" for place in range(len(heard))]
    start, end = sorted((max(0.0, first), max(0.0, last)))
    found = timed(Segment(start, end, "".join(words)), words, heard, rule, characters=characters).words
    assert [each.text for each in found] == words
    for each in found:
        assert start <= each.start <= each.end <= end
        assert each.probability is None or 0 <= each.probability <= 1
        assert len(each.characters) == (len(each.text.strip()) if characters else 0)
    for one, other in pairwise(found):
        assert one.start <= other.start
        assert one.end <= other.end


SEGMENT = Segment(10.0, 20.0, " a b c d")
WORDS = [" a", " b", " c", " d"]


@pytest.mark.parametrize(
    ("rule", "times"),
    [
        ("nearest", [(11, 12), (11, 12), (15, 16), (15, 16)]),
        ("linear", [(11, 12), (12, 13.5), (13.5, 15), (15, 16)]),
        ("ignore", [(11, 12), (12, 12), (12, 12), (15, 16)]),
    ],
)
def test_between_two_that_were_heard(rule: str, times: list[tuple[float, float]]) -> None:
    heard = [Heard(11, 12, 0.9), None, None, Heard(15, 16, 0.8)]
    found = timed(SEGMENT, WORDS, heard, rule).words
    assert [(each.start, each.end) for each in found] == times
    assert [each.probability for each in found] == [0.9, None, None, 0.8]


@pytest.mark.parametrize(
    ("rule", "times"),
    [
        ("nearest", [(14, 15), (14, 15), (14, 15), (14, 15)]),
        ("linear", [(10, 14), (14, 15), (15, 17.5), (17.5, 20)]),
        ("ignore", [(14, 14), (14, 15), (15, 15), (15, 15)]),
    ],
)
def test_at_the_ends(rule: str, times: list[tuple[float, float]]) -> None:
    found = timed(SEGMENT, WORDS, [None, Heard(14, 15, 1), None, None], rule).words
    assert [(each.start, each.end) for each in found] == times


@pytest.mark.parametrize("rule", RULES)
def test_if_nothing_was_heard_words_share_the_segment(rule: str) -> None:
    found = timed(SEGMENT, [" aaa", " b"], [None, None], rule).words
    assert [(each.start, each.end, each.probability) for each in found] == [(10, 17.5, None), (17.5, 20, None)]


def test_shares_of_nothing() -> None:
    assert spread([], 1, 2) == []


def test_characters_lie_in_their_word() -> None:
    letters = (Character("a", 9.0, 10.5, 0.4), Character("."))
    found = timed(SEGMENT, ["a."], [Heard(10.2, 10.4, 0.4, letters)], "nearest", characters=True).words
    assert found[0].characters == (Character("a", 10.2, 10.4, 0.4), Character("."))


@pytest.mark.parametrize("text", [" ", "a", "'", "9", "今", "。", " \n", "a ", "a" + 65_535 * " "])
def test_a_text_of_any_form_is_cut_in_a_moment(text: str) -> None:
    text = (text * (65_536 // len(text) + 1))[:65_536]
    begun = time.process_time()
    assert "".join(words_of(text)) == text.rstrip()
    assert time.process_time() - begun < 1
