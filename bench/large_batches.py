"""Decode-only steps of larger batches than a fit has seen: modelled against measured.

    python bench/large_batches.py RUNS_DIR [--most 64] [--json]

The shipped profiles' stages, without the steps of more than ``--most`` decoding requests, are fitted; the steps left out are
compared with what the profile says of them, by requests (medians).
"""

import argparse
import json
from pathlib import Path

import numpy as np

from block.steptime.fit import Subject, fit_profile
from block.steptime.pace import steady
from block.steptime.roofline import arithmetic
from block.steptime.sources import read_measured
from block.steptime.steplog import STEPS_SUFFIX, StepLog
from block.steptime.windows import work_s
from fit_profiles import TRAINED_ON

BINS = (96, 128, 192, 256)
STEPS_FEW = 10


def pieces(log: StepLog, most: int) -> list[StepLog]:
    """The stretches of a log without steps of more than ``most`` decoding requests."""
    columns = [f for f in StepLog.__struct_fields__ if f != "name" and getattr(log, f) is not None]
    small = np.flatnonzero(log.decode_requests <= most)
    runs = np.split(small, 1 + np.flatnonzero(np.diff(small) > 1))
    return [StepLog(name=log.name, **{f: getattr(log, f)[run] for f in columns}) for run in runs if len(run)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--most", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for name, stages in TRAINED_ON.items():
        measured = read_measured([args.runs / run / f"{stage}{STEPS_SUFFIX}" for run, stage in stages])
        logs = [(piece, limits) for log, limits in measured.logs for piece in pieces(log, args.most)]
        subject = Subject(name=name, gpu=measured.gpu, model=measured.model,
                          prior=arithmetic(measured.model_config, measured.gpu, 1))  # fmt: skip
        profile = fit_profile(logs, subject)
        n, took, said = [], [], []
        for log, limits in measured.logs:
            k = steady(log)
            n.append(log.decode_requests[k])
            took.append(log.finished_s[k] - log.finished_s[k - 1])
            said.append(work_s(log, profile.curve(limits=limits), limits)[k])
        requests, measured_s, modelled_s = map(np.concatenate, (n, took, said))
        low = args.most
        for high in BINS:
            of = (requests > low) & (requests <= high)
            if of.sum() >= STEPS_FEW:
                off = float(np.median(modelled_s[of] / measured_s[of]) - 1)
                rows.append({"profile": name, "more_than": low, "up_to": high, "steps": int(of.sum()), "off": off})
            low = high
    if args.json:
        print(json.dumps({"batches": rows}))
        return
    for r in rows:
        print(
            f"{r['profile']:18} {r['more_than']:3} < requests <= {r['up_to']:3}: {r['steps']:4} steps, {r['off']:+.1%}"
        )


if __name__ == "__main__":
    main()
