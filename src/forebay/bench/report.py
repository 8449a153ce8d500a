"""What was measured, beside what is wanted: JSON for machines, a table for people.

It refuses to leave out errors, seeds or the machine's load.
"""

import datetime as dt
import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forebay


@dataclass(slots=True)
class Measure:
    """One figure: the median over the seeds. `floor` and `goal` bound it from above, or from below if `more_is_better`."""

    id: str
    name: str
    unit: str
    by_seed: list[float] = field(default_factory=list)
    floor: float | None = None
    goal: float | None = None
    more_is_better: bool = False

    @property
    def value(self) -> float:
        """The median over the seeds."""
        return statistics.median(self.by_seed) if self.by_seed else math.nan

    @property
    def verdict(self) -> str:
        """Which of its bounds it keeps."""
        if not self.by_seed:
            return "not measured"
        if self.floor is None and self.goal is None:
            return ""
        if self.goal is not None and self._keeps(self.goal):
            return "goal"
        if self.floor is not None and self._keeps(self.floor):
            return "floor"
        return "missed"

    def _keeps(self, bound: float) -> bool:
        return self.value >= bound if self.more_is_better else self.value <= bound


@dataclass(slots=True)
class Report:
    """One run."""

    kind: str
    seeds: int
    measures: dict[str, Measure]
    requests: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    load_before: float = field(default_factory=lambda: _load())
    began: str = field(default_factory=lambda: dt.datetime.now(dt.UTC).isoformat(timespec="seconds"))

    def add(self, name: str, value: float) -> None:
        """One seed's figure."""
        self.measures[name].by_seed.append(value)

    def count(self, troubles: Iterable[str]) -> None:
        """Count requests, and those that went wrong by what went wrong; "" is a good one."""
        for trouble in troubles:
            self.requests += 1
            if trouble:
                self.errors[trouble] = self.errors.get(trouble, 0) + 1

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "kind": self.kind,
            "forebay": forebay.__version__,
            "began": self.began,
            "machine": machine(),
            "load_before": self.load_before,
            "load_after": _load(),
            "seeds": self.seeds,
            "requests": self.requests,
            "errors": sum(self.errors.values()),
            "errors_by_reason": self.errors,
            "measures": {
                name: {
                    "id": measure.id,
                    "name": measure.name,
                    "unit": measure.unit,
                    "value": _rounded(measure.value) if measure.by_seed else None,
                    "by_seed": [_rounded(value) for value in measure.by_seed],
                    "floor": measure.floor,
                    "goal": measure.goal,
                    "verdict": measure.verdict,
                }
                for name, measure in self.measures.items()
            },
            "notes": self.notes,
        }

    def as_markdown(self) -> str:
        """The table, with what a reader needs to judge it."""
        said = self.as_dict()
        where = said["machine"]
        lines = [
            f"# forebay bench {self.kind}",
            "",
            f"{said['began']}, Forebay {said['forebay']}, {where['cores']} cores ({where['processor']}), "
            f"{where['system']}, Python {where['python']}; load {said['load_before']} before, "
            f"{said['load_after']} after. {self.seeds} seeds, {self.requests} requests, {said['errors']} errors"
            + (
                f" ({', '.join(f'{count} x {reason}' for reason, count in self.errors.items())})."
                if self.errors
                else "."
            ),
            "",
            "| # | measure | median | by seed | floor | goal | keeps |",
            "|---|---|---|---|---|---|---|",
        ]
        for measure in said["measures"].values():
            seeds = ", ".join(f"{value:g}" for value in measure["by_seed"])
            floor, goal = ("" if bound is None else f"{bound:g}" for bound in (measure["floor"], measure["goal"]))
            cells = (measure["id"], measure["name"], figure(measure), seeds, floor, goal, measure["verdict"])
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write both files; an older run's are replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        as_json, as_markdown = folder / f"{self.kind}.json", folder / f"{self.kind}.md"
        as_json.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        as_markdown.write_text(self.as_markdown(), encoding="utf-8")
        return as_json, as_markdown


def figure(measure: dict[str, Any]) -> str:
    """The value of a measure with its unit, as people read it; "" where there is none."""
    return "" if measure["value"] is None else f"{measure['value']:g} {measure['unit']}".strip()


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of all values lie; nan of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1 if share < 1 else len(ordered) - 1)]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def _load() -> float:
    return round(os.getloadavg()[0], 2)


def _rounded(value: float) -> float:
    return value if math.isnan(value) or value == 0 else round(value, 3 - math.floor(math.log10(abs(value))))
