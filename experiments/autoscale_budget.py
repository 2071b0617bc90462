"""Where `replay`'s GPU hours go: the conversation day with the load to come told, and without the patience before a removal.

usage: autoscale_budget.py TRACES [--seeds 11,12] [--only PATTERN] [--out FOLDER]

"told": in place of the forecast stands what will come in those minutes (rates as the forecaster measures them); what n instances
bear is found as ever. "settle 0": a lower count is followed at once instead of after 300 s. Rows are added to
FOLDER/autoscale-budget.csv.
"""

import argparse
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from autoscale_days import INTERVAL_S, LIMITS, SLOS, traffic_of
from autoscale_report import HERE, append, line
from autoscale_traffic import DAY_S
from block.autoscale.controllers import guard_for
from block.autoscale.controllers.forecast import Course, Forecast, Forecaster
from block.autoscale.controllers.replay import Replay
from block.autoscale.controllers.work import work_on
from block.autoscale.terms import Kind, Observation
from block.simulate.optimum import optimum
from block.simulate.provision import Setting, Traffic, provision

PARTS = {"as it is": (False, 300.0), "settle 0": (False, 0.0), "told": (True, 300.0), "told, settle 0": (True, 0.0)}


class Told(Forecaster):
    """Answers by what will have come."""

    def __init__(self, kind: Kind, traffic: Traffic) -> None:
        super().__init__(work_on(kind))
        ends_s = np.arange(INTERVAL_S, traffic.at_s[-1] + INTERVAL_S, INTERVAL_S)
        edges = np.searchsorted(traffic.at_s, np.concatenate(([0.0], ends_s)))
        tokens = [
            (int(traffic.prompts[first:after].sum()), int(traffic.outputs[first:after].sum()))
            for first, after in itertools.pairwise(edges)
        ]
        self._seen = [
            Observation(at_s=float(at_s), arrived=int(count), tokens=brought)
            for at_s, count, brought in zip(ends_s, np.diff(edges), tokens, strict=True)
        ]
        self._whole = super().course(self._seen).level
        self._now = 0

    def course(self, window: Sequence[Observation]) -> Course:
        self._now = round(window[-1].at_s / self.step_s) - 1
        return super().course(window[-240:])

    def tell(self, course: Course, from_s: float, to_s: float) -> Forecast:
        leads = np.arange(round(from_s / self.step_s), round(to_s / self.step_s) + 1) + 2
        rates = self._whole[np.minimum(self._now + leads, len(self._whole) - 1)]
        level, base = float(course.level[-1]), float(course.base[-1])
        return Forecast(rates, rates / max(rates.sum(), 1e-12), level, base, "told")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path)
    parser.add_argument("--seeds", default="11,12")
    parser.add_argument("--only", default=".*", help="a regular expression of parts, optimum among them")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    results = arguments.out / "autoscale-budget.csv"
    results.parent.mkdir(parents=True, exist_ok=True)
    kind, slo = Kind(profile="a30-qwen2-7b", limits=LIMITS, most=20, cold_start_s=120.0), SLOS["conv"]
    for seed in map(int, arguments.seeds.split(",")):
        traffic = traffic_of("conv", arguments.traces, seed, 2)
        judged = traffic.at_s >= DAY_S
        rows = []
        for part, (told, settle_s) in PARTS.items():
            if not re.fullmatch(arguments.only, part):
                continue
            controller = Replay([kind], slo)
            if told:
                controller._forecaster = Told(kind, traffic)
            guard = msgspec.structs.replace(guard_for("replay"), settle_s=settle_s)
            setting = Setting(kinds=(kind,), start={kind.name: 3}, guard=guard, interval_s=INTERVAL_S)
            done = provision(traffic, controller, setting)
            paid = [s.ready + s.starting + s.draining for s in done.steps if DAY_S < s.at_s <= 2 * DAY_S]
            missed = 100 * float(1 - done.within(slo)[judged].mean())
            rows.append((part, missed, float(np.sum(paid)) * INTERVAL_S / 3600))
        if re.fullmatch(arguments.only, "optimum"):
            day = Traffic(traffic.at_s[judged] - DAY_S, traffic.prompts[judged], traffic.outputs[judged])
            best = optimum(day, kind, slo, 0.003)
            rows.append(("optimum", 100 * best.missed, best.instance_s / 3600))
        for part, missed, hours in rows:
            row = {"seed": seed, "part": part, "missed_percent": missed, "gpu_hours_day": hours}
            print(line(row), flush=True)
            append(results, row)


if __name__ == "__main__":
    main()
