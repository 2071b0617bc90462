"""Put measured figures into README.md, between its ``<!-- results:NAME -->`` marks.

block demo --json > demo.json
python bench/fidelity.py --json > fidelity.json
block bench whatif --json > whatif.json
python bench/readme.py demo=demo.json fidelity=fidelity.json whatif=whatif.json
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def demo(figures: dict[str, Any]) -> str:
    head = table_head("policy", "TTFT mean", "P50", "P99", "E2E mean", "P99", "TPOT", "preempted", "requests/s")
    rows = []
    for name, p in figures["policies"].items():
        seconds = (p["ttft_s_mean"], p["ttft_s_p50"], p["ttft_s_p99"], p["e2e_s_mean"], p["e2e_s_p99"])
        cells = " | ".join(f"{s:.2f} s" for s in seconds)
        rows.append(
            f"| {name} | {cells} | {p['tpot_s_mean'] * 1e3:.1f} ms | {p['preemptions']} | {p['requests_rps']:.0f} |"
        )
    late_ms = figures["lateness_s_p99"] * 1e3
    note = f"\n\n<sub>`block demo` on {machine()}; P99 lateness of the emulation {late_ms:.0f} ms. {commit()}.</sub>"
    return head + "\n".join(rows) + note


def fidelity(figures: dict[str, Any]) -> str:
    head = table_head(
        "run",
        "stage",
        "profile",
        "E2E error P50",
        "TTFT error P50",
        "mean E2E, ours / measured",
        "mean TTFT",
        "preemptions",
    )
    shipped = {
        (s["run"], s["stage"]): s for s in reversed(figures["stages"])
    }  # the shipped profile's score comes first
    rows = []
    for (run, stage), s in reversed(shipped.items()):
        name = re.split(r"\.seqs|\.blocks", run)[0]
        rows.append(
            f"| {name} | {stage} | {s['how']} | {s['e2e_error_p50']:.1%} | {s['ttft_error_p50']:.1%} "
            f"| {s['e2e_mean_ratio']:.3f} | {s['ttft_mean_ratio']:.3f} | {s['preemptions']} / {s['preemptions_measured']} |"
        )
    return head + "\n".join(rows) + f"\n\n<sub>`python bench/fidelity.py RUNS`. {commit()}.</sub>"


def table_head(*names: str) -> str:
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|\n"


def whatif(figures: dict[str, Any]) -> str:
    head = table_head("one what-if", "running", "waiting", "median", "P99", "from a snapshot's bytes")
    rows = [
        f"| {t['scenario']} | {t['running']} | {t['waiting']} | {t['median_us']:.1f} us | {t['p99_us']:.1f} us "
        f"| {t['decoding_median_us']:.1f} us |"
        for t in figures["whatif"]
    ]
    return head + "\n".join(rows) + f"\n\n<sub>`block bench whatif` on one core of {machine()}. {commit()}.</sub>"


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {"demo": demo, "fidelity": fidelity, "whatif": whatif}


def machine() -> str:
    return f"{os.cpu_count()} cores ({platform.machine()}, Python {platform.python_version()})"


def commit() -> str:
    described = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, check=True)
    return f"Commit {described.stdout.strip()}"


def main(arguments: list[str]) -> None:
    text = README.read_text()
    for argument in arguments:
        name, _, path = argument.partition("=")
        if name not in SECTIONS:
            sys.exit(f"There is no section {name!r}: write one of {', '.join(SECTIONS)}, as NAME=FILE.json.")
        table = SECTIONS[name](json.loads(Path(path).read_text()))
        marks = re.compile(rf"(<!-- results:{name} -->\n).*?(<!-- /results -->)", re.DOTALL)
        text, found = marks.subn(lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text)
        if not found:
            sys.exit(f"README.md has no <!-- results:{name} --> section.")
    README.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
