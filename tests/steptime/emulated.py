"""Step logs of an engine whose step times are known: what a fit should give back."""

import numpy as np

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence
from block.predict.snapshot import STEP
from block.steptime.profile import StepTimeProfile
from block.steptime.steplog import StepLog

LIMITS = EngineLimits(max_num_seqs=128, max_num_batched_tokens=2048, num_gpu_blocks=20_000)


def known_profile() -> StepTimeProfile:
    return StepTimeProfile(
        name="known",
        gpu="made up",
        model="made up",
        decode_knots=[(1, 5e-3), (128, 6.5e-3)],
        mixed_knots=[(1, 5.2e-3), (128, 6.6e-3), (2048, 46e-3)],
        kv_s=30e-9,
        attention_s=1e-9,
        request_s=2e-6,
        launch_decode_s=1.8e-3,
        launch_graph_s=7e-3,
        launch_eager_s=16e-3,
        launch_request_s=5e-6,
        head_s=1.8e-3,
    )


def steps_of(
    profile: StepTimeProfile, *, scale: float = 1.0, requests: int = 300, rate_rps: float = 20.0, seed: int = 0
) -> np.ndarray:
    """Rows of ``STEP``: Poisson arrivals with long-tailed lengths through an engine of this profile."""
    rng = np.random.default_rng(seed)
    engine = Engine(LIMITS, profile.curve(scale, limits=LIMITS))
    at_s, rows = 0.0, []
    for key in range(requests):
        at_s += rng.exponential(1 / rate_rps)
        prompt, output = int(min(rng.lognormal(4.6, 1.3), 3500)) + 1, int(min(rng.lognormal(5, 1), 1000)) + 2
        engine.add(Sequence(key, prompt, output), at_s)
    while (event_s := engine.next_event_s()) is not None:
        engine.advance(event_s)
        while engine.recent:
            flight, finished_s = engine.recent.popleft()
            b = flight.batch
            shape = (b.decode_requests, b.context, b.prefill_tokens, b.prefill_work, len(b.chunks))
            rows.append((flight.scheduled_s, finished_s, *shape))
    return np.array(rows, STEP)


def log_of(steps: np.ndarray) -> StepLog:
    return StepLog("emulated", *(steps[f].astype(float) for f in STEP.names))
