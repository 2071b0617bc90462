"""Fit a step-time profile to measured step logs.

Four stages: the work of decode-only steps, which nothing hides; the CPU's launch times, and from both when each step ended on
the accelerator (``pace``); the work of all steps together (``work``); one factor that makes whole windows right (``refine``).
Requests, where given, add the delays between the engine and its caller (``delays``).
"""

from collections.abc import Callable, Sequence

import msgspec

from block.engine.limits import EngineLimits
from block.errors import BadInputError
from block.steptime.delays import Calls, fit_delays
from block.steptime.pace import LaunchFit, first_launch, fit_launch, observe, steady, work_samples
from block.steptime.profile import StepTimeProfile
from block.steptime.refine import refine
from block.steptime.roofline import Arithmetic
from block.steptime.steplog import StepLog
from block.steptime.windows import errors_by_regime
from block.steptime.work import HEAT_MEMORY_S, WorkFit, even, fit_work, samples, together

LAUNCH_ROUNDS = 2
MIXED_FEW = 20  # fewer steps that show a prefill's work say less than arithmetic does
MIXED_ALONE = 60  # with as many, decode-only steps need not help out

Logs = Sequence[tuple[StepLog, EngineLimits]]


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What the logs are of."""

    name: str
    gpu: str
    model: str
    tensor_parallel: int = 1
    source: str = ""
    prior: Arithmetic | None = None


def fit_profile(
    logs: Logs,
    subject: Subject,
    progress: Callable[[str], None] = lambda stage: None,
    calls: Sequence[tuple[StepLog, Calls]] = (),
) -> StepTimeProfile:
    """Fit logs of one (GPU, model, tensor parallelism), of asynchronous scheduling; errors by regime are in the profile.

    ``calls``: the requests that belong to some of the logs.

    Raises:
        BadInputError: the logs hold too few decode-only steps, or too few steps with prefill.
    """
    progress("decode steps")
    plain = [
        samples(log, limits, i, k, log.finished_s[k] - log.finished_s[k - 1])
        for i, (log, limits) in enumerate(logs)
        for k in [steady(log)]
    ]
    tile_requests, least_kv_s = (
        (subject.prior.tile_requests, subject.prior.kv_s) if subject.prior is not None else (0.0, 0.0)
    )
    decode = fit_work(together(plain), None, tile_requests, least_kv_s)
    if decode is None:
        raise BadInputError("The step logs hold too few decode-only steps in a row to fit a profile.")
    progress("launches")
    seen = [observe(log, limits, decode.decode_s(log, limits)) for log, limits in logs]
    launch = first_launch(seen)
    for _ in range(LAUNCH_ROUNDS):
        launch = fit_launch(seen, launch)
    progress("steps with prefill")
    mixed = [
        even(samples(log, limits, i, *work_samples(one, launch)), decode)
        for i, ((log, limits), one) in enumerate(zip(logs, seen, strict=True))
    ]
    count = sum(len(m.seconds) for m in mixed)
    if count < MIXED_FEW and subject.prior is None:
        raise BadInputError("The step logs hold too few steps with prefill to fit a profile.")
    work = fit_work(together(mixed), subject.prior, 0.0, least_kv_s) if count >= MIXED_ALONE else None
    work = work or fit_work(together([*plain, *mixed] if count >= MIXED_FEW else plain), subject.prior)
    assert work is not None  # there were enough samples before
    progress("windows")
    most = max(int(log.decode_requests.max()) for log, _ in logs)
    profile = refine(logs, _profile(decode, work, launch, most, subject), lambda: progress("windows"))
    delays = fit_delays(calls)
    return msgspec.structs.replace(
        profile,
        input_s=delays.input_s,
        output_s=delays.output_s,
        output_request_s=delays.output_request_s,
        errors=errors_by_regime(logs, profile),
    )


def _profile(decode: WorkFit, work: WorkFit, launch: LaunchFit, most: int, subject: Subject) -> StepTimeProfile:
    decode_s, graph_s, eager_s = map(float, launch.kind_s)
    return StepTimeProfile(
        name=subject.name,
        gpu=subject.gpu,
        model=subject.model,
        tensor_parallel=subject.tensor_parallel,
        source=subject.source,
        decode_knots=decode.decode_table(most, work),
        mixed_knots=work.mixed_table(),
        kv_s=decode.kv_s,
        kv_mixed_s=work.kv_s + work.mixed_kv_s,
        attention_s=work.attention_s,
        chunk_s=work.chunk_s,
        request_s=work.request_s,
        caching_s=decode.caching_s,
        shared_s=decode.shared_s,
        tile_s=decode.tile_s,
        tile_requests=decode.tile_requests,
        heat_s=work.heat_s,
        heat_memory_s=HEAT_MEMORY_S,
        launch_decode_s=decode_s,
        launch_graph_s=graph_s,
        launch_eager_s=eager_s,
        launch_request_s=launch.request_s,
        head_s=launch.head_s,
    )
