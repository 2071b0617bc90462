"""What if this request went to that instance? Snapshot + request -> Prediction.

Theory of operation
-------------------
A *mirror* is the engine model's copy of one instance, kept in flat arrays: restored from a snapshot, plus the requests
dispatched since that are not in it yet. A what-if copies the mirror into one scratch engine, lets the new request
arrive at *now*, and runs the copy until that request ends or the horizon. So a snapshot's age costs nothing but accuracy: the
copy first relives the time since it was taken. All instances are asked in one compiled call, some microseconds each.

Lengths: every present request ends at its expected total, the new one at each of the given scenarios in turn, whose
outcomes are averaged. Times are the server's view: from arrival to the engine's delivery, including ``input_s`` and ``output_s``.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from block.core import Prediction, Request
from block.engine.ask import ask_mirrors
from block.engine.kernel import FastEngine
from block.engine.limits import EngineLimits
from block.engine.resume import restore
from block.predict.snapshot import FIELDS, MAX_TOKENS, PRIORITY, PROMPT, EngineSnapshot
from block.steptime.curve import StepCurve

HORIZON_S = 600.0
_NO_HITS = np.zeros(4096, np.int32)


class Mirror:
    """The engine model's copy of one instance. ``load`` and ``add`` are its only changes.

    ``input_s`` and ``output_s``: seconds from the API to the scheduler's queue, and from a step's results to the caller.
    """

    def __init__(self, curve: StepCurve, input_s: float = 0.0, output_s: float = 0.0) -> None:
        self.curve = curve
        self.input_s = input_s
        self.output_s = output_s
        self.taken_s = 0.0
        self.engine: FastEngine | None = None
        self._limits: EngineLimits | None = None

    def load(
        self, snapshot: EngineSnapshot, totals: npt.NDArray[np.int32], hits: npt.NDArray[np.int32] | None = None
    ) -> None:
        """Become the state of ``snapshot``.

        ``totals``: (n,) expected total output tokens of its requests, each above what it has output (others are
        raised to that); ``hits``: (n,) prompt tokens that waiting requests will find in the prefix cache (the
        snapshot itself may tell what running ones found).
        """
        header = snapshot.header
        requests = np.array(snapshot.requests, np.int32)
        totals = np.array(totals, np.int32)  # the kernel wants writable buffers
        arrived = snapshot.arrived
        beyond = int(header["waiting_total"]) - snapshot.waiting
        if beyond > 0:
            requests, totals = _with_unlisted(requests, totals, beyond, int(header["waiting_tokens_beyond"]))
            arrived = np.concatenate((arrived, np.full(beyond, np.inf)))
        count = requests.shape[1]
        if hits is None or len(hits) < count:
            hits = _NO_HITS[:count] if count <= len(_NO_HITS) else np.zeros(count, np.int32)
        if snapshot.prefix is not None:
            hits = np.concatenate((np.maximum(snapshot.prefix.hits[: snapshot.running], 0), hits[snapshot.running :]))
        if self.engine is None or self._limits != snapshot.limits:
            self.engine = FastEngine(snapshot.limits, self.curve, capacity=max(64, 2 * count))
            self._limits = snapshot.limits
        restore(
            self.engine, requests, totals, hits, arrived, int(header["running"]), int(header["kv_blocks_free"]),
            float(header["taken_s"]), int(header["batches_in_flight"]), float(header["batch_1_started_s"]),
            float(header["newest_scheduled_s"]), self._heat(snapshot),
        )  # fmt: skip
        self.taken_s = float(header["taken_s"])

    def _heat(self, snapshot: EngineSnapshot) -> float:
        """Tokens prefilled lately, by the snapshot's finished steps (see ``StepCurve``)."""
        steps = snapshot.steps
        if not self.curve.heat_s or not steps["prefill_tokens"].any():
            return 0.0
        age_s = np.maximum(float(snapshot.header["taken_s"]) - steps["finished_s"], 0.0)
        return float(steps["prefill_tokens"] @ np.exp(-age_s / self.curve.heat_memory_s))

    def add(
        self, key: int, prompt_tokens: int, max_tokens: int, expected_total: int, arrived_s: float, priority: int = 0,
        hit_tokens: int = 0,
    ) -> None:  # fmt: skip
        """A request dispatched to the instance that the loaded snapshot does not show yet."""
        if self.engine is None:
            raise ValueError("load a snapshot first")
        at_s = arrived_s + self.input_s
        self.engine.add(prompt_tokens, max_tokens, expected_total, at_s, hit_tokens=hit_tokens, priority=priority)


