"""How long one step takes: the compiled evaluation of a step-time profile.

A decode-only step of n requests takes ``decode_base[n] + (kv_s + tile_s / max(n, tile_requests)) * context - shared_s * shared``:
linear in the context, so that many steps of one batch have a closed form. The tile is what the last of the accelerator's processors
still has to do when the others have nothing left: about one request's context, once there are more requests than processors for
each head. A step with prefill takes ``mixed_base[tokens] + request_s * n + kv_mixed_s * context +
attention_s * prefill_work + chunk_s * chunks + heat_s * prefill_tokens * heat``, where tokens are the batch's, decoding ones
included, and heat is how many tokens the accelerator has prefilled lately: each counts exp(-age / heat_memory_s). Under
sustained prefill the accelerator reaches its power limit and slows its clock down; decoding, which reads memory, is mostly spared.
``launch_s`` is how long the CPU is busy with scheduling and launching the step:
the results of the step before it are not looked at earlier. An idle accelerator starts ``head_s`` after the step is
scheduled. See docs/engine-model.md.
"""

import cython

if cython.compiled:
    from cython.cimports.libc.math import exp
else:
    from math import exp


class StepCurve:
    """Step times in seconds; arrays are indexed by requests and by tokens, the last slope goes on beyond their ends.

    ``graph_tokens``: the most tokens of a step that the engine runs from captured CUDA graphs; beyond, every kernel is
    launched by itself (``launch_eager_s``).
    """

    # fmt: off
    def __init__(self, decode_base, mixed_base, kv_s, kv_mixed_s, attention_s, chunk_s, request_s, launch_decode_s,
                 launch_graph_s, launch_eager_s, launch_request_s, head_s, graph_tokens, heat_s=0.0, heat_memory_s=1.0,
                 tile_s=0.0, tile_requests=1.0, shared_s=0.0):
        # fmt: on
        if len(decode_base) < 2 or len(mixed_base) < 2:
            raise ValueError("a step curve needs at least two points a table")
        self.decode_base = decode_base
        self.mixed_base = mixed_base
        self.kv_s = kv_s
        self.kv_mixed_s = kv_mixed_s
        self.attention_s = attention_s
        self.chunk_s = chunk_s
        self.request_s = request_s
        self.launch_decode_s = launch_decode_s
        self.launch_graph_s = launch_graph_s
        self.launch_eager_s = launch_eager_s
        self.launch_request_s = launch_request_s
        self.head_s = head_s
        self.graph_tokens = graph_tokens
        self.heat_s = heat_s
        self.heat_memory_s = max(heat_memory_s, 1e-6)
        self.tile_s = tile_s
        self.tile_requests = max(tile_requests, 1.0)
        self.shared_s = shared_s

    def decode_base_s(self, requests):
        """Seconds of a decode-only step before its context is counted."""
        last: cython.longlong = len(self.decode_base) - 1
        if requests <= last:
            return self.decode_base[requests]
        return self.decode_base[last] + (requests - last) * (self.decode_base[last] - self.decode_base[last - 1])

    def decode_kv_s(self, requests):
        """Seconds per token of context in a decode-only step of so many requests."""
        return self.kv_s + self.tile_s / max(requests, self.tile_requests)

    def gpu_s(self, decode_requests, context, prefill_tokens, prefill_work, chunks, heat=0.0, shared=0.0):
        """Seconds that the accelerator works on one step; ``heat`` in tokens, of before it; ``shared``: tokens of the context that
        are in the cache for another request too."""
        if chunks == 0:
            return self.decode_base_s(decode_requests) + self.decode_kv_s(decode_requests) * context - self.shared_s * shared
        tokens: cython.longlong = decode_requests + prefill_tokens
        last: cython.longlong = len(self.mixed_base) - 1
        base: cython.double
        if tokens <= last:
            base = self.mixed_base[tokens]
        else:
            base = self.mixed_base[last] + (tokens - last) * (self.mixed_base[last] - self.mixed_base[last - 1])
        base += self.request_s * decode_requests - self.shared_s * shared
        base += (self.kv_mixed_s + self.tile_s / max(decode_requests, self.tile_requests)) * context
        return base + self.attention_s * prefill_work + self.chunk_s * chunks + self.heat_s * prefill_tokens * heat

    def heat_after(self, heat, elapsed_s):
        """What is left of the heat after some seconds."""
        return heat * exp(-elapsed_s / self.heat_memory_s) if elapsed_s > 0 else heat

    def launch_s(self, decode_requests, prefill_tokens, chunks):
        """Seconds that the CPU is busy with one step: from taking in results over scheduling to its last kernel launch."""
        requests_s: cython.double = self.launch_request_s * (decode_requests + chunks)
        if decode_requests + prefill_tokens > self.graph_tokens:
            return self.launch_eager_s + requests_s
        if chunks > 0:
            return self.launch_graph_s + requests_s
        return self.launch_decode_s + requests_s
