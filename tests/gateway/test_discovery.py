"""Instances from a file and from DNS: the newest list wins, who is gone is drained, nonsense changes nothing."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from block.errors import ConfigError
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.members.discovery import Problem, members_of
from block.gateway.members.discovery.file import read_instances
from gateway.conftest import Client, Start, until
from gateway.fakes import FakeEngine, slowly

DNS = GatewayConfig(service_discovery="dns", discovery_name="localhost:9000", discovery_interval_s=0.05)


def config(**options: Any) -> GatewayConfig:
    return GatewayConfig(service_discovery="file", **options)


def names(client: Client) -> set[str]:
    return {str(name) for name in client.gateway.pool.instances}


def test_llm_ds_endpoint_file_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "endpoints.yaml"
    file.write_text(
        "endpoints:\n"
        "- {name: gpu1, namespace: default, address: 10.0.0.1, port: '8000', labels: {llm-d.ai/role: decode}}\n"
        "- {address: '::1', port: 8001, model: llama, hardware: h200, role: prefill, predictor_port: 8200}\n"
        "- {url: 'https://gpu3.example/base', profile: h200-llama3.1-8b, max_num_seqs: 64}\n"
    )
    assert read_instances(str(file), config()) == [
        InstanceConfig(name="gpu1", url="http://10.0.0.1:8000"),
        InstanceConfig(url="http://[::1]:8001", predictor="http://[::1]:8200"),
        InstanceConfig(url="https://gpu3.example/base", profile="h200-llama3.1-8b", max_num_seqs=64),
    ]
    found = read_instances(str(file), config(discovery_predictor_port=9))
    assert found[0].predictor == "http://10.0.0.1:9"
    file.write_text("endpoints:\n")
    assert read_instances(str(file), config()) == []


def test_instances_can_be_written_as_in_the_configuration(tmp_path: Path) -> None:
    rows = [{"url": "http://a:1", "name": "x"}, {"url": "http://b:2", "predictor": "http://b:3"}]
    expected = [InstanceConfig(url="http://a:1", name="x"), InstanceConfig(url="http://b:2", predictor="http://b:3")]
    as_json, as_toml = tmp_path / "i.json", tmp_path / "i.toml"
    as_json.write_text(json.dumps({"instances": rows}))
    as_toml.write_text(
        '[[instances]]\nurl = "http://a:1"\nname = "x"\n[[instances]]\nurl = "http://b:2"\npredictor = "http://b:3"\n'
    )
    assert read_instances(str(as_json), config()) == read_instances(str(as_toml), config()) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("endpoints: [", "cannot be understood"),
        ("endpoints: {a: 1}", "must hold a list"),
        ("[1, 2]", "must hold either"),
        ("{}", "must hold either"),
        ("endpoints: [{name: a}]", "entry 1"),
        ("endpoints: [{address: a, port: 1, colour: red}]", "colour"),
        ("endpoints: [{address: a, port: 1}, {address: a, port: 1}]", "two instances named 'a:1'"),
        ("endpoints: [{address: 'a/b c', port: x}]", "entry 1"),
        ("endpoints: !!python/object/apply:os.system [id]", "cannot be understood"),
    ],
)
def test_a_wrong_file_is_one_clear_sentence(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_instances(str(file), config())
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"service_discovery": "file"},
        {"service_discovery": "dns"},
        {"service_discovery": "dns", "discovery_name": "host"},
        {"service_discovery": "dns", "discovery_name": "host:0"},
    ],
)
def test_a_source_without_its_settings_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        members_of(GatewayConfig(**options))


async def test_a_changed_file_adds_and_drains_and_a_broken_one_changes_nothing(start: Start, tmp_path: Path) -> None:
    engines = [await FakeEngine(slowly(0.3)).start() for _ in range(3)]
    file = tmp_path / "endpoints.json"

    def write(*numbers: int) -> None:
        rows = [{"name": f"g{n}", "address": "127.0.0.1", "port": engines[n].port} for n in numbers]
        beside = tmp_path / "next"
        beside.write_text(json.dumps({"endpoints": rows}))
        os.replace(beside, file)  # noqa: PTH105  as an editor or Kubernetes does

    write(0, 1)
    client = await start(
        service_discovery="file", discovery_file=str(file), discovery_interval_s=0.05, wait=False
    )  # fmt: skip
    await until(lambda: len(client.gateway.pool.ready()) == 2)
    assert names(client) == {"g0", "g1"}
    asked = asyncio.create_task(client.post())
    await until(lambda: any(engine.heard for engine in engines))
    busy = "g0" if engines[0].heard else "g1"
    write(2)
    await until(lambda: names(client) == {busy, "g2"})  # the busy one finishes first
    assert client.gateway.pool.instances[busy].state == "draining"  # type: ignore[index]
    assert (await asked)[0] == 200
    await until(lambda: names(client) == {"g2"})
    _, text = await client.get("/metrics")
    assert 'endpoint="g0"' not in text.decode()
    assert 'endpoint="g1"' not in text.decode()
    file.write_text('{"endpoints": [{"colour": "red"}]}')
    await until(lambda: client.gateway.metrics.discovered.labels("failed")._value.get() >= 1)
    assert names(client) == {"g2"}
    write(0, 2)
    await until(lambda: names(client) == {"g0", "g2"})
    for engine in engines:
        await engine.stop()


async def test_discovery_leaves_the_configurations_and_the_admins_instances_alone(start: Start, tmp_path: Path) -> None:
    static, found, added = FakeEngine(), await FakeEngine().start(), await FakeEngine().start()
    file = tmp_path / "e.json"
    file.write_text(json.dumps({"endpoints": [{"name": "found", "address": "127.0.0.1", "port": found.port}]}))
    client = await start(
        static, service_discovery="file", discovery_file=str(file), discovery_interval_s=0.05, admin_key="k", wait=False
    )
    headers = {"authorization": "Bearer k"}
    async with client.session.post(
        client.url + "/admin/instances", json={"url": added.url, "name": "added"}, headers=headers
    ) as answer:
        assert answer.status == 201
    await until(lambda: names(client) == {"e0", "found", "added"})
    async with client.session.delete(client.url + "/admin/instances/found", headers=headers) as answer:
        assert answer.status == 200
    file.write_text(
        json.dumps(
            {
                "endpoints": [
                    {"name": "found", "address": "127.0.0.1", "port": found.port},
                    {"name": "e0", "address": "127.0.0.1", "port": found.port},
                ]
            }
        )
    )
    await asyncio.sleep(0.2)
    assert names(client) == {"e0", "added"}  # who was dismissed stays away, a name in use is not taken over
    assert client.gateway.pool.instances["e0"].config.url == static.url  # type: ignore[index]
    file.write_text('{"endpoints": []}')
    await asyncio.sleep(0.2)
    assert names(client) == {"e0", "added"}
    await found.stop()
    await added.stop()


async def test_all_addresses_of_a_name_are_instances() -> None:
    lists = members_of(DNS)
    found = await anext(lists)
    assert not isinstance(found, Problem)
    assert "127.0.0.1:9000" in {instance.id for instance in found}
    await lists.aclose()
    lost = members_of(
        GatewayConfig(service_discovery="dns", discovery_name="no-such-host.invalid:1", discovery_interval_s=0.05)
    )
    assert isinstance(await anext(lost), Problem)
    await lost.aclose()


class _Zone(asyncio.DatagramProtocol):
    """A name server that knows some SRV records."""

    def __init__(self) -> None:
        self.targets: list[tuple[str, int]] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        import dns.flags
        import dns.message
        import dns.rcode
        import dns.rrset

        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        name = query.question[0].name
        if self.targets:
            records = [f"0 5 {port} {host}." for host, port in self.targets]
            answer.answer.append(dns.rrset.from_text(name, 1, "IN", "SRV", *records))
        else:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self.transport.sendto(answer.to_wire(), addr)


@pytest.fixture
async def zone() -> AsyncIterator[tuple[_Zone, str]]:
    pytest.importorskip("dns", reason="needs dnspython: pip install 'block-llm[dns]'")
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
        _Zone, local_addr=("127.0.0.1", 0)
    )  # fmt: skip
    yield protocol, f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"
    transport.close()


async def test_srv_records_bring_hosts_and_ports_and_a_name_that_is_gone_keeps_them(zone: tuple[_Zone, str]) -> None:
    server, address = zone
    lists = members_of(
        GatewayConfig(
            service_discovery="dns", discovery_name="_http._tcp.vllm.example", discovery_server=address,
            discovery_interval_s=0.05, discovery_predictor_port=8200, discovery_scheme="https",
        )
    )  # fmt: skip
    server.targets = [("gpu1.example", 8000), ("gpu2.example", 8001)]
    found = await anext(lists)
    assert not isinstance(found, Problem)
    assert [(i.url, i.predictor) for i in found] == [
        ("https://gpu1.example:8000", "https://gpu1.example:8200"),
        ("https://gpu2.example:8001", "https://gpu2.example:8200"),
    ]
    server.targets = []
    assert isinstance(await anext(lists), Problem)
    server.targets = [("gpu2.example", 8001)]
    while isinstance(found := await anext(lists), Problem):
        pass
    assert [i.id for i in found] == ["gpu2.example:8001"]
    await lists.aclose()
