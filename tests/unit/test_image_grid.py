"""The settings of a grid of pictures: every combination, and what cannot vary."""

import pytest

from forebay.bench.image_grid import CELLS_MAX, cells_of, label_of
from forebay.errors import SetupError


def test_every_combination_the_last_setting_fastest() -> None:
    assert cells_of(["steps=20,28", "guidance=2, 10,30"]) == [
        {"steps": steps, "guidance": guidance} for steps in (20, 28) for guidance in (2.0, 10.0, 30.0)
    ]
    assert cells_of(["model=a,b:c/d", "size=64x64"]) == [
        {"model": "a", "size": "64x64"}, {"model": "b:c/d", "size": "64x64"},
    ]  # fmt: skip
    assert label_of({"model": "a", "guidance": 2.0, "steps": 4}) == "model a, guidance 2, steps 4"


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (["colour=red"], "`colour` cannot vary in a grid. Take one of model, steps,"),
        (["steps"], "Write `steps` with its values"),
        (["steps=2", "steps=3"], "`steps` is there twice"),
        (["steps=2,x"], "`x` is no value of `steps`"),
        (["steps=2.5"], "`2.5` is no value of `steps`"),
        (["guidance=nan"], "`nan` is no value of `guidance`"),
        (["model=a,"], "`model` has an empty value"),
        (["steps=" + ",".join(map(str, range(CELLS_MAX + 1)))], f"and a grid has at most {CELLS_MAX}"),
    ],
)
def test_what_cannot_vary_is_said(axes: list[str], said: str) -> None:
    with pytest.raises(SetupError) as refused:
        cells_of(axes)
    assert said in str(refused.value)
