"""Are the predictions right? Of every instance, all the time; and what decides where they are not.

Theory of operation. A prediction can be wrong although its predictor lives: another profile than the GPU's, snapshots of another
engine, a model that does not know what the engine does. Two things tell.

    residuals   what an answer took, over what was predicted for an answer of its length (so that not knowing lengths is no
                fault of the predictor's). Right is within ``factor`` either way; wrong is an instance of whose answers in the last
                minute more than half were not.
    snapshots   they show fewer requests than this gateway alone has there, and none of those for ``unseen_after_s``.

Where a candidate is wrong, all are ranked by counters, for a prediction is never compared with a counter: by free KV blocks
where only times are wrong, by the requests that the gateway itself has in flight where the snapshots are. What-ifs go on being made
beside that, so that the residuals also tell when they are right again; going back takes more than coming here did.
"""

import logging
from collections import deque
from typing import TYPE_CHECKING, Final

from block.core import InstanceId
from block.policy.rank import Evidence as Needs
from block.policy.table import Policy, make_policy

if TYPE_CHECKING:
    from block.gateway.deciding.evidence import Evidence
    from block.gateway.exchange import Exchange

RECENT_S: Final = 60.0
KEPT: Final = 256
LEAST: Final = 16
"""Answers before there is a verdict."""
WRONG_BELOW: Final = 0.5
RIGHT_ABOVE: Final = 0.7
"""Shares of right predictions: below the one an instance is wrong, above the other it is right again."""
HOLD_S: Final = 3.0
"""For this long a verdict must stand before it counts."""
SLACK_S: Final = 0.02
"""Added to both, so that what is over in a moment is not called wrong for a moment."""
UNSHOWN_LEAST: Final = 3
UNSHOWN_S: Final = 30.0
LOOK_S: Final = 0.5

RESIDUALS: Final = "residuals"
SNAPSHOTS: Final = "snapshots"

log = logging.getLogger("block.gateway")


class Record:
    """What is known of one instance's predictions."""

    __slots__ = ("_answers", "_differs_since_s", "_right", "unshown", "unshown_before", "wrong")

    def __init__(self) -> None:
        self._answers: deque[tuple[float, bool]] = deque()
        self._right = 0
        self._differs_since_s: float | None = None
        self.wrong: str | None = None
        """By what it was found wrong; ``None``: it is right, or nothing is known."""
        self.unshown: deque[float] = deque(maxlen=UNSHOWN_LEAST)
        self.unshown_before = 0

    def note(self, right: bool, now_s: float) -> None:
        """One prediction came true, or not."""
        if len(self._answers) >= KEPT:
            self._right -= self._answers.popleft()[1]
        self._answers.append((now_s, right))
        self._right += right

    def share(self, now_s: float) -> float | None:
        """The share of the last minute's predictions that were right; ``None``: too few to say."""
        answers = self._answers
        while answers and now_s - answers[0][0] > RECENT_S:
            self._right -= answers.popleft()[1]
        return self._right / len(answers) if len(answers) >= LEAST else None

    def look(self, now_s: float) -> bool:
        """Judge anew; whether the verdict changed."""
        verdict = self._verdict(now_s)
        if verdict == self.wrong:
            self._differs_since_s = None
            return False
        if self._differs_since_s is None:
            self._differs_since_s = now_s
        if now_s - self._differs_since_s < HOLD_S:
            return False
        self._differs_since_s, self.wrong = None, verdict
        return True

    def _verdict(self, now_s: float) -> str | None:
        unshown = self.unshown
        if len(unshown) == UNSHOWN_LEAST and now_s - unshown[0] < UNSHOWN_S:
            return SNAPSHOTS
        share = self.share(now_s)
        if share is None:
            return RESIDUALS if self.wrong == RESIDUALS else None  # nothing new is no reason to trust it again
        if share < WRONG_BELOW:
            return RESIDUALS
        return RESIDUALS if self.wrong is not None and share < RIGHT_ABOVE else None


class Drift:
    """Of all instances of one gateway. Told of every answer's end; asked before every decision. ``factor`` 0: says nothing."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.records: dict[InstanceId, Record] = {}
        self.wrong: dict[InstanceId, str] = {}
        self._fallbacks = {RESIDUALS: make_policy("llumnix-minus"), SNAPSHOTS: make_policy("least-outstanding")}
        self._looked_s = 0.0

    def of(self, instance: InstanceId) -> Record:
        found = self.records.get(instance)
        if found is None:
            found = self.records[instance] = Record()
        return found

    def forget(self, instance: InstanceId) -> None:
        """It left."""
        self.records.pop(instance, None)
        self.wrong.pop(instance, None)

    # Told

    def take(self, exchange: "Exchange") -> None:
        """An answer came whole: compare it with what was predicted for an answer of its length."""
        prediction, instance = exchange.prediction, exchange.instance
        if not self.factor or prediction is None or instance is None or prediction.truncated:
            return
        took_s, predicted_s = exchange.answered_s - exchange.decided_s, prediction.ttft_s
        tokens = exchange.output_tokens
        if tokens is None:
            if not exchange.sse:
                return
            took_s = exchange.first_byte_s - exchange.decided_s
        elif tokens > 1 and prediction.tpot_s is not None:
            predicted_s += prediction.tpot_s * (tokens - 1)
        ratio = (took_s + SLACK_S) / (predicted_s + SLACK_S)
        self.of(instance.id).note(1 / self.factor <= ratio <= self.factor, exchange.answered_s)

    def look(self, now_s: float, evidence: "dict[InstanceId, Evidence]") -> None:
        """Judge all instances. Called a few times a second."""
        if not self.factor or now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        for instance, of_instance in evidence.items():
            if of_instance.unshown:
                record = self.of(instance)
                record.unshown.extend([now_s] * min(of_instance.unshown - record.unshown_before, UNSHOWN_LEAST))
                record.unshown_before = of_instance.unshown
        for instance, record in self.records.items():
            if record.look(now_s):
                self._turned(instance, record, now_s)

    def _turned(self, instance: InstanceId, record: Record, now_s: float) -> None:
        if record.wrong is None:
            self.wrong.pop(instance, None)
            log.info("the predictions for %s are right again", instance)
            return
        self.wrong[instance] = record.wrong
        share = record.share(now_s)
        why = (
            "its snapshots do not show requests that it works on"
            if record.wrong == SNAPSHOTS
            else f"{share:.0%} of the last minute's were within a factor of {self.factor:g}"
            if share is not None
            else "?"
        )
        log.warning("the predictions for %s are wrong (%s): its requests are placed by counters", instance, why)

    # Asked

    def instead_of(
        self, policy: Policy, shortlist: "list[InstanceId] | tuple[InstanceId, ...]"
    ) -> tuple[Policy, str | None]:
        """(the policy to decide by, why not by the one given: the name for the counter of fallbacks)."""
        if not self.wrong or policy.rank.needs is not Needs.PREDICTION:
            return policy, None
        found = {self.wrong[instance] for instance in shortlist if instance in self.wrong}
        if not found:
            return policy, None
        why = SNAPSHOTS if SNAPSHOTS in found else RESIDUALS
        return self._fallbacks[why], f"wrong-{why}:{self._fallbacks[why].name}"
