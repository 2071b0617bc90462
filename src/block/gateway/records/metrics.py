"""The gateway's Prometheus metrics: names after llm-d's, smg's and Dynamo's, under one prefix.

Children of the hot path are bound once; a request costs some ten increments and observations, about 5 microseconds.
Label values are bounded: models beyond ``MODELS_MAX`` count as ``other``.
"""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from block import __version__

MODELS_MAX: Final = 200
_LATENCY: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SHORT: Final = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1)
_RATIO: Final = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 4, 10)


class PerModel:
    """The request metrics of one model, bound."""

    def __init__(self, metrics: "Metrics", model: str) -> None:
        self.requests = metrics.requests.labels(model)
        self.duration = metrics.duration.labels(model)
        self.ttft = metrics.ttft.labels(model)
        self.tpot = metrics.tpot.labels(model)
        self.predicted_ttft = metrics.predicted_ttft.labels(model)
        self.prediction_error = metrics.prediction_error.labels(model)
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.output_tokens = metrics.output_tokens.labels(model)


class Metrics:
    """One registry per gateway."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        n = "block_"  # fmt: off
        self.requests = Counter(n + "request_total", "Requests taken in.", ["model"], registry=registry)
        self.errors = Counter(
            n + "request_error_total", "Requests that ended in an error, by its code.", ["code"], registry=registry
        )
        self.duration = Histogram(
            n + "request_duration_seconds",
            "From the request's last byte to the answer's last byte.",
            ["model"],
            buckets=_LATENCY,
            registry=registry,
        )
        self.ttft = Histogram(
            n + "request_ttft_seconds",
            "From the request's last byte to the first byte of a streamed answer.",
            ["model"],
            buckets=_LATENCY,
            registry=registry,
        )
        self.tpot = Histogram(
            n + "request_streaming_tpot_seconds",
            "Seconds per output token after the first.",
            ["model"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1),
            registry=registry,
        )
        self.predicted_ttft = Histogram(
            n + "request_predicted_ttft_seconds",
            "Predicted TTFT on the chosen instance.",
            ["model"],
            buckets=_LATENCY,
            registry=registry,
        )
        self.prediction_error = Histogram(
            n + "prediction_error_ratio",
            "Measured over predicted TTFT of streamed answers.",
            ["model"],
            buckets=_RATIO,
            registry=registry,
        )
        self.coverage = Gauge(
            n + "prediction_interval_coverage_ratio",
            "Share of the last prediction intervals that the measured TTFT or E2E lay in.",
            ["endpoint", "of"],
            registry=registry,
        )
        self.bias = Gauge(
            n + "prediction_bias_ratio",
            "Median of the last measured over predicted TTFT or E2E.",
            ["endpoint", "of"],
            registry=registry,
        )
        self.drift = Gauge(
            n + "predictor_drift",
            "1: an instance's predictions are wrong and not used.",
            ["endpoint"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            n + "request_prompt_tokens_total",
            "Prompt tokens, as estimated or told by usage.",
            ["model"],
            registry=registry,
        )
        self.output_tokens = Counter(
            n + "request_output_tokens_total", "Output tokens seen.", ["model"], registry=registry
        )
        self.slo_violations = Counter(
            n + "request_slo_violation_total",
            "Requests that missed a target they asked for.",
            ["type"],
            registry=registry,
        )
        self.predict_time = Histogram(
            n + "request_ttft_prediction_duration_seconds",
            "Time to predict all candidates of a request.",
            buckets=_SHORT,
            registry=registry,
        )
        self.decision_time = Histogram(
            n + "scheduler_e2e_duration_seconds",
            "Time to decide where a request goes.",
            buckets=_SHORT,
            registry=registry,
        )
        self.overhead = Histogram(
            n + "router_overhead_seconds",
            "From a request's last byte to its being sent on, queueing included.",
            buckets=_SHORT,
            registry=registry,
        )
        self.queue_time = Histogram(
            n + "flow_control_request_queue_duration_seconds",
            "Time in the gateway's queue of requests that queued.",
            buckets=_LATENCY,
            registry=registry,
        )
        self.queue_size = Gauge(n + "flow_control_queue_size", "Requests in the gateway's queue.", registry=registry)
        self.held = Gauge(
            n + "flow_control_held_requests", "Requests that the policy keeps for now.", registry=registry
        )
        self.held_time = Histogram(
            n + "flow_control_held_request_duration_seconds",
            "For how long the policy kept the requests that it kept.",
            buckets=_LATENCY,
            registry=registry,
        )
        self.rejected = Counter(
            n + "flow_control_rejected_total", "Requests answered 429, by reason.", ["reason"], registry=registry
        )
        self.fallbacks = Counter(
            n + "fallback_total",
            "Decisions on coarser evidence than the policy needs, by kind.",
            ["reason"],
            registry=registry,
        )
        self.evidence_missing = Counter(
            n + "evidence_missing_total",
            "Candidates whose predictor gave no usable evidence for a decision.",
            ["endpoint"],
            registry=registry,
        )
        self.stale = Gauge(
            n + "prediction_stale_seconds",
            "Since an instance's predictor last said something.",
            ["endpoint"],
            registry=registry,
        )
        self.retries = Counter(
            n + "worker_retries_total", "Requests sent again elsewhere, by reason.", ["reason"], registry=registry
        )
        self.broken = Counter(
            n + "stream_broken_total", "Answers that broke after they had begun.", ["endpoint"], registry=registry
        )
        self.continued = Counter(
            n + "stream_continued_total",
            "Streams that went on elsewhere after this instance broke off.",
            ["endpoint"],
            registry=registry,
        )
        self.disconnects = Counter(
            n + "client_disconnect_total", "Clients that left before their answer was whole.", registry=registry
        )
        self.ready = Gauge(n + "ready_endpoints", "Instances that may get requests.", registry=registry)
        self.health = Gauge(n + "worker_health", "1: ready; 0: not.", ["endpoint"], registry=registry)
        self.circuit = Gauge(
            n + "worker_cb_state", "Circuit: 0 closed, 1 open, 2 on trial.", ["endpoint"], registry=registry
        )
        self.suspect = Gauge(n + "worker_suspect", "1: bytes are due and do not come.", ["endpoint"], registry=registry)
        self.in_flight = Gauge(n + "inflight_requests", "Requests at an instance.", ["endpoint"], registry=registry)
        self.in_flight_tokens = Gauge(
            n + "inflight_tokens",
            "Prompt and expected output tokens of requests at an instance.",
            ["endpoint"],
            registry=registry,
        )
        self.unseen = Gauge(
            n + "unseen_requests", "Dispatched requests that no snapshot shows yet.", ["endpoint"], registry=registry
        )
        self.sent = Counter(
            n + "worker_requests_total", "Requests sent to an instance.", ["endpoint"], registry=registry
        )
        self.loop_delay = Histogram(
            n + "event_loop_delay_seconds", "How late the event loop ran a timer.", buckets=_SHORT, registry=registry
        )
        self.tasks = Gauge(n + "event_loop_tasks", "Tasks of the event loop.", registry=registry)
        self.reloads = Counter(
            n + "config_reload_total", "Configuration reloads by result.", ["result"], registry=registry
        )
        self.log_rows = Counter(
            n + "request_log_rows_total",
            "Rows of the request log, by what became of them.",
            ["result"],
            registry=registry,
        )
        self.connections = Gauge(n + "client_connections", "Open client connections.", registry=registry)
        self.discovered = Counter(
            n + "discovery_total", "Lists of instances taken from discovery, by result.", ["result"], registry=registry
        )
        self.workers = Gauge(n + "workers", "Worker processes that these metrics are of.", registry=registry)
        self.workers.set(1)
        info = Gauge(n + "info", "Version and policy.", ["version", "policy"], registry=registry)
        self._info = info
        self._models: dict[str, PerModel] = {}
        self._sent_to: dict[str, Counter] = {}

    def sent_to(self, endpoint: str) -> Counter:
        """The bound counter of requests sent to an instance."""
        found = self._sent_to.get(endpoint)
        if found is None:
            found = self._sent_to[endpoint] = self.sent.labels(endpoint)
        return found

    def forget(self, endpoint: str) -> None:
        """An instance left: nothing is said of it any more."""
        self._sent_to.pop(endpoint, None)
        for metric in vars(self).values():
            names = getattr(metric, "_labelnames", ())
            if "endpoint" in names:
                metric.remove_by_labels({"endpoint": endpoint})

    def set_policy(self, policy: str) -> None:
        """The policy in force, for ``info``."""
        self._info.clear()
        self._info.labels(__version__, policy).set(1)

    def model(self, name: str) -> PerModel:
        """The bound metrics of a model."""
        found = self._models.get(name)
        if found is None:
            if len(self._models) >= MODELS_MAX:
                name = "other"
            found = self._models[name] = self._models.get(name) or PerModel(self, name)
        return found

    def render(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self.registry)
