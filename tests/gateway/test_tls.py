"""HTTPS towards clients and instances, certificates on both sides, renewed while the gateway runs."""

import asyncio
import os
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from block.errors import ConfigError
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.serve import Gateway
from gateway.conftest import Client, Start, until
from gateway.fakes import FakeEngine, FakePredictor, snapshot

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command for certificates")


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


class Authority:
    """A small one: ``issue`` makes NAME.pem and NAME.key for 127.0.0.1."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.cert, self.key = folder / f"{name}.pem", folder / f"{name}.key"
        openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-subj", f"/CN={name}", "-keyout", str(self.key), "-out", str(self.cert),
            "-addext", "keyUsage=critical,keyCertSign,digitalSignature",
        )  # fmt: skip

    def issue(self, name: str) -> tuple[Path, Path]:
        cert, key, request = (self.folder / f"{name}.{ending}" for ending in ("pem", "key", "csr"))
        openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}",
            "-keyout", str(key), "-out", str(request), "-addext", "subjectAltName=IP:127.0.0.1",
        )  # fmt: skip
        openssl(
            "x509", "-req", "-in", str(request), "-CA", str(self.cert), "-CAkey", str(self.key), "-CAcreateserial",
            "-days", "2", "-copy_extensions", "copy", "-out", str(cert),
        )  # fmt: skip
        return cert, key

    def client(self, cert: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.cert))
        if cert is not None:
            context.load_cert_chain(*cert)
        return context

    def server(self, name: str, *, wants_cert: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.cert))
        context.load_cert_chain(*self.issue(name))
        context.verify_mode = ssl.CERT_REQUIRED if wants_cert else ssl.CERT_NONE
        return context


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def ask(client: Client, context: ssl.SSLContext, **body: Any) -> tuple[int, bytes]:
    url = f"https://127.0.0.1:{client.gateway.port}/v1/chat/completions"
    async with client.session.post(url, json={"model": "fake", "messages": []} | body, ssl=context) as answer:
        return answer.status, await answer.read()


async def test_clients_are_served_over_tls_and_a_new_certificate_is_taken_up(
    start: Start, authority: Authority
) -> None:
    cert, key = authority.issue("front")
    client = await start(FakeEngine(), tls_cert_path=str(cert), tls_key_path=str(key))
    assert (await ask(client, authority.client()))[0] == 200
    status, body = await ask(client, authority.client(), stream=True)
    assert (status, body.count(b"data:")) == (200, 5)

    def serial() -> int:
        pem = ssl.get_server_certificate(("127.0.0.1", client.gateway.port))
        return hash(pem)

    before = await asyncio.to_thread(serial)
    key.write_text("half written")
    client.gateway._renew_certificates()
    assert await asyncio.to_thread(serial) == before  # what does not fit changes nothing
    authority.issue("front")
    os.utime(cert)
    client.gateway._renew_certificates()
    assert await asyncio.to_thread(serial) != before
    assert (await ask(client, authority.client()))[0] == 200


async def test_plain_bytes_and_strangers_are_turned_away_at_the_tls_port(start: Start, authority: Authority) -> None:
    cert, key = authority.issue("front")
    known, unknown = authority.issue("known"), Authority(authority.folder, "other").issue("unknown")
    client = await start(
        FakeEngine(), tls_cert_path=str(cert), tls_key_path=str(key), tls_ca_path=str(authority.cert)
    )  # fmt: skip
    assert b"200 OK" not in await client.raw(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert (await ask(client, authority.client(known)))[0] == 200
    for stranger in (None, unknown):
        with pytest.raises((aiohttp.ClientError, OSError)):
            await ask(client, authority.client(stranger))


async def test_a_client_that_never_finishes_its_handshake_is_cut_off(start: Start, authority: Authority) -> None:
    cert, key = authority.issue("front")
    client = await start(FakeEngine(), tls_cert_path=str(cert), tls_key_path=str(key), header_timeout_s=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", client.gateway.port)
    async with asyncio.timeout(5):
        assert await reader.read(100) == b""
    writer.close()


async def test_instances_and_predictors_are_reached_over_mutual_tls(start: Start, authority: Authority) -> None:
    engine, predictor = FakeEngine(), FakePredictor(lambda: snapshot(running=1))
    engine.tls, predictor.tls = (
        authority.server("engine", wants_cert=True),
        authority.server("predictor", wants_cert=True),
    )
    await engine.start()
    await predictor.start()
    cert, key = authority.issue("gateway")
    upstream = {"upstream_ca_path": str(authority.cert), "upstream_cert_path": str(cert), "upstream_key_path": str(key)}
    instance = InstanceConfig(url=engine.url, predictor=predictor.url)
    assert instance.url.startswith("https://")
    client = await start(instances=[instance], policy="block", **upstream)
    await until(lambda: client.gateway.decider.evidence[instance.id].frames > 2)  # type: ignore[index]
    status, _, headers = await client.post()
    assert status == 200
    assert "x-predicted-e2e-ms" in headers
    nobody = await start(instances=[instance], upstream_ca_path=str(authority.cert))  # shows no certificate
    assert (await nobody.post())[0] in (502, 503)
    assert not nobody.gateway.pool.ready()
    await predictor.stop()
    await engine.stop()


async def test_an_instance_with_somebody_elses_certificate_gets_nothing(start: Start, authority: Authority) -> None:
    engine = FakeEngine()
    engine.tls = Authority(authority.folder, "other").server("engine")
    await engine.start()
    client = await start(instances=[InstanceConfig(url=engine.url)], upstream_ca_path=str(authority.cert))
    assert (await client.post())[0] in (502, 503)
    assert engine.heard == []
    await engine.stop()


def test_certificates_that_are_not_there_are_one_clear_sentence(tmp_path: Path) -> None:
    for options in ({"tls_cert_path": str(tmp_path / "none")}, {"tls_key_path": "k"}):
        with pytest.raises(ConfigError):
            Gateway(GatewayConfig(**options))  # type: ignore[arg-type]
