"""What a whole answer teaches: latencies for the metrics, lengths for the estimator, bytes per prompt token."""

from typing import Any, Final

from block.gateway.deciding.residuals import Residuals
from block.gateway.exchange import Exchange
from block.gateway.records.metrics import Metrics
from block.gateway.records.requestlog import RequestLog
from block.gateway.wire.openai import PromptRatio, usage_of

OBSERVED_PER_S: Final = 500
"""Answers that the length estimator learns from in a second, at some 20 us each: more of the same second teach nothing."""


class Lessons:
    """Takes every answer that came whole and was no error."""

    def __init__(
        self, estimator: Any, ratio: PromptRatio, metrics: Metrics, request_log: RequestLog | None = None
    ) -> None:
        self._estimator, self._ratio, self._metrics, self._log = estimator, ratio, metrics, request_log
        self.residuals = Residuals()
        self._second, self._observed = 0, 0

    def take(self, exchange: Exchange) -> None:
        """Learn from one answer."""
        metrics = self._metrics.model(exchange.request.model)
        duration_s = exchange.answered_s - exchange.arrived_s
        metrics.duration.observe(duration_s)
        if not exchange.generating:
            return
        output_tokens = exchange.output_tokens = self._tokens(exchange)
        ttft_s = tpot_s = None
        if exchange.sse:
            ttft_s = exchange.first_byte_s - exchange.arrived_s
            metrics.ttft.observe(ttft_s)
            if output_tokens and output_tokens > 1:
                tpot_s = (duration_s - ttft_s) / (output_tokens - 1)
                metrics.tpot.observe(tpot_s)
            prediction = exchange.prediction
            if prediction is not None and prediction.ttft_s > 0:
                metrics.predicted_ttft.observe(prediction.ttft_s)
                metrics.prediction_error.observe(ttft_s / prediction.ttft_s)
        self._compare(exchange)
        if self._log is not None and output_tokens:
            self._log.note(exchange, output_tokens, ttft_s)
        if exchange.request.slo is not None:
            self._hold_against_slo(exchange, ttft_s, tpot_s, duration_s)

    def _compare(self, exchange: Exchange) -> None:
        """Measured with predicted, both from the decision on."""
        prediction, instance = exchange.prediction, exchange.instance
        if prediction is None or instance is None:
            return
        # the first event of /v1/responses says that the request came, not that a token did
        timed = exchange.sse and not exchange.http.target.startswith(b"/v1/responses")
        self.residuals.observe(
            instance.id, prediction, exchange.interval,
            ttft_s=exchange.first_byte_s - exchange.decided_s if timed else None,
            e2e_s=exchange.answered_s - exchange.decided_s, now_s=exchange.answered_s,
        )  # fmt: skip

    def _tokens(self, exchange: Exchange) -> int | None:
        """Output tokens: what usage says, else the events of the stream that carried some."""
        request, metrics = exchange.request, self._metrics.model(exchange.request.model)
        prompt_tokens, output_tokens = usage_of(exchange.before_last + exchange.last)
        if exchange.tape is not None and exchange.tape.attempts:  # the last instance tells of its part alone
            prompt_tokens, output_tokens = None, exchange.tape.count
        if prompt_tokens and exchange.prompt_bytes:
            self._ratio.observe(request.model, exchange.prompt_bytes, prompt_tokens)
        if output_tokens is None and exchange.sse:
            chat = b"/chat/" in exchange.http.target  # opens with an event that names the role alone
            output_tokens = max(1, exchange.events - 1 - chat)
        metrics.prompt_tokens.inc(prompt_tokens or request.prompt_tokens)
        if output_tokens:
            metrics.output_tokens.inc(output_tokens)
            if int(exchange.answered_s) != self._second:
                self._second, self._observed = int(exchange.answered_s), 0
            self._observed += 1
            if self._observed <= OBSERVED_PER_S:
                self._estimator.observe(request, output_tokens)
        return output_tokens

    def _hold_against_slo(self, exchange: Exchange, ttft_s: float | None, tpot_s: float | None, e2e_s: float) -> None:
        slo = exchange.request.slo
        assert slo is not None
        for kind, target_s, got_s in (
            ("ttft", slo.ttft_s, ttft_s),
            ("tpot", slo.tpot_s, tpot_s),
            ("e2e", slo.e2e_s, e2e_s),
        ):
            if target_s is not None and got_s is not None and got_s > target_s:
                self._metrics.slo_violations.labels(kind).inc()
