"""Every controller by name, with what it is, how to make one, and the guard that suits it."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from block.autoscale.controllers.guard import Guard
from block.autoscale.controllers.hpa import kv_hpa, queue_hpa, rate_hpa
from block.autoscale.controllers.replay import Replay
from block.autoscale.controllers.rules import Preempt, Relief, Static
from block.autoscale.terms import Controller, Kind
from block.core import Slo
from block.errors import ConfigError, UnknownNameError
from block.options import check_options, name_and_options


class ControllerSpec(NamedTuple):
    """One row: ``make`` takes the kinds, the SLO, and its options by name, all with defaults."""

    description: str
    make: Callable[..., Controller]
    guard: Guard


_AT_ONCE = Guard(settle_s=0.0)
_PATIENT = Guard()

CONTROLLERS: dict[str, ControllerSpec] = {
    "replay": ControllerSpec(
        "the fewest (or cheapest mix) that meet the SLO when recent arrivals come again at the forecast rate",
        Replay,
        _PATIENT,
    ),
    "static": ControllerSpec("always the same count", Static, _AT_ONCE),
    "preempt": ControllerSpec(
        "one more for every request whose best predicted E2E exceeds 70 s (published)", Preempt, _AT_ONCE
    ),
    "relief": ControllerSpec("one more after a measured latency above its threshold", Relief, _AT_ONCE),
    "hpa-queue": ControllerSpec("Kubernetes' formula on requests waiting", queue_hpa, _PATIENT),
    "hpa-kv": ControllerSpec("Kubernetes' formula on the used fraction of the KV cache", kv_hpa, _PATIENT),
    "hpa-rps": ControllerSpec("Kubernetes' formula on requests a second", rate_hpa, _PATIENT),
}


def controller_names() -> list[str]:
    """Names of all controllers, in the table's order."""
    return list(CONTROLLERS)


def guard_for(name: str) -> Guard:
    """The guard that suits a controller (a name or a word with options) unless the operator says otherwise.

    Raises:
        UnknownNameError: no such controller.
    """
    return _spec(name.partition(":")[0]).guard


def controller_from(text: str, kinds: Sequence[Kind], slo: Slo | None = None, **options: float) -> Controller:
    """A controller written as one word, ``replay`` or ``replay:margin=0.1``, and options by name; those given win.

    Raises:
        UnknownNameError: no such controller; lists those there are.
        ConfigError: no kinds, an option that it does not have, or a value that it cannot take.
    """
    name, written = name_and_options(text)
    spec = _spec(name)
    if not kinds:
        raise ConfigError("A controller needs at least one kind of instance.")
    known = {key: p for key, p in inspect.signature(spec.make).parameters.items() if p.kind is p.KEYWORD_ONLY}
    given: dict[str, Any] = written | options
    check_options(f"controller {name}", known, given)
    return spec.make(tuple(kinds), slo, **given)


def _spec(name: str) -> ControllerSpec:
    if name not in CONTROLLERS:
        raise UnknownNameError("controller", name, CONTROLLERS)
    return CONTROLLERS[name]
