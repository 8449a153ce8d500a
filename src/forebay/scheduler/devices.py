"""Which work is where: counts online and batch work on each device, and pauses and resumes engines as its pace says.

Told by the scheduler of every change, it never awaits. It refuses to pause an engine that has anything but batch work, and
knows no device of models that run elsewhere: those are not paced.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from forebay.clock import Clock
from forebay.replicas.replica import Replica
from forebay.scheduler.brief import Brief, Sharing
from forebay.scheduler.pace import Bound, Claim, Pace, Signal, to_run
from forebay.scheduler.policy import to_step_aside
from forebay.scheduler.queue import Ticket
from forebay.server_config import PaceSettings
from forebay.telemetry import Log, Metrics

_TURN_SECONDS = 10.0  # of an engine, when several want what the bound lets only one of them have
_SAMPLE_SECONDS = 0.01  # tokens of one answer are looked at together for so long
_SAMPLE_SECONDS_ALONE = 0.1  # the same while there is no batch work that they could tell anything about
_FREE = Bound(None, None)


@dataclass(frozen=True, slots=True)
class _Run:
    """Batch work that was granted a place on `replica`, when each place that was filled had `had` so much of it."""

    ticket: Ticket
    replica: Replica
    had: float


@dataclass(slots=True)
class _Device:
    """What is known of one device. `batch` has what each batch ticket runs that was granted a place on it.

    `online` counts online requests by replica, `asked` by model; `online_of` counts those of them that the pace knows of,
    `last_online` is when a model last had one. `since` is when a replica was
    last paused or resumed. `busy`: batch work runs or waits. `offered` is the bound at which those who wait were last told to look again.
    `asked_by_turn` are those who have looked in the round that goes on. Until `floor_until` one engine runs that had stood still for long beside batch work that cannot.
    """

    name: str
    models: list[str]
    pace: Pace
    brief: Brief
    online: Counter[str] = field(default_factory=Counter)
    last_online: dict[str, float] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    online_of: Counter[str] = field(default_factory=Counter)
    batch: dict[int, _Run] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
    served_at: dict[str, float] = field(default_factory=dict)
    sharing: dict[str, Sharing] = field(default_factory=dict)
    busy: bool = False
    offered: Bound = _FREE
    offering: asyncio.Handle | None = None
    asked_by_turn: set[str] = field(default_factory=set)
    floor_until: float = -math.inf
    alarm: tuple[float, asyncio.Task[None]] | None = None


class Ear:
    """Hears how fast one online answer comes."""

    __slots__ = ("_device", "_devices", "_granted_at", "_model", "_since", "_tokens")

    def __init__(self, devices: "Devices", device: _Device, model: str, granted_at: float) -> None:
        self._devices = devices
        self._device = device
        self._model = model
        self._granted_at = granted_at
        self._since = -1.0
        self._tokens = 0

    def hear(self, tokens: int, now: float) -> None:
        """The answer has so many tokens now."""
        if self._since < 0:
            self._devices.note(self._device, Signal.FIRST, self._model, now - self._granted_at, now)
        else:
            gone, new = now - self._since, tokens - self._tokens
            if new <= 0 or gone < (_SAMPLE_SECONDS if self._device.busy else _SAMPLE_SECONDS_ALONE):
                return
            self._devices.note(self._device, Signal.TOKEN, self._model, gone / new, now)
        self._since, self._tokens = now, tokens

    def skip(self, tokens: int, now: float) -> None:
        """The time until now was its reader's."""
        if self._since >= 0:
            self._since, self._tokens = now, tokens


