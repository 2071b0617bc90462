"""Late binding: what is held, for how long, and that without predictions nothing is."""

from random import Random

import pytest

from block.core import Candidate, Decision, InstanceId, Prediction, Request, Slo
from block.policy import decide, make_policy
from block.policy.hold import HeldQueue, Hold, holds


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
        (Hold(delay_s=0.5), decision(0.0, preemptions=1), 0.0, True),
        (Hold(delay_s=0.5, most_s=3.0), decision(0.0, preemptions=1), 3.0, False),
        (Hold(delay_s=0.0), decision(None), 0.0, False),
    ],
)
def test_a_request_is_held_while_its_best_instance_would_make_it_wait(
    hold: Hold, given: Decision, held_s: float, expected: bool
) -> None:
    assert holds(hold, given, held_s) is expected


def request(prompt_tokens: int = 100, ttft_s: float | None = None, priority: int = 0) -> Request:
    slo = None if ttft_s is None else Slo(ttft_s=ttft_s)
    return Request(id="r", arrived_s=0.0, prompt_tokens=prompt_tokens, slo=slo, priority=priority)


class Door:
    """Takes what ``room`` says; keeps what was tried, in order."""

    def __init__(self) -> None:
        self.room: set[str] = set()
        self.tried: list[str] = []
        self.forced: list[str] = []

    def attempt(self, item: str, held_s: float, may_hold: bool) -> bool:
        self.tried.append(item)
        if not may_hold:
            self.forced.append(item)
            return True
        return item in self.room

    def turns(self) -> list[str]:
        tried, self.tried = self.tried, []
        return tried


def queue_of(hold: Hold, door: Door, *given: tuple[str, int], at_s: float = 0.0) -> HeldQueue[str]:
    queue: HeldQueue[str] = HeldQueue(hold)
    for item, size in given:
        queue.offer(item, request(size), size, at_s, door.attempt)
    door.turns()
    return queue


def test_the_first_come_is_tried_first_and_only_so_many_may_pass_it() -> None:
    door = Door()
    queue = queue_of(Hold(ahead=1), door, ("a", 40), ("b", 30), ("c", 20), ("d", 10))
    queue.tick(0.1, door.attempt)
    assert door.turns() == ["a", "b"]
    door.room = {"b", "c"}
    queue.tick(0.2, door.attempt)
    assert door.turns() == ["a", "b", "c", "d"]
    assert list(queue) == ["a", "d"]


def test_what_is_bigger_than_something_that_does_not_fit_is_not_asked_about() -> None:
    door = Door()
    queue = queue_of(Hold(ahead=8), door, ("a", 30), ("b", 40), ("c", 20))
    queue.tick(0.1, door.attempt)
    assert door.turns() == ["a", "c"]


def test_by_size_the_smallest_go_first_until_one_loses_patience_or_half_of_its_own_target_is_gone() -> None:
    door = Door()
    door.room = {"big", "small", "urgent"}
    hold = Hold(ahead=8, by_size=True, patience_s=1.0)
    queue: HeldQueue[str] = HeldQueue(hold)
    for item, asked in (("big", request(90)), ("small", request(10)), ("urgent", request(95, ttft_s=0.5))):
        queue.hold_on(item, asked, asked.prompt_tokens, 0.0)
    queue.tick(0.1, door.attempt)
    assert door.turns() == ["small", "big", "urgent"]
    for item, asked in (("big", request(90)), ("small", request(10)), ("urgent", request(95, ttft_s=0.5))):
        queue.hold_on(item, asked, asked.prompt_tokens, 0.2)
    queue.tick(0.5, door.attempt)
    assert door.turns() == ["urgent", "small", "big"]


def test_more_important_requests_leave_first() -> None:
    door = Door()
    queue: HeldQueue[str] = HeldQueue(Hold(ahead=8))
    queue.hold_on("usual", request(), 100, 0.0)
    queue.hold_on("important", request(priority=-1), 100, 0.0)
    queue.tick(0.1, door.attempt)
    assert door.turns()[0] == "important"


def test_nothing_is_held_for_longer_than_it_may_be_nor_more_than_so_many() -> None:
    door = Door()
    queue = queue_of(Hold(most_s=2.0, queue_max=2), door, ("a", 1), ("b", 1), ("c", 1))
    assert door.forced == ["c"]
    queue.tick(2.0, door.attempt)
    assert door.forced == ["c", "a", "b"]
    assert len(queue) == 0


def test_while_no_request_ends_nothing_is_asked_again_for_a_while() -> None:
    door = Door()
    queue = queue_of(Hold(), door, ("a", 1))
    for at_s, ended, asked in ((0.02, 5, ["a"]), (0.04, 5, []), (0.06, 6, ["a"]), (0.08, 6, []), (0.2, 6, ["a"])):
        queue.tick(at_s, door.attempt, ended)
        assert door.turns() == asked


def test_a_shutdown_lets_all_go() -> None:
    door = Door()
    queue = queue_of(Hold(), door, ("a", 1), ("b", 1))
    assert queue.oldest_s(1.5) == 1.5
    queue.release(door.attempt, 1.0)
    assert door.forced == ["a", "b"]
    assert len(queue) == 0
