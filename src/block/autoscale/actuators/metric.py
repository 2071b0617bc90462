"""No actuator of Block's at all: the counts are published and somebody else follows them.

``block_desired_instances{kind}`` at ``/metrics`` and the same counts as JSON at ``/desired`` are what a HorizontalPodAutoscaler or
a KEDA scaler reads (``deploy/``); Block needs no right in the cluster.
"""

from collections.abc import Mapping, Sequence

import msgspec

from block.autoscale.actuators.surroundings import Surroundings
from block.autoscale.terms import Member


class MetricSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="metric"
):
    """There is nothing to set."""


class MetricActuator:
    """Does nothing: the keeper publishes what it wants whatever the actuator is."""

    keeps_members = False

    def __init__(self, settings: MetricSettings, surroundings: Surroundings) -> None:
        pass

    async def scale_to(self, want: Mapping[str, int]) -> None:
        return

    async def members(self) -> Sequence[Member]:
        return ()

    async def close(self) -> None:
        return