class Devices:
    """Owned by the scheduler, which alone calls it, but for what ears hear.

    `online` has how many replicas of each model are for online work first. `absent` says whether a model waits for memory,
    `waiting` how many batch requests of it wait, and `in_line` how many others; `offer` has the scheduler look whether a
    batch request may go on.
    """

    def __init__(
        self,
        device_of: Mapping[str, str],
        online: Mapping[str, int],
        replicas: Callable[[str], list[Replica]],
        absent: Callable[[str], bool],
        waiting: Callable[[str], int],
        in_line: Callable[[str], int],
        offer: Callable[[str], None],
        settings: PaceSettings,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._online = online
        self._replicas = replicas
        self._absent = absent
        self._waiting = waiting
        self._in_line = in_line
        self._offer = offer
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._log = Log()
        self._devices: dict[str, _Device] = {}
        self._of: dict[str, _Device] = {}
        for model, name in device_of.items():
            if name and settings.enabled:
                device = self._devices.setdefault(
                    name, _Device(name, [], Pace(settings), Brief(settings.brief_seconds))
                )
                device.models.append(model)
                self._of[model] = device
        for device in self._devices.values():
            self._measure(device)

    def joined(self, ticket: Ticket) -> None:
        """`ticket` waits. Online, it has batch work stand still at once."""
        device = self._of.get(ticket.model)
        if device is None:
            return
        now = self._clock.monotonic()
        ticket.found_engine = bool(self._replicas(ticket.model))
        if not ticket.batch:
            device.asked[ticket.model] += 1
            self._count(device, ticket.model, now)
        self._settle(device, now)

    def granted(self, ticket: Ticket, replica: Replica) -> None:
        """`ticket` has a place on `replica`, and is about to run there."""
        device = self._of.get(ticket.model)
        if device is None:
            return
        now = self._clock.monotonic()
        if ticket.batch:
            device.batch[ticket.number] = _Run(ticket, replica, self._shared_out(device, replica, ticket.taken, now))
            device.since.setdefault(replica.id, now)
            device.served_at[ticket.model] = now
        else:
            device.online[replica.id] += 1
            self._resume(device, replica, now)
            if ticket.found_engine:  # to load a model takes its time without any batch work as well
                device.pace.seen(Signal.WAIT, ticket.model, now - ticket.joined_at, now)
        self._settle(device, now)

    def gone(self, ticket: Ticket) -> None:
        """`ticket` neither waits nor runs any longer."""
        device = self._of.get(ticket.model)
        if device is None:
            return
        now = self._clock.monotonic()
        if ticket.batch:
            self._ended(device, ticket, now)
        else:
            device.asked[ticket.model] -= 1
            self._count(device, ticket.model, now)
            device.last_online[ticket.model] = now
            if ticket.replica_id:
                device.online[ticket.replica_id] -= 1
                if not device.online[ticket.replica_id]:
                    del device.online[ticket.replica_id]
        self._settle(device, now)

    def _ended(self, device: _Device, ticket: Ticket, now: float) -> None:
        run = device.batch.pop(ticket.number, None)
        if run is None:
            return
        beside = sum(other.ticket.taken for other in device.batch.values() if other.replica is run.replica)
        seconds = self._shared_out(device, run.replica, -ticket.taken, now) - run.had
        # How soon a line fails says nothing of the others, how late does.
        if ticket.served or (not ticket.preempted and seconds > self._settings.brief_seconds):
            device.brief.learn(ticket.model, seconds, now)
        if not beside:
            self._resume(device, run.replica, now)
            device.since.pop(run.replica.id, None)
            del device.sharing[run.replica.id]

    def _shared_out(self, device: _Device, replica: Replica, places: int, now: float) -> float:
        """So many more are filled on `replica`; what each has had of it, in seconds in which it did not stand still."""
        sharing = device.sharing.setdefault(replica.id, Sharing())
        return sharing.change(places, now - replica.paused_seconds)

    def changed(self, model: str) -> None:
        """Replicas of `model` came or went, or are about to go."""
        device = self._of.get(model)
        if device is not None:
            now = self._clock.monotonic()
            self._count(device, model, now)
            self._settle(device, now)

    def _count(self, device: _Device, model: str, now: float) -> None:
        """Tell the pace of online requests of `model`, but for those that need nothing of the device before there is memory."""
        online = 0 if self._absent(model) else device.asked[model]
        for _ in range(online - device.online_of[model]):
            device.pace.joined(now)
        for _ in range(device.online_of[model] - online):
            device.pace.left(now)
        device.online_of[model] = online

    def room(self, model: str, *, yields: bool) -> int | None:
        """Places that batch work of `model` may fill in all, given that it `yields` or not; None if as many as there are."""
        device = self._of.get(model)
        if device is None:
            return None
        now = self._clock.monotonic()
        bound = device.pace.bound(now)
        stays = self.only(model) is None and self._stays(device, model, now, yields=yields)
        limit = bound.staying if stays else bound.yielding
        if limit is None:
            return None
        room = self._beside_others(device, model, limit) - self._owed(device, model)
        return max(room, device.brief.places(model, now)) if bound.yielding is None else room

    def to_leave(self, model: str, running: Iterable[Ticket]) -> list[Ticket]:
        """Those of `running` that leave for online work in one process with them: what can be paused where it is need not."""
        device = self._of.get(model)
        limit = None if device is None else device.pace.bound(self._clock.monotonic()).staying
        if device is None or limit is None:
            return []
        shared = [ticket for ticket in running if self._is_shared(device, ticket)]
        return to_step_aside(shared, self._beside_others(device, model, limit)) if shared else []

    def apart(self, model: str) -> frozenset[str]:
        """The replicas of `model` beyond those for online work: where its batch work can stand still for that."""
        further = self._replicas(model)[self._online[model] :] if model in self._of else ()
        return frozenset(replica.id for replica in further if replica.traits.pausable)

    def only(self, model: str) -> frozenset[str] | None:
        """The replicas that batch work may go to now, while it has some to itself; None for any."""
        apart = self.apart(model)
        device = self._of[model] if apart else None
        if device is None or device.pace.bound(self._clock.monotonic()).staying is None:
            return None
        return frozenset(replica_id for replica_id in apart if not device.online[replica_id]) or None

    def ear(self, model: str) -> Ear | None:
        """What hears an online answer of `model` that begins now."""
        device = self._of.get(model)
        return None if device is None else Ear(self, device, model, self._clock.monotonic())

    def note(self, device: _Device, signal: Signal, model: str, seconds: float, now: float) -> None:
        """An online answer took so long for `signal`."""
        if device.pace.seen(signal, model, seconds, now):
            self._log.debug("pace.changed", device=device.name, bound=device.pace.level)
            self._settle(device, now)

    def _stays(self, device: _Device, model: str, now: float, *, yields: bool) -> bool:
        """Whether batch work of `model` may soon run beside online work in one process, which cannot be paused."""
        last = device.last_online.get(model)
        lately = not yields and last is not None and now < last + self._settings.quiet_seconds
        return lately or self._in_one_process(device, model)

    def _in_one_process(self, device: _Device, model: str) -> bool:
        return device.online_of[model] > 0 or not all(replica.traits.pausable for replica in self._replicas(model))

    def _is_shared(self, device: _Device, ticket: Ticket) -> bool:
        run = device.batch.get(ticket.number)
        if run is None or device.online[run.replica.id] or not run.replica.traits.pausable:
            return run is not None
        return device.online_of[ticket.model] > 0 and run.replica.id not in self.apart(ticket.model)

    def _beside_others(self, device: _Device, model: str, limit: int) -> int:
        runs = device.batch.values()
        return max(
            0, limit - sum(run.ticket.taken for run in runs if run.ticket.model != model and not run.replica.paused)
        )

    def _owed(self, device: _Device, model: str) -> int:
        """A place for another model whose batch work waits longer, and has none: whoever ends a line would take it again."""
        helped = {model, *device.asked_by_turn, *(run.ticket.model for run in device.batch.values())}
        served = device.served_at.get(model, -math.inf)
        waits = (one for one in device.models if one not in helped and self._waiting(one))
        return int(any(device.served_at.get(one, -math.inf) < served for one in waits))

    def _settle(self, device: _Device, now: float) -> None:
        """Have those engines run that may, and look again when time alone changes that."""
        device.busy = bool(device.batch) or any(self._waiting(model) for model in device.models)
        if not device.busy:
            device.pace.batch(0, now, held=False)
            self._set_alarm(device, None)
            return
        device.pace.tick(now)
        bound = device.pace.bound(now)
        places, replicas = self._places(device)
        pausable = [replica for replica in replicas if self._may_pause(device, replica)]
        claims = [
            Claim(replica.id, places[replica.id], not replica.paused, device.since.get(replica.id, now))
            for replica in pausable
        ]
        staying = sum(places.values()) - sum(claim.places for claim in claims)
        free, look = None, math.inf
        if bound.yielding is not None:
            floor, look = self._floor(device, claims, now) if staying and claims else (0, math.inf)
            free = max(floor, bound.yielding - staying)
        running = to_run(claims, free, now, _TURN_SECONDS)
        paced = sum(places[claim.replica_id] for claim in claims if claim.replica_id in running)
        for replica in replicas:
            if replica in pausable and replica.id not in running:
                self._pause(device, replica, now)
            else:
                self._resume(device, replica, now)
        held = len(running) < len(claims) or any(self._waiting(model) for model in device.models)
        device.pace.batch(staying + (paced if free is None else min(paced, free)), now, held=held)
        due = min(look, math.inf if (next_look := device.pace.next_look(now)) is None else next_look)
        self._set_alarm(device, due if due < math.inf else None)
        self._plan_offer(device, bound)

    def _floor(self, device: _Device, claims: list[Claim], now: float) -> tuple[int, float]:
        """Places of those who stand still beside batch work that cannot, and when that changes: the pace sees that some runs."""
        still = min(now if claim.runs else claim.since for claim in claims)
        due = max(still, device.floor_until) + self._settings.hold_seconds_max
        if due <= now:
            device.floor_until = now + self._settings.floor_seconds
        return (1, device.floor_until) if now < device.floor_until else (0, due)

    def _places(self, device: _Device) -> tuple[Counter[str], list[Replica]]:
        """What batch work fills by replica, and the replicas."""
        places: Counter[str] = Counter()
        replicas: dict[str, Replica] = {}
        for run in device.batch.values():
            places[run.replica.id] += run.ticket.taken
            replicas[run.replica.id] = run.replica
        return places, list(replicas.values())

    def _may_pause(self, device: _Device, replica: Replica) -> bool:
        if device.online[replica.id] or not replica.pausable:
            return False
        if self._in_line(replica.model) and replica.id not in self.apart(replica.model):
            return False  # they wait for a place there
        return any(other is replica for other in self._replicas(replica.model))  # not while it is to leave

    def _pause(self, device: _Device, replica: Replica, now: float) -> None:
        if replica.paused:
            return
        replica.pause()
        device.since[replica.id] = now
        self._log.debug("engine.paused", model=replica.model, replica=replica.id, device=device.name)

    def _resume(self, device: _Device, replica: Replica, now: float) -> None:
        if not replica.paused:
            return
        replica.resume()
        self._metrics.paused_seconds.labels(device.name).inc(now - device.since.get(replica.id, now))
        device.since[replica.id] = now
        self._log.debug("engine.resumed", model=replica.model, replica=replica.id, device=device.name)

    def _plan_offer(self, device: _Device, bound: Bound) -> None:
        """Have those look again who wait for the bound to let them in, when the scheduler is done with what it does."""
        if bound == _FREE == device.offered or device.offering is not None:
            return
        device.offered = bound
        if any(self._waiting(model) for model in device.models):
            device.offering = asyncio.get_running_loop().call_soon(self._offer_all, device)

    def _offer_all(self, device: _Device) -> None:
        """Whose batch work was served the longest time ago looks first; nothing is kept for one that has had that turn."""
        device.offering = None
        for model in sorted(device.models, key=lambda one: device.served_at.get(one, -math.inf)):
            if self._waiting(model):
                self._offer(model)
            device.asked_by_turn.add(model)
        device.asked_by_turn.clear()

    def _set_alarm(self, device: _Device, due: float | None) -> None:
        """Look again at `due`. One that goes off too early does no harm: it sets the next."""
        if device.alarm is not None:
            if due is not None and device.alarm[0] <= due:
                return
            device.alarm[1].cancel()
            device.alarm = None
        if due is not None:
            device.alarm = (due, asyncio.get_running_loop().create_task(self._look_again(device, due)))

    async def _look_again(self, device: _Device, due: float) -> None:
        await self._clock.sleep(max(0.0, due - self._clock.monotonic()))
        device.alarm = None
        self._settle(device, self._clock.monotonic())

    def _measure(self, device: _Device) -> None:
        def paused() -> int:
            return len({run.replica.id for run in device.batch.values() if run.replica.paused})

        self._metrics.pace_level.labels(device.name).set_function(lambda: device.pace.level)
        self._metrics.paused.labels(device.name).set_function(paused)
