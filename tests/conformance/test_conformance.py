"""Every check passes on Block's gateway and engine, and every check can fail."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from block.cli.conformance import command
from block.conformance import GROUPS, Outcome, Target, all_checks, open_target, run_checks
from block.conformance.check import Check
from block.conformance.run import run_check
from block.emulate.config import EmulateConfig
from block.engine.limits import EngineLimits
from block.errors import ConfigError, UnknownNameError
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.serve import Gateway
from conformance.bad_server import BadServer
from emulate.served import PROFILE, serving

QUICK = {"timeout_s": 5.0, "quiet_s": 0.05}
VICES = {
    "no": {
        "health", "health-without-key", "live", "ready", "request-id-long", "unknown-header", "unknown-field", "flood",
        "many-left", "keep-alive", "keep-alive-after-error", "chunked-request", "in-pieces",
        "absolute-target", "targets", "targets-odd", "session", "traceparent",
    },
    "mute": {"expect-continue"},
    "zombie": {"stream-left", "whole-left"},
}  # fmt: skip


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[str]:
    profile = tmp_path / "profile.json"
    profile.write_bytes(msgspec.json.encode(PROFILE))
    # Slow enough that a long answer outlasts the wait for its cancellation.
    config = EmulateConfig(limits=EngineLimits(), profile=str(profile), models=("tiny",), speed=0.5)
    async with serving(config) as url:
        yield url


async def test_blocks_gateway_passes_every_check(engine: str) -> None:
    config = GatewayConfig(
        instances=[InstanceConfig(url=engine, name="e0")], port=0, policy="round-robin", seed=1,
        health_check_interval_s=0.05, api_keys=["secret"], header_timeout_s=1.0, shutdown_grace_period_s=2.0,
    )  # fmt: skip
    gateway = Gateway(config)
    await gateway.start()
    try:
        async with asyncio.timeout(5):
            while not gateway.pool.ready():  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{gateway.port}"
        async with open_target(url, api_key="secret", engines=(engine,), patience_s=5.0, **QUICK) as target:
            results = await run_checks(target)
    finally:
        await gateway.close()
    assert len(results) == len(all_checks())
    assert not [(r.name, r.detail) for r in results if r.outcome is not Outcome.PASS]


async def test_the_emulated_engine_fails_no_required_check_of_errors_and_streams(engine: str) -> None:
    async with open_target(engine, **QUICK) as target:
        results = await run_checks(target, ["errors", "sse", "cancel"])
    assert not [(r.name, r.detail) for r in results if r.fatal]


@pytest.mark.parametrize(("group", "check"), [pytest.param(g, c, id=f"{g}-{c.name}") for g, c in all_checks()])
async def test_each_check_fails_on_a_server_that_does_wrong(group: str, check: Check) -> None:
    vice = next((vice for vice, names in VICES.items() if check.name in names), "yes")
    timeout_s = 5.0 if vice == "zombie" else 0.3
    async with (
        BadServer(vice).running() as url,
        open_target_of(url, timeout_s) as target,
    ):
        result = await run_check(target, group, check)
    assert (result.outcome, bool(result.detail)) == (Outcome.FAIL, True), result.detail


def open_target_of(url: str, timeout_s: float):
    """Without asking the server first: this one may never answer."""
    import contextlib

    import aiohttp

    @contextlib.asynccontextmanager
    async def opened():
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session:
            yield Target(url, session, model="m", api_key="key", timeout_s=timeout_s, quiet_s=0.05, patience_s=0.3)

    return opened()


def test_names_are_unique_and_every_check_says_what_it_claims_and_why() -> None:
    checks = [check for group in GROUPS.values() for check in group]
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.claim.endswith(".") and check.reference for check in checks)


async def test_where_nothing_answers_the_sentence_says_so(unused_tcp_port: int) -> None:
    with pytest.raises(ConfigError, match="Nothing answers"):
        async with open_target(f"http://127.0.0.1:{unused_tcp_port}"):
            pass
    with pytest.raises(ConfigError, match="no URL"):
        async with open_target("gateway:8000"):
            pass


def test_an_unknown_group_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(UnknownNameError):
        all_checks(["nonsense"])


async def test_the_command_prints_json_and_exits_1_when_a_required_check_fails() -> None:
    async with BadServer("yes").running() as url:
        args = [url, "--model", "m", "--only", "health", "--json", "--timeout", "2"]
        ran = await asyncio.to_thread(CliRunner().invoke, command, args)
    assert ran.exit_code == 1
    assert json.loads(ran.stdout)["failed"] == ["health/models"]


async def test_the_table_names_what_was_seen(engine: str) -> None:
    ran = await asyncio.to_thread(CliRunner().invoke, command, [engine, "--only", "health"])
    assert ran.exit_code == 0
    assert "recommended" in ran.stdout
    assert "0 required" in ran.stdout
