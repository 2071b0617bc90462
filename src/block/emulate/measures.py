"""What the emulator counts, exported under vLLM's own metric names.

Counting happens once a token, so it is plain additions here; ``prometheus_client`` makes the text when somebody asks.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from block.engine.pipeline import Engine

# vLLM's buckets (vllm/v1/metrics/loggers.py).
_TTFT: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_GAP: Final = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_LATENCY: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_STEP_TOKENS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_LATE: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


def _tokens_up_to(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 ... up to the context length, as vLLM builds them."""
    return tuple(m * 10**e for e in range(10) for m in (1, 2, 5) if m * 10**e <= most)


class Histogram:
    """Counts by bucket; ``observe`` is a bisection and two additions."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        """Add a sample: cumulative counts, as Prometheus wants them."""
        total, buckets = 0, []
        for bound, n in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += n
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), total))
        family.add_metric(labels, buckets, self._sum)


class Measures:
    """Counters and histograms of one emulated engine; whoever serves a request adds to them."""

    def __init__(self, max_model_len: int) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.queried_tokens = 0
        self.generation_tokens = 0
        self.finished = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        lengths = _tokens_up_to(max_model_len)
        self.histograms: dict[str, tuple[str, Histogram]] = {
            "time_to_first_token_seconds": ("Arrival to first token", Histogram(_TTFT)),
            "inter_token_latency_seconds": ("Between two tokens of a request", Histogram(_GAP)),
            "request_time_per_output_token_seconds": ("Mean time per output token of a request", Histogram(_GAP)),
            "e2e_request_latency_seconds": ("Arrival to last token", Histogram(_LATENCY)),
            "request_queue_time_seconds": ("Waiting for the first step", Histogram(_LATENCY)),
            "request_prefill_time_seconds": ("First step to first token", Histogram(_LATENCY)),
            "request_decode_time_seconds": ("First to last token", Histogram(_LATENCY)),
            "request_inference_time_seconds": ("First step to last token", Histogram(_LATENCY)),
            "request_prompt_tokens": ("Prompt tokens of a request", Histogram(lengths)),
            "request_generation_tokens": ("Output tokens of a request", Histogram(lengths)),
            "request_params_max_tokens": ("max_tokens of a request", Histogram(lengths)),
            "iteration_tokens_total": ("Tokens of a step", Histogram(_STEP_TOKENS)),
        }
        self.ttft = self.histograms["time_to_first_token_seconds"][1]
        self.gap = self.histograms["inter_token_latency_seconds"][1]
        self.step_tokens = self.histograms["iteration_tokens_total"][1]
        self.late = Histogram(_LATE)

    def observe_first_token(self, sequence: Any, ttft_s: float) -> None:
        """Count a request's first token and its prompt, which is computed by then."""
        self.ttft.observe(ttft_s)
        self.prompt_tokens += sequence.prompt
        self.queried_tokens += sequence.prompt
        self.cached_tokens += sequence.hit_tokens

    def observe_finished(self, sequence: Any, reason: str) -> None:
        """Count a finished request by the times on its ``Sequence`` (seconds) and its lengths."""
        h, output = self.histograms, sequence.output
        self.finished[reason] += 1
        arrived_s, scheduled_s = sequence.arrived_s, sequence.scheduled_s
        first_s, last_s = sequence.first_token_s, sequence.finished_s
        h["e2e_request_latency_seconds"][1].observe(last_s - arrived_s)
        h["request_queue_time_seconds"][1].observe(scheduled_s - arrived_s)
        h["request_prefill_time_seconds"][1].observe(first_s - scheduled_s)
        h["request_decode_time_seconds"][1].observe(last_s - first_s)
        h["request_inference_time_seconds"][1].observe(last_s - scheduled_s)
        if output > 1:
            h["request_time_per_output_token_seconds"][1].observe((last_s - first_s) / (output - 1))
        h["request_prompt_tokens"][1].observe(sequence.prompt)
        h["request_generation_tokens"][1].observe(output)
        h["request_params_max_tokens"][1].observe(sequence.max_tokens)


class MeasuresCollector(Collector):
    """``Measures`` and the engine's queues as metric families, for a ``prometheus_client`` registry."""

    def __init__(self, measures: Measures, engine: Engine, model: str) -> None:
        self._measures, self._engine, self._model = measures, engine, model

    def collect(self) -> Iterator[Metric]:
        names, values = ["model_name", "engine"], [self._model, "0"]
        scheduler, limits, m = self._engine.scheduler, self._engine.limits, self._measures
        gauges = {
            "num_requests_running": ("Requests in the running batch", len(scheduler.running)),
            "num_requests_waiting": ("Requests waiting", len(scheduler.waiting)),
            "kv_cache_usage_perc": ("KV cache in use, 1 is full", 1 - scheduler.blocks_free / limits.blocks_usable),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        config = GaugeMetricFamily("vllm:cache_config_info", "KV cache configuration", labels=[
            "block_size", "num_gpu_blocks", "enable_prefix_caching", *names])  # fmt: skip
        config.add_metric(
            [str(limits.block_size), str(limits.num_gpu_blocks), str(limits.enable_prefix_caching), *values], 1
        )
        yield config
        counters = {
            "num_preemptions": ("Preemptions", scheduler.preemptions),
            "prompt_tokens": ("Prompt tokens of requests that got their first token", m.prompt_tokens),
            "prompt_tokens_cached": ("Prompt tokens found in the prefix cache", m.cached_tokens),
            "generation_tokens": ("Generated tokens", m.generation_tokens),
            "prefix_cache_queries": ("Tokens looked up in the prefix cache", m.queried_tokens),
            "prefix_cache_hits": ("Tokens found in the prefix cache", m.cached_tokens),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=names)
            counter.add_metric(values, value)
            yield counter
        finished = CounterMetricFamily("vllm:request_success", "Finished requests", labels=[*names, "finished_reason"])
        for reason, n in m.finished.items():
            finished.add_metric([*values, reason], n)
        yield finished
        for name, (text, histogram) in m.histograms.items():
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=names)
            histogram.add_to(family, values)
            yield family
        late = HistogramMetricFamily("emulate_lateness_seconds", "Actual minus due time of steps", labels=names)
        m.late.add_to(late, values)
        yield late
