"""The wire form of an engine's scheduler state: one flat little-endian buffer, decoded without copying.

Layout: ``HEADER`` (one record), ``requests`` (int32, FIELDS x n: running in order, then waiting in order), ``keys`` (uint64 x n),
``arrived`` (float64 x n), ``steps`` (``STEP`` x steps: the last finished ones, oldest first, for calibration),
``cached_blocks`` (uint64 x cached: content keys of findable prefix-cache blocks; empty where unknown). Behind that, where the
header's flags say so, ``PREFIX`` (one record) and ``hits`` (int32 x n: prompt tokens that each request found in the prefix
cache when it was admitted, -1: not yet). Who does not know the last part ignores it.
The same bytes lie in shared memory, travel in the predictor's stream and feed the engine model.

Times are wall-clock seconds (``time.time``), so that hosts can compare them.
"""

import hashlib
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from block.engine.limits import EngineLimits
from block.errors import BadInputError

MAGIC: Final = 0x534B4C42  # "BLKS"
VERSION: Final = 1

# Rows of ``requests``. COMPUTED and PLACEHOLDERS include the batches in flight, OUTPUT does not.
# BATCH_1 / BATCH_2: tokens of the request in the older / newer batch in flight. STALE: of a preempted request, tokens
# still in flight. BLOCKS: KV blocks held.
PROMPT, MAX_TOKENS, COMPUTED, OUTPUT, PLACEHOLDERS, BATCH_1, BATCH_2, STALE, BLOCKS, PRIORITY, FLAGS, PREEMPTIONS = (
    range(12)
)
FIELDS: Final = 12

EXACT: Final = 1  # FLAGS: the client fixed the output at max_tokens (ignore_eos)
SAMPLES_1: Final = 2  # FLAGS: the older batch in flight yields an output token of this request
SAMPLES_2: Final = 4  # FLAGS: the newer one does

HEADER: Final = np.dtype(
    [
        ("magic", "<u4"), ("version", "<u2"), ("flags", "<u2"),
        ("running", "<i4"), ("waiting", "<i4"),  # requests described; waiting_total counts those beyond the cap too
        ("waiting_total", "<i4"), ("steps", "<i4"), ("cached", "<i4"), ("batches_in_flight", "<i4"),
        ("sequence", "<u8"),  # grows with every snapshot of one engine process
        ("epoch", "<u8"),  # another number after the engine's restart
        ("taken_s", "<f8"),
        ("batch_1_started_s", "<f8"),  # when the older batch in flight began to execute
        ("newest_scheduled_s", "<f8"),  # when the newest batch in flight was scheduled
        ("waiting_tokens_beyond", "<i8"),  # prompt tokens of waiting requests beyond the cap
        ("preemptions_total", "<i8"),
        ("kv_blocks_free", "<i4"), ("num_gpu_blocks", "<i4"), ("block_size", "<i4"), ("max_num_seqs", "<i4"),
        ("max_num_batched_tokens", "<i4"), ("max_model_len", "<i4"), ("long_prefill_token_threshold", "<i4"),
        ("watermark_permille", "<i4"),
    ]
)  # fmt: skip

ASYNC, CHUNKED, PREFIX_CACHING, PRIORITY_POLICY, RESERVE_FULL = 1, 2, 4, 8, 16  # HEADER flags
ANONYMOUS: Final = 32  # HEADER flags: the requests are made up from counts, and so are their keys
PREFIX_TOLD: Final = 64  # HEADER flags: PREFIX and hits follow

STEP: Final = np.dtype(
    [
        ("scheduled_s", "<f8"), ("finished_s", "<f8"), ("decode_requests", "<i4"), ("context", "<i8"),
        ("prefill_tokens", "<i4"), ("prefill_work", "<f8"), ("chunks", "<i4"),
    ]
)  # fmt: skip


