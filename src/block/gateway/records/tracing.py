"""OpenTelemetry, where it is asked for (``tracing``, the extra ``otel``): one span a request, exported over OTLP.

Everything is set up by the standard variables (``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER``,
``OTEL_BSP_*`` ...). The span is a child of the client's ``traceparent``, and the instance gets the span's own in its place. Spans
hold numbers and names, never prompts or answers. Where tracing is off, the client's ``traceparent`` goes through as it came.
"""

import time
from typing import TYPE_CHECKING, Any

from block import __version__
from block.errors import BlockError, ClientError, ConfigError
from block.gateway.wire.http1 import HttpRequest

if TYPE_CHECKING:
    from block.gateway.exchange import Exchange

_PROPAGATED = (b"traceparent:", b"tracestate:")


class Tracing:
    """Makes and ends the spans. ``exporter``: for tests; the OTLP one over HTTP by default."""

    def __init__(self, exporter: Any = None) -> None:
        """
        Raises:
            ConfigError: the packages of the extra are not there.
        """
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter()
        except ImportError as error:
            raise ConfigError(f"Tracing needs OpenTelemetry: pip install 'block-llm[otel]' ({error}).") from error
        resource = Resource.create()  # what OTEL_* variables say
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "block-gateway"}))
        self._trace = trace
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("block.gateway", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, exchange: "Exchange") -> None:
        """A request came in: its span begins, and its lines towards the instance carry the span on."""
        http, request = exchange.http, exchange.request
        given = {
            name: value for name in ("traceparent", "tracestate") if (value := http.header(name.encode())) is not None
        }
        path = http.path
        span = exchange.span = self._tracer.start_span(
            f"{http.method.decode('latin-1')} {path}", context=self._propagator.extract(given),
            kind=self._trace.SpanKind.SERVER, start_time=time.time_ns(),
            attributes={
                "http.request.method": http.method.decode("latin-1"), "url.path": path, "block.request_id": request.id,
                "gen_ai.operation.name": path.rpartition("/")[2], "gen_ai.request.model": request.model,
                "gen_ai.request.stream": exchange.stream, "block.prompt_tokens": request.prompt_tokens,
            },
        )  # fmt: skip
        carried: dict[str, str] = {}
        self._propagator.inject(carried, context=self._trace.set_span_in_context(span))
        self._carry(http, carried)

    @staticmethod
    def _carry(http: HttpRequest, carried: dict[str, str]) -> None:
        http.lines = [line for line in http.lines if not line[:12].lower().startswith(_PROPAGATED)]
        http.lines += [f"{name}: {value}\r\n".encode("latin-1") for name, value in carried.items()]

    def end(self, exchange: "Exchange", error: BlockError | None) -> None:
        """It is over."""
        span, exchange.span = exchange.span, None
        if span is None:
            return
        if span.is_recording():
            span.set_attributes({name: value for name, value in _attributes(exchange).items() if value is not None})
            if error is not None:
                code = error.code if isinstance(error, ClientError) else "stream_broken"
                span.set_attribute("error.type", code or type(error).__name__)
            if error is not None or exchange.status >= 500:
                span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, str(error) if error else None))
        span.end()

    def close(self) -> None:
        """Export what is left; waits for it as ``OTEL_BSP_EXPORT_TIMEOUT`` says."""
        self._provider.shutdown()


def _attributes(exchange: "Exchange") -> dict[str, Any]:
    decision, prediction, interval = exchange.decision, exchange.prediction, exchange.interval
    started_s, ended_s = exchange.arrived_s, exchange.answered_s
    timed = exchange.first_byte_s and exchange.stream
    return {
        "http.response.status_code": exchange.status or None,
        "block.instance": decision and decision.instance,
        "block.policy": decision and decision.policy,
        "block.evidence": decision and decision.evidence,
        "block.fallback": decision and decision.fallback,
        "block.attempts": exchange.attempts,
        "block.overhead_s": exchange.overhead_s,
        "block.predicted_ttft_s": prediction and prediction.ttft_s,
        "block.predicted_e2e_s": prediction and prediction.e2e_s,
        "block.predicted_e2e_low_s": interval and interval.e2e_low_s,
        "block.predicted_e2e_high_s": interval and interval.e2e_high_s,
        "block.measured_ttft_s": exchange.first_byte_s - started_s if timed else None,
        "block.measured_e2e_s": ended_s - started_s if ended_s else None,
        "gen_ai.usage.output_tokens": exchange.output_tokens,
    }
