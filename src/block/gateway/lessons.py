"""What a whole answer teaches: latencies for the metrics, lengths for the estimator, bytes per prompt token."""

from typing import Any, Final

from block.gateway.exchange import Exchange
from block.gateway.metrics import Metrics
from block.gateway.openai import PromptRatio, usage_of

OBSERVED_PER_S: Final = 100
"""Answers that the length estimator learns from in a second: more of the same second teach nothing and cost time."""


class Lessons:
    """Takes every answer that came whole and was no error."""

    def __init__(self, estimator: Any, ratio: PromptRatio, metrics: Metrics) -> None:
        self._estimator, self._ratio, self._metrics = estimator, ratio, metrics
        self._second, self._observed = 0, 0

    def take(self, exchange: Exchange) -> None:
        """Learn from one answer."""
        metrics = self._metrics.model(exchange.request.model)
        duration_s = exchange.answered_s - exchange.arrived_s
        metrics.duration.observe(duration_s)
        if not exchange.generating:
            return
        output_tokens = self._tokens(exchange)
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
        if exchange.request.slo is not None:
            self._hold_against_slo(exchange, ttft_s, tpot_s, duration_s)

    def _tokens(self, exchange: Exchange) -> int | None:
        """Output tokens: what usage says, else the events of the stream that carried some."""
        request, metrics = exchange.request, self._metrics.model(exchange.request.model)
        prompt_tokens, output_tokens = usage_of(exchange.before_last + exchange.last)
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
