"""State guessed from an engine's Prometheus metrics: counts and the KV cache's use, no requests.

The engine tells how many requests run and wait and how full its cache is; how long each is, it does not. So the
snapshot holds as many made-up requests: prompts and answers of the mean length that the engine's own histograms state,
spread evenly over their lives, and scaled so that together they hold the blocks that are really in use. Good for
queues, blind to who is in them; see docs/vllm.md for what that costs in accuracy. Their lengths are marked as fixed, so
that nobody learns from requests that do not exist, and the snapshot as anonymous, so that nobody looks for their keys.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl, urldefrag

import msgspec
import numpy as np
import numpy.typing as npt

from block.engine.limits import EngineLimits
from block.errors import ConfigError
from block.predict import snapshot as wire

INTERVAL_S: Final = 0.25  # an answer costs vLLM's API server 10 to 500 ms
TIMEOUT_S: Final = 5.0
BYTES_MAX: Final = 8 << 20
PROMPT_TOKENS: Final = 300.0  # until the engine has served a request
OUTPUT_TOKENS: Final = 200.0
ALIVE_EVERY_S: Final = 1.0
_SAMPLE: Final = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

# What is wanted -> how the engines call it, vLLM (and its older names), SGLang, TGI. Several engines behind one port are summed.
NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "running": ("vllm:num_requests_running", "sglang:num_running_reqs", "tgi_batch_current_size"),
    "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "tgi_queue_size"),
    "kv_used": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"),
    "kv_tokens": ("sglang:max_total_num_tokens",),
    "preemptions": ("vllm:num_preemptions_total", "sglang:num_retracted_reqs_total"),
    "prompt_sum": ("vllm:request_prompt_tokens_sum", "sglang:prompt_tokens_total", "tgi_request_input_length_sum"),
    "prompt_count": ("vllm:request_prompt_tokens_count", "sglang:num_requests_total", "tgi_request_input_length_count"),
    "output_sum": (
        "vllm:request_generation_tokens_sum",
        "sglang:generation_tokens_total",
        "tgi_request_generated_tokens_sum",
    ),
    "output_count": (
        "vllm:request_generation_tokens_count",
        "sglang:num_requests_total",
        "tgi_request_generated_tokens_count",
    ),
}
_WANTED: Final = {name: what for what, names in NAMES.items() for name in names}


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What one scrape told; ``None``: not there. ``kv_used`` is a fraction."""

    running: float | None = None
    waiting: float | None = None
    kv_used: float | None = None
    kv_tokens: float | None = None
    preemptions: float | None = None
    prompt_sum: float | None = None
    prompt_count: float | None = None
    output_sum: float | None = None
    output_count: float | None = None
    block_size: int | None = None
    num_gpu_blocks: int | None = None
    prefix_caching: bool | None = None

    @property
    def prompt_tokens(self) -> float:
        """Mean prompt of the requests so far."""
        return self.prompt_sum / self.prompt_count if self.prompt_sum and self.prompt_count else PROMPT_TOKENS

    @property
    def output_tokens(self) -> float:
        return self.output_sum / self.output_count if self.output_sum and self.output_count else OUTPUT_TOKENS


def read_figures(text: str) -> Figures:
    """Pick the figures out of a Prometheus page; of data-parallel ranks counts are summed and fractions averaged."""
    found: dict[str, list[float]] = {}
    static: dict[str, Any] = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample is None:
            continue
        name, labels, value = sample.groups()
        if name in _WANTED:
            found.setdefault(_WANTED[name], []).append(float(value))
        elif name == "vllm:cache_config_info":
            static = dict(_LABEL.findall(labels or ""))
    figures: dict[str, Any] = {
        what: sum(values) / (len(values) if what == "kv_used" else 1) for what, values in found.items()
    }
    if static.get("block_size", "").isdigit():
        figures["block_size"] = int(static["block_size"])
    if static.get("num_gpu_blocks", "").isdigit():
        figures["num_gpu_blocks"] = int(static["num_gpu_blocks"]) * max(len(found.get("running", ())), 1)
    if "enable_prefix_caching" in static:
        figures["prefix_caching"] = static["enable_prefix_caching"] == "True"
    return Figures(**figures)


def limits_told(limits: EngineLimits, figures: Figures) -> EngineLimits:
    """The limits with what the metrics know better."""
    block_size = figures.block_size or limits.block_size
    blocks = figures.num_gpu_blocks or (
        int(figures.kv_tokens) // block_size + 1 if figures.kv_tokens else limits.num_gpu_blocks
    )
    return msgspec.structs.replace(limits, block_size=block_size, num_gpu_blocks=max(blocks, 2))