def ask(
    mirrors: Sequence[Mirror], scratch: FastEngine, *, prompt_tokens: int, max_tokens: int,
    output_tokens: int | Sequence[int], now_s: float, hits: npt.NDArray[np.int32] | None = None, priority: int = 0,
    horizon_s: float = HORIZON_S, harm: bool = False,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """The what-if of one request on every mirror, as numbers.

    ``output_tokens``: its expected total, or several scenarios that are averaged; ``hits``: (mirrors,) its prompt tokens in
    each prefix cache. Returns (mirrors, 6): queue delay, TTFT, E2E in seconds from ``now_s``, preemptions foreseen on the
    instance until it ends, truncated (0/1), harm in seconds (0 unless asked).

    Raises:
        ValueError: a mirror has not been loaded.
    """
    totals = np.array([output_tokens] if isinstance(output_tokens, int) else output_tokens, np.int32)
    count = len(mirrors)
    out = np.empty((count, 6))
    if hits is None:
        hits = _NO_HITS if count <= len(_NO_HITS) else np.zeros(count, np.int32)
    listed = mirrors if isinstance(mirrors, list) else list(mirrors)
    ask_mirrors(listed, scratch, prompt_tokens, max_tokens, totals, hits, priority, now_s, horizon_s, harm, out)
    return out


def scratch_engine(mirrors: Sequence[Mirror]) -> FastEngine:
    """An engine for ``ask`` to overwrite; keep it, it grows to what is needed."""
    for mirror in mirrors:
        if mirror.engine is not None:
            return FastEngine(mirror.engine.limits, mirror.curve)
    raise ValueError("no mirror has been loaded")


def prefill_tokens_per_s(curve: StepCurve, limits: EngineLimits) -> float:
    """Tokens per second of full steps that compute prompts from their beginning and nothing else."""
    tokens = limits.max_num_batched_tokens
    return tokens / max(float(curve.gpu_s(0, 0, tokens, 0.5 * tokens * tokens, 1)), 1e-9)


class Oracle:
    """Asks mirrors and keeps the scratch engine between questions. Not for several threads."""

    def __init__(self) -> None:
        self._scratch: FastEngine | None = None

    def predict_all(
        self, mirrors: Sequence[Mirror], *, prompt_tokens: int, max_tokens: int, output_tokens: int | Sequence[int],
        now_s: float, hits: npt.NDArray[np.int32] | None = None, priority: int = 0, horizon_s: float = HORIZON_S,
        harm: bool = False,
    ) -> list[Prediction]:  # fmt: skip
        """One prediction per mirror; every mirror must have been loaded."""
        if not mirrors:
            return []
        if self._scratch is None:
            self._scratch = scratch_engine(mirrors)
        rows = ask(
            mirrors, self._scratch, prompt_tokens=prompt_tokens, max_tokens=max_tokens, output_tokens=output_tokens,
            now_s=now_s, hits=hits, priority=priority, horizon_s=horizon_s, harm=harm,
        ).tolist()  # fmt: skip
        expected = output_tokens if isinstance(output_tokens, int) else sum(output_tokens) / len(output_tokens)
        return [_prediction(row, expected, harm, now_s - m.taken_s) for row, m in zip(rows, mirrors, strict=True)]


def predict_all(
    mirrors: Sequence[Mirror], *, prompt_tokens: int, max_tokens: int, output_tokens: int | Sequence[int], now_s: float,
    horizon_s: float = HORIZON_S, harm: bool = False,
) -> list[Prediction]:  # fmt: skip
    """``Oracle.predict_all`` for callers that ask seldom."""
    return Oracle().predict_all(
        mirrors, prompt_tokens=prompt_tokens, max_tokens=max_tokens, output_tokens=output_tokens, now_s=now_s,
        horizon_s=horizon_s, harm=harm,
    )  # fmt: skip


def predict(
    snapshot: EngineSnapshot, request: Request, *, output_tokens: int, step_time: StepCurve,
    totals: npt.NDArray[np.int32] | None = None, horizon_s: float = HORIZON_S, harm: bool = False,
) -> Prediction:  # fmt: skip
    """What happens to ``request`` if it goes to the instance of ``snapshot`` at its arrival.

    ``totals``: expected total output tokens of the requests present; by default their ``max_tokens``.
    """
    mirror = Mirror(step_time)
    mirror.load(snapshot, snapshot.requests[MAX_TOKENS] if totals is None else totals)
    limit = request.max_tokens or snapshot.limits.max_model_len
    return predict_all(
        [mirror], prompt_tokens=request.prompt_tokens, max_tokens=limit, output_tokens=output_tokens,
        now_s=request.arrived_s, horizon_s=horizon_s, harm=harm,
    )[0]  # fmt: skip


def _prediction(row: list[float], expected_tokens: float, harm: bool, age_s: float) -> Prediction:
    delay_s, ttft_s, e2e_s, preemptions, truncated, harm_s = row
    tpot_s = (e2e_s - ttft_s) / (expected_tokens - 1) if expected_tokens > 1 else None
    return Prediction(
        ttft_s=ttft_s, e2e_s=e2e_s, tpot_s=tpot_s, queue_delay_s=delay_s, preemptions=round(preemptions),
        harm_s=harm_s if harm else None, truncated=truncated > 0, snapshot_age_s=max(age_s, 0.0),
    )  # fmt: skip


def _with_unlisted(
    requests: npt.NDArray[np.int32], totals: npt.NDArray[np.int32], count: int, tokens: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Stand-ins for waiting requests beyond the snapshot's cap: their mean prompt, the listed ones' mean total."""
    rows = np.zeros((FIELDS, count), np.int32)
    rows[PROMPT] = max(1, round(tokens / count))
    mean_total = max(1, int(totals.mean())) if len(totals) else 256
    rows[MAX_TOKENS] = mean_total
    rows[PRIORITY] = requests[PRIORITY].max(initial=0)
    both = np.ascontiguousarray(np.concatenate((requests, rows), axis=1))
    return both, np.concatenate((totals, np.full(count, mean_total, np.int32)))
