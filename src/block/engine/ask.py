"""What-ifs on any number of engines in one call."""

import cython

if cython.compiled:
    from cython.cimports.block.engine.store import FINISHED, FIRST, SCHEDULED, STATE, UNUSED
else:
    from block.engine.store import FINISHED, FIRST, SCHEDULED, STATE, UNUSED


def ask_all(engines, scratch, prompt, max_tokens, totals, hits, priority, at_s, horizon_s, believing, harm, out):
    """What if one more request came to each of ``engines`` at ``at_s``? No engine is changed; ``scratch`` is overwritten.

    ``totals``: (k,) int32, its output tokens in k scenarios, whose outcomes are averaged; ``hits``: (engines,) int32, prompt
    tokens that each holds in its prefix cache; ``believing``: present requests end when they are believed to. ``out``:
    (engines, 6) float64, filled with queue delay, TTFT, E2E (seconds from ``at_s``), preemptions, truncated (0/1), harm
    (seconds, sum over the others; 0 unless ``harm``).
    """
    i: cython.int
    for i in range(len(engines)):
        _ask_one(
            engines[i], scratch, prompt, max_tokens, totals, hits[i], priority, at_s, horizon_s, believing, harm, out, i
        )


def ask_mirrors(mirrors, scratch, prompt, max_tokens, totals, hits, priority, now_s, horizon_s, harm, out):
    """``ask_all`` for mirrors (``predict.whatif``), each with its own way in and out: times count from ``now_s``, when the
    request is sent, to the caller's having the answer."""
    i: cython.int
    input_s: cython.double
    output_s: cython.double
    for i in range(len(mirrors)):
        mirror = mirrors[i]
        if mirror.engine is None:
            raise ValueError("a mirror has not been loaded")
        input_s = mirror.input_s
        output_s = mirror.output_s
        _ask_one(
            mirror.engine, scratch, prompt, max_tokens, totals, hits[i], priority, now_s + input_s, horizon_s, False, harm,
            out, i,
        )  # fmt: skip
        out[i, 0] += input_s
        out[i, 1] += input_s + output_s
        out[i, 2] += input_s + output_s


def _ask_one(engine, scratch, prompt, max_tokens, totals, hit, priority, at_s, horizon_s, believing, harm, out, i):
    k: cython.int
    r: cython.int
    scenarios: cython.int = len(totals)
    with_s: cython.double
    end_s: cython.double = at_s + horizon_s
    for k in range(6):
        out[i, k] = 0.0
    for k in range(scenarios):
        scratch._adopt(engine, believing)
        r = _ask(scratch, prompt, max_tokens, totals[k], at_s, hit, priority, horizon_s)
        out[i, 0] += (scratch.times[r, SCHEDULED] - at_s if scratch.times[r, SCHEDULED] >= 0 else horizon_s) / scenarios
        out[i, 1] += (scratch.times[r, FIRST] - at_s if scratch.times[r, FIRST] >= 0 else horizon_s) / scenarios
        out[i, 2] += (scratch.times[r, FINISHED] - at_s if scratch.times[r, FINISHED] >= 0 else horizon_s) / scenarios
        out[i, 3] += (scratch.preemption_count + 0.0) / scenarios
        if scratch.times[r, FINISHED] < 0:
            out[i, 4] = 1.0
    if harm:
        with_s = _finish_sum(scratch, engine.used, end_s)
        scratch._adopt(engine, believing)
        out[i, 5] = max(with_s - _finish_sum(scratch, engine.used, end_s), 0.0)
    return 0


def _ask(engine, prompt, max_tokens, total, at_s, hit, priority, horizon_s):
    """Add one more request and run until it ends or the horizon; returns its row. Changes the engine: give it a copy."""
    r: cython.int = engine._add(prompt, max_tokens, total, at_s, total, hit, -1, priority)
    engine.target = r
    engine._run(at_s + horizon_s)
    return r


def _finish_sum(engine, before, until_s):
    """Run until all end or ``until_s``; the sum of the end times of the first ``before`` rows."""
    r: cython.int
    total: cython.double = 0.0
    engine.target = -1
    engine._run(until_s)
    for r in range(before):
        if engine.rows[r, STATE] != UNUSED:
            total += engine.times[r, FINISHED] if engine.times[r, FINISHED] >= 0 else until_s
    return total
