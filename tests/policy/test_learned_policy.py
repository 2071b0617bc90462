"""The learned policy: it learns what a slow instance costs, and until then it counts."""

from random import Random

import pytest

pytest.importorskip("lightgbm", reason="needs LightGBM: pip install block-llm[learned]")

from block.core import Candidate, InstanceId, Load, Request
from block.policy import decide, make_policy
from block.policy.learned import SAMPLES_MIN, LearnedLatency, train


def candidate(name: str, running: int, waiting: int, free: int) -> Candidate:
    load = Load(running, waiting, running + waiting, waiting * 100, kv_blocks_free=free, kv_blocks_total=1000)
    return Candidate(InstanceId(name), load)


def taught() -> LearnedLatency:
    """By a world in which waiting requests cost much and running ones little."""
    rank, rng = LearnedLatency(output_tokens=100.0), Random(1)
    for _ in range(SAMPLES_MIN):
        running, waiting = rng.randint(0, 40), rng.randint(0, 20)
        request = Request(id="r", arrived_s=0.0, prompt_tokens=rng.randint(10, 1000))
        ttft_s = 0.05 + 0.5 * waiting + request.prompt_tokens * 1e-4
        rank.observe(request, candidate("a", running, waiting, 500), ttft_s, 0.02 + 2e-4 * running)
    assert rank.due
    rank.adopt(train(*rank.samples()))
    assert not rank.due
    return rank


def test_what_was_learned_decides() -> None:
    policy = make_policy("learned")._replace(rank=taught())
    request = Request(id="r", arrived_s=0.0, prompt_tokens=200)
    queueing, busy = candidate("queueing", 5, 10, 500), candidate("busy", 25, 0, 500)
    assert decide(policy, request, [queueing, busy], Random(1)).instance == "busy"


def test_before_there_is_a_model_the_fewest_requests_win() -> None:
    policy = make_policy("learned")
    request = Request(id="r", arrived_s=0.0, prompt_tokens=200)
    candidates = [candidate("queueing", 5, 10, 500), candidate("busy", 25, 0, 500)]
    assert decide(policy, request, candidates, Random(1)).instance == "queueing"
