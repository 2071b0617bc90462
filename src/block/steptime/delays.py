"""What lies between the engine and who calls it: from arrival to the scheduler's queue, from a step's results to the caller."""

from collections.abc import Sequence

import msgspec
import numpy as np
from scipy.optimize import nnls

from block.steptime.regress import Floats
from block.steptime.steplog import StepLog

IDLE_MOST_S = 0.02  # a first schedule later than this after an arrival had another reason
OUTPUT_MOST_S = 0.05  # an end later than this after a step was of a step that the log lacks
FEW = 5


class Delays(msgspec.Struct, frozen=True):
    """Seconds: ``input_s`` before the scheduler sees a request; ``output_s`` + ``output_request_s`` x batch until the caller
    sees a token.
    """

    input_s: float
    output_s: float
    output_request_s: float


class Calls(msgspec.Struct, frozen=True, eq=False):
    """When the requests of a stage arrived and when their last token was seen, shape (requests,)."""

    arrived_s: Floats
    ended_s: Floats


def fit_delays(stages: Sequence[tuple[StepLog, Calls]]) -> Delays:
    """Medians over stages; zeros where nothing shows a delay.

    The input delay shows where a request wakes an idle engine, the output delay at every request's end.
    """
    inputs = np.concatenate([_wakes(log, calls) for log, calls in stages] or [np.zeros(0)])
    outputs = np.concatenate([_ends(log, calls) for log, calls in stages] or [np.zeros((0, 2))])
    taking_in = np.concatenate([_taking_in(log) for log, _ in stages] or [np.zeros(0)])
    input_s = 0.0
    if len(inputs) >= FEW and len(taking_in):
        # A launch is counted from the results before it, so the input delay must not count the taking in again.
        input_s = max(float(np.median(inputs) - np.median(taking_in)), 0.0)
    if len(outputs) < FEW:
        return Delays(input_s, 0.0, 0.0)
    batch, late = outputs[:, 0], np.minimum(outputs[:, 1], np.percentile(outputs[:, 1], 95))
    constant, slope = nnls(np.column_stack([np.ones(len(batch)), batch]), late)[0]
    return Delays(input_s, float(constant), float(slope))


def _wakes(log: StepLog, calls: Calls) -> Floats:
    arrived = np.sort(calls.arrived_s)
    s, u = log.scheduled_s, log.finished_s
    k = 1 + np.flatnonzero(u[:-1] < s[1:])
    first = np.searchsorted(arrived, u[k - 1])
    k, first = k[first < len(arrived)], first[first < len(arrived)]
    waited = s[k] - arrived[first]
    return np.asarray(waited[(waited > 0) & (waited < IDLE_MOST_S)])


def _taking_in(log: StepLog) -> Floats:
    """From a step's results to the next schedule(), in a running engine."""
    s, u = log.scheduled_s, log.finished_s
    return np.asarray((s[2:] - u[:-2])[(s[2:] > u[:-2]) & (s[2:] < u[1:-1])])


def _ends(log: StepLog, calls: Calls) -> Floats:
    """Rows (batch size of the step, delay) of the requests' last tokens."""
    k = np.searchsorted(log.finished_s, calls.ended_s) - 1
    late = calls.ended_s - log.finished_s[k]
    seen = (k >= 0) & (late < OUTPUT_MOST_S)
    batch = log.decode_requests[k] + log.chunks[k]
    return np.column_stack([batch, late])[seen]
