"""True output lengths for experiments: what the emulated engine's request header says. Only policy ``block-oracle`` has it."""

from typing import Any, Final

from block.core import Request
from block.gateway.http1 import HttpRequest
from block.length.table import make_estimator

HEADER: Final = b"x-emulate-output-tokens"


class HeaderLengths:
    """The ``header`` estimator, told each request's length before it is asked. A request without the header gets history."""

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
