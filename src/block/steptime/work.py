"""Fit of the accelerator's work: one model for decode-only steps and for steps with prefill.

    work = G(tokens) + request_s * decode_requests + kv_s * context + attention_s * prefill_work + chunk_s * chunks
           - shared_s * shared + tile_s * context / max(decode_requests, tile_requests)
           (+ mixed_s + mixed_kv_s * context + heat_s * prefill_tokens * heat in a step with prefill, + caching_s with prefix
           caching)

G, the matrix products, is the same function of the batch's tokens whether they decode or prefill; it never falls. All
coefficients are non-negative. Below the largest captured CUDA graph the tokens are padded to the next captured size.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from block.engine.limits import EngineLimits
from block.steptime.profile import graph_tokens
from block.steptime.regress import Floats, balanced, bends, rises, solve, solve_cleaned
from block.steptime.roofline import Arithmetic
from block.steptime.steplog import StepLog, cuda_graph_sizes

KNOTS = np.array(
    [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024, 1536, 2048, 4096, 8192], dtype=float
)
DECODE_MOST = 1024  # requests; vLLM's largest default of max_num_seqs
MIXED_KNOTS = np.array([1, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192], dtype=float)
CONTEXT_CELLS = np.array([64, 200, 500, 1000, 2000, 4000])  # tokens a request
CELL_MOST = (
    300  # steps of one (tokens, context, log) cell that count fully: weights follow where engines spend their steps
)
SMOOTH = 0.5  # how strongly the slopes of neighbouring segments pull together
CACHING, SHARED = -5, -4  # columns
KNEE = 0.05  # relative errors beyond it count linearly at first
STALLED = 0.2  # and beyond this are stalls of the host, which also make the next step look short: they do not count
SAMPLES_FEW = 40
SHARED_FRACTION = 0.1  # of the context; less is within what counting by blocks leaves open
HEAT_MEMORY_S = 0.1
HOT_FRACTION = 0.12  # what arithmetic is believed to take longer under prefill without end: 9-16 % on our H200 runs
HEAT_CELLS = np.array([500, 2000, 4000])  # tokens
MIXED_CELL_MOST = 20  # of steps with prefill; a sweep has hundreds of long ones in a row, serving has single ones
SHORT_TRUST = 0.5
PRIOR_TOKENS = (1024.0, 2048.0, 4096.0)
PRIOR_WEIGHT = 0.3  # of one measured step each
MILLI = 1e-3


class Samples(msgspec.Struct, frozen=True, eq=False):
    """Steps whose work is seen; arrays of shape (samples,). ``tokens`` are padded, ``seconds`` the work."""

    tokens: Floats
    requests: Floats
    context: Floats
    shared: Floats
    prefill_work: Floats
    chunks: Floats
    caching: Floats
    prefill_tokens: Floats
    heat: Floats
    log: npt.NDArray[np.int64]
    seconds: Floats

    def columns(self, knots: Floats, tile_requests: float) -> Floats:
        plain = self.chunks == 0
        tile = self.context / np.maximum(self.requests, max(tile_requests, 1.0)) * plain * (tile_requests > 0)
        # What a decode-only step takes longer after a prefill, against such steps' mean: most of all a sweep's large batches.
        hot = np.where(plain, self.heat - (self.heat[plain].mean() if plain.any() else 0.0), 0.0)
        return np.column_stack([
            rises(self.tokens, knots), self.requests, self.context / 1e3, self.prefill_work / 1e6, self.chunks,
            self.chunks > 0, self.context / 1e3 * (self.chunks > 0), self.caching,
            -self.shared / 1e3 * plain, tile / 1e3, hot / 1e3, self.prefill_tokens * self.heat / 1e6,
        ])  # fmt: skip

    def weights(self) -> Floats:
        each = self.context / np.maximum(self.requests, 1)
        cells = np.searchsorted(KNOTS, self.tokens) * 1000 + np.searchsorted(CONTEXT_CELLS, each) * 100 + self.log
        mixed = self.chunks > 0
        heated = np.searchsorted(KNOTS, self.tokens) * 1000 + np.searchsorted(HEAT_CELLS, self.heat) * 100 + self.log
        found = np.where(
            mixed, balanced(heated + 10**6 * ~mixed, MIXED_CELL_MOST), balanced(cells - 10**6 * mixed, CELL_MOST)
        )
        short = (self.chunks == 0) & (each < CONTEXT_CELLS[0])
        found[short] *= SHORT_TRUST  # real batches are not that short; a sweep's are
        return found / (self.seconds / MILLI)


class WorkFit(msgspec.Struct, frozen=True, eq=False):
    """The coefficients above, in seconds; ``base`` is G at the knots."""

    knots: Floats
    base: Floats
    request_s: float
    kv_s: float
    attention_s: float
    chunk_s: float
    mixed_s: float
    mixed_kv_s: float
    caching_s: float
    shared_s: float
    tile_s: float
    tile_requests: float
    heat_s: float

    def g(self, tokens: Floats) -> Floats:
        slope = (self.base[-1] - self.base[-2]) / (self.knots[-1] - self.knots[-2])
        return np.asarray(np.interp(tokens, self.knots, self.base) + np.maximum(tokens - self.knots[-1], 0) * slope)

    def kv(self, requests: Floats) -> Floats:
        """Seconds per token of context in decode-only steps."""
        return np.asarray(self.kv_s + self.tile_s / np.maximum(requests, self.tile_requests))

    def decode_s(self, log: StepLog, limits: EngineLimits) -> Floats:
        """Work of every step's decoding part alone, shape (steps,)."""
        more_s = self.caching_s if limits.enable_prefix_caching else 0.0
        tokens = padded(np.maximum(log.decode_requests, 1), limits)
        return (
            self.g(tokens)
            + self.request_s * log.decode_requests
            + self.kv(log.decode_requests) * log.context
            + more_s
            - self.shared_s * log.shared(limits)
        )

    def decode_table(self, most: int, prefill: "WorkFit") -> list[tuple[float, float]]:
        """Profile knots of decode-only steps: G is flat up to each captured size.

        Beyond ``most`` requests, the most seen, it grows as with the tokens of steps with prefill (``prefill``, their fit).
        """
        sizes = cuda_graph_sizes(most)
        knots = sorted({1, *(int(s) + 1 for s in sizes[:-1]), *(int(s) for s in sizes)})
        n = np.array(knots, dtype=float)
        seconds = self.g(sizes[np.searchsorted(sizes, n)].astype(float)) + self.request_s * n
        beyond = KNOTS[(knots[-1] < KNOTS) & (KNOTS <= DECODE_MOST)]
        grown = prefill.g(beyond) - prefill.g(n[-1:]) + prefill.request_s * (beyond - n[-1])
        n, seconds = np.concatenate([n, beyond]), np.concatenate([seconds, seconds[-1] + grown])
        return [(float(x), round(float(y), 9)) for x, y in zip(n, seconds, strict=True)]

    def mixed_table(self) -> list[tuple[float, float]]:
        """Profile knots of steps with prefill, by tokens."""
        return [(float(x), round(float(y + self.mixed_s), 9)) for x, y in zip(self.knots, self.base, strict=True)]


