"""Whether the what-if can be trusted: on an idle and a busy engine it must say what the step by step model does."""

import time

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence
from block.predict.capture import Recorder
from block.predict.snapshot import MAX_TOKENS, decode
from block.predict.whatif import Mirror, predict_all
from block.steptime.profile import StepTimeProfile

TOLERANCE = 0.02
_PROMPT, _OUTPUT, _OTHERS = 300, 20, 3


def self_test(profile: StepTimeProfile) -> str | None:
    """``None`` when what-if and step-by-step model agree on TTFT and E2E, else a sentence that says how they differ."""
    started_s = time.perf_counter()
    for others in (0, _OTHERS):
        engine = Engine(EngineLimits(), profile.curve())
        for key in range(others):
            engine.add(Sequence(key + 1, _PROMPT, 2 * _OUTPUT), 0.0)
        now_s = 0.1
        engine.advance(now_s)
        mirror = Mirror(profile.curve())
        snapshot = decode(Recorder(engine).capture(now_s))
        mirror.load(snapshot, snapshot.requests[MAX_TOKENS])
        (said,) = predict_all([mirror], prompt_tokens=_PROMPT, max_tokens=_OUTPUT, output_tokens=_OUTPUT, now_s=now_s)
        asked = Sequence(others + 1, _PROMPT, _OUTPUT)
        engine.add(asked, now_s)
        engine.advance(now_s + 600.0)
        for what, predicted_s, happened_s in (
            ("TTFT", said.ttft_s, asked.first_token_s - now_s),
            ("E2E", said.e2e_s, asked.finished_s - now_s),
        ):
            if not abs(predicted_s - happened_s) <= TOLERANCE * happened_s:
                return (
                    f"with {others} other requests the what-if says a {what} of {predicted_s:.4f} s and the engine "
                    f"model {happened_s:.4f} s"
                )
    return None if time.perf_counter() - started_s < 10.0 else "it takes more than 10 s"
