"""How good the served estimates were, over the last few hundred finished requests: what the metrics show."""

from dataclasses import dataclass


@dataclass(slots=True)
class Accuracy:
    """Running scores of finished requests, with exponential forgetting over about ``memory`` of them.

    One owner updates it (`record`); the gateway exports it. ``None``: nothing finished yet.
    """

    memory: int = 512
    finished: int = 0
    error_tokens: float | None = None
    """Mean absolute error of the expected total (metric ``block_length_error_tokens``)."""
    bias_tokens: float | None = None
    """Mean of expected minus true: positive when answers are shorter than told."""
    mean_tokens: float | None = None
    """Mean true length, to read the errors against."""
    coverage_fraction: float | None = None
    """How many ended within their own 10-90 % interval: 0.8 is calibrated (``block_length_coverage_fraction``)."""

    def record(self, expected: float, low: float, high: float, true_tokens: int) -> None:
        """Score one finished request; ``low``-``high`` was its 80 % interval."""
        self.finished += 1
        weight = max(1.0 / self.memory, 1.0 / self.finished)
        self.error_tokens = _moved(self.error_tokens, abs(expected - true_tokens), weight)
        self.bias_tokens = _moved(self.bias_tokens, expected - true_tokens, weight)
        self.mean_tokens = _moved(self.mean_tokens, true_tokens, weight)
        self.coverage_fraction = _moved(self.coverage_fraction, float(low <= true_tokens <= high), weight)


def _moved(mean: float | None, value: float, weight: float) -> float:
    return value if mean is None else mean + weight * (value - mean)
