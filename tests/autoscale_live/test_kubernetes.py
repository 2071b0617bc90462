"""Pods as instances, against a real API server where there is one and an emulated one otherwise (see ``cluster``).

The real one: ``tools/kubernetes/build.sh /tmp/kubernetes && BLOCK_KUBERNETES=/tmp/kubernetes pytest tests/autoscale_live``.
"""

# ruff: noqa: ASYNC110  (what is waited for happens in another process)

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes_asyncio", reason="pip install 'block-llm[kubernetes]'")
yaml = pytest.importorskip("yaml", reason="pip install pyyaml")

from autoscale_live.cluster import (  # noqa: E402
    AUTOSCALER,
    COST,
    GATEWAY,
    LWS_DEFINITION,
    NAMESPACE,
    Cluster,
    EmulatedCluster,
    RealCluster,
    path_of,
    programs,
)  # fmt: skip
from autoscale_live.fakes import FakeGateway  # noqa: E402
from block.autoscale.actuators.kubernetes import KubernetesActuator, KubernetesSettings, Workload  # noqa: E402
from block.autoscale.actuators.surroundings import Surroundings  # noqa: E402
from block.autoscale.live.lease import LeaseLock  # noqa: E402
from block.autoscale.live.membership import Membership  # noqa: E402
from block.autoscale.terms import Kind, Phase  # noqa: E402
from block.errors import ActuatorError, ConfigError  # noqa: E402
from block.gateway.config import GatewayConfig  # noqa: E402
from block.gateway.members.discovery import Problem  # noqa: E402
from block.gateway.members.discovery import kubernetes as discovery  # noqa: E402

