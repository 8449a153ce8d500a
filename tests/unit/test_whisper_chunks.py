import numpy as np
import pytest

from forebay.engines.vad import WINDOW_SAMPLES
from forebay.engines.whisper_chunks import Chunk, collect, consumed, quietest, until, windows
from forebay.speech import Segment, Word

S = 16_000


def _chunk(*pieces: tuple[float, float]) -> Chunk:
    return Chunk(tuple((round(begin * S), round(end * S)) for begin, end in pieces))


def test_regions_are_put_together_up_to_the_length_of_a_chunk() -> None:
    regions = [(0, 10 * S), (12 * S, 22 * S), (22 * S, 30 * S), (40 * S, 50 * S), (50 * S, 80 * S)]
    assert collect(regions, 30 * S) == [
        _chunk((0, 10), (12, 30)),
        _chunk((40, 50)),
        _chunk((50, 80)),
    ]
    assert collect([], 30 * S) == []


@pytest.mark.parametrize("seed", range(10))
def test_no_sound_is_lost_and_no_chunk_too_long(seed: int) -> None:
    chance = np.random.default_rng(seed)
    edges = np.sort(chance.choice(100_000, 40, replace=False))
    regions = [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]
    longest = max(end - begin for begin, end in regions) + 1000
    chunks = collect(regions, longest)
    assert all(chunk.samples <= longest for chunk in chunks)
    pcm = np.arange(100_000, dtype=np.int32).astype(np.int16)
    wanted = np.concatenate([pcm[begin:end] for begin, end in regions])
    assert np.array_equal(np.concatenate([chunk.cut(pcm) for chunk in chunks]), wanted)


def test_times_go_back_to_where_they_were_said() -> None:
    chunk = _chunk((5, 8), (20, 24))
    words = (Word(0.5, 1, " a"), Word(2.8, 3.3, " b"), Word(2.9, 3.3, " c"), Word(3.5, 9, " d"))
    placed = chunk.placed(Segment(0.5, 9, " a b c d", words=words))
    assert [(word.start, word.end) for word in placed.words] == [(5.5, 6), (19.8 + 0.2, 20.3), (20, 20.3), (20.5, 24)]
    assert (placed.start, placed.end) == (5.5, 24)


def test_a_segment_without_words_may_reach_over_a_gap() -> None:
    chunk = _chunk((5, 8), (20, 24))
    assert [chunk.placed(Segment(*times, "")).start for times in ((0, 3), (3, 4))] == [5, 20]
    assert [chunk.placed(Segment(*times, "")).end for times in ((0, 3), (1, 4), (0, 30))] == [8, 21, 24]


def test_the_rest_of_a_chunk_is_what_was_not_heard() -> None:
    chunk = _chunk((5, 8), (20, 24))
    assert chunk.rest(1) == _chunk((6, 8), (20, 24))
    assert chunk.rest(3) == _chunk((20, 24))
    assert chunk.rest(4.5) == _chunk((21.5, 24))


def test_without_vad_it_is_cut_where_it_is_quiet() -> None:
    pcm = (np.random.default_rng(1).normal(0, 1000, 50 * S)).astype(np.int16)
    pcm[27 * S : 27 * S + 4000] = 0
    found = windows(pcm, 30 * S)
    assert [chunk.pieces[0][0] for chunk in found[1:]] == [chunk.pieces[0][1] for chunk in found[:-1]]
    assert found[-1].pieces[0][1] == len(pcm)
    assert 27 * S < found[0].pieces[0][1] < 27 * S + 4000
    assert windows(pcm[:0], 30 * S) == []
    assert quietest(pcm, 5, 10) == 10


def test_a_stretch_ends_in_the_last_silence_of_its_final_part() -> None:
    speech = np.full(round(60 * S / WINDOW_SAMPLES), 0.9, np.float32)
    samples = len(speech) * WINDOW_SAMPLES
    assert consumed(speech, 0.4, samples) is None
    early, late, short = speech.copy(), speech.copy(), speech.copy()
    early[100:200] = 0  # in the first half
    assert consumed(early, 0.4, samples) is None
    late[1200:1220] = late[1500:1520] = 0.1
    assert consumed(late, 0.4, samples) == 1510 * WINDOW_SAMPLES
    short[1500:1505] = 0.1
    assert consumed(short, 0.4, samples) is None
    assert consumed(np.zeros(24, np.float32), 0.4, 24 * WINDOW_SAMPLES) == 18 * WINDOW_SAMPLES
    assert consumed(np.zeros(4, np.float32), 0.4, 4 * WINDOW_SAMPLES) is None
    assert until([(0, 5), (7, 9), (9, 12)], 8) == [(0, 5), (7, 8)]
