"""Make a fast engine continue from a snapshot of a real one: queues, batches in flight, and when they end."""

import cython

if cython.compiled:
    from cython.cimports.block.engine.store import (
        ARRIVED,
        BELIEVED,
        BLOCKS,
        COMPUTED,
        DECODE,
        DONE,
        DONE_STATE,
        FINISHED,
        FIRST,
        G0,
        HELD,
        HIT,
        KEY,
        LABEL,
        LAST,
        MAX_TOKENS,
        PREEMPTIONS,
        PREFILL,
        PRIORITY,
        PROMPT,
        SCHEDULED,
        STATE,
        STOP,
        WAITING,
    )
else:
    from block.engine.store import (
        ARRIVED,
        BELIEVED,
        BLOCKS,
        COMPUTED,
        DECODE,
        DONE,
        DONE_STATE,
        FINISHED,
        FIRST,
        G0,
        HELD,
        HIT,
        KEY,
        LABEL,
        LAST,
        MAX_TOKENS,
        PREEMPTIONS,
        PREFILL,
        PRIORITY,
        PROMPT,
        SCHEDULED,
        STATE,
        STOP,
        WAITING,
    )

# Rows of a snapshot's requests (predict.snapshot).
IN_PROMPT = cython.declare(cython.int, 0)
IN_MAX_TOKENS = cython.declare(cython.int, 1)
IN_COMPUTED = cython.declare(cython.int, 2)
IN_OUTPUT = cython.declare(cython.int, 3)
IN_BATCH_1 = cython.declare(cython.int, 5)
IN_BATCH_2 = cython.declare(cython.int, 6)
IN_BLOCKS = cython.declare(cython.int, 8)
IN_PRIORITY = cython.declare(cython.int, 9)
IN_FLAGS = cython.declare(cython.int, 10)
IN_SAMPLES_1 = cython.declare(cython.int, 2)
IN_SAMPLES_2 = cython.declare(cython.int, 4)


def restore(
    engine, requests, totals, hits, arrived, running, free, taken_s, batches, batch_1_started_s, newest_scheduled_s, heat=0.0
):  # fmt: skip
    """Make ``engine`` (a FastEngine of the same limits) continue from a snapshot (see ``predict.snapshot``).

    ``requests``: (FIELDS, n) int32; ``totals``: (n,) int32 expected total output tokens; ``hits``: (n,) int32 prompt
    tokens that each found in the prefix cache, or will; ``arrived``: (n,) float64; ``batches`` in flight 0-2; times in
    seconds; ``heat``: of the finished steps, at ``taken_s`` (see ``curve``).
    """
    n = requests.shape[1]
    if engine.capacity < n + 1:
        engine._allocate_arrays(2 * (n + 1))
    engine._clear(taken_s, free)
    engine.heat = heat
    if engine.limits.enable_prefix_caching:
        engine.held = max(_blocks_held(requests, running) - (engine.limits.blocks_usable - free), 0)
    _restore(engine, requests, totals, hits, arrived, running, batches, batch_1_started_s, newest_scheduled_s)
    if engine.held > 0:
        _share(engine, requests, running)


def _blocks_held(requests, running):
    i: cython.int
    total: cython.longlong = 0
    for i in range(running):
        total += requests[IN_BLOCKS, i]
    return total


def _share(engine, requests, running):
    """What is held more than once is charged once: each running request lacks its part of the blocks, as it has blocks
    (who shares with whom is not known)."""
    i: cython.int
    total: cython.longlong = _blocks_held(requests, running)
    before: cython.longlong = 0
    for i in range(running):
        engine.rows[i, HELD] = (before + requests[IN_BLOCKS, i]) * engine.held // total - before * engine.held // total
        before += requests[IN_BLOCKS, i]


def _restore(engine, requests, totals, hits, arrived, running, batches, batch_1_started_s, newest_scheduled_s):
    i: cython.int
    n: cython.int = requests.shape[1]
    taken: cython.double = engine.now
    _resume_time(engine, requests, batches, batch_1_started_s, newest_scheduled_s)
    engine.used = n
    for i in range(n):
        _restore_row(engine, i, requests, totals[i], i < running, batches)
        engine.times[i, ARRIVED] = arrived[i]
        engine.rows[i, HIT] = max(0, min(hits[i], engine.rows[i, PROMPT] - 1))
        if i >= running and engine.rows[i, STATE] != DONE_STATE:
            engine.waiting_tokens += engine.rows[i, PROMPT]
            engine._queue(i)
    if _has_work(engine):
        engine.now = max(engine.now, taken)
    # else it tried to schedule when it had launched, in vain, and hears of nothing before the results


def _has_work(engine):
    """Whether there is something to schedule that is not in flight already."""
    r: cython.int
    if engine.prefill_n > 0 or engine.wait_n > 0:
        return True
    for r in range(engine.used):
        if engine.rows[r, STATE] == DECODE and engine.rows[r, KEY] > 0:
            return True
    return False


