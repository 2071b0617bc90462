"""The gateway's own cost beside the direct path and, where it is installed, vllm-router: one run, interleaved rounds.

    python bench/gateway/compare.py [--rounds 5] [--seconds 3] [--vllm-router PATH] [--json]

Trivial backends answer at once, so a difference to the direct path is the proxy's. Policy round-robin stands before 2
backends; block before 12, with a feed that streams snapshots of 24-48 running requests from each. Every round measures
everything once, the order turns; medians are printed. CPU is the proxy's, per request or per SSE event.
Targets (one process, one core): round-robin +0.15 ms, 9,000 req/s with 32 connections; block over 12 +0.5 ms, 2,500 req/s;
streams +0.3 ms to the first token, 16 us CPU an event.
"""

import argparse
import json
import shutil
import signal
from contextlib import ExitStack
from typing import Any

from rig import (
    HERE,
    Measured,
    Paced,
    free_ports,
    heading,
    median_of,
    median_paced,
    paced,
    process,
    python,
    require_wrk,
    rss_mb,
    wrk,
)

CASES = {"c=1": (1, False), "c=32": (32, False), "c=1 stream": (1, True), "c=32 stream": (32, True)}
INSTANCES = 12


def start_all(stack: ExitStack, router: str | None, feed_rate: float) -> dict[str, tuple[str, int | None]]:
    """Backends and proxies; name -> (URL, pid)."""
    backends, feeds = free_ports(INSTANCES), free_ports(INSTANCES)
    urls = [f"http://127.0.0.1:{port}" for port in backends]
    stack.enter_context(process(*python(str(HERE / "backend.py"), *_ports(backends)), ready=urls[-1] + "/health"))
    stack.enter_context(
        process(
            *python(str(HERE / "feed.py"), "--rate", str(feed_rate), *_ports(feeds)),
            ready=f"http://127.0.0.1:{feeds[-1]}/health",
        )
    )
    things: dict[str, tuple[str, int | None]] = {"direct": (urls[0], None)}

    def add(name: str, *command: str) -> None:
        things[name] = _start(stack, command)

    add("featureless asyncio proxy", *python(str(HERE / "stacks.py"), *urls[:2], "--serve", "raw"))
    serve = python("-c", "from block.cli import main; main()", "serve", "--log-level", "error")
    add("block serve, round-robin", *serve, "--policy", "round-robin", "--worker-urls", " ".join(urls[:2]))
    instances = [f"--instance={url},predictor=http://127.0.0.1:{feed}" for url, feed in zip(urls, feeds, strict=True)]
    # No engine works on what the feed shows, so every prediction is wrong; the cost asked for is that of predicting.
    predicting = ("env", "BLOCK_DRIFT_FACTOR=0", *serve)
    add("block serve, block over 12", *predicting, "--policy", "block", *instances)
    if router is not None:
        add(
            "vllm-router, round_robin",
            router,
            "--policy",
            "round_robin",
            "--host",
            "127.0.0.1",
            "--worker-urls",
            *urls[:2],
        )
    return things


