"""Every actuator by the ``type`` of its settings. What needs an extra package imports it when it first needs it."""

from typing import Any, Final

from block.autoscale.actuators.command import ExecActuator, ExecSettings
from block.autoscale.actuators.kubernetes import KubernetesActuator, KubernetesSettings
from block.autoscale.actuators.local import LocalActuator, LocalSettings
from block.autoscale.actuators.metric import MetricActuator, MetricSettings
from block.autoscale.actuators.ray import RayActuator, RaySettings
from block.autoscale.actuators.surroundings import Surroundings
from block.autoscale.terms import Actuator

ActuatorSettings = LocalSettings | KubernetesSettings | RaySettings | ExecSettings | MetricSettings

ACTUATORS: Final[dict[str, tuple[type[Any], type[Any]]]] = {
    "local": (LocalSettings, LocalActuator),
    "kubernetes": (KubernetesSettings, KubernetesActuator),
    "ray": (RaySettings, RayActuator),
    "exec": (ExecSettings, ExecActuator),
    "metric": (MetricSettings, MetricActuator),
}
"""The type's name -> its settings and what they make."""


def make_actuator(settings: ActuatorSettings, surroundings: Surroundings) -> Actuator:
    """The actuator that the settings describe.

    Raises:
        ConfigError: the settings do not fit the kinds.
    """
    made: Actuator = next(make for kind, make in ACTUATORS.values() if kind is type(settings))(settings, surroundings)
    return made
