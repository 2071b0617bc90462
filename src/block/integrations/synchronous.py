"""Step times of an engine that schedules synchronously (vLLM on CPUs, or with ``--no-async-scheduling``).

Nothing overlaps there: a step's time runs from the results before it to its own, the CPU's share included, and is
fitted directly:

    seconds = base(decode requests) + kv_s * context                                                     decode-only
    steps seconds = base(tokens) + request_s * decodes + kv_s * context + attention_s * work + chunk_s * chunks    steps
    with prefill

with non-negative, rising bases (Lawson and Hanson's NNLS), reweighted so that stalls of the host count little.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from block.errors import BadInputError
from block.steptime.profile import RegimeError, StepTimeProfile

Floats = npt.NDArray[np.float64]

GAP_MOST_S: Final = 0.02  # a longer pause before a step means that the engine was idle
STEPS_FEW: Final = 40
ROUNDS: Final = 4
KNEE: Final = 0.05  # relative errors beyond it count linearly
DECODE_KNOTS: Final = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024], float)
TOKEN_KNOTS: Final = np.array([1, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384], float)


def fit_synchronous(steps: npt.NDArray[np.void], *, name: str, gpu: str, model: str, source: str) -> StepTimeProfile:
    """Fit a step log, shape (n,), dtype ``predict.snapshot.STEP``, oldest first; errors by regime are in the profile.

    Raises:
        BadInputError: too few decode-only steps, or too few with prefill.
    """
    seconds = durations_s(steps)
    decodes, chunks = steps["decode_requests"].astype(float), steps["chunks"].astype(float)
    context, tokens = steps["context"].astype(float), decodes + steps["prefill_tokens"]
    plain, mixed = (chunks == 0) & (seconds > 0), (chunks > 0) & (seconds > 0)
    if min(np.count_nonzero(plain), np.count_nonzero(mixed)) < STEPS_FEW:
        raise BadInputError(
            f"The sweep shows {np.count_nonzero(plain)} decode-only steps and {np.count_nonzero(mixed)} with prefill: "
            "run a longer one."
        )
    decode_knots = _knots(DECODE_KNOTS, decodes[plain])
    decode = _solve([_rises(decodes[plain], decode_knots), context[plain]], seconds[plain])
    token_knots = _knots(TOKEN_KNOTS, tokens[mixed])
    work = [decodes[mixed], steps["prefill_work"][mixed], chunks[mixed]]
    kv_s = decode[-1]  # the same memory traffic in both kinds of step, seen best where nothing else happens
    rest = _solve([_rises(tokens[mixed], token_knots), *work], seconds[mixed] - kv_s * context[mixed])
    request_s, attention_s, chunk_s = map(float, rest[-3:])
    profile = StepTimeProfile(
        name=name, gpu=gpu, model=model, source=source, kv_s=float(kv_s), request_s=request_s,
        attention_s=attention_s, chunk_s=chunk_s, decode_knots=_table(decode_knots, decode), mixed_knots=_table(token_knots, rest),
    )  # fmt: skip
    curve = profile.curve()
    modelled = np.array(
        [curve.gpu_s(int(d), int(k), int(p), float(w), int(c)) for _, _, d, k, p, w, c in steps.tolist()]
    )
    errors = [
        _error(kind, seconds[chosen], modelled[chosen]) for kind, chosen in (("decode", plain), ("with prefill", mixed))
    ]
    return msgspec.structs.replace(profile, errors=errors)


def durations_s(steps: npt.NDArray[np.void]) -> Floats:
    """Seconds of each step, the CPU's share before it included; 0 where it is not known (the first one)."""
    scheduled_s, finished_s = steps["scheduled_s"], steps["finished_s"]
    gap_s = scheduled_s[1:] - finished_s[:-1]
    back_to_back = (gap_s >= 0) & (gap_s < GAP_MOST_S)
    usual_gap_s = float(np.median(gap_s[back_to_back])) if back_to_back.any() else 0.0
    after_idle_s = finished_s[1:] - scheduled_s[1:] + usual_gap_s
    return np.concatenate([[0.0], np.where(back_to_back, finished_s[1:] - finished_s[:-1], after_idle_s)])


def _knots(grid: Floats, seen: Floats) -> Floats:
    """The grid up to the first knot that covers what was seen; at least two."""
    return grid[: max(int(np.searchsorted(grid, seen.max())) + 1, 2)]


def _rises(x: Floats, knots: Floats) -> Floats:
    """Columns whose non-negative combinations are the rising functions, linear between knots; shape (len(x),
    len(knots))."""
    steps = [np.clip(x - a, 0, b - a) for a, b in pairwise(knots)]
    steps[-1] = np.maximum(x - knots[-2], 0)  # the last slope goes on
    return np.column_stack([np.ones_like(x), *steps])


def _solve(columns: Sequence[Floats], seconds: Floats) -> Floats:
    """Non-negative coefficients that make relative errors small."""
    matrix = np.column_stack(list(columns))
    scale = np.maximum(matrix.max(axis=0), 1e-12)
    weights = 1.0 / seconds
    found = np.zeros(matrix.shape[1])
    for _ in range(ROUNDS):
        found, _norm = nnls(matrix / scale * weights[:, None], seconds * weights)
        relative = np.abs(matrix / scale @ found / seconds - 1)
        weights = np.sqrt(np.minimum(1.0, KNEE / np.maximum(relative, 1e-9))) / seconds
    return np.asarray(found / scale)


def _table(knots: Floats, found: Floats) -> list[tuple[float, float]]:
    slopes = found[1 : len(knots)]
    base = found[0] + np.concatenate([[0.0], np.cumsum(slopes * np.diff(knots))])
    return [(float(x), round(float(y), 9)) for x, y in zip(knots, base, strict=True)]


def _error(regime: str, measured: Floats, modelled: Floats) -> RegimeError:
    relative = np.abs(modelled / measured - 1)
    return RegimeError(
        regime=regime, samples=len(measured), bias_fraction=round(float(modelled.sum() / measured.sum() - 1), 5),
        error_p50_fraction=round(float(np.median(relative)), 5), error_p90_fraction=round(float(np.percentile(relative, 90)), 5),
    )  # fmt: skip


def whole(steps: npt.NDArray[np.void]) -> dict[str, Any]:
    """What a step log covers, for people: counts, and the seconds that the engine worked."""
    return {
        "steps": len(steps),
        "decode_only": int(np.count_nonzero(steps["chunks"] == 0)),
        "busy_s": round(float(durations_s(steps).sum()), 2) if len(steps) else 0.0,
    }
