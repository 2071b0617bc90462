"""The length estimator's claims: cost of one estimate, of a model's load, of a snapshot's totals; how good, and why this learner.

Run: python bench/length.py [cost] [quality] [learners] --sets FOLDER

cost      one request from text to distribution (P50, P99, CPU time), what learning from a finished one takes, what the event
          loop spends on a line of the request log, load, size; all requests of 12 x 48 at once; the trees by numpy against
          LightGBM's own single-row prediction
quality   every set alone, 5 folds by prompt, against the baselines (as `block length eval --separately --by-set`)
learners  location-scale hybrid (what ships) against boosted quantiles and a discretised distribution, same folds

FOLDER holds public sets of prompts and answers (docs/length.md). Costs are measured without them on made-up prompts.
"""

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from block.core import Request
from block.length.data.records import Record
from block.length.data.sets import read_records
from block.length.evaluation.report import report
from block.length.evaluation.scores import QUANTILES, TELLERS, Teller, Told, cross_validate
from block.length.learn.model import load_model
from block.length.learn.tabulate import tabulate
from block.length.learn.train import fit, levels
from block.length.learned import SHIPPED, LearnedEstimator
from block.length.prompt.features import features_of

SEED = 1


def percentiles_us(call: Callable[[int], object], count: int) -> tuple[float, float]:
    """(P50, P99) of CPU microseconds of one call."""
    taken = np.empty(count)
    for i in range(count):
        started = time.thread_time_ns()
        call(i)
        taken[i] = time.thread_time_ns() - started
    return float(np.quantile(taken, 0.5)) / 1e3, float(np.quantile(taken, 0.99)) / 1e3


def cost(records: Sequence[Record], model: Path) -> dict[str, object]:
    started = time.process_time()
    estimator = LearnedEstimator(model=model)
    load_s = time.process_time() - started
    texts = [r.text for r in records] or ["Write a list of ten ideas for a long trip through the mountains. " * 8] * 100
    rng = np.random.default_rng(SEED)
    chosen = [texts[int(i)] for i in rng.integers(len(texts), size=4000)]
    requests = [
        Request(id=str(i), arrived_s=0.0, prompt_tokens=1, prompt=text, model="m") for i, text in enumerate(chosen)
    ]
    told = [estimator.estimate(request) for request in requests]
    lengths = [
        max(1, round(estimate.quantile(float(q)))) for estimate, q in zip(told, rng.random(len(told)), strict=True)
    ]
    observe = percentiles_us(lambda i: estimator.observe(requests[i], lengths[i]), len(requests))
    long = Request(id="long", arrived_s=0.0, prompt_tokens=1, prompt="some words and " * 70_000, model="m")
    n = 12 * 48
    rows = rng.integers(1, len(estimator.bank), n).astype(np.int32)
    generated, caps = rng.integers(0, 900, n).astype(np.int32), np.full(n, 4096, np.int32)
    p50, p99 = percentiles_us(lambda i: estimator.estimate(requests[i]), len(requests))
    return {
        "observe_us_p50": observe[0],
        "observe_us_p99": observe[1],
        "log_us_p50": log_cost(),
        "estimate_us_p50": p50,
        "estimate_us_p99": p99,
        "estimate_1_mb_us_p50": percentiles_us(lambda _: estimator.estimate(long), 300)[0],
        "load_s": load_s,
        "model_bytes": model.stat().st_size,
        "bank_bytes": estimator.bank.nbytes,
        "totals_of_576_us_p50": percentiles_us(lambda _: estimator.bank.expected_totals(rows, generated, caps), 2000)[
            0
        ],
        "totals_of_48_us_p50": percentiles_us(
            lambda _: estimator.bank.expected_totals(rows[:48], generated[:48], caps[:48]), 2000
        )[0],
        **trees_cost(),
    }


def log_cost() -> float:
    """Microseconds that the event loop spends on one row of the request log."""
    from types import SimpleNamespace

    from block.gateway.records.metrics import Metrics
    from block.gateway.records.requestlog import RequestLog

    request = Request(id="r", arrived_s=0.0, prompt_tokens=9, model="m")
    exchange = SimpleNamespace(
        http=SimpleNamespace(body=b"{}"),
        instance=None,
        answered_s=1.0,
        arrived_s=0.0,
        request=request,
        expected_total=9,
    )
    with tempfile.TemporaryDirectory() as folder:
        log = RequestLog(f"{folder}/rows.jsonl", Metrics(), prompts="full")
        taken = percentiles_us(lambda _: log.note(exchange, 9, None), 5000)[0]  # type: ignore[arg-type]
        log.close()
    return taken