def _restore_row(engine, i, requests, total, running, batches):
    sampled_1: cython.int = (requests[IN_FLAGS, i] & IN_SAMPLES_1) != 0
    sampled_2: cython.int = (requests[IN_FLAGS, i] & IN_SAMPLES_2) != 0
    output: cython.int = requests[IN_OUTPUT, i]
    done: cython.int = output + sampled_1 + sampled_2
    prompt: cython.int = max(1, min(requests[IN_PROMPT, i], engine.model_len - 1))
    limit: cython.int = max(1, min(requests[IN_MAX_TOKENS, i], engine.model_len - prompt))
    last: cython.int
    total = max(output + 1, min(total, limit))
    engine.rows[i, PROMPT] = prompt
    engine.rows[i, MAX_TOKENS] = limit
    engine.rows[i, STOP] = total
    engine.rows[i, BELIEVED] = total
    engine.rows[i, DONE] = done
    engine.rows[i, G0] = engine.rows[i, KEY] = engine.rows[i, HIT] = engine.rows[i, PREEMPTIONS] = 0
    engine.rows[i, HELD] = 0
    engine.rows[i, COMPUTED] = engine.rows[i, BLOCKS] = 0
    engine.rows[i, LABEL] = i
    engine.rows[i, PRIORITY] = requests[IN_PRIORITY, i]
    engine.rows[i, STATE] = DONE_STATE
    engine.times[i, ARRIVED] = engine.times[i, SCHEDULED] = engine.times[i, FIRST] = engine.times[i, FINISHED] = -1.0
    # Schedules are numbered from 0 here: the newest batch in flight is -1.
    if sampled_1 and total <= output + 1:
        last = -batches
    elif total <= done:
        last = -1
    else:
        last = total - done - 1
    if not running:
        if last >= 0:
            engine.rows[i, STATE] = WAITING
        return
    engine.running_n += 1
    engine._push_order(i)
    if requests[IN_COMPUTED, i] < prompt + done - 1 or done == 0:
        engine.rows[i, STATE] = PREFILL
        engine.rows[i, COMPUTED] = requests[IN_COMPUTED, i]
        engine.rows[i, BLOCKS] = requests[IN_BLOCKS, i]
        engine.prefilling[engine.prefill_n] = i
        engine.prefill_n += 1
    elif last == -2 and total >= limit:
        engine.rows[i, STATE] = LAST  # its last token is in the older of two batches in flight
        engine.rows[i, DONE] = total
        engine.retired[engine.retired_n] = i
        engine.retired_n += 1
    else:
        engine._join(i, last)


def _resume_time(engine, requests, batches, batch_1_started_s, newest_scheduled_s):
    """When the next schedule happens and when the newest batch in flight ends."""
    taken: cython.double = engine.now
    older_end: cython.double
    launched: cython.double
    if batches == 0:
        return
    older_end = batch_1_started_s + _batch_s(engine, requests, IN_BATCH_1, batches == 2)
    launched = newest_scheduled_s + _batch_launch_s(engine, requests, IN_BATCH_2 if batches == 2 else IN_BATCH_1)
    if batches == 2:
        if max(older_end, launched) < taken:
            older_end = taken  # it takes longer than the model thinks: it may end any moment
        engine.now = max(older_end, launched)
        older_end = max(older_end, newest_scheduled_s + engine.curve.head_s)
        engine.gpu_end = max(older_end + _batch_s(engine, requests, IN_BATCH_2, False), launched)
    else:
        engine.gpu_end = max(older_end, launched, taken)
        engine.now = engine.gpu_end if engine.lag == 1 else launched
    engine.in_flight = engine.lag == 2


def _batch_s(engine, requests, batch, followed):
    """Step time of a batch in flight; ``followed``: a newer one is in flight, whose tokens count as computed too."""
    i: cython.int
    tokens: cython.int
    computed: cython.int
    decodes: cython.int = 0
    chunks: cython.int = 0
    prefill: cython.int = 0
    context: cython.longlong = 0
    work: cython.double = 0.0
    for i in range(requests.shape[1]):
        tokens = requests[batch, i]
        if tokens == 0:
            continue
        computed = requests[IN_COMPUTED, i] - tokens
        if followed:
            computed -= requests[IN_BATCH_2, i]
        if computed < 0:  # preempted meanwhile
            computed = requests[IN_PROMPT, i] + requests[IN_OUTPUT, i] - tokens
        if tokens == 1 and computed >= requests[IN_PROMPT, i]:
            decodes += 1
            context += computed
        else:
            chunks += 1
            prefill += tokens
            work += tokens * (computed + 0.5 * tokens)
    if decodes + chunks == 0:
        return 0.0
    shared: cython.double = 1.0 * engine.held * engine.block_size
    seconds: cython.double = engine.curve.gpu_s(decodes, context, prefill, work, chunks, engine.heat, shared)
    engine.heat += prefill
    return seconds


def _batch_launch_s(engine, requests, batch):
    i: cython.int
    decodes: cython.int = 0
    chunks: cython.int = 0
    prefill: cython.int = 0
    for i in range(requests.shape[1]):
        if requests[batch, i] == 1 and requests[IN_COMPUTED, i] > requests[IN_PROMPT, i]:
            decodes += 1
        elif requests[batch, i] > 0:
            chunks += 1
            prefill += requests[batch, i]
    return engine.curve.launch_s(decodes, prefill, chunks)