def padded(tokens: Floats, limits: EngineLimits) -> Floats:
    """Tokens that are computed: the next captured size, where a CUDA graph of it is captured."""
    most = graph_tokens(limits)
    sizes = cuda_graph_sizes(most)
    up = sizes[np.minimum(np.searchsorted(sizes, tokens), len(sizes) - 1)].astype(float)
    return np.where(tokens <= most, up, tokens)


def samples(log: StepLog, limits: EngineLimits, number: int, index: npt.NDArray[np.int64], seconds: Floats) -> Samples:
    """The steps ``index`` of a log, which took ``seconds`` of work."""
    return Samples(
        tokens=padded(log.tokens[index], limits),
        requests=log.decode_requests[index],
        context=log.context[index],
        shared=log.shared(limits)[index],
        prefill_work=log.prefill_work[index],
        chunks=log.chunks[index],
        caching=np.full(len(index), float(limits.enable_prefix_caching)),
        prefill_tokens=log.prefill_tokens[index],
        heat=log.heat(HEAT_MEMORY_S)[index],
        log=np.full(len(index), number),
        seconds=seconds,
    )


def even(seen: Samples, decode: WorkFit) -> Samples:
    """The samples as if no context were shared and all processors had the same to read, at decode-only steps' prices."""
    tile_s = decode.tile_s / np.maximum(seen.requests, decode.tile_requests) * seen.context
    return msgspec.structs.replace(seen, seconds=seen.seconds + decode.shared_s * seen.shared - tile_s)


