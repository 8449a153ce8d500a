import math
import struct
from pathlib import Path

import numpy as np
import pytest

from forebay.engines.ge2e import Ge2e, gain, mel_frames
from forebay.engines.torch_weights import NotWeights, read_weights
from tests.support.models import ge2e


@pytest.fixture(scope="module")
def model() -> Ge2e:
    return Ge2e(ge2e(), 1)


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Tones that come and go, and noise."""
    times = np.arange(int(seconds * 16_000)) / 16_000
    noise = np.random.default_rng(seed).normal(size=len(times)) * 0.02
    return (0.2 * np.sin(2 * np.pi * (200 + 300 * times) * times) * (1 + np.sin(9 * times)) + noise).astype(np.float32)


def slow_mels(samples: np.ndarray, frame: int) -> list[float]:
    """One frame by the definitions: Fourier sums, and triangles on Slaney's mel scale, one number after another."""
    begin = frame * 160 - 200
    piece = [float(samples[at]) if 0 <= at < len(samples) else 0.0 for at in range(begin, begin + 400)]
    hann = [0.5 - 0.5 * math.cos(2 * math.pi * place / 400) for place in range(400)]
    power = []
    for number in range(201):
        turns = [
            complex(math.cos(a), -math.sin(a)) for a in (2 * math.pi * number * place / 400 for place in range(400))
        ]
        power.append(abs(sum(value * shape * turn for value, shape, turn in zip(piece, hann, turns, strict=True))) ** 2)

    def mel_of(hertz: float) -> float:
        return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)

    def hertz_of(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    edges = [hertz_of(mel_of(8000) * place / 41) for place in range(42)]
    found = []
    for low, top, high in zip(edges, edges[1:], edges[2:], strict=False):
        total = 0.0
        for number, value in enumerate(power):
            hertz = number * 40.0
            if low < hertz < high:
                total += value * ((hertz - low) / (top - low) if hertz <= top else (high - hertz) / (high - top))
        found.append(total * 2 / (high - low))
    return found


def test_mel_bands_are_those_of_the_definition() -> None:
    samples = sound(0.5)
    found = mel_frames(samples)
    assert found.shape == (51, 40)
    for frame in (0, 1, 25, 49, 50):
        assert found[frame] == pytest.approx(slow_mels(samples, frame), rel=1e-3, abs=1e-7)


def test_long_sound_has_the_same_mel_bands_as_its_parts() -> None:
    samples = sound(60.0)
    assert mel_frames(samples)[5000:5010] == pytest.approx(mel_frames(samples[4990 * 160 :])[10:20], rel=1e-4)


def test_quiet_sound_is_made_louder_and_loud_sound_left() -> None:
    samples = sound(1.0)
    assert gain(samples) == 1
    quiet = samples / 100
    assert 20 * math.log10(float(np.sqrt(np.mean((quiet * gain(quiet)) ** 2)))) == pytest.approx(-30, abs=0.01)
    assert math.isfinite(gain(np.zeros(100, dtype=np.float32)))
    assert gain(np.zeros(0, dtype=np.float32)) > 0


def slow_vectors(windows: np.ndarray) -> np.ndarray:
    """The network in double precision, one step of time after another."""
    weights = {name: each.astype(np.float64) for name, each in read_weights(ge2e(), "model_state").items()}
    flow = windows.astype(np.float64)
    for layer in range(3):
        of = {kind: weights[f"lstm.{kind}_l{layer}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        hidden = cell = np.zeros((len(windows), 256))
        steps = []
        for step in range(flow.shape[1]):
            gates = flow[:, step] @ of["weight_ih"].T + hidden @ of["weight_hh"].T + of["bias_ih"] + of["bias_hh"]
            enter, forget, new, leave = np.split(gates, 4, axis=1)
            cell = cell / (1 + np.exp(-forget)) + np.tanh(new) / (1 + np.exp(-enter))
            hidden = np.tanh(cell) / (1 + np.exp(-leave))
            steps.append(hidden)
        flow = np.stack(steps, axis=1)
    raw = np.maximum(0, hidden @ weights["linear.weight"].T + weights["linear.bias"])
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True))


def test_vectors_are_those_of_the_network_step_by_step(model: Ge2e) -> None:
    mels = mel_frames(sound(4.0))
    windows = np.stack([mels[first : first + 160] for first in (0, 60, 200)])
    assert model.vectors(windows) == pytest.approx(slow_vectors(windows), abs=1e-5)


def test_a_vector_does_not_depend_on_its_batch(model: Ge2e) -> None:
    mels = mel_frames(sound(8.0))
    windows = np.stack([mels[first : first + 160] for first in range(0, 640, 20)])
    alone = np.concatenate([model.vectors(each[None]) for each in windows])
    assert model.vectors(windows) == pytest.approx(alone, abs=1e-5)


def test_silence_has_a_finite_vector(model: Ge2e) -> None:
    assert np.isfinite(model.vectors(np.zeros((1, 160, 40), dtype=np.float32))).all()


def test_weights_are_read_as_they_lie_in_the_file() -> None:
    data = ge2e().read_bytes()
    found = read_weights(ge2e(), "model_state")
    assert sum(each.size for each in found.values()) == 2 + 1024 * (40 + 5 * 256 + 6) + 256 * 257
    for name in ("linear.bias", "linear.weight"):
        raw = found[name].astype("<f4").tobytes()
        assert data.count(struct.pack("<q", found[name].size) + raw) == 1


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    data = ge2e().read_bytes()
    name = b"lstm.weight_hh_l1"
    (tmp_path / "renamed.pt").write_bytes(data.replace(name, b"lstm.weight_hh_l9"))
    with pytest.raises(NotWeights, match=r"lstm\.weight_hh_l1 is not of the shape 1024x256"):
        Ge2e(tmp_path / "renamed.pt", 1)
