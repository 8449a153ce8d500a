"""How much batch work runs on a device beside online work: pure, additive increase and multiplicative decrease.

Fed with what is seen of online work and when, it answers with a bound. It refuses to look at a clock, and to raise the
bound on anything but evidence: what online answers take beside batch work, against what they took lately without any.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from forebay.server_config import PaceSettings

_WEIGHT_MIN = 1 / 32  # of a new sample in a baseline
_SAMPLES_MIN = {"wait": 4, "first": 4, "token": 8}  # before a baseline is good for a comparison
_EVIDENCE = 6  # samples for a verdict
_EVIDENCE_SECONDS = 0.1  # at least, or there would be so many verdicts that some are wrong by chance
_DOUBT = 1.5  # how much of the noise is taken for chance
_DOUBT_EARLY = 4.0
_EVIDENCE_BAD = 2  # samples for one that cannot wait
_RATIO_MAX = 4.0  # one odd sample is no verdict
_FIRSTS_MIN = 2  # first tokens that say whether the bound may grow
_FIRSTS_MAX = 32  # of those that count: the older ones fade
_LEVEL_MAX = 1024


class Signal(StrEnum):
    """What is seen of an online answer: its time in line, its time to the first token, the gap between two."""

    WAIT = "wait"
    FIRST = "first"
    TOKEN = "token"  # noqa: S105 - of text


@dataclass(frozen=True, slots=True)
class Bound:
    """Places that batch work may fill on a device; None is no bound. `yielding` is for work that can be paused at once.

    `staying` is for work that stays until it ends, and so is let in later and never after the moment.
    """

    yielding: int | None
    staying: int | None


@dataclass(slots=True)
class _Baseline:
    """What one signal was lately while no batch work ran: the newest samples count most, and none counts for ever."""

    mean: float = 0.0
    deviation: float = 0.0
    count: int = 0
    at: float = -math.inf

    def add(self, seconds: float, now: float, keep_seconds: float) -> None:
        if now - self.at > keep_seconds:
            self.count = 0
        if self.count == 0:
            self.mean, self.deviation = seconds, 0.0
        self.count, self.at = self.count + 1, now
        weight = max(1 / self.count, _WEIGHT_MIN)
        error = seconds - self.mean
        self.mean += weight * error
        self.deviation += weight * (abs(error) - self.deviation)


@dataclass(slots=True)
class _Evidence:
    """Samples since the bound last changed, each as a share of its baseline."""

    since: float = -math.inf
    count: int = 0
    ratios: float = 0.0
    noise: float = 0.0

    def add(self, ratio: float, noise: float) -> None:
        self.count += 1
        self.ratios += ratio
        self.noise += noise

    def fade(self) -> None:
        """Count half."""
        self.count, self.ratios, self.noise = self.count // 2, self.ratios / 2, self.noise / 2

    @property
    def mean(self) -> float:
        """How many times as long as without batch work it took."""
        return self.ratios / self.count

    def least(self, doubt: float) -> float:
        """The same without what may be chance."""
        return self.mean - doubt * self.noise / self.count / math.sqrt(self.count)


class Pace:
    """The bound of one device. Whoever owns it tells it all that happens there, in the order of time.

    `level` is how much batch work has been found to do no harm. At the first online request after a pause none may run;
    then `stair` climbs to the level again, a step for each verdict that is good, and beyond it the level grows. A bad
    verdict halves the level, and where it was bad becomes the `ceiling`, which is tried again after `backoff`: twice as
    long each time that it is bad again.
    """

    def __init__(self, settings: PaceSettings) -> None:
        self._settings = settings
        self._online = 0
        self._level = 0
        self._stair = 0
        self._proven = 0
        self._ceiling: int | None = None
        self._probe_at = -math.inf
        self._backoff = settings.probe_seconds_min
        self._online_until = -math.inf
        self._running = 0
        self._peak = 0
        self._ran_until = -math.inf
        self._changed_at = -math.inf
        self._held_since: float | None = None
        self._floor_until = -math.inf
        self._evidence = _Evidence()
        self._firsts = (
            _Evidence()
        )  # of first tokens alone, since something was bad: tokens are many more, and may not mind
        self._first_is_new = False
        self._baselines: dict[tuple[str, Signal, int], _Baseline] = {}
        self._rested = 0

    @property
    def online(self) -> int:
        """Online requests that wait or run."""
        return self._online

    @property
    def level(self) -> int:
        """How much batch work has been found to do no harm beside online work."""
        return self._level

    def joined(self, now: float) -> None:
        """An online request waits or runs from now on."""
        if self._alone(self._settings.resume_seconds, now):
            self._step(now, self._level, 0)
        elif self._stair > self._proven:
            self._give_up(now)
        self._online += 1

    def left(self, now: float) -> None:
        """One has gone."""
        self._online -= 1
        if self._online == 0:
            self._online_until = now

    def batch(self, running: int, now: float, *, held: bool) -> None:
        """So many places of batch work run from now on; `held` says whether some would run, were it not for the bound."""
        if self._running and not running:
            self._ran_until = now
        self._running, self._peak = running, max(self._peak, running)
        if running or not held:
            self._held_since = None
        elif self._held_since is None:
            self._held_since = now

    def tick(self, now: float) -> None:
        """Time has passed: begin the floor if it is due."""
        if self._held_since is not None and now >= self._held_since + self._settings.hold_seconds_max:
            self._floor_until, self._held_since = now + self._settings.floor_seconds, None

    def bound(self, now: float) -> Bound:
        """What batch work may fill now. (1) Nobody is online, and has not been for long enough; (2) the floor; (3) the level."""
        floor = 1 if now < self._floor_until else 0
        return Bound(
            yielding=None if self._alone(self._settings.resume_seconds, now) else max(floor, self._allowed),
            staying=None if self._alone(self._settings.quiet_seconds, now) else max(floor, self._level),
        )

    def next_look(self, now: float) -> float | None:
        """When the mere passing of time changes the bound."""
        times = [self._floor_until]
        if self._online == 0:
            times += [
                self._online_until + self._settings.resume_seconds,
                self._online_until + self._settings.quiet_seconds,
            ]
        if self._held_since is not None:
            times.append(self._held_since + self._settings.hold_seconds_max)
        return min((time for time in times if time > now), default=None)

    def seen(self, signal: Signal, model: str, seconds: float, now: float) -> bool:
        """An online answer took so long for `signal`, until now; whether the bound has changed."""
        began = now - seconds
        key = (model, signal, self._online.bit_length())
        if (baseline := self._baselines.get(key)) is None:
            baseline = self._baselines[key] = _Baseline()
        if not self._running and self._ran_until <= began:
            baseline.add(seconds, now, self._settings.baseline_seconds)
            self._rested += 1
            is_wanted = self._stair == 0 and self._held_since is not None
            return is_wanted and self._rested >= _EVIDENCE and self._known(signal, model, now) and self._raise(now)
        if began < max(self._changed_at, self._floor_until) or self._running > max(1, self._allowed):
            return False
        if not self._known(signal, model, now):
            return self._rest(signal, model, now)
        scale = baseline.mean
        if signal is Signal.WAIT:  # what a caller feels is the wait and the answer's first token together
            first = self._baselines.get((model, Signal.FIRST, self._online.bit_length()))
            scale += first.mean if first is not None and first.count else 0.0
        if scale <= 0:
            return False
        sample = min(_RATIO_MAX, 1 + (seconds - baseline.mean) / scale), min(1.0, baseline.deviation / scale)
        self._evidence.add(*sample)
        if signal is Signal.FIRST:
            self._note_first(*sample)
        return self._judge(now)

    def _alone(self, seconds: float, now: float) -> bool:
        return self._online == 0 and now >= self._online_until + seconds

    @property
    def _allowed(self) -> int:
        return min(self._level, self._stair)

    def _judge(self, now: float) -> bool:
        """(1) Bad, as soon as it shows; (2) good, once there is enough of it and the bound has been used; (3) neither."""
        evidence, settings = self._evidence, self._settings
        enough = evidence.count >= _EVIDENCE and now >= evidence.since + _EVIDENCE_SECONDS
        bad = (
            evidence.count >= _EVIDENCE_BAD
            and evidence.least(_DOUBT if enough else _DOUBT_EARLY) > settings.tolerance_bad
        )
        firsts = self._firsts
        if bad or (self._first_is_new and firsts.count >= _EVIDENCE and firsts.least(_DOUBT) > settings.tolerance_bad):
            self._cut(now)
            return True
        if not enough:
            return False
        good = evidence.mean <= settings.tolerance_good and self._peak >= self._allowed and self._good_firsts()
        self._evidence = _Evidence(now)
        if not good:
            return False
        self._proven = self._allowed
        if self._ceiling is not None and self._allowed >= self._ceiling:
            self._ceiling, self._backoff = None, settings.probe_seconds_min
        return self._raise(now)

    def _note_first(self, ratio: float, noise: float) -> None:
        if self._firsts.count >= _FIRSTS_MAX:
            self._firsts.fade()
        self._firsts.add(ratio, noise)
        self._first_is_new = True

    def _good_firsts(self) -> bool:
        """Whether first tokens come as fast as without, or what is more of their time may be chance."""
        return self._firsts.count < _FIRSTS_MIN or self._firsts.least(_DOUBT) <= self._settings.tolerance_good

    def _raise(self, now: float) -> bool:
        if self._stair < self._level:
            self._step(now, self._level, self._stair + 1)
            return True
        level = self._level + 1
        if level > _LEVEL_MAX or (self._ceiling is not None and level >= self._ceiling and now < self._probe_at):
            return False
        self._step(now, level, level)
        return True

    def _known(self, signal: Signal, model: str, now: float) -> bool:
        baseline = self._baselines.get((model, signal, self._online.bit_length()))
        if baseline is None or baseline.count < _SAMPLES_MIN[signal]:
            return False
        return now - baseline.at <= self._settings.baseline_seconds

    def _rest(self, signal: Signal, model: str, now: float) -> bool:
        """Have no batch work run for as long as it takes to see what `signal` is without, if nothing else tells."""
        tells = signal is Signal.TOKEN or (signal is Signal.FIRST and not self._known(Signal.TOKEN, model, now))
        if not tells or self._stair == 0:
            return False
        self._step(now, self._level, 0)
        return True

    def _give_up(self, now: float) -> None:
        """Take back a step up that there has been no verdict on, unless what was seen of it is enough for one."""
        evidence, settings = self._evidence, self._settings
        if evidence.count >= _EVIDENCE_BAD and evidence.least(_DOUBT) > settings.tolerance_bad:
            self._cut(now)
        elif evidence.count < _EVIDENCE or evidence.mean > settings.tolerance_good:
            self._step(now, min(self._level, self._proven), self._proven)

    def _cut(self, now: float) -> None:
        """To half of what was bad, which is left alone for a while."""
        bad = max(1, self._allowed)
        self._ceiling, self._probe_at = bad, now + self._backoff
        self._backoff = min(2 * self._backoff, self._settings.probe_seconds_max)
        self._firsts = _Evidence()
        self._step(now, bad // 2, bad // 2)

    def _step(self, now: float, level: int, stair: int) -> None:
        self._level, self._stair, self._changed_at = level, stair, now
        self._proven = min(self._proven, stair)
        self._evidence, self._rested, self._peak, self._first_is_new = _Evidence(now), 0, self._running, False


@dataclass(frozen=True, slots=True)
class Claim:
    """An engine that has batch work alone: the places that fills, whether it runs, and since when it does or does not."""

    replica_id: str
    places: int
    runs: bool
    since: float


def to_run(claims: Iterable[Claim], places: int | None, now: float, turn_seconds: float) -> set[str]:
    """The engines that run while so many places may be filled; an engine runs or is paused as a whole.

    (1) Those that run and have not had their turn; (2) those that are paused, the longest first; (3) the others. Each
    runs if those before it leave a place at least.
    """
    running: set[str] = set()

    def order(claim: Claim) -> tuple[int, float, str]:
        has_turn = claim.runs and now - claim.since < turn_seconds
        return (0 if has_turn else 2 if claim.runs else 1, claim.since, claim.replica_id)

    for claim in sorted(claims, key=order):
        if places is None or places > 0:
            running.add(claim.replica_id)
            places = None if places is None else places - claim.places
    return running
