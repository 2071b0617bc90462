"""Length estimators as the gateway has them: their figures as metrics, and true lengths for experiments."""

from collections.abc import Iterator
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from block.core import Request
from block.gateway.wire.http1 import HttpRequest
from block.length.simple import READINGS
from block.length.table import make_estimator

HEADER: Final = b"x-emulate-output-tokens"


class LengthCollector(Collector):
    """The readings of an estimator, taken when somebody asks for the metrics."""

    def __init__(self, estimator: Any) -> None:
        self._estimator = estimator

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for reading in self._estimator.readings():
            family = families.get(reading.name)
            if family is None:
                kind = CounterMetricFamily if reading.name.endswith("_total") else GaugeMetricFamily
                family = families[reading.name] = kind(
                    reading.name, READINGS[reading.name], labels=list(reading.labels)
                )
            family.add_metric(list(reading.labels.values()), reading.value)  # type: ignore[attr-defined]
        yield from families.values()


class HeaderLengths:
    """The true output lengths that the emulated engine's request header says; only policy ``block-oracle`` has it.

    The ``header`` estimator, told each request's length before it is asked. A request without the header gets history.
    """

    def __init__(self) -> None:
        self._estimator: Any = make_estimator("header")
        self.bank = self._estimator.bank

    def listen(self, request: Request, http: HttpRequest) -> None:
        """Note what the header says."""
        text = http.fields.get(HEADER)
        if text is not None and text.isdigit() and 0 < len(text) < 9:
            self._estimator.tell(request.id, int(text))

    def estimate(self, request: Request) -> Any:
        return self._estimator.estimate(request)

    def observe(self, request: Request, output_tokens: int) -> None:
        self._estimator.observe(request, output_tokens)

    def readings(self) -> Iterator[Any]:
        return self._estimator.readings()  # type: ignore[no-any-return]
