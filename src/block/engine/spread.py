"""A whole cluster under a cheap dispatch rule in one compiled call: what would these requests have met on those engines?

Every request goes to the open engine with the most free KV blocks, the queue's prompts counted as taken, per running request
(Llumnix's dispatch without migration). Engines open and close at given times: a closed one takes nothing more and ends what it
has. A request that comes while none is open waits for the first that opens.
"""

import cython

if cython.compiled:
    from cython.cimports.block.engine.kernel import FastEngine
    from cython.cimports.block.engine.store import FINISHED, FIRST, LABEL, STATE, UNUSED
else:
    from block.engine.kernel import FastEngine
    from block.engine.store import FINISHED, FIRST, LABEL, STATE, UNUSED


def spread(engines, opens_s, closes_s, at_s, prompts, outputs, labels, until_s, out, placed):
    """Serve more requests on ``engines``, which are changed, up to ``until_s``; call it again for what comes after.

    ``opens_s``, ``closes_s``: (engines,) float64. ``at_s`` (ascending, float64), ``prompts``, ``outputs``, ``labels`` (int32):
    (requests,); each must fit into any of the engines alone; its row of ``out`` is its label. ``out``: (n, 2) float64,
    into which the times of first token and end are written as they become known: fill it with -1 before. ``placed``:
    (requests,) int32, filled with the index of the engine that took each, -1: none is open nor will be.
    """
    i: cython.int
    j: cython.int
    to: cython.int
    engine: FastEngine
    for i in range(len(at_s)):
        for j in range(len(engines)):
            engine = engines[j]
            engine._run(at_s[i])
            if engine.ended_n > 0:
                _note(engine, out)
        to = placed[i] = _emptiest(engines, opens_s, closes_s, at_s[i], i)
        if to >= 0:
            engine = engines[to]
            engine._add(
                prompts[i], engine.model_len, outputs[i], max(at_s[i], opens_s[to]), outputs[i], 0, labels[i], 0
            )
    for j in range(len(engines)):
        engine = engines[j]
        engine._run(until_s)
        _note(engine, out)
        for i in range(engine.used):
            if engine.rows[i, STATE] != UNUSED and engine.rows[i, LABEL] >= 0:
                out[engine.rows[i, LABEL], 0] = engine.times[i, FIRST]


def forget_labels(engine):
    """Let the times of the requests that are there now not be noted any more."""
    r: cython.int
    for r in range(engine.used):
        engine.rows[r, LABEL] = -1


def _emptiest(engines, opens_s, closes_s, now_s, first):
    """Index of the engine that takes the next request; -1: none is open nor will be. Ties go round with ``first``."""
    n: cython.int = len(engines)
    j: cython.int
    k: cython.int
    best: cython.int = -1
    cost: cython.double
    lowest: cython.double = 0.0
    soonest: cython.int = -1
    engine: FastEngine
    for k in range(n):
        j = (first + k) % n
        if closes_s[j] <= now_s:
            continue
        if opens_s[j] > now_s:
            if soonest < 0 or opens_s[j] < opens_s[soonest]:
                soonest = j
            continue
        engine = engines[j]
        cost = engine.free - engine.waiting_tokens / (1.0 * engine.block_size)
        cost = -cost / max(engine.running_n, 1)
        if best < 0 or cost < lowest:
            best, lowest = j, cost
    return best if best >= 0 else soonest


def _note(engine, out):
    """Write the times of what has ended and free its rows."""
    i: cython.int
    r: cython.int
    if engine.ended_n == 0:
        return
    engine._compact_order()
    for i in range(engine.ended_n):
        r = engine.ended[i]
        if engine.rows[r, LABEL] >= 0:
            out[engine.rows[r, LABEL], 0] = engine.times[r, FIRST]
            out[engine.rows[r, LABEL], 1] = engine.times[r, FINISHED]
        engine.rows[r, STATE] = UNUSED
        engine.free_rows[engine.free_n] = r
        engine.free_n += 1
    engine.ended_n = 0