def together(parts: Sequence[Samples]) -> Samples:
    return Samples(**{f: np.concatenate([getattr(p, f) for p in parts]) for f in Samples.__struct_fields__})


def fit_work(
    seen: Samples, prior: Arithmetic | None, tile_requests: float = 0.0, least_kv_s: float = 0.0
) -> WorkFit | None:
    """Fit the samples; ``None`` if there are too few.

    ``prior`` counts where no step shows long prefills. ``tile_requests``, ``least_kv_s``: of ``roofline``, 0 if unknown.
    """
    if len(seen.seconds) < SAMPLES_FEW:
        return None
    most = float(max(seen.tokens.max(), PRIOR_TOKENS[-1] if prior is not None else 0.0))
    all_knots = MIXED_KNOTS if (seen.chunks > 0).all() else KNOTS
    knots = all_knots[: max(int(np.searchsorted(all_knots, most)) + 1, 3)]
    n = len(knots)
    columns, weights = seen.columns(knots, tile_requests), seen.weights()
    target = (seen.seconds - least_kv_s * seen.context) / MILLI
    if not seen.caching.any() or seen.caching.all():
        columns[:, CACHING] = 0.0
    if (seen.shared > SHARED_FRACTION * seen.context).sum() < SAMPLES_FEW:
        columns[:, SHARED] = 0.0
    if prior is not None:
        known = _arithmetic_samples(prior, float(np.percentile(seen.seconds, 5)))
        columns = np.concatenate([columns, known.columns(knots, tile_requests)])
        target = np.concatenate([target, known.seconds / MILLI])
        weights = np.concatenate([weights, PRIOR_WEIGHT / (known.seconds / MILLI)])
        hot = np.zeros((1, columns.shape[1]))
        # One token under prefill without end, against how much longer it takes then.
        hot[0, -1] = HEAT_MEMORY_S / prior.token_s / 1e6
        columns = np.concatenate([columns, hot])
        target = np.append(target, HOT_FRACTION * prior.token_s / MILLI)
        weights = np.append(weights, PRIOR_WEIGHT / (prior.token_s / MILLI))
    penalty = bends(knots, columns.shape[1], SMOOTH * MILLI / float(np.median(seen.seconds)))
    if (seen.chunks > 0).any():
        found = solve_cleaned(columns, target, weights, penalty, KNEE, STALLED, len(seen.seconds)) * MILLI
    else:
        found = solve(columns, target, weights, penalty, KNEE) * MILLI
    base = found[0] + np.concatenate([[0.0], np.cumsum(found[1:n] * np.diff(knots))])
    request, kv, attention, chunk, mixed, mixed_kv, caching, shared, tile, _, heat = map(float, found[n:])
    kv_s = least_kv_s + kv / 1e3
    return WorkFit(
        knots, base, request, kv_s, attention / 1e6, chunk, mixed, mixed_kv / 1e3, caching, min(shared / 1e3, kv_s),
        tile / 1e3, max(tile_requests, 1.0), heat / 1e6,
    )  # fmt: skip


def _arithmetic_samples(prior: Arithmetic, least_s: float) -> Samples:
    """Whole single prompts as arithmetic has them, on top of a fifth of the shortest step (what is not hidden behind it)."""
    tokens = np.array(PRIOR_TOKENS)
    work = tokens**2 / 2
    zero = np.zeros(len(tokens))
    seconds = prior.token_s * tokens + prior.attention_s * work + 0.2 * least_s
    return Samples(tokens, zero, zero, zero, work, zero + 1, zero, tokens, zero, zero.astype(np.int64), seconds)
