"""What a gateway knows of an instance's waiting requests beyond what the instance's snapshots tell."""

import pytest

from block.core import InstanceId, Request
from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import FINISHED, Sequence
from block.gateway.deciding.evidence import Evidence
from block.gateway.deciding.expectations import Expectations
from block.length.table import make_estimator
from block.predict.capture import Recorder
from block.predict.snapshot import request_key
from block.predict.whatif import predict_all
from block.steptime.profile import load_profile

LIMITS = EngineLimits(max_num_seqs=1, max_num_batched_tokens=512, enable_prefix_caching=True)
PROFILE = load_profile("h200-llama3.1-8b")
COMMON = [("system prompt", block) for block in range(240)]
OUTPUT = 20


def test_a_waiting_request_is_foretold_with_the_prefix_that_it_will_find() -> None:
    """Three requests with one beginning, one slot: the newcomer waits for two answers, but for no second long prefill."""
    engine = Engine(LIMITS, PROFILE.curve(limits=LIMITS))
    knowing, ignorant = (
        Evidence(InstanceId("a"), Expectations(make_estimator("constant", tokens=OUTPUT, sigma=0)), stale_after_s=60,
                 unseen_after_s=5)
        for _ in range(2)
    )  # fmt: skip
    for name, hit in (("first", 0), ("second", 16 * 240)):
        engine.add(Sequence(request_key(name), 4000, OUTPUT, block_keys=COMMON), 0.0)
        for evidence, known in ((knowing, hit), (ignorant, 0)):
            evidence.sent(Request(id=name, arrived_s=0.0, prompt_tokens=4000), OUTPUT, OUTPUT, 0.0, known)
    engine.advance(0.1)
    frame = Recorder(engine).capture(0.1)
    foretold = []
    for evidence in (knowing, ignorant):
        evidence.take_profile(PROFILE, 1.0)
        evidence.take_frame(frame, 0.1)
        mirror = evidence.mirror(0.1)
        assert mirror is not None
        mirror.input_s = mirror.output_s = 0.0
        foretold.append(predict_all([mirror], prompt_tokens=50, max_tokens=OUTPUT, output_tokens=OUTPUT, now_s=0.1)[0])
    third = Sequence(3, 50, OUTPUT)
    engine.add(third, 0.1)
    while third.status != FINISHED:
        engine.advance(engine.next_event_s())
    assert foretold[0].ttft_s == pytest.approx(third.first_token_s - 0.1, rel=0.03)
    assert foretold[1].ttft_s > 1.2 * foretold[0].ttft_s
