"""When is a request better kept at the gateway? Late binding: the choice is made when there is something to choose.

A request that would only wait, or push others out, binds to one instance for nothing: held, it goes to whichever has
room first. Holding needs predictions; without them nothing is held.
"""

from typing import NamedTuple

from block.core import Decision, Prediction


class Hold(NamedTuple):
    """Keep a request while the best instance's prediction says so, for at most ``most_s`` seconds.

    ``delay_s``: a predicted queue delay above it holds; ``preemptions``: as many foreseen or more hold; ``None``: does not
    matter. ``ahead``: how many held requests may be tried behind one that does not go yet (0: strictly first come);
    ``tick_s``: how often they are tried; ``queue_max``: beyond that many held, requests are sent at once.
    """

    delay_s: float | None = 0.1
    preemptions: int | None = None
    most_s: float = 10.0
    ahead: int = 0
    tick_s: float = 0.02
    queue_max: int = 1024


def holds(hold: Hold, decision: Decision, held_s: float) -> bool:
    """Whether to keep the request after all; ``held_s`` is how long it has been kept already."""
    prediction = prediction_of(decision)
    if prediction is None or held_s >= hold.most_s:
        return False
    if hold.delay_s is not None and prediction.queue_delay_s > hold.delay_s:
        return True
    return hold.preemptions is not None and prediction.preemptions >= hold.preemptions


def prediction_of(decision: Decision) -> Prediction | None:
    """The chosen candidate's prediction, where there is one."""
    for candidate in decision.candidates:
        if candidate.instance == decision.instance:
            return candidate.prediction
    return None
