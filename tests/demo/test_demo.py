"""The whole system, as a user starts it: real processes, real HTTP, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

BLOCK = [sys.executable, "-m", "block"]


def children(pid: int | str) -> set[int]:
    """Processes that descend from ``pid``, by their session's environment mark."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"BLOCK_TEST_MARK={pid}\0".encode() in environment:
                found.add(int(entry.name))
    return found


def test_the_demo_serves_every_request_under_every_policy(tmp_path: Path) -> None:
    arguments = [
        "demo",
        "--policies",
        "round-robin,block",
        "--rate",
        "12",
        "--seconds",
        "2",
        "--out",
        str(tmp_path),
        "--json",
    ]
    done = subprocess.run([*BLOCK, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["policies"]) == {"round-robin", "block"}
    for figures in result["policies"].values():
        assert figures["requests"] == 24
        assert figures["failed"] == 0
        assert 0 < figures["ttft_s_p50"] <= figures["ttft_s_p99"] <= figures["e2e_s_p99"]
    assert result["lateness_s_p99"] >= 0
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + 2 * 24
    assert (tmp_path / "latency.png").stat().st_size > 1000


def test_an_interrupted_demo_leaves_no_process_behind(tmp_path: Path) -> None:
    mark = os.getpid()
    environment = {**os.environ, "BLOCK_TEST_MARK": str(mark)}
    demo = subprocess.Popen(
        [*BLOCK, "demo", "--seconds", "60", "--out", str(tmp_path)], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(children(mark)) < 10 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(children(mark)) >= 10, "four engines, four predictors, a gateway and the demo itself"
    demo.send_signal(signal.SIGINT)
    assert demo.wait(timeout=30) == 1
    assert not children(mark)


def test_an_unknown_policy_ends_the_demo_in_one_sentence_before_it_starts(tmp_path: Path) -> None:
    done = subprocess.run(
        [*BLOCK, "demo", "--policies", "nonsense", "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("block: There is no policy named 'nonsense'. Known: ")
    assert "Traceback" not in done.stderr


def test_with_autoscale_instances_come_with_the_load_and_no_request_is_lost(tmp_path: Path) -> None:
    mark = os.getpid()
    arguments = [
        "demo", "--autoscale", "--controller", "hpa-rps:target=1,average_s=2", "--rate", "5", "--seconds", "6",
        "--out", str(tmp_path), "--json",
    ]  # fmt: skip
    environment = {**os.environ, "BLOCK_TEST_MARK": f"{mark}a"}
    done = subprocess.run(
        [*BLOCK, *arguments], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["requests"] > 5
    assert result["failed"] == 0
    assert result["instances_most"] > result["instances_least"] >= 1
    decisions = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert len(decisions) == result["decisions"]
    assert {decision["action"] for decision in decisions} >= {"ordered", "kept"}
    assert (tmp_path / "provisioning.png").stat().st_size > 1000
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + result["requests"]
    assert not children(f"{mark}a")
