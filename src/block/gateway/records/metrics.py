"""The gateway's Prometheus metrics: names after llm-d's, smg's and Dynamo's, under one prefix.

Children of the hot path are bound once; a request costs some ten increments and observations, about 5 microseconds.
Label values are bounded: models beyond ``MODELS_MAX`` count as ``other``.
"""

from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from block import __version__

PREFIX: Final = "block_"
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
        self.registry = CollectorRegistry()
        self._requests()
        self._predictions()
        self._flow()
        self._instances()
        self._process()
        self.workers.set(1)
        self._info = self._gauge("info", "Version and policy.", "version", "policy")
        self._models: dict[str, PerModel] = {}
        self._sent_to: dict[str, Counter] = {}

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)

    def _requests(self) -> None:
        """What requests and their answers were."""
        self.requests = self._counter("request_total", "Requests taken in.", "model")
        self.errors = self._counter("request_error_total", "Requests that ended in an error, by its code.", "code")
        self.duration = self._histogram(
            "request_duration_seconds",
            "From the request's last byte to the answer's last byte.",
            "model",
            buckets=_LATENCY,
        )
        self.ttft = self._histogram(
            "request_ttft_seconds",
            "From the request's last byte to the first byte of a streamed answer.",
            "model",
            buckets=_LATENCY,
        )
        self.tpot = self._histogram(
            "request_streaming_tpot_seconds",
            "Seconds per output token after the first.",
            "model",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1),
        )
        self.prompt_tokens = self._counter(
            "request_prompt_tokens_total", "Prompt tokens, as estimated or told by usage.", "model"
        )
        self.output_tokens = self._counter("request_output_tokens_total", "Output tokens seen.", "model")
        self.slo_violations = self._counter(
            "request_slo_violation_total", "Requests that missed a target they asked for.", "type"
        )
        self.broken = self._counter("stream_broken_total", "Answers that broke after they had begun.", "endpoint")
        self.continued = self._counter(
            "stream_continued_total", "Streams that went on elsewhere after this instance broke off.", "endpoint"
        )
        self.disconnects = self._counter("client_disconnect_total", "Clients that left before their answer was whole.")
        self.log_rows = self._counter(
            "request_log_rows_total", "Rows of the request log, by what became of them.", "result"
        )

    def _predictions(self) -> None:
        """What was predicted and decided, and how well."""
        self.predicted_ttft = self._histogram(
            "request_predicted_ttft_seconds", "Predicted TTFT on the chosen instance.", "model", buckets=_LATENCY
        )
        self.prediction_error = self._histogram(
            "prediction_error_ratio", "Measured over predicted TTFT of streamed answers.", "model", buckets=_RATIO
        )
        self.coverage = self._gauge(
            "prediction_interval_coverage_ratio",
            "Share of the last prediction intervals that the measured TTFT or E2E lay in.",
            "endpoint",
            "of",
        )
        self.bias = self._gauge(
            "prediction_bias_ratio", "Median of the last measured over predicted TTFT or E2E.", "endpoint", "of"
        )
        self.drift = self._gauge("predictor_drift", "1: an instance's predictions are wrong and not used.", "endpoint")
        self.predict_time = self._histogram(
            "request_ttft_prediction_duration_seconds", "Time to predict all candidates of a request.", buckets=_SHORT
        )
        self.decision_time = self._histogram(
            "scheduler_e2e_duration_seconds", "Time to decide where a request goes.", buckets=_SHORT
        )
        self.fallbacks = self._counter(
            "fallback_total", "Decisions on coarser evidence than the policy needs, by kind.", "reason"
        )
        self.evidence_missing = self._counter(
            "evidence_missing_total", "Candidates whose predictor gave no usable evidence for a decision.", "endpoint"
        )
        self.stale = self._gauge(
            "prediction_stale_seconds", "Since an instance's predictor last said something.", "endpoint"
        )
        self.unseen = self._gauge("unseen_requests", "Dispatched requests that no snapshot shows yet.", "endpoint")

    def _flow(self) -> None:
        """Queueing, holding, refusing, sending again."""
        self.overhead = self._histogram(
            "router_overhead_seconds",
            "From a request's last byte to its being sent on, queueing included.",
            buckets=_SHORT,
        )
        self.queue_time = self._histogram(
            "flow_control_request_queue_duration_seconds",
            "Time in the gateway's queue of requests that queued.",
            buckets=_LATENCY,
        )
        self.queue_size = self._gauge("flow_control_queue_size", "Requests in the gateway's queue.")
        self.held = self._gauge("flow_control_held_requests", "Requests that the policy keeps for now.")
        self.held_time = self._histogram(
            "flow_control_held_request_duration_seconds",
            "For how long the policy kept the requests that it kept.",
            buckets=_LATENCY,
        )
        self.rejected = self._counter("flow_control_rejected_total", "Requests answered 429, by reason.", "reason")
        self.retries = self._counter("worker_retries_total", "Requests sent again elsewhere, by reason.", "reason")

    def _instances(self) -> None:
        """Instances as this gateway sees them."""
        self.ready = self._gauge("ready_endpoints", "Instances that may get requests.")
        self.health = self._gauge("worker_health", "1: ready; 0: not.", "endpoint")
        self.circuit = self._gauge("worker_cb_state", "Circuit: 0 closed, 1 open, 2 on trial.", "endpoint")
        self.suspect = self._gauge("worker_suspect", "1: bytes are due and do not come.", "endpoint")
        self.in_flight = self._gauge("inflight_requests", "Requests at an instance.", "endpoint")
        self.in_flight_tokens = self._gauge(
            "inflight_tokens", "Prompt and expected output tokens of requests at an instance.", "endpoint"
        )
        self.sent = self._counter("worker_requests_total", "Requests sent to an instance.", "endpoint")
        self.discovered = self._counter(
            "discovery_total", "Lists of instances taken from discovery, by result.", "result"
        )

    def _process(self) -> None:
        """The gateway itself."""
        self.loop_delay = self._histogram(
            "event_loop_delay_seconds", "How late the event loop ran a timer.", buckets=_SHORT
        )
        self.tasks = self._gauge("event_loop_tasks", "Tasks of the event loop.")
        self.reloads = self._counter("config_reload_total", "Configuration reloads by result.", "result")
        self.connections = self._gauge("client_connections", "Open client connections.")
        self.workers = self._gauge("workers", "Worker processes that these metrics are of.")

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
