"""A step-time profile from a live engine: sweep, collect, fit."""

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence as EngineSequence
from block.errors import ConfigError
from block.integrations import sweep
from block.integrations.steps import StepCollector, write_run
from block.integrations.synchronous import fit_synchronous, whole
from block.predict.snapshot import EngineSnapshot
from block.predictor.source import StateSource
from block.steptime.profile import StepTimeProfile

FIRST_SNAPSHOT_S = 10.0
QUIET_S = 0.5  # for the last steps to be published


class Calibrated(msgspec.Struct, frozen=True):
    """A profile and what it was made from; ``lost``: how often steps went by unseen."""

    profile: StepTimeProfile
    limits: EngineLimits
    requests: int
    covered: dict[str, Any]
    lost: int


async def calibrate(
    url: str,
    model: str,
    source: StateSource,
    *,
    effort: sweep.Effort,
    name: str,
    gpu: str,
    keep: Path | None = None,
    seed: int = 0,
    on_plan: Callable[[Sequence[sweep.Stage]], None] = lambda stages: None,
    on_stage: Callable[[sweep.Stage], None] | None = None,
) -> Calibrated:
    """Sweep the engine at ``url``, whose state ``source`` shows, and fit its step times; ``keep`` saves the
    measurements.

    Raises:
        ConfigError: no state can be seen, or the engine is busy with other requests.
        SweepError: a request was refused.
        BadInputError: the sweep shows too little to fit.
    """
    collector = StepCollector(source)
    watching = asyncio.create_task(collector.watch())
    try:
        snapshot = await _first_snapshot(collector, source, watching)
        stages = sweep.plan(snapshot.limits, effort)
        on_plan(stages)
        answered = await sweep.play(url, model, stages, seed=seed, on_stage=on_stage)
        await asyncio.sleep(QUIET_S)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    steps, limits = collector.steps, snapshot.limits
    if keep is not None:
        write_run(keep, steps, answered, limits, gpu=gpu, model=model)
    profile = with_front_s(fit(steps, limits, name=name, gpu=gpu, model=model), limits, answered)
    return Calibrated(profile, limits, len(answered), whole(steps), collector.lost)


async def _first_snapshot(
    collector: StepCollector, source: StateSource, watching: "asyncio.Task[None]"
) -> EngineSnapshot:
    for _ in range(int(FIRST_SNAPSHOT_S / 0.05)):
        if watching.done():
            watching.result()
        if collector.snapshot is not None:
            if collector.snapshot.running + collector.snapshot.waiting:
                raise ConfigError("The engine is busy with other requests: calibrate it while nobody uses it.")
            return collector.snapshot
        await asyncio.sleep(0.05)
    raise ConfigError(f"The engine's state cannot be seen: {source.problem or 'it publishes nothing'}.")


def fit(steps: npt.NDArray[np.void], limits: EngineLimits, *, name: str, gpu: str, model: str) -> StepTimeProfile:
    """Step times from a step log, by the way in which the engine schedules.

    Raises:
        BadInputError: the log shows too little.
    """
    source = "block calibrate"
    if not limits.async_scheduling:
        return fit_synchronous(steps, name=name, gpu=gpu, model=model, source=source)
    from block.steptime.fit import Subject, fit_profile
    from block.steptime.steplog import StepLog

    start_s = float(steps["scheduled_s"][0]) if len(steps) else 0.0
    columns = {
        f: steps[f].astype(float) for f in ("decode_requests", "context", "prefill_tokens", "prefill_work", "chunks")
    }
    log = StepLog(
        name="sweep", scheduled_s=steps["scheduled_s"] - start_s, finished_s=steps["finished_s"] - start_s, **columns
    )
    return fit_profile([(log, limits)], Subject(name=name, gpu=gpu, model=model, source=source))


def with_front_s(profile: StepTimeProfile, limits: EngineLimits, answered: Sequence[sweep.Answered]) -> StepTimeProfile:
    """The profile with the time that the API server adds around the scheduler: what single requests took beyond their
    steps.

    How it divides between the way in and the way out cannot be seen from outside; half each.
    """
    alone = [a for a in answered if a.output_tokens == 3 and a.ttft_s > 0]
    extra_s = sorted(a.ttft_s - _alone_ttft_s(profile, limits, a.prompt_tokens) for a in alone)
    if not extra_s:
        return profile
    half_s = max(extra_s[len(extra_s) // 2], 0.0) / 2
    return msgspec.structs.replace(profile, input_s=round(half_s, 6), output_s=round(half_s, 6), output_request_s=0.0)


def _alone_ttft_s(profile: StepTimeProfile, limits: EngineLimits, prompt_tokens: int) -> float:
    engine = Engine(limits, profile.curve(1.0, limits))
    sequence = EngineSequence(0, prompt_tokens, 3)
    engine.add(sequence, 0.0)
    engine.advance(math.inf)
    return float(sequence.first_token_s)
