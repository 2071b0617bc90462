"""Length estimators by name."""

import inspect
from typing import Any

from block.errors import ConfigError, UnknownNameError
from block.length.learned import LearnedEstimator
from block.length.simple import ConstantEstimator, Estimator, HistoryEstimator, OracleEstimator

ESTIMATORS: dict[str, type[Estimator]] = {
    "constant": ConstantEstimator,
    "history": HistoryEstimator,
    "oracle": OracleEstimator,
    "learned": LearnedEstimator,
    "header": OracleEstimator,  # the same, told one by one (`tell`) by an experiment's request header
}


def make_estimator(name: str, **options: Any) -> Estimator:
    """An estimator by name; ``learned:FILE`` is the learned one with that model file.

    Raises:
        UnknownNameError: no estimator of that name.
        ConfigError: an option that it does not have or a value that it does not take.
        BadInputError: a model file that cannot be used.
    """
    name, _, file = name.partition(":")
    if file:
        options["model"] = file
    if name not in ESTIMATORS:
        raise UnknownNameError("length estimator", name, ESTIMATORS)
    kind = ESTIMATORS[name]
    known = [option for option in inspect.signature(kind).parameters if option != "bank"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(
            f"Length estimator {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}."
        )
    try:
        return kind(**options)
    except ValueError as error:
        raise ConfigError(f"Length estimator {name!r}: {error}.") from error
