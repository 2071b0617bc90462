"""Can this process predict at all? Asked once at start: ready says no where a prediction would be nonsense."""

import time

import numpy as np

from block.errors import BlockError
from block.predict.snapshot import FIELDS, decode, encode, header_of


def self_test() -> str | None:
    """A what-if on an idle engine must be finite, positive and longer for more tokens. ``None``: passed; else why not."""
    try:
        from block.engine.limits import EngineLimits
        from block.predict.whatif import Mirror, predict_all
        from block.steptime.profile import load_profile, profile_names

        header = header_of(EngineLimits())
        header["taken_s"] = now_s = time.time()
        header["kv_blocks_free"] = EngineLimits().blocks_usable
        empty = encode(header, np.zeros((FIELDS, 0), np.int32), np.zeros(0, np.uint64), np.zeros(0))
        mirror = Mirror(load_profile(profile_names()[0]).curve())
        mirror.load(decode(empty), np.zeros(0, np.int32))
        short, long = (
            predict_all([mirror], prompt_tokens=100, max_tokens=tokens, output_tokens=tokens, now_s=now_s)[0]
            for tokens in (10, 200)
        )
    except (ImportError, BlockError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        return f"predictions do not work here: {error!r}"
    if not 0 < short.ttft_s <= short.e2e_s < long.e2e_s < 3600:
        return f"predictions make no sense: {short.e2e_s:.3g} s for 10 tokens, {long.e2e_s:.3g} s for 200"
    return None
