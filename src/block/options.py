"""A choice with options, written as one word: ``block-k:k=4``, ``replay:margin=0.1,spare=1``."""

from collections.abc import Mapping
from inspect import Parameter

from block.errors import ConfigError


def name_and_options(text: str) -> tuple[str, dict[str, int | float]]:
    """The name before the colon and the numbers after it.

    Raises:
        ConfigError: what follows the colon is not ``option=number``, separated by commas.
    """
    name, _, tail = text.partition(":")
    options: dict[str, int | float] = {}
    for part in filter(None, tail.split(",")):
        key, equals, number = part.partition("=")
        try:
            options[key] = float(number) if "." in number or "e" in number else int(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"Write options as {name}:option=number, not {text!r}.")
    return name, options


def check_options(whose: str, known: Mapping[str, Parameter], given: Mapping[str, object]) -> None:
    """``whose``: as it stands after *the*, "policy block-k". ``known``: parameters, every one with a number as its default.

    Raises:
        ConfigError: an option that there is not, or one whose value is no number of its default's type.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"The {whose} has no option {', '.join(unknown)}: {has}.")
    for option, value in given.items():
        default = known[option].default
        if isinstance(value, bool) or not isinstance(value, (int, type(default))):
            raise ConfigError(f"The option {option} of the {whose} must be a number like {default}, not {value!r}.")