DEPLOY = Path(__file__).parents[2] / "deploy" / "kubernetes"
KINDS = {"gpu": Kind(name="gpu")}
HOW = "tools/kubernetes/build.sh makes the programs, BLOCK_KUBERNETES names their folder; etcd must be installed"


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    folder = programs()
    if folder is None:
        pytest.skip(f"no Kubernetes here: {HOW}")
    cluster = RealCluster(folder, tmp_path_factory.mktemp("kubernetes"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(params=["emulated", "real"])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    """With the roles of ``deploy/`` in force."""
    if request.param == "real":
        found = request.getfixturevalue("control_plane")
        yield found
        await found.clear()
        return
    emulated = await EmulatedCluster(tmp_path).start()
    yield emulated
    await emulated.stop()


async def rights(cluster: Cluster) -> None:
    """Apply the roles that ``deploy/`` gives (the emulated one lets everybody do everything)."""
    for file in ("autoscaler.yaml", "gateway.yaml"):
        for item in yaml.safe_load_all((DEPLOY / file).read_text()):
            if cluster.real and item["kind"] in ("ServiceAccount", "Role", "RoleBinding"):
                if item["kind"] == "RoleBinding":
                    item["subjects"][0]["namespace"] = NAMESPACE
                path = path_of(item["kind"])
                names = {one["metadata"]["name"] for one in (await cluster.ask("GET", path))["items"]}
                if item["metadata"]["name"] not in names:
                    await cluster.create(item)


class Scaled:
    """An actuator on a cluster, the gateway that its pods join, the membership between."""

    def __init__(
        self, cluster: Cluster, actuator: KubernetesActuator, membership: Membership, gateway: FakeGateway
    ) -> None:
        self.cluster, self.actuator, self.membership, self.gateway = cluster, actuator, membership, gateway

    async def phases(self) -> list[Phase]:
        return [member.phase for member in await self.actuator.members()]

    async def reach(self, *phases: str) -> None:
        async with asyncio.timeout(30):
            while sorted(await self.phases()) != sorted(phases):
                await asyncio.sleep(0.1)


@pytest.fixture
async def scaled(cluster: Cluster, session: Any, gateways: Any) -> AsyncIterator[Any]:
    await rights(cluster)
    (gateway,) = await gateways()
    made: list[tuple[KubernetesActuator, asyncio.Task[None]]] = []

    async def make(resource: Any = "deployment", name: str = "engine", **settings: Any) -> Scaled:
        membership = Membership([gateway.gateway(session)])
        workload = Workload(name=name, resource=resource, port=8000, predictor_port=8200)
        given = KubernetesSettings(workloads={"gpu": workload}, kubeconfig=cluster.kubeconfig(AUTOSCALER), **settings)
        actuator = KubernetesActuator(given, Surroundings("test", KINDS, membership, session))
        made.append((actuator, asyncio.create_task(_beat(membership))))
        return Scaled(cluster, actuator, membership, gateway)

    yield make
    for actuator, beating in made:
        beating.cancel()
        await actuator.close()


async def _beat(membership: Membership) -> None:
    while True:
        await membership.beat()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet"])
async def test_a_workload_is_scaled_up_and_its_pods_join_the_gateway_when_ready(
    cluster: Cluster, scaled: Any, kind: str
) -> None:
    await cluster.workload(kind, "engine", 1)
    await cluster.pods_until("engine", 1)
    one = await scaled(kind.lower())
    await one.actuator.scale_to({"gpu": 3})
    await cluster.pods_until("engine", 3)
    assert await one.phases() == [Phase.STARTING] * 3
    names = await cluster.make_all_ready("engine")
    await one.reach(*["ready"] * 3)
    async with asyncio.timeout(10):
        while sorted(one.gateway.instances) != sorted(names):
            await asyncio.sleep(0.05)
    joined = one.gateway.instances[names[0]]
    assert (joined["url"], joined["predictor"]) == ("http://127.0.0.1:8000", "http://127.0.0.1:8200")
    assert set(one.actuator.ordered_s) == set(names)


async def test_a_pod_is_drained_before_the_count_is_lowered(cluster: Cluster, scaled: Any) -> None:
    await cluster.workload("Deployment", "engine", 3)
    await cluster.pods_until("engine", 3)
    one = await scaled()
    names = await cluster.make_all_ready("engine")
    await one.reach(*["ready"] * 3)
    async with asyncio.timeout(10):
        while len(one.gateway.instances) < 3:
            await asyncio.sleep(0.05)
    for name in names:
        one.gateway.instances[name]["in_flight"] = 5
    one.gateway.instances[names[1]]["in_flight"] = 1
    await one.membership.beat()
    await one.actuator.scale_to({"gpu": 2})
    await one.actuator.scale_to({"gpu": 2})  # again, as the keeper does
    async with asyncio.timeout(10):
        while one.gateway.instances[names[1]]["state"] != "draining":
            await asyncio.sleep(0.05)
    assert sorted(await one.phases()) == ["draining", "ready", "ready"]
    marked = await cluster.ask("GET", path_of("Pod", names[1]))
    assert marked["metadata"]["annotations"][COST] == "-1000"
    await asyncio.sleep(0.3)
    assert len(await cluster.pods("engine")) == 3, "it still has a request"
    one.gateway.instances[names[1]]["in_flight"] = 0
    left = await cluster.pods_until("engine", 2)
    if not cluster.real:  # Kubernetes heeds the cost from 1.22 on; the real one that can be built here is 1.20
        assert names[1] not in {pod["metadata"]["name"] for pod in left}


async def test_a_count_raised_while_a_pod_drains_keeps_room_for_it(cluster: Cluster, scaled: Any) -> None:
    await cluster.workload("Deployment", "engine", 2)
    await cluster.pods_until("engine", 2)
    one = await scaled()
    names = await cluster.make_all_ready("engine")
    await one.reach("ready", "ready")
    async with asyncio.timeout(10):
        while len(one.gateway.instances) < 2:
            await asyncio.sleep(0.05)
    for name in names:
        one.gateway.instances[name]["in_flight"] = 1
    await one.membership.beat()
    await one.actuator.scale_to({"gpu": 1})
    await one.actuator.scale_to({"gpu": 2})
    await cluster.pods_until("engine", 3)
    assert sorted(await one.phases()) == ["draining", "ready", "starting"]


async def test_of_a_stateful_set_the_highest_ordinal_is_drained(cluster: Cluster, scaled: Any) -> None:
    await cluster.workload("StatefulSet", "engine", 3)
    await cluster.pods_until("engine", 3)
    one = await scaled("statefulset")
    await cluster.make_all_ready("engine")
    await one.reach(*["ready"] * 3)
    await one.actuator.scale_to({"gpu": 1})
    left = await cluster.pods_until("engine", 1)
    assert [pod["metadata"]["name"] for pod in left] == ["engine-0"]


async def test_a_leader_worker_set_is_scaled_by_its_groups(cluster: Cluster, scaled: Any) -> None:
    if cluster.real:
        definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        await cluster.ask("POST", definitions, LWS_DEFINITION)
        async with asyncio.timeout(20):
            while True:
                try:
                    await cluster.workload("LeaderWorkerSet", "big", 1)
                    break
                except (AssertionError, ValueError):  # not served yet
                    await asyncio.sleep(0.5)
        selected = {"status": {"replicas": 1, "hpaPodSelector": "app=big"}}
        await cluster.ask(
            "PATCH", path_of("LeaderWorkerSet", "big") + "/status", selected, "application/merge-patch+json"
        )
    else:
        await cluster.workload("LeaderWorkerSet", "big", 1)
    one = await scaled("leaderworkerset", "big")
    await one.actuator.scale_to({"gpu": 2})
    assert (await cluster.ask("GET", path_of("LeaderWorkerSet", "big")))["spec"]["replicas"] == 2
    if not cluster.real:  # its controller does not run there
        await cluster.make_all_ready("big")
        await one.reach("ready", "ready")


async def test_what_the_api_refuses_is_an_actuator_error_that_says_why(cluster: Cluster, scaled: Any) -> None:
    one = await scaled(name="nothing-there")
    with pytest.raises(ActuatorError, match=r"refused GET .*/deployments/nothing-there/scale: 404"):
        await one.actuator.scale_to({"gpu": 1})


async def test_a_lease_has_one_holder_and_passes_on_when_it_is_not_renewed(
    cluster: Cluster, scaled: Any, monkeypatch: Any
) -> None:
    del scaled  # its rights
    locks = [LeaseLock("block-autoscale-test", NAMESPACE, cluster.kubeconfig(AUTOSCALER), None, 5.0) for _ in range(2)]
    assert [await locks[0].held(), await locks[1].held(), await locks[0].held()] == [True, False, True]
    monkeypatch.setattr("block.autoscale.live.lease.LEASE_S", 1)
    assert await locks[0].held()
    assert not await locks[1].held()
    await asyncio.sleep(1.2)
    assert await locks[1].held()
    assert not await locks[0].held()
    for lock in locks:
        await lock.release()
    if cluster.real:
        await cluster.ask("DELETE", path_of("Lease", "block-autoscale-test"))


async def test_a_lease_is_not_held_where_the_api_does_not_answer(tmp_path: Path) -> None:
    gone = EmulatedCluster(tmp_path)
    gone.url = "http://127.0.0.1:9"
    lock = LeaseLock("a", NAMESPACE, gone.kubeconfig(), None, 1.0)
    assert not await lock.held()
    await lock.release()


async def test_gateways_find_ready_pods_as_they_come_and_go(cluster: Cluster, scaled: Any, monkeypatch: Any) -> None:
    del scaled
    await cluster.workload("Deployment", "engine", 2)
    await cluster.pods_until("engine", 2)
    monkeypatch.setenv("KUBECONFIG", cluster.kubeconfig(GATEWAY))
    monkeypatch.setattr(
        "kubernetes_asyncio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", cluster.kubeconfig(GATEWAY)
    )
    config = GatewayConfig(
        service_discovery="k8s", discovery_name=f"{NAMESPACE}/pods:app=engine:8000", discovery_predictor_port=8200
    )
    lists = discovery.watch(config)
    async with asyncio.timeout(30):
        assert await anext(lists) == []
        names = sorted(await cluster.make_all_ready("engine"))
        found: Any = []
        while len(found) < 2:
            found = await anext(lists)
        assert [one.name for one in found] == names
        assert (found[0].url, found[0].predictor) == ("http://127.0.0.1:8000", "http://127.0.0.1:8200")
        await cluster.make_ready(names[0], ready=False)
        assert [one.name for one in await anext(lists)] == names[1:]
    await lists.aclose()


async def test_gateways_find_a_services_ready_endpoints(tmp_path: Path, monkeypatch: Any) -> None:
    cluster = await EmulatedCluster(
        tmp_path
    ).start()  # the real one that can be built here has no discovery.k8s.io/v1 yet
    monkeypatch.setattr(
        "kubernetes_asyncio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", cluster.kubeconfig(GATEWAY)
    )
    lists = discovery.watch(GatewayConfig(service_discovery="k8s", discovery_name="engine:http"))
    piece = {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "engine-1", "labels": {"kubernetes.io/service-name": "engine"}},
        "ports": [{"name": "metrics", "port": 9000}, {"name": "http", "port": 8000}],
        "endpoints": [
            {"addresses": ["10.0.0.1"], "conditions": {"ready": True}, "targetRef": {"kind": "Pod", "name": "engine-a"}},
            {"addresses": ["10.0.0.2"], "conditions": {"ready": False}, "targetRef": {"kind": "Pod", "name": "engine-b"}},
            {"addresses": ["10.0.0.3"], "conditions": {"ready": True, "terminating": True}},
        ],
    }  # fmt: skip
    async with asyncio.timeout(20):
        assert await anext(lists) == []
        await cluster.create(piece)
        (found,) = await anext(lists)  # type: ignore[misc]
        assert (found.name, found.url) == ("engine-a", "http://10.0.0.1:8000")
        cluster.refuse = {"GET"}
        await cluster.stop()
        assert isinstance(await anext(lists), Problem)
    await lists.aclose()


@pytest.mark.parametrize("name", ["", "ns/", "pods:engine:8000", "pods:app=engine"])
def test_a_discovery_name_that_cannot_be_understood_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="discovery_name"):
        discovery.wanted(name)


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_yaml_whose_objects_say_what_they_are(file: Path) -> None:
    items = list(yaml.safe_load_all(file.read_text()))
    assert items
    for item in items:
        assert item["apiVersion"]
        assert item["kind"]
        assert item["metadata"]["name"]