PREFIX: Final = np.dtype(
    [
        ("queried_tokens", "<i8"), ("hit_tokens", "<i8"),  # of all prompts admitted since the start
        ("blocks_cached", "<i4"),  # findable blocks; -1: not known
        ("unused", "<i4"),
    ]
)  # fmt: skip


class PrefixUse(msgspec.Struct, frozen=True, eq=False):
    """What an engine tells of its prefix cache: counters since its start, and what each request found there.

    ``hits``: (n,) int32, prompt tokens, -1 for a request that has not been admitted; ``blocks_cached``: -1 if not known.
    Which prompts are cached it does not tell: the engine's hashes are of token ids, salted anew at every start.
    """

    queried_tokens: int
    hit_tokens: int
    blocks_cached: int
    hits: npt.NDArray[np.int32]


class EngineSnapshot(msgspec.Struct, frozen=True, eq=False):
    """One engine's state at ``taken_s``. The arrays are views of the buffer they were decoded from.

    Shapes: requests (FIELDS, n) int32, keys (n,) uint64, arrived (n,) float64, steps (k,) ``STEP``, cached_blocks (c,) uint64,
    with n = running + waiting.
    """

    header: Any
    limits: EngineLimits
    requests: npt.NDArray[np.int32]
    keys: npt.NDArray[np.uint64]
    arrived: npt.NDArray[np.float64]
    steps: npt.NDArray[np.void]
    cached_blocks: npt.NDArray[np.uint64]
    prefix: PrefixUse | None = None

    @property
    def running(self) -> int:
        return int(self.header["running"])

    @property
    def waiting(self) -> int:
        return int(self.header["waiting"])

    @property
    def waiting_total(self) -> int:
        """Those beyond the cap too."""
        return int(self.header["waiting_total"])

    @property
    def anonymous(self) -> bool:
        """Whether it shows how many requests there are, but not which."""
        return bool(int(self.header["flags"]) & ANONYMOUS)

    @property
    def taken_s(self) -> float:
        return float(self.header["taken_s"])

    @property
    def sequence(self) -> int:
        return int(self.header["sequence"])

    @property
    def epoch(self) -> int:
        return int(self.header["epoch"])

    @property
    def kv_blocks_free(self) -> int:
        return int(self.header["kv_blocks_free"])

    @property
    def shared_tokens(self) -> int:
        """Tokens of the running requests' KV blocks that another one holds too, counted once less than held."""
        if not self.limits.enable_prefix_caching:
            return 0
        held = int(self.requests[BLOCKS, : self.running].sum())
        return max(held - (self.limits.blocks_usable - self.kv_blocks_free), 0) * self.limits.block_size


