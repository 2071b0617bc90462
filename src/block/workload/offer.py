"""A whole workload from a few numbers: lengths x arrivals x seed -> what is offered."""

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from block.core import PromptBlocks, Request, Slo
from block.errors import ConfigError, UnknownNameError
from block.workload.arrivals import ARRIVALS, Times, rescaled
from block.workload.chance import generator
from block.workload.length_table import load_lengths
from block.workload.offered import Offered
from block.workload.trace import read_trace

RATE_MAX_RPS = 1e6
REQUESTS_MAX = 10_000_000
Arrivals = Literal["poisson", "gamma", "constant", "bursts", "trace"]


class WorkloadConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is offered. Lengths come from a ``trace`` file, or are the two numbers given, or come from a length table.

    ``rate_rps`` may be ``None`` only with ``arrivals = "trace"``: then the recorded times are kept. ``order``: take a
    trace's requests as recorded, or in an order drawn by the seed (``shuffled``; only without its times).
    ``jitter_s``: recorded times are spread over this many seconds (for traces with a coarse clock).
    """

    rate_rps: float | None = 10.0
    requests: int | None = 1000
    arrivals: Arrivals = "poisson"
    gap_cv2: float = 1.0
    on_s: float = 10.0
    off_s: float = 10.0
    quiet_fraction: float = 0.0
    lengths: str = "sharegpt"
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    trace: str | None = None
    order: Literal["recorded", "shuffled"] = "recorded"
    jitter_s: float = 0.0
    total_tokens_max: int | None = None
    max_tokens: int | None = None
    exact_output: bool = False
    model: str = ""
    slo: Slo | None = None

    def __post_init__(self) -> None:
        if self.rate_rps is not None and not 0 < self.rate_rps <= RATE_MAX_RPS:
            raise ConfigError(f"The rate must be above 0 requests/s and at most {RATE_MAX_RPS:g}, not {self.rate_rps}.")
        if self.requests is not None and not 1 <= self.requests <= REQUESTS_MAX:
            raise ConfigError(f"A workload needs at least 1 request and at most {REQUESTS_MAX:,}, not {self.requests}.")
        for name in ("prompt_tokens", "output_tokens", "max_tokens"):
            tokens = getattr(self, name)
            if tokens is not None and tokens < 1:
                raise ConfigError(f"{name} must be at least 1, not {tokens}.")
        if self.total_tokens_max is not None and self.total_tokens_max < 2:
            raise ConfigError(f"total_tokens_max must be at least 2, not {self.total_tokens_max}.")


class _Shapes(msgspec.Struct):
    prompt: list[int]
    output: list[int]
    blocks: list[PromptBlocks | None]
    times_s: list[float | None]


def offer(config: WorkloadConfig, seed: int) -> list[Offered]:
    """The requests offered, in order of arrival. A seed gives the same lengths at any rate (common random numbers).

    ``exact_output`` tells the system the true length as ``max_tokens``; otherwise it sees ``config.max_tokens``
    (``None``: no limit). Requests longer than ``total_tokens_max`` have their prompt cut, then their output.

    Raises:
        ConfigError, UnknownNameError, BadInputError: the configuration cannot be met; the message says why.
    """
    shapes = _shapes(config, seed)
    times_s = _times(config, shapes, seed)
    count = min(len(times_s), len(shapes.prompt))
    return [_offered(config, shapes, i, float(times_s[i])) for i in range(count)]


def _shapes(config: WorkloadConfig, seed: int) -> _Shapes:
    if config.trace is not None:
        return _traced(config, config.trace, seed)
    count = config.requests
    if count is None:
        raise ConfigError("Say how many requests: only a trace knows by itself.")
    if config.arrivals == "trace":
        raise ConfigError('arrivals = "trace" needs a trace file.')
    if config.prompt_tokens is not None and config.output_tokens is not None:
        prompt, output = [config.prompt_tokens] * count, [config.output_tokens] * count
    else:
        drawn = load_lengths(config.lengths).draw(count, generator(seed, "lengths"))
        prompt, output = drawn[0].tolist(), drawn[1].tolist()
    return _Shapes(prompt, output, [None] * count, [None] * count)


def _traced(config: WorkloadConfig, trace: str, seed: int) -> _Shapes:
    recorded = read_trace(Path(trace))
    if config.order == "shuffled":
        if config.arrivals == "trace":
            raise ConfigError("A trace that keeps its times cannot be shuffled.")
        recorded = [recorded[i] for i in generator(seed, "order").permutation(len(recorded))]
    if config.requests is not None:
        if config.requests > len(recorded):
            raise ConfigError(f"{trace} has {len(recorded)} requests, not {config.requests}.")
        recorded = recorded[: config.requests]
    return _Shapes(
        [r.prompt_tokens for r in recorded], [max(r.output_tokens, 1) for r in recorded], [r.blocks for r in recorded],
        [r.arrived_s for r in recorded],
    )  # fmt: skip


def _times(config: WorkloadConfig, shapes: _Shapes, seed: int) -> Times:
    count, rng = len(shapes.prompt), generator(seed, "arrivals")
    if config.arrivals == "trace":
        recorded = [t for t in shapes.times_s if t is not None]
        if len(recorded) < count:
            raise ConfigError(f"{config.trace} has no times: choose another arrival process.")
        return rescaled(np.array(recorded) + rng.random(count) * config.jitter_s, config.rate_rps)
    if config.rate_rps is None:
        raise ConfigError(f"{config.arrivals} arrivals need a rate.")
    options = {
        "gamma": {"gap_cv2": config.gap_cv2},
        "bursts": {"on_s": config.on_s, "off_s": config.off_s, "quiet_fraction": config.quiet_fraction},
    }.get(config.arrivals, {})
    if config.arrivals not in ARRIVALS:
        raise UnknownNameError("arrival process", config.arrivals, [*ARRIVALS, "trace"])
    return ARRIVALS[config.arrivals](config.rate_rps, count, rng, **options)


def _offered(config: WorkloadConfig, shapes: _Shapes, i: int, arrived_s: float) -> Offered:
    prompt, output = shapes.prompt[i], shapes.output[i]
    if config.total_tokens_max is not None:
        prompt = min(prompt, config.total_tokens_max - 1)
        output = min(output, config.total_tokens_max - prompt)
    request = Request(
        id=f"r{i:06d}", arrived_s=arrived_s, prompt_tokens=prompt,
        max_tokens=output if config.exact_output else config.max_tokens,
        exact_output=config.exact_output, model=config.model, slo=config.slo, blocks=shapes.blocks[i],
    )  # fmt: skip
    return Offered(request, output, shapes.blocks[i])
