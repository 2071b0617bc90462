"""Takes the lists of a source as they come: what is wrong with one changes nothing, is logged once and counted."""

import logging
from typing import Final

from block.gateway.members.discovery import Lists, Problem
from block.gateway.members.membership import Membership, Origin
from block.gateway.records.metrics import Metrics

DISCOVERED_MAX: Final = 2048

log = logging.getLogger("block.gateway")


async def follow(lists: Lists, members: Membership, metrics: Metrics) -> None:
    """Until cancelled."""
    said: str | None = None
    async for found in lists:
        problem = _problem_of(found)
        if isinstance(found, Problem) or problem is not None:
            metrics.discovered.labels("failed").inc()
            if problem != said:
                log.warning("discovery: %s", problem)
            said = problem
            continue
        said = None
        metrics.discovered.labels("ok").inc()
        came, went = members.reconcile(Origin.DISCOVERY, found)
        if came or went:
            log.info("discovery: %d instances came, %d went", came, went)


def _problem_of(found: object) -> str | None:
    if isinstance(found, Problem):
        return found.reason
    if isinstance(found, list) and len(found) > DISCOVERED_MAX:
        return f"{len(found)} instances are more than the {DISCOVERED_MAX} that one gateway takes"
    return None