def coarse_snapshot(figures: Figures, limits: EngineLimits, *, taken_s: float, sequence: int, epoch: int) -> bytes:
    """An encoded snapshot of made-up requests that agree with the figures; see the head of this file."""
    running = min(round(figures.running or 0), limits.max_num_seqs)
    waiting_total = max(round((figures.running or 0) + (figures.waiting or 0)) - running, 0)
    waiting = min(waiting_total, 256)
    prompt, total = max(figures.prompt_tokens, 1.0), max(figures.output_tokens, 2.0)
    output = 1 + ((np.arange(running) + 0.5) / max(running, 1) * (total - 1)).astype(np.int32)
    used_blocks = round((figures.kv_used or 0.0) * limits.blocks_usable)
    context = (
        used_blocks * limits.block_size / running if running and figures.kv_used is not None else prompt + total / 2
    )
    prompts = np.clip(np.round(context - output.mean() if running else 0), 1, limits.max_model_len - total - 1)
    rows = np.zeros((wire.FIELDS, running + waiting), np.int32)
    rows[wire.PROMPT, :running], rows[wire.PROMPT, running:] = prompts, min(prompt, limits.max_model_len - 2)
    rows[wire.MAX_TOKENS] = round(total)
    rows[wire.OUTPUT, :running] = np.minimum(output, round(total) - 1)
    rows[wire.FLAGS] = wire.EXACT
    blocks = _blocks(rows[:, :running], limits)
    for _ in range(int(blocks.sum()) - limits.blocks_usable):  # rounding up, or answers too long for this cache
        longest = int(blocks.argmax())
        if rows[wire.PROMPT, longest] > limits.block_size:
            rows[wire.PROMPT, longest] -= limits.block_size
        else:
            rows[wire.OUTPUT, longest] = max(rows[wire.OUTPUT, longest] - limits.block_size, 1)
        blocks = _blocks(rows[:, :running], limits)
    rows[wire.COMPUTED, :running] = rows[wire.PROMPT, :running] + rows[wire.OUTPUT, :running] - 1
    rows[wire.BLOCKS, :running] = blocks
    header = wire.header_of(limits)
    header["flags"] |= wire.ANONYMOUS
    header["running"], header["waiting"], header["waiting_total"] = running, waiting, waiting_total
    header["waiting_tokens_beyond"] = round((waiting_total - waiting) * prompt)
    header["sequence"], header["epoch"], header["taken_s"] = sequence, epoch, taken_s
    header["preemptions_total"] = round(figures.preemptions or 0)
    header["kv_blocks_free"] = max(limits.blocks_usable - int(blocks.sum()), 0)
    keys = np.iinfo(np.uint64).max - np.arange(running + waiting, dtype=np.uint64)
    return wire.encode(header, rows, keys, np.full(running + waiting, taken_s))


def _blocks(running: npt.NDArray[np.int32], limits: EngineLimits) -> npt.NDArray[np.int32]:
    """Blocks that decoding requests hold; the newest token is not computed yet."""
    held: npt.NDArray[np.int32] = -(-(running[wire.PROMPT] + running[wire.OUTPUT] - 1) // limits.block_size)
    return np.maximum(held, 1)


class MetricsSource:
    """Polls ``URL`` (a ``/metrics`` page, or an engine's base URL). What metrics do not tell stands behind a ``#`` as
    ``max_num_seqs=128&max_num_batched_tokens=2048&max_model_len=8192``.

    Raises:
        ConfigError: not an http(s) URL, or an unknown limit behind the ``#``.
    """

    def __init__(self, where: str, min_interval_s: float = 0.005) -> None:
        url, fragment = urldefrag(where)
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{where!r} is not a URL: write --source metrics:http://HOST:PORT.")
        self._url = url if url.rstrip("/").endswith("/metrics") else url.rstrip("/") + "/metrics"
        self._limits = _limits(fragment)
        self._interval_s = max(min_interval_s, INTERVAL_S)
        self._epoch = time.time_ns()
        self.problem: str | None = f"{self._url} has not been read yet"

    async def frames(self) -> AsyncIterator[bytes]:
        import aiohttp

        sequence = 0
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                began_s = time.monotonic()
                try:
                    async with session.get(self._url) as answer:
                        answer.raise_for_status()
                        text = (await answer.content.read(BYTES_MAX)).decode(errors="replace")
                except (aiohttp.ClientError, TimeoutError) as error:
                    self.problem = f"{self._url} cannot be read: {error or type(error).__name__}"
                    await asyncio.sleep(ALIVE_EVERY_S)
                    continue
                figures = read_figures(text)
                if figures.running is None:
                    known = ", ".join(NAMES["running"])
                    self.problem = f"{self._url} has none of the metrics {known}"
                    await asyncio.sleep(ALIVE_EVERY_S)
                    continue
                self.problem = None
                sequence += 1
                limits = limits_told(self._limits, figures)
                yield coarse_snapshot(figures, limits, taken_s=time.time(), sequence=sequence, epoch=self._epoch)
                await asyncio.sleep(max(self._interval_s - (time.monotonic() - began_s), 0.0))


def _limits(fragment: str) -> EngineLimits:
    fields = dict(parse_qsl(fragment, strict_parsing=bool(fragment)))
    unknown = fields.keys() - set(EngineLimits.__struct_fields__)
    if unknown:
        raise ConfigError(
            f"{sorted(unknown)[0]!r} is no limit of an engine. Known: {', '.join(EngineLimits.__struct_fields__)}."
        )
    try:
        return msgspec.convert(fields, EngineLimits, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"The limits behind the # of the source: {error}.") from error
