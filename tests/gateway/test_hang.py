"""Who is suspected of hanging, looked at without waiting: time is an argument."""

from block.core import InstanceId
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.members.health import HangWatch
from block.gateway.members.pool import TRIAL_START, Instance, Pool, State

LOOK_S = 0.1


def watched(count: int = 2, hang_after_s: float = 0.75) -> tuple[Pool, HangWatch, list[Instance]]:
    """Instances that have been streaming since second 0, and who watches them."""
    pool = Pool(
        GatewayConfig(instances=[InstanceConfig(url=f"http://h:{n}", name=f"e{n}") for n in range(1, count + 1)])
    )
    instances = list(pool.instances.values())
    for instance in instances:
        instance.state = State.READY
        pool.started(instance, 10, 0.0)
        instance.streaming = 1
    return pool, HangWatch(pool, {}, {}, hang_after_s), instances


def test_an_instance_that_is_silent_among_others_that_talk_is_suspected_within_a_second() -> None:
    _, watch, (silent, talking) = watched()
    for n in range(1, 11):
        talking.last_byte_s = n * LOOK_S
        watch.look(n * LOOK_S, 0.0)
        if silent.suspect:
            break
    assert silent.suspect
    assert n * LOOK_S <= 0.9
    assert talking.suspect is None


def test_a_gateway_that_was_kept_from_running_suspects_nobody() -> None:
    """Found by holding ten thousand streams on an overloaded machine: all instances were suspected, then on trial, at once."""
    _, watch, instances = watched()
    for n in range(1, 5):
        for instance in instances:
            instance.last_byte_s = n * LOOK_S
        watch.look(n * LOOK_S, 0.0)
    watch.look(5.0, 0.0)  # what came meanwhile has not been read
    assert [instance.suspect for instance in instances] == [None, None]
    for instance in instances:
        instance.last_byte_s = 5.01
    watch.look(5.1, 0.0)
    assert [instance.suspect for instance in instances] == [None, None]


def test_a_gateway_that_is_always_late_still_notices_an_instance_that_hangs() -> None:
    _, watch, (silent, talking) = watched()
    now_s = 0.0
    while silent.suspect is None and now_s < 10:
        now_s += 0.4
        talking.last_byte_s = now_s
        watch.look(now_s, 0.0)
    assert now_s <= 2.0
    assert talking.suspect is None


def test_those_on_trial_get_more_than_their_trial_allows_when_there_is_nobody_else() -> None:
    pool, _, instances = watched()
    for instance in instances:
        pool.set_suspect(instance, "silent")
        pool.set_suspect(instance, None)
    for _ in range(TRIAL_START):
        for instance in instances:
            pool.started(instance, 10, 1.0)
    assert all(instance.in_flight == instance.limit() for instance in instances)
    assert pool.eligible("") == (InstanceId("e1"), InstanceId("e2"))
    instances[0].trial = None
    pool.configure(GatewayConfig())
    assert pool.eligible("") == (InstanceId("e1"),)
