"""Time of one what-if in the situations that matter: light, memory-bound with preemptions, many requests."""

import json
import time

import cython
import msgspec
import numpy as np

from block.engine import kernel
from block.engine.limits import EngineLimits
from block.predict.snapshot import (
    BLOCKS,
    COMPUTED,
    FIELDS,
    MAX_TOKENS,
    OUTPUT,
    PROMPT,
    decode,
    encode,
    header_of,
)
from block.predict.whatif import Mirror, ask, scratch_engine
from block.steptime.profile import load_profile

PROMPT_TOKENS, OUTPUT_TOKENS = 246, 326  # the means of ShareGPT
STATES = 20
AMPLE = 100_000  # KV blocks that never run out
FULL = 8  # free blocks, at most, of a cache called full


class Timing(msgspec.Struct, frozen=True):
    """Microseconds per what-if; ``decoding`` includes reading the snapshot's bytes; ``batch`` is per instance of 12."""

    scenario: str
    running: int
    waiting: int
    median_us: float
    p99_us: float
    decoding_median_us: float
    batch_median_us: float
    preemptions: float


def measure_whatif(seconds: float = 1.0, profile: str = "h200-llama3.1-8b") -> list[Timing]:
    """Time the three scenarios of the README on random states (seeded), about ``seconds`` of CPU each."""
    return [
        _measure("light", 48, 0, AMPLE, seconds, profile),
        _measure("full cache", 48, 50, 1056, seconds, profile),
        _measure("many", 256, 50, AMPLE, seconds, profile),
    ]


def print_whatif(timings: list[Timing], as_json: bool) -> None:
    """A table, or JSON with the machine's facts."""
    compiled = bool(getattr(kernel, "__file__", "").endswith(".so")) and cython is not None
    if as_json:
        print(json.dumps({"compiled": compiled, "whatif": [msgspec.structs.asdict(t) for t in timings]}))  # noqa: T201
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"one what-if, microseconds ({'compiled' if compiled else 'not compiled'})")
    for column in (
        "scenario",
        "running",
        "waiting",
        "median",
        "P99",
        "with decoding",
        "per instance of 12",
        "preemptions",
    ):
        table.add_column(column, justify="left" if column == "scenario" else "right")
    for t in timings:
        table.add_row(
            t.scenario, str(t.running), str(t.waiting), f"{t.median_us:.1f}", f"{t.p99_us:.1f}",
            f"{t.decoding_median_us:.1f}", f"{t.batch_median_us:.1f}", f"{t.preemptions:.0f}",
        )  # fmt: skip
    Console().print(table)


def _measure(scenario: str, running: int, waiting: int, blocks: int, seconds: float, profile: str) -> Timing:
    curve = load_profile(profile).curve()
    limits = EngineLimits(max_num_seqs=running, max_num_batched_tokens=max(512, running), num_gpu_blocks=blocks)
    buffers = [_random_snapshot(limits, running, waiting, seed) for seed in range(STATES)]
    mirrors = []
    for buffer, totals in buffers:
        mirrors.append(Mirror(curve))
        mirrors[-1].load(decode(buffer), totals)
    scratch = scratch_engine(mirrors)

    def what_if(which: list[Mirror]) -> float:
        rows = ask(
            which, scratch, prompt_tokens=PROMPT_TOKENS, max_tokens=1024, output_tokens=OUTPUT_TOKENS,
            now_s=which[0].taken_s,
        )  # fmt: skip
        return float(rows[0, 3])

    def decode_and_ask(index: int) -> None:
        buffer, totals = buffers[index]
        mirrors[index].load(decode(buffer, limits), totals)
        what_if([mirrors[index]])

    preemptions = np.mean([what_if([m]) for m in mirrors])
    single = _times_us(lambda i: what_if([mirrors[i % STATES]]), seconds)
    decoding = _times_us(lambda i: decode_and_ask(i % STATES), seconds / 2)
    batch = _times_us(lambda _i: what_if(mirrors[:12]), seconds / 2)
    return Timing(
        scenario, running, waiting, float(np.median(single)), float(np.quantile(single, 0.99)),
        float(np.median(decoding)), float(np.median(batch)) / 12, float(preemptions),
    )  # fmt: skip


def _times_us(work: "object", seconds: float) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    assert callable(work)
    for i in range(3 * STATES):
        work(i)
    times: list[int] = []
    end = time.process_time() + seconds
    while not times or time.process_time() < end:
        for i in range(100):
            start = time.perf_counter_ns()
            work(i)
            times.append(time.perf_counter_ns() - start)
    return np.array(times) / 1e3


def _random_snapshot(
    limits: EngineLimits, running: int, waiting: int, seed: int
) -> tuple[bytes, "np.ndarray[tuple[int], np.dtype[np.int32]]"]:
    """ShareGPT-like requests, the running ones 1-200 tokens into their answers with 200-500 to go, within the blocks."""
    rng = np.random.default_rng(seed)
    while True:
        count = running + waiting
        prompts = np.minimum(np.exp(rng.normal(4.6, 1.2, count)).astype(np.int32) % 2000 + 4, limits.max_model_len // 2)
        rows = np.zeros((FIELDS, count), np.int32)
        rows[PROMPT], rows[MAX_TOKENS] = prompts, 1024
        rows[OUTPUT, :running] = rng.integers(1, 200, running)
        rows[COMPUTED, :running] = prompts[:running] + rows[OUTPUT, :running] - 1
        rows[BLOCKS] = -(-rows[COMPUTED] // limits.block_size)
        totals = (rows[OUTPUT] + rng.integers(200, 500, count)).astype(np.int32)
        free = limits.blocks_usable - int(rows[BLOCKS].sum())
        if 0 <= free <= (FULL if limits.num_gpu_blocks < AMPLE else free):
            break
    header = header_of(limits)
    header["running"], header["waiting"], header["waiting_total"] = running, waiting, waiting
    header["kv_blocks_free"], header["taken_s"], header["sequence"] = free, 1000.0, 1
    return encode(header, rows, rng.integers(1, 1 << 60, count).astype(np.uint64), np.full(count, 999.0)), totals