def test_the_examples_configuration_of_the_autoscaler_is_valid(tmp_path: Path, monkeypatch: Any) -> None:
    from block.autoscale.live.settings import load_settings

    items = yaml.safe_load_all((DEPLOY / "autoscaler.yaml").read_text())
    (text,) = [item["data"]["autoscale.toml"] for item in items if item["kind"] == "ConfigMap"]
    (tmp_path / "autoscale.toml").write_text(text)
    settings = load_settings(tmp_path / "autoscale.toml")
    assert [kind.name for kind in settings.kinds] == list(settings.actuator.workloads) == ["h200"]  # type: ignore[union-attr]


async def test_the_real_api_takes_the_examples(control_plane: RealCluster) -> None:
    """A dry run of every object whose kind that version knows."""
    for file in ("autoscaler.yaml", "gateway.yaml"):
        for item in yaml.safe_load_all((DEPLOY / file).read_text()):
            if item["kind"] == "RoleBinding":
                item["subjects"][0]["namespace"] = NAMESPACE
            path, name = path_of(item["kind"]), item["metadata"]["name"]
            if item["kind"] in ("ServiceAccount", "Role", "RoleBinding"):
                item["metadata"]["name"] = name + "-dry"
            await control_plane.ask("POST", path + "?dryRun=All&fieldManager=test", item)
