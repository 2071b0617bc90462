"""Do prediction intervals hold? Three emulated engines, one at half speed; the load more than doubles half way through.

    python bench/gateway/coverage.py [--rates 6 14] [--seconds 40] [--level 0.9]

Requests come open loop with ShareGPT's lengths, answers end when they end (their lengths are not told). After each part
the gateway's own metrics are printed: the share of each instance's last 256 intervals that the measured TTFT and E2E lay
in, and the median of measured over predicted. All of it runs on this machine: what that is late by is in the
measurements, and the intervals have to bear it.
"""

import argparse
import json
import re
import subprocess
import urllib.request
from contextlib import ExitStack

from rig import free_ports, heading, process, python

PROFILE = "h200-llama3.1-8b"
SPEEDS = (1.0, 1.0, 0.5)
BLOCK = python("-c", "from block.cli import main; main()")


def start(stack: ExitStack, level: float) -> str:
    """Engines, predictors and the gateway; its URL."""
    engines, predictors = free_ports(len(SPEEDS)), free_ports(len(SPEEDS))
    (port,) = free_ports(1)
    instances = []
    for n, speed in enumerate(SPEEDS):
        name = f"coverage-{engines[n]}"
        own = ("--profile", PROFILE, "--speed", str(speed))
        emulate = (*BLOCK, "emulate", *own, "--name", name, "--seed", str(n), "--port", str(engines[n]))
        stack.enter_context(process(*emulate, ready=f"http://127.0.0.1:{engines[n]}/health"))
        predictor = (*BLOCK, "predictor", *own, "--source", f"emulate:{name}", "--port", str(predictors[n]))
        stack.enter_context(process(*predictor, ready=f"http://127.0.0.1:{predictors[n]}/health"))
        instances.append(
            f"--instance=http://127.0.0.1:{engines[n]},predictor=http://127.0.0.1:{predictors[n]},name=e{n}"
        )
    settings = ("env", f"BLOCK_PREDICTION_LEVEL={level}")
    serve = (*settings, *BLOCK, "serve", "--policy", "block", "--port", str(port), "--log-level", "error", *instances)
    stack.enter_context(process(*serve, ready=f"http://127.0.0.1:{port}/ready"))
    return f"http://127.0.0.1:{port}"


def replay(url: str, rate: float, seconds: float, seed: int) -> dict[str, float]:
    """One part of the load; the client's summary."""
    command = (*BLOCK, "replay", url, "--rate", str(rate), "--duration", str(seconds), "--requests", "100000")
    options = ("--length-mode", "natural", "--seed", str(seed), "--json")
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def gauges(url: str) -> dict[tuple[str, str, str], float]:
    """(metric, instance, of) -> value."""
    with urllib.request.urlopen(url + "/metrics", timeout=5) as answer:
        text = answer.read().decode()
    pattern = r'^block_prediction_(interval_coverage|bias)_ratio\{endpoint="(\w+)",of="(\w+)"\} (\S+)$'
    return {(m[1], m[2], m[3]): float(m[4]) for m in re.finditer(pattern, text, re.MULTILINE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[6.0, 14.0])
    parser.add_argument("--seconds", type=float, default=40.0, help="of each rate")
    parser.add_argument("--level", type=float, default=0.9)
    options = parser.parse_args()
    print(
        f"{heading()}\n{options.seconds:g} s of each rate; intervals for {options.level:.0%}; engines at speeds {SPEEDS}\n"
    )
    print(f"{'req/s':>6s} {'instance':9s}{'TTFT held':>11s}{'E2E held':>11s}{'TTFT ratio':>12s}{'E2E ratio':>12s}")
    with ExitStack() as stack:
        url = start(stack, options.level)
        for seed, rate in enumerate(options.rates):
            replay(url, rate, options.seconds, seed)
            found = gauges(url)
            for name in sorted({instance for _, instance, _ in found}):
                values = [
                    found.get((what, name, of)) for what in ("interval_coverage", "bias") for of in ("ttft", "e2e")
                ]
                shown = [
                    f"{value:{'11.1%' if n < 2 else '12.2f'}}" if value is not None else "-"
                    for n, value in enumerate(values)
                ]
                print(
                    f"{rate:6g} {name:9s}" + "".join(f"{text:>{11 if n < 2 else 12}s}" for n, text in enumerate(shown))
                )


if __name__ == "__main__":
    main()
