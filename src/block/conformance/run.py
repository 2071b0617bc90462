"""Runs checks one after the other: a check that breaks on a socket error is a failed check, never a stopped run."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from typing import Final

import aiohttp

from block.conformance import cancel, connections, failures, headers, health, limits, scheduling, smuggling, stream
from block.conformance.check import Check, FailedError, NotApplicableError, Outcome, Result
from block.conformance.target import Target
from block.errors import UnknownNameError

GROUPS: Final[Mapping[str, tuple[Check, ...]]] = {
    "health": health.CHECKS,
    "errors": failures.CHECKS,
    "sse": stream.CHECKS,
    "headers": headers.CHECKS,
    "limits": limits.CHECKS,
    "cancel": cancel.CHECKS,
    "scheduling": scheduling.CHECKS,
    "connections": connections.CHECKS,
    "smuggling": smuggling.CHECKS,
}


def all_checks(only: Iterable[str] = ()) -> list[tuple[str, Check]]:
    """(group, check) of the named groups, all where none is named.

    Raises:
        UnknownNameError: there is no such group.
    """
    wanted = list(only) or list(GROUPS)
    for group in wanted:
        if group not in GROUPS:
            raise UnknownNameError("group of checks", group, GROUPS)
    return [(group, check) for group in GROUPS if group in wanted for check in GROUPS[group]]


async def run_checks(
    target: Target, only: Iterable[str] = (), progress: Callable[[Result], None] = lambda _: None
) -> list[Result]:
    """The results of all checks of the named groups, in order; ``progress`` hears each as it ends."""
    results: list[Result] = []
    for group, check in all_checks(only):
        result = await run_check(target, group, check)
        progress(result)
        results.append(result)
    return results


async def run_check(target: Target, group: str, check: Check) -> Result:
    """One check against the target."""
    started_s = monotonic()
    outcome, detail = Outcome.PASS, ""
    try:
        async with asyncio.timeout(4 * target.timeout_s + target.patience_s):
            await check.run(target)
    except NotApplicableError as reason:
        outcome, detail = Outcome.NOT_APPLICABLE, str(reason)
    except FailedError as failure:
        outcome, detail = Outcome.FAIL, str(failure)
    except TimeoutError:
        outcome, detail = Outcome.FAIL, "no answer in time"
    except (aiohttp.ClientError, OSError) as error:
        outcome, detail = Outcome.FAIL, f"the connection failed: {error or type(error).__name__}"
    return Result(
        group, check.name, check.required, outcome, detail, check.claim, check.reference, monotonic() - started_s
    )
