"""Ray Serve's replicas, on a real Ray where one is installed and on a server that answers alike everywhere.

The real one: ``pip install 'ray[serve]'`` in a venv, then ``BLOCK_RAY=VENV/bin pytest tests/autoscale_live``.
"""

import asyncio
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from autoscale_live.cluster import free_port
from block.autoscale.actuators.ray import RayActuator, RaySettings, Serving
from block.autoscale.actuators.surroundings import Surroundings
from block.autoscale.live.membership import Membership
from block.autoscale.terms import Kind
from block.errors import ActuatorError, ConfigError

HERE = Path(__file__).parent
APPLICATION = {
    "proxy_location": "Disabled",
    "applications": [{
        "name": "llm", "import_path": "ray_engine:app", "external_scaler_enabled": True,
        "deployments": [{"name": "engine", "num_replicas": 1}],
    }],
}  # fmt: skip


@pytest.fixture(scope="module")
def real_dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = os.environ.get("BLOCK_RAY")
    if folder is None:
        pytest.skip("no Ray here: BLOCK_RAY names the folder of its programs (pip install 'ray[serve]')")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "PYTHONPATH": str(HERE), "RAY_USAGE_STATS_ENABLED": "0"}
    folder_of_ray = tmp_path_factory.mktemp("r")
    ray = [f"{folder}/python", "-m", "ray.scripts.scripts"]
    head = subprocess.Popen(
        [*ray, "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}", f"--dashboard-port={port}",
         "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000",
         f"--temp-dir={folder_of_ray}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                request = urllib.request.Request(
                    url + "/api/serve/applications/", json.dumps(APPLICATION).encode(),
                    {"content-type": "application/json"}, method="PUT",
                )  # fmt: skip
                urllib.request.urlopen(request, timeout=30).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(1.0)
        yield url
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(folder_of_ray, ignore_errors=True)


class FakeServe:
    """The two calls that Block makes, as Ray 2.60 answers them."""

    def __init__(self) -> None:
        self.replicas = [{"replica_id": "r0", "state": "RUNNING", "start_time_s": time.time()}]
        self.target = 1
        self.posts = 0

    async def applications(self, _request: web.Request) -> web.Response:
        for replica in self.replicas:
            if replica["state"] == "STARTING":
                replica["state"] = "RUNNING"
        deployment = {"name": "engine", "target_num_replicas": self.target, "replicas": self.replicas}
        return web.json_response({"applications": {"llm": {"name": "llm", "deployments": {"engine": deployment}}}})

    async def scale(self, request: web.Request) -> web.Response:
        self.posts += 1
        if request.match_info["application"] != "llm":
            return web.json_response({"error": "Application not found."}, status=400)
        self.target = (await request.json())["target_num_replicas"]
        new = [
            {"replica_id": f"r{n}", "state": "STARTING", "start_time_s": time.time()}
            for n in range(len(self.replicas), self.target)
        ]
        self.replicas = [*self.replicas[: self.target], *new]
        return web.json_response({"message": "Scaling request received."})


@pytest.fixture(params=["fake", "real"])
async def dashboard(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    if request.param == "real":
        yield request.getfixturevalue("real_dashboard")
        return
    serve, app = FakeServe(), web.Application()
    app.router.add_get("/api/serve/applications/", serve.applications)
    app.router.add_post("/api/v1/applications/{application}/deployments/{deployment}/scale", serve.scale)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def actuator_of(session: aiohttp.ClientSession, url: str, deployment: str = "engine") -> RayActuator:
    settings = RaySettings(deployments={"gpu": Serving(application="llm", deployment=deployment)}, dashboard=url)
    return RayActuator(settings, Surroundings("test", {"gpu": Kind(name="gpu")}, Membership([]), session))


async def ready(actuator: RayActuator, count: int) -> None:
    async with asyncio.timeout(90):
        while True:
            try:
                phases = [member.phase.value for member in await actuator.members()]
            except ActuatorError:  # Serve is still starting
                phases = []
            if phases == ["ready"] * count:
                return
            await asyncio.sleep(0.2)


async def test_replicas_follow_both_ways(session: Any, dashboard: str) -> None:
    actuator = actuator_of(session, dashboard)
    await ready(actuator, 1)
    for count in (3, 3, 1):
        await actuator.scale_to({"gpu": count})
        await ready(actuator, count)


async def test_a_deployment_that_is_not_there_is_an_error(session: Any, dashboard: str) -> None:
    await ready(actuator_of(session, dashboard), 1)
    with pytest.raises(ActuatorError, match="Ray Serve has no deployment 'other' in an application 'llm'"):
        await actuator_of(session, dashboard, "other").scale_to({"gpu": 1})


async def test_where_nobody_listens_is_an_error(session: Any) -> None:
    with pytest.raises(ActuatorError, match="did not answer"):
        await actuator_of(session, "http://127.0.0.1:9").members()


async def test_every_kind_needs_a_deployment(session: Any) -> None:
    with pytest.raises(ConfigError, match=r"actuator.deployments lacks the kind gpu"):
        RayActuator(RaySettings(deployments={}), Surroundings("t", {"gpu": Kind(name="gpu")}, Membership([]), session))