def trees_cost() -> dict[str, float]:
    """The same shape of model, one row at a time: numpy over flat arrays, and LightGBM's Booster.predict."""
    import lightgbm

    from block.length.learn.trees import from_lightgbm

    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((4000, 60)).astype(np.float32)
    y = x[:, 0] + np.sin(3 * x[:, 1]) + 0.1 * rng.standard_normal(4000)
    parameters = {"num_leaves": 15, "max_depth": 6, "learning_rate": 0.04, "num_threads": 1, "verbose": -1}
    booster = lightgbm.train(parameters, lightgbm.Dataset(x, y), 250)
    trees = from_lightgbm(booster.dump_model())
    assert np.allclose(trees.many(x[:200]), booster.predict(x[:200]), atol=1e-4)
    return {
        "trees_numpy_us_p50": percentiles_us(lambda i: trees.one(x[i]), 2000)[0],
        "trees_lightgbm_us_p50": percentiles_us(lambda i: booster.predict(x[i : i + 1], num_threads=1), 2000)[0],
    }


def quality(records: Sequence[Record]) -> list[object]:
    import msgspec

    shown: list[object] = []
    for name in sorted({r.dataset for r in records}):
        some = [r for r in records if r.dataset == name]
        shown += [msgspec.to_builtins(one) for one in report(some, cross_validate(some, TELLERS), by_model=False)]
    return shown


def boosted(kind: str) -> Callable[[Sequence[Record]], Teller]:
    """Rivals on the same features: "quantiles" (three boosters) or "bins" (one multiclass booster over 12 bins)."""

    def make(train: Sequence[Record]) -> Teller:
        import lightgbm

        table = tabulate(train)
        offset, spread = levels(table.log_tokens, table.model)
        places = {name: i for i, name in enumerate(table.models)}
        x = np.column_stack([table.dense, offset[table.model], spread[table.model]])
        y = table.log_tokens - offset[table.model]
        shape = {"num_leaves": 15, "max_depth": 6, "learning_rate": 0.04, "min_data_in_leaf": 20, "lambda_l2": 5.0,
                 "feature_fraction": 0.5, "bagging_fraction": 0.8, "bagging_freq": 1, "num_threads": 1, "verbose": -1,
                 "seed": SEED}  # fmt: skip
        edges = np.quantile(y, np.linspace(0, 1, 13))
        if kind == "quantiles":
            made = [
                lightgbm.train({**shape, "objective": "quantile", "alpha": q}, lightgbm.Dataset(x, y), 250)
                for q in QUANTILES
            ]
        else:
            label = np.clip(np.searchsorted(edges, y, side="right") - 1, 0, 11)
            bins = {**shape, "objective": "multiclass", "num_class": 12}
            made = [lightgbm.train(bins, lightgbm.Dataset(x, label), 60)]

        def tell(some: Sequence[Record]) -> Told:
            of = np.array([places[r.model] for r in some])
            rows = np.column_stack([[features_of(r.text, r.max_tokens).dense for r in some], offset[of], spread[of]])
            if kind == "quantiles":
                told = np.column_stack([booster.predict(rows) for booster in made])
            else:
                below = np.concatenate([np.zeros((len(rows), 1)), np.cumsum(made[0].predict(rows), axis=1)], axis=1)
                told = np.array([np.interp(QUANTILES, cdf, edges) for cdf in below])
            return np.exp(np.sort(told, axis=1) + offset[of][:, None])

        return tell

    return make


def learners(records: Sequence[Record]) -> dict[str, object]:
    tellers = {
        "constant": TELLERS["constant"], "hybrid": TELLERS["learned"], "quantiles": boosted("quantiles"), "bins": boosted("bins"),
    }  # fmt: skip
    shown: dict[str, object] = {}
    for name in sorted({r.dataset for r in records}):
        some = [r for r in records if r.dataset == name]
        (one,) = report(some, cross_validate(some, tellers), by_model=False)
        shown[name] = {
            who: {"mae": s.mae_tokens, "pinball": s.pinball_tokens, "cover": s.coverage_80_fraction}
            for who, s in one.scores.items()
        }
    return shown


def training(records: Sequence[Record]) -> dict[str, float]:
    started = time.process_time()
    model = fit(records)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.npz"
        model.save(path)
        load_model(path)
        return {"train_cpu_s": time.process_time() - started, "bytes": path.stat().st_size, "records": len(records)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["cost"], choices=["cost", "quality", "learners"])
    parser.add_argument("--sets", type=Path)
    parser.add_argument("--model-file", type=Path, default=SHIPPED, help="whose cost")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    print(json.dumps({"commit": commit.strip(), "host": platform.processor() or platform.machine(), "seed": SEED}))
    records = read_records([options.sets]) if options.sets else []
    if "cost" in options.what:
        print(json.dumps(cost(records, options.model_file), indent=1))
        if records:
            print(json.dumps(training(records), indent=1))
    if "quality" in options.what:
        print(json.dumps(quality(records), indent=1))
    if "learners" in options.what:
        print(json.dumps(learners(records), indent=1))


if __name__ == "__main__":
    main()
