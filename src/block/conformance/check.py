"""What a check is, and how it says that something is wrong."""

from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import msgspec

from block.errors import BlockError

if TYPE_CHECKING:
    from block.conformance.target import Target

RFC9110: Final = "https://www.rfc-editor.org/rfc/rfc9110#section-"
RFC9112: Final = "https://www.rfc-editor.org/rfc/rfc9112#section-"
OPENAI: Final = "https://platform.openai.com/docs/"
SSE: Final = "https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream"
CUSTOM: Final = "convention of vLLM, SGLang and llm-d gateways"


class Outcome(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    NOT_APPLICABLE = "not applicable"


class FailedError(BlockError):
    """The claim does not hold; the message says what was seen."""


class NotApplicableError(BlockError):
    """The claim cannot be observed here; the message says why."""


Run = Callable[["Target"], Awaitable[None]]


class Check(msgspec.Struct, frozen=True):
    """``required``: its failure makes the whole run fail. ``reference``: where the claim comes from."""

    name: str
    claim: str
    reference: str
    run: Run
    required: bool = True


class Result(msgspec.Struct, frozen=True):
    """How one check ended. ``detail``: what was seen, or why the check does not apply; empty for a pass."""

    group: str
    name: str
    required: bool
    outcome: Outcome
    detail: str
    claim: str
    reference: str
    duration_s: float

    @property
    def fatal(self) -> bool:
        return self.required and self.outcome is Outcome.FAIL


def expect(condition: object, message: str) -> None:
    """Raise FailedError with ``message`` unless the condition holds."""
    if not condition:
        raise FailedError(message)
