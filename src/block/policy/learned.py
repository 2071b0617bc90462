"""Latency learned online instead of simulated, in the manner of llm-d's predictor: gradient boosting on an instance's counters.

Features of a candidate: KV use, the prompt's tokens, requests waiting and running, the share of the prompt that is cached, prompt
tokens waiting. Targets: TTFT and TPOT as they then came, both from the decision on. A model is trained anew every
``RETRAIN_EVERY`` answers on the last ``SAMPLES_MAX``; until there is one, the fewest requests in flight win.

Whoever drives the policy tells it the ends (`observe`) and lets it train when it is `due`: `train` is pure and slow (tenths of a
second), so a gateway runs it in a thread and hands the result to `adopt`. Needs LightGBM (``pip install block-llm[learned]``).
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from block.core import Candidate, Request
from block.errors import ConfigError
from block.policy.rank import Evidence, JointRank

SAMPLES_MAX: Final = 4000
SAMPLES_MIN: Final = 300
RETRAIN_EVERY: Final = 500
_TREES: Final = 60
_SETTINGS: Final = {
    "objective": "regression", "learning_rate": 0.1, "num_leaves": 15, "min_data_in_leaf": 10, "verbose": -1,
    "num_threads": 1, "deterministic": True, "force_row_wise": True, "seed": 1,
}  # fmt: skip

Floats = npt.NDArray[np.float64]


class Models(NamedTuple):
    """A pair of boosters: of log TTFT and of log TPOT (seconds)."""

    ttft: Any
    tpot: Any


class LearnedLatency(JointRank):
    """Predicted TTFT plus predicted TPOT times ``output_tokens``, by what was learned of this pool. One owner; it learns."""

    needs: ClassVar = Evidence.LOAD
    prefix: ClassVar = True

    def __init__(self, output_tokens: float) -> None:
        if output_tokens < 0:
            raise ConfigError("output_tokens must not be negative.")
        _lightgbm()
        self.output_tokens = output_tokens
        self.models: Models | None = None
        self._samples: deque[tuple[list[float], float, float]] = deque(maxlen=SAMPLES_MAX)
        self._since = 0

    def costs(self, request: Request, candidates: Sequence[Candidate]) -> list[float | None]:
        features = [_features(request, candidate) for candidate in candidates]
        if self.models is None or any(row is None for row in features):
            return [None if c.load is None else float(c.load.in_flight) for c in candidates]
        rows = np.array(features, dtype=np.float64)
        ttft_s, tpot_s = (np.exp(model.predict(rows, num_threads=1)) for model in self.models)
        costs: list[float | None] = (ttft_s + self.output_tokens * tpot_s).tolist()
        return costs

    def observe(self, request: Request, candidate: Candidate, ttft_s: float, tpot_s: float | None) -> None:
        """What came of a request that was sent to ``candidate``, as it was seen then; seconds from the decision on."""
        row = _features(request, candidate)
        if row is not None and tpot_s is not None and ttft_s > 0 and tpot_s > 0:
            self._samples.append((row, ttft_s, tpot_s))
            self._since += 1

    @property
    def due(self) -> bool:
        """Whether enough is new to train on."""
        first = self.models is None and len(self._samples) >= SAMPLES_MIN
        return first or self._since >= RETRAIN_EVERY

    def samples(self) -> tuple[Floats, Floats]:
        """Features (n, 6) and log targets (n, 2) so far; they count as trained on from now."""
        self._since = 0
        rows = np.array([row for row, _, _ in self._samples], dtype=np.float64)
        return rows, np.log(np.array([(ttft, tpot) for _, ttft, tpot in self._samples], dtype=np.float64))

    def adopt(self, models: Models) -> None:
        """Use these from now on."""
        self.models = models


def train(rows: Floats, logs: Floats) -> Models:
    """Two boosters from the features (n, 6) and the log targets (n, 2)."""
    lightgbm = _lightgbm()
    made = [lightgbm.train(_SETTINGS, lightgbm.Dataset(rows, logs[:, n]), num_boost_round=_TREES) for n in range(2)]
    return Models(*made)


def _features(request: Request, candidate: Candidate) -> list[float] | None:
    load = candidate.load
    if load is None or load.kv_blocks_free is None or not load.kv_blocks_total:
        return None
    prompt = request.prompt_tokens
    return [
        1.0 - load.kv_blocks_free / load.kv_blocks_total, float(prompt), float(load.waiting), float(load.running),
        candidate.hit_tokens / max(prompt, 1), float(load.waiting_tokens),
    ]  # fmt: skip


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError as error:
        raise ConfigError("The policy learned needs LightGBM: pip install block-llm[learned].") from error
    return lightgbm
