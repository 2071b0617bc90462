"""What is seen: arrivals with their true lengths once known, of all gateways, and what is not seen is said."""

from collections.abc import Sequence
from typing import Any

from autoscale_live.fakes import FakeActuator, FakeGateway
from block.autoscale.live.membership import Membership
from block.autoscale.live.observer import Observer
from block.autoscale.terms import Kind, Phase

KINDS = [Kind(name="small"), Kind(name="large")]


def observer_of(session: Any, fakes: Sequence[FakeGateway], actuator: Any = None) -> Observer:
    reached = [fake.gateway(session) for fake in fakes]
    return Observer(reached, Membership(reached, "none"), actuator or FakeActuator(), KINDS, session)


async def test_arrivals_get_their_true_output_when_they_end(session: Any, gateways: Any) -> None:
    (fake,) = await gateways()
    observer = observer_of(session, [fake])
    fake.arrive(2, output=50)
    first = (await observer.look(60.0, 5.0))[-1]
    assert [one.output_tokens for one in first.arrivals] == [50, 50]
    fake.finish(2, output=77)
    window = await observer.look(60.0, 5.0)
    assert [one.output_tokens for one in window[0].arrivals] == [50, 77]
    assert window[1].arrivals == ()
    assert [(one.ttft_s, one.e2e_s) for one in window[1].served] == [(0.1, 1.0)]


async def test_an_arrival_without_an_estimate_gets_the_mean_of_those_that_ended(session: Any, gateways: Any) -> None:
    (fake,) = await gateways()
    observer = observer_of(session, [fake])
    fake.arrive(1, output=None)
    fake.finish(1, output=40)
    await observer.look(60.0, 5.0)
    fake.arrive(1, output=None)
    assert (await observer.look(60.0, 5.0))[-1].arrivals[0].output_tokens == 40


async def test_gateways_are_summed_and_the_largest_predictions_kept(session: Any, gateways: Any) -> None:
    fakes = await gateways(2)
    for fake, e2e_s in zip(fakes, (3.0, 90.0), strict=True):
        fake.seat("large-1", waiting=4, kv_free=25)
        fake.arrive(3, e2e_s=e2e_s)
    observer = observer_of(session, fakes)
    seen = (await observer.look(60.0, 5.0))[-1]
    assert len(seen.arrivals) == 6
    assert (seen.predicted_e2e_s, seen.slow_e2e_s[0], len(seen.slow_e2e_s)) == (90.0, 90.0, 6)
    assert (seen.in_flight, seen.queued) == (6, 2 + 2 + 4), "the instance that both know waits once"
    assert seen.kv_used == 0.75
    assert observer.foreign == {"large": 1}


async def test_what_came_while_a_gateway_was_silent_belongs_to_its_time(session: Any, gateways: Any) -> None:
    (fake,) = await gateways()
    observer = observer_of(session, [fake])
    await observer.look(60.0, 5.0)
    await fake.stop()
    fake.arrive(5)
    for one in fake.arrivals:
        one[1] -= 3.0
    blind = (await observer.look(60.0, 5.0))[-1]
    assert blind.blind == (fake.url,)
    assert blind.in_flight is None
    await fake.start()
    window = await observer.look(60.0, 5.0)
    assert len(window[-1].arrivals) == 0
    assert sum(len(seen.arrivals) for seen in window) == 5


async def test_a_member_is_ready_only_when_a_gateway_finds_it_so(session: Any, gateways: Any) -> None:
    (fake,) = await gateways()
    actuator = FakeActuator()
    observer = observer_of(session, [fake], actuator)
    await actuator.scale_to({"small": 1})
    assert (await observer.look(60.0, 5.0))[-1].members[0].phase is Phase.STARTING
    fake.seat("small-0")
    assert (await observer.look(60.0, 5.0))[-1].members[0].phase is Phase.READY
    fake.seat("small-0", state="down")
    assert (await observer.look(60.0, 5.0))[-1].members[0].phase is Phase.DOWN


async def test_an_actuator_that_cannot_say_is_blind_and_its_members_stay_as_known(session: Any, gateways: Any) -> None:
    (fake,) = await gateways()
    fake.seat("small-0")
    actuator = FakeActuator()
    observer = observer_of(session, [fake], actuator)
    await actuator.scale_to({"small": 1})
    await observer.look(60.0, 5.0)
    actuator.silent = True
    seen = (await observer.look(60.0, 5.0))[-1]
    assert seen.blind == ("actuator",)
    assert [member.id for member in seen.members] == ["small-0"]


async def test_an_instance_that_is_told_twice_does_not_count_twice(session: Any, gateways: Any, caplog: Any) -> None:
    actuator = FakeActuator()
    await actuator.scale_to({"small": 1})
    actuator.there = actuator.there * 2
    observer = observer_of(session, await gateways(), actuator)
    assert (await observer.look(60.0, 5.0))[-1].blind == ("actuator",)
    assert "it tells of 'small-0' more than once." in caplog.text


async def test_a_kind_that_is_not_configured_is_said_once(session: Any, gateways: Any, caplog: Any) -> None:
    fakes = await gateways()
    actuator = FakeActuator()
    await actuator.scale_to({"huge": 1})
    observer = observer_of(session, fakes, actuator)
    seen = [(await observer.look(60.0, 5.0))[-1] for _ in range(3)]
    assert [one.blind for one in seen] == [("actuator",)] * 3
    assert caplog.text.count("it tells of the kind 'huge'; configured are small, large.") == 1


async def test_it_is_known_why_a_gateway_cannot_be_asked(session: Any, gateways: Any) -> None:
    strict, gone = await gateways(2)
    await gone.stop()
    reached = [strict.gateway(session, "wrong"), gone.gateway(session)]
    observer = Observer(reached, Membership(reached, "none"), FakeActuator(), KINDS, session)
    await observer.look(60.0, 5.0)
    assert observer.silent == {
        strict.url: "it refuses the admin key", gone.url: "no connection: Connection refused",
    }  # fmt: skip


async def test_a_predictor_is_asked_where_no_gateway_has_fresh_evidence(session: Any, gateways: Any) -> None:
    fake, predictor = await gateways(2)
    fake.seat("small-0", predictor=predictor.url)
    observer = observer_of(session, [fake])
    seen = (await observer.look(60.0, 5.0))[-1]
    assert seen.blind == (), "its evidence is fresh: nobody else is asked"
    assert not predictor.calls
