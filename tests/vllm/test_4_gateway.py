"""Two real vLLM instances behind predictors and the gateway."""

import asyncio
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from live import BLOCK, Program, VllmServer, free_port, wait_healthy
from measure import offer
from test_3_emulated_gpu import calibrate

from block.metrics.row import Row
from block.replay.client import ReplayOptions, replay
from block.workload import WorkloadConfig
from block.workload import offer as offered


class Fleet(NamedTuple):
    url: str
    servers: list[VllmServer]
    predictors: list[str]


@pytest.fixture(scope="module")
def fleet(servers: list[VllmServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    profile = folder / "cpu.json"
    calibrate(servers[0], profile)
    programs: list[Program] = []
    predictors = []
    try:
        for server in servers:
            port = free_port()
            command = [
                *BLOCK,
                "predictor",
                "--source",
                f"vllm:{server.name}",
                "--profile",
                str(profile),
                "--port",
                str(port),
            ]
            programs.append(Program(command, folder / f"{server.name}.log", {}))
            predictors.append(f"http://127.0.0.1:{port}")
        for program, url in zip(programs, predictors, strict=True):
            wait_healthy(program, url, within_s=30)
        port = free_port()
        pairs = zip("ab", servers, predictors, strict=True)
        instances = [f"--instance={server.url},predictor={predictor},name={name}" for name, server, predictor in pairs]
        gateway = Program([*BLOCK, "serve", *instances, "--port", str(port)], folder / "gateway.log", {})
        programs.append(gateway)
        wait_healthy(gateway, f"http://127.0.0.1:{port}", "/v1/models", within_s=30)
        yield Fleet(f"http://127.0.0.1:{port}", servers, predictors)
    finally:
        for program in reversed(programs):
            program.stop()


async def test_every_request_is_answered_and_streamed(fleet: Fleet, report: dict[str, Any]) -> None:
    load = offered(WorkloadConfig(rate_rps=10.0, requests=150, prompt_tokens=120, output_tokens=60), 3)
    rows = await replay(load, fleet.url, ReplayOptions())
    assert [(r.status, r.error) for r in rows if r.status != "finished"] == []
    assert {r.output_tokens for r in rows} == {60}
    assert {r.instance for r in rows} == {"a", "b"}
    assert all(r.ttft_s is not None and r.e2e_s is not None and r.ttft_s < r.e2e_s for r in rows)
    report["gateway, predicted against measured at the client"] = prediction_error(rows)


def prediction_error(rows: list[Row]) -> dict[str, float]:
    def of(predicted: str, measured: str) -> tuple[float, float]:
        pairs = [(getattr(r, predicted), getattr(r, measured)) for r in rows if getattr(r, predicted) is not None]
        assert len(pairs) > 0.9 * len(rows), "hardly any request was predicted"
        error = statistics.median(abs(p - m) / m for p, m in pairs)
        return round(error, 3), round(sum(p for p, _ in pairs) / sum(m for _, m in pairs), 3)

    (ttft, ttft_ratio), (e2e, e2e_ratio) = of("predicted_ttft_s", "ttft_s"), of("predicted_e2e_s", "e2e_s")
    means = {f"{name}_mean": round(statistics.fmean(getattr(r, name) for r in rows), 3) for name in ("ttft_s", "e2e_s")}
    return {
        **means,
        "ttft_error_p50": ttft,
        "ttft_mean_ratio": ttft_ratio,
        "e2e_error_p50": e2e,
        "e2e_mean_ratio": e2e_ratio,
    }


async def test_an_instance_killed_in_mid_load_loses_no_unanswered_request(fleet: Fleet, report: dict[str, Any]) -> None:
    """A stream that has begun cannot be repeated; everything else is answered by the other instance."""
    load = asyncio.create_task(offer(fleet.url, requests=160, rate_rps=16, seed=31, prompt=(40, 200), output=(60, 120)))
    await asyncio.sleep(4)
    fleet.servers[1].kill()
    outcomes = await load
    broken = [o for o in outcomes if o.error]
    unanswered = [o.error for o in broken if o.ttft_s is None]
    report["killed in mid-load"] = {
        "requests": len(outcomes),
        "answered": len(outcomes) - len(broken),
        "broken in their stream": len(broken),
    }
    assert unanswered == []
    assert len(broken) <= 32  # at most what the dead instance was streaming
