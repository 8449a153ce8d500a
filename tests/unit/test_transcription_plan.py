"""How far a recording is, as one number for all its stages."""

import pytest

from forebay.dialects.speech import Align, Diarize, SpeechTask
from forebay.jobs.ledger import FETCHING
from forebay.jobs.transcription import DECODING, plan_of
from forebay.scheduler.transcriber import ALIGNING, DIARIZING, TRANSCRIBING
from forebay.store.media_jobs import WHOLE

ALL = (FETCHING, DECODING, TRANSCRIBING, ALIGNING, DIARIZING)


@pytest.mark.parametrize(
    ("task", "stages"),
    [
        (SpeechTask("transcribe"), ALL[:3]),
        (SpeechTask("translate", diarize=Diarize("d")), (*ALL[:3], DIARIZING)),
        (SpeechTask("transcribe", align=Align("a"), diarize=Diarize("d")), ALL),
        (SpeechTask("align", align=Align("a")), (FETCHING, DECODING, ALIGNING)),
        (SpeechTask("diarize", diarize=Diarize("d")), (FETCHING, DECODING, DIARIZING)),
    ],
)
def test_it_grows_through_the_stages_that_were_asked_for(task: SpeechTask, stages: tuple[str, ...]) -> None:
    plan = plan_of(task)
    told = [plan.done(stage, percent) for stage in stages for percent in (-1, 0, 0.5, 50, 99.9, 100, 101)]
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0, WHOLE - 1), "the last thousandth is for the result"
    for stage in set(ALL) - set(stages):
        with pytest.raises(KeyError):
            plan.done(stage, 1)