def request_key(request_id: str) -> int:
    """The 64-bit key under which a request of this id (the ``X-Request-Id``) stands in snapshots."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")


def header_of(limits: EngineLimits) -> Any:
    """A zeroed header record (``numpy.void``, mutable) with the limits filled in."""
    header = np.zeros((), HEADER)
    header["magic"], header["version"] = MAGIC, VERSION
    header["flags"] = (
        ASYNC * limits.async_scheduling
        + CHUNKED * limits.enable_chunked_prefill
        + PREFIX_CACHING * limits.enable_prefix_caching
        + PRIORITY_POLICY * (limits.policy == "priority")
        + RESERVE_FULL * limits.scheduler_reserve_full_isl
    )
    for name in (
        "num_gpu_blocks",
        "block_size",
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "long_prefill_token_threshold",
    ):
        header[name] = getattr(limits, name)
    header["watermark_permille"] = round(limits.watermark * 1000)
    return header


def limits_of(header: Any) -> EngineLimits:
    """The limits that a header record states."""
    flags = int(header["flags"])
    return EngineLimits(
        max_num_seqs=int(header["max_num_seqs"]),
        max_num_batched_tokens=int(header["max_num_batched_tokens"]),
        num_gpu_blocks=int(header["num_gpu_blocks"]),
        block_size=int(header["block_size"]),
        max_model_len=int(header["max_model_len"]),
        async_scheduling=bool(flags & ASYNC),
        enable_chunked_prefill=bool(flags & CHUNKED),
        enable_prefix_caching=bool(flags & PREFIX_CACHING),
        policy="priority" if flags & PRIORITY_POLICY else "fcfs",
        long_prefill_token_threshold=int(header["long_prefill_token_threshold"]),
        watermark=int(header["watermark_permille"]) / 1000,
        scheduler_reserve_full_isl=bool(flags & RESERVE_FULL),
    )


def encode(
    header: Any,
    requests: npt.NDArray[np.int32],
    keys: npt.NDArray[np.uint64],
    arrived: npt.NDArray[np.float64],
    steps: npt.NDArray[np.void] | None = None,
    cached_blocks: npt.NDArray[np.uint64] | None = None,
) -> bytes:
    """The buffer of one snapshot; ``header`` needs running, waiting and its times filled in, the other counts are set here."""
    header["steps"] = 0 if steps is None else len(steps)
    header["cached"] = 0 if cached_blocks is None else len(cached_blocks)
    parts = [header.tobytes(), np.ascontiguousarray(requests, "<i4").tobytes(), keys.tobytes(), arrived.tobytes()]
    if steps is not None:
        parts.append(steps.tobytes())
    if cached_blocks is not None:
        parts.append(cached_blocks.tobytes())
    return b"".join(parts)


def decode(buffer: bytes | bytearray | memoryview, limits: EngineLimits | None = None) -> EngineSnapshot:
    """Read a snapshot; ``limits`` may be passed from the engine's last snapshot to save making them anew.

    Raises:
        BadInputError: not a snapshot, of another version, or cut short.
    """
    if len(buffer) < HEADER.itemsize:
        raise BadInputError(f"A snapshot has at least {HEADER.itemsize} bytes, not {len(buffer)}.")
    header = np.frombuffer(buffer, HEADER, 1)[0]
    if header["magic"] != MAGIC:
        raise BadInputError("This is not an engine snapshot.")
    if header["version"] != VERSION:
        raise BadInputError(
            f"Snapshot version {header['version']} is not {VERSION}: run the same Block version on both sides."
        )
    n = int(header["running"]) + int(header["waiting"])
    steps, cached = int(header["steps"]), int(header["cached"])
    if min(int(header["running"]), int(header["waiting"]), steps, cached) < 0:
        raise BadInputError("A snapshot's counts are negative.")
    size = HEADER.itemsize + n * (4 * FIELDS + 16) + steps * STEP.itemsize + cached * 8
    if len(buffer) < size:
        raise BadInputError(f"A snapshot of {n} requests has {size} bytes, not {len(buffer)}.")
    at = HEADER.itemsize
    requests = np.frombuffer(buffer, "<i4", n * FIELDS, at).reshape(FIELDS, n)
    at += 4 * FIELDS * n
    keys = np.frombuffer(buffer, "<u8", n, at)
    arrived = np.frombuffer(buffer, "<f8", n, at + 8 * n)
    at += 16 * n
    step_rows = np.frombuffer(buffer, STEP, steps, at)
    cached_keys = np.frombuffer(buffer, "<u8", cached, at + steps * STEP.itemsize)
    prefix = _prefix(buffer, size, n) if int(header["flags"]) & PREFIX_TOLD else None
    return EngineSnapshot(header, limits or limits_of(header), requests, keys, arrived, step_rows, cached_keys, prefix)


def _prefix(buffer: bytes | bytearray | memoryview, at: int, n: int) -> PrefixUse:
    if len(buffer) < at + PREFIX.itemsize + 4 * n:
        raise BadInputError(f"What a snapshot of {n} requests tells of its prefix cache is cut short.")
    record = np.frombuffer(buffer, PREFIX, 1, at)[0]
    hits = np.frombuffer(buffer, "<i4", n, at + PREFIX.itemsize)
    return PrefixUse(int(record["queried_tokens"]), int(record["hit_tokens"]), int(record["blocks_cached"]), hits)