def _start(stack: ExitStack, command: tuple[str, ...]) -> tuple[str, int]:
    """A proxy on a free port: (URL, pid)."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    return url, stack.enter_context(process(*command, "--port", str(port), ready=url + "/health"))


def _ports(ports: list[int]) -> list[str]:
    return [part for port in ports for part in ("--port", str(port))]


def measure(options: argparse.Namespace, router: str | None) -> dict[str, Any]:
    runs: dict[str, dict[str, list[Measured]]] = {}
    memory: dict[str, float] = {}
    with ExitStack() as stack:
        things = start_all(stack, router, options.feed_rate)
        names = list(things)
        for turn in range(options.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                url, pid = things[name]
                for case, (connections, stream) in CASES.items():
                    run = wrk(url, pid, connections=connections, seconds=options.seconds, stream=stream)
                    runs.setdefault(name, {}).setdefault(case, []).append(run)
        for name, (_, pid) in things.items():
            if pid is not None:
                memory[name] = rss_mb(pid)
    cases = {name: {case: median_of(each) for case, each in by_case.items()} for name, by_case in runs.items()}
    return {"cases": cases, "rss_mb": memory}


def measure_paced(options: argparse.Namespace, router: str | None) -> dict[str, Paced]:
    """32 streams of 100 events, 20 ms to the first and 10 ms between."""
    found: dict[str, list[Paced]] = {}
    with ExitStack() as stack:
        ports = free_ports(2)
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        pace = ("--ttft-ms", "20", "--itl-ms", "10", "--events", "100")
        stack.enter_context(
            process(*python(str(HERE / "backend.py"), *pace, *_ports(ports)), ready=urls[1] + "/health")
        )
        things: dict[str, tuple[str, int | None]] = {"direct": (urls[0], None)}
        commands = {
            "featureless asyncio proxy": python(str(HERE / "stacks.py"), *urls, "--serve", "raw"),
            "block serve, round-robin": (
                *python("-c", "from block.cli import main; main()", "serve", "--log-level", "error"),
                "--policy", "round-robin", "--worker-urls", " ".join(urls),
            )
        }  # fmt: skip
        if router is not None:
            commands["vllm-router, round_robin"] = (
                router, "--policy", "round_robin", "--host", "127.0.0.1", "--worker-urls", *urls,
            )  # fmt: skip
        for name, command in commands.items():
            things[name] = _start(stack, command)
        for _ in range(options.rounds):
            for name, (url, pid) in things.items():
                found.setdefault(name, []).append(paced(url, pid, streams=32, seconds=options.seconds))
    return {name: median_paced(each) for name, each in found.items()}


def show(result: dict[str, Any]) -> None:
    cases, direct, unknown = result["cases"], result["cases"].get("direct"), float("nan")
    titles = ("added p50 ms", "added, stream", "req/s c=32", "streams/s", "CPU us/req", "us/stream", "RSS MB", "errors")
    print(" " * 26 + "".join(f"{title:>14s}" for title in titles))
    for name, case in cases.items():
        values = (
            f"{case['c=1'].p50_ms - direct['c=1'].p50_ms:.3f}",
            f"{case['c=1 stream'].p50_ms - direct['c=1 stream'].p50_ms:.3f}",
            f"{case['c=32'].rps:,.0f}",
            f"{case['c=32 stream'].rps:,.0f}",
            f"{case['c=32'].cpu_us or unknown:.0f}",
            f"{case['c=32 stream'].cpu_us or unknown:.0f}",
            f"{result['rss_mb'].get(name, unknown):.0f}",
            str(sum(each.errors for each in case.values())),
        )
        print(f"{name:26s}" + "".join(f"{value:>14s}" for value in values))
    print(f"\n{'32 streams of 100 events':26s}{'TTFT p50 ms':>14s}{'p99 ms':>14s}{'CPU us/event':>14s}")
    for name, run in result["paced"].items():
        print(f"{name:26s}{run.ttft_p50_ms:14.2f}{run.ttft_p99_ms:14.2f}{run.cpu_us_per_event or unknown:14.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument(
        "--feed-rate", type=float, default=90.0, help="snapshots a second from each of the 12 predictors"
    )
    parser.add_argument(
        "--vllm-router", default=shutil.which("vllm-router"), help="its path; by default looked up on PATH"
    )
    parser.add_argument("--only-paced", action="store_true", help="only the paced streams")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a time limit takes the way out that ends what was started
    require_wrk()
    top = heading()
    result = {"cases": {}, "rss_mb": {}} if options.only_paced else measure(options, options.vllm_router)
    result["paced"] = measure_paced(options, options.vllm_router)
    if options.json:
        cases = {n: {c: m._asdict() for c, m in by.items()} for n, by in result["cases"].items()}
        paced_runs = {n: p._asdict() for n, p in result["paced"].items()}
        print(json.dumps({"heading": top, "cases": cases, "paced": paced_runs, "rss_mb": result["rss_mb"]}, indent=1))
        return
    print(f"{top}\n{options.rounds} rounds of {options.seconds:g} s, medians; trivial backends, 200-byte prompts\n")
    show(result)
    if options.vllm_router is None:
        print(
            "\nvllm-router was not found: give --vllm-router PATH (pip install vllm-router, in an environment of its own)."
        )


if __name__ == "__main__":
    main()
