"""Run as a program: serve a fixed stream with the engine model and print what happened.

With the argument ``uncompiled`` it loads the sources of the compiled modules.

The same numbers must come out of both forms (test_uncompiled.py).
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

SOURCES = Path(__file__).parents[2] / "src"
HOT = (
    "steptime.curve",
    "engine.sequence",
    "engine.blocks",
    "engine.scheduler",
    "engine.store",
    "engine.admission",
    "engine.kernel",
    "engine.resume",
    "engine.ask",
    "engine.spread",
)


class SourceFirst(importlib.abc.MetaPathFinder):
    """Finds the compiled modules' sources instead of their compiled form."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.removeprefix("block.") not in HOT:
            return None
        return importlib.util.spec_from_file_location(fullname, SOURCES / (fullname.replace(".", "/") + ".py"))


def outcome() -> dict[str, object]:
    import cython
    import numpy as np

    from block.engine import kernel
    from block.engine.kernel import FastEngine
    from block.engine.limits import EngineLimits
    from block.engine.pipeline import Engine
    from block.engine.sequence import Sequence as EngineSequence
    from block.predict.capture import Recorder
    from block.predict.snapshot import MAX_TOKENS, decode
    from block.predict.whatif import Mirror, predict_all
    from block.steptime.profile import load_profile

    rng = random.Random(5)
    limits = EngineLimits(max_num_seqs=8, max_num_batched_tokens=256, num_gpu_blocks=60, max_model_len=600)
    curve = load_profile("h200-llama3.1-8b").curve()
    fast, reference = FastEngine(limits, curve, capacity=4), Engine(limits, curve)
    sequences = []
    for i in range(60):
        prompt, stop, at_s = rng.randint(1, 200), rng.randint(1, 120), i * 0.02
        fast.add(prompt, 120, stop, at_s, label=i)
        sequences.append(EngineSequence(i, prompt, 120, stop, arrived_s=at_s))
        reference.add(sequences[-1], at_s)
    reference.advance(0.7)
    snapshot = decode(Recorder(reference).capture(0.7))
    mirror = Mirror(curve)
    mirror.load(snapshot, np.array(snapshot.requests[MAX_TOKENS]))
    asked = predict_all([mirror], prompt_tokens=80, max_tokens=64, output_tokens=64, now_s=0.7, harm=True)[0]
    fast.advance(1e9)
    reference.advance(1e9)
    return {
        "compiled": not kernel.__file__.endswith(".py"),
        "cython": cython.compiled,
        "fast": sorted(fast.collect()),
        "reference": [(s.key, s.scheduled_s, s.first_token_s, s.finished_s, s.preemptions) for s in sequences],
        "asked": [asked.ttft_s, asked.e2e_s, asked.preemptions, asked.harm_s],
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["uncompiled"]:
        sys.meta_path.insert(0, SourceFirst())
    json.dump(outcome(), sys.stdout)
