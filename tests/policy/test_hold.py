"""Late binding: what is held, for how long, and that without predictions nothing is."""

from random import Random

import pytest

from block.core import Candidate, Decision, InstanceId, Prediction, Request
from block.policy import decide, make_policy
from block.policy.hold import Hold, holds


def decision(delay_s: float | None, preemptions: int = 0) -> Decision:
    prediction = None
    if delay_s is not None:
        prediction = Prediction(ttft_s=1.0, e2e_s=2.0, tpot_s=None, queue_delay_s=delay_s, preemptions=preemptions)
    candidates = [Candidate(InstanceId("a"), None, prediction)]
    return decide(make_policy("block"), Request(id="r", arrived_s=0.0, prompt_tokens=1), candidates, Random(1))


@pytest.mark.parametrize(
    ("hold", "given", "held_s", "expected"),
    [
        (Hold(delay_s=0.5), decision(0.6), 0.0, True),
        (Hold(delay_s=0.5), decision(0.4), 0.0, False),
        (Hold(delay_s=0.5, most_s=3.0), decision(9.0), 3.0, False),
        (Hold(delay_s=None, preemptions=2), decision(9.0, 1), 0.0, False),
        (Hold(delay_s=None, preemptions=2), decision(0.0, 2), 0.0, True),
        (Hold(delay_s=0.0), decision(None), 0.0, False),
    ],
)
def test_a_request_is_held_while_its_best_instance_would_make_it_wait(
    hold: Hold, given: Decision, held_s: float, expected: bool
) -> None:
    assert holds(hold, given, held_s) is expected
