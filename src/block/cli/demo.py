"""``block demo``: see what prediction buys, without a GPU."""

from pathlib import Path
from typing import Any

import click


@click.command()
@click.option("--policies", default="", help="Policies to compare, separated by commas. [four that show the idea]")
@click.option("--rate", type=float, help="Requests per second; with --autoscale the highest. [66; with --autoscale 12]")
@click.option("--seconds", type=float, help="Length of the workload (of each policy). [14; with --autoscale 90]")
@click.option("--seed", default=0, show_default=True, help="The same seed offers the same requests at the same times.")
@click.option(
    "--out", default="demo-results", show_default=True, type=click.Path(path_type=Path, file_okay=False),
    help="Folder for rows.csv and latency.png.",
)  # fmt: skip
@click.option("--autoscale", is_flag=True, help="Instead: load rises and falls, instances come and go with it.")
@click.option("--controller", help="Who decides how many, with --autoscale. [replay, quickened]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    policies: str, rate: float | None, seconds: float | None, seed: int, out: Path, autoscale: bool, controller: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Run the whole system on this machine: four emulated instances of unequal speed and memory, a predictor beside each, the
    gateway, and the same workload under several policies.

    \b
    Examples:
      block demo
      block demo --policies round-robin,block --seconds 30
      block demo --json > demo.json
      block demo --autoscale
      block demo --autoscale --controller relief:threshold_s=2 --seconds 60
    """
    import asyncio
    import json
    import signal

    from block.demo import run, scenario
    from block.errors import ConfigError
    from block.policy.table import policy_from

    if autoscale:
        _provision(controller, rate, seconds, seed, out, as_json)
        return
    rate = 66.0 if rate is None else rate
    seconds = 14.0 if seconds is None else seconds
    names = [name.strip() for name in policies.split(",") if name.strip()] or list(scenario.POLICIES)
    for name in names:
        policy_from(name)
    if not (rate > 0 and seconds > 0):
        raise ConfigError("--rate and --seconds must be greater than 0.")
    out.mkdir(parents=True, exist_ok=True)
    # Stopping by SIGTERM takes the same way out as Ctrl-C: through every `finally`.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _display(len(names), int(rate * seconds)) as progress:
        try:
            outcomes = asyncio.run(run.run_demo(names, rate, seconds, seed, progress))
        except KeyboardInterrupt:
            raise click.Abort from None
    run.write_outcomes(outcomes, out / "rows.csv", out / "latency.png")
    result = run.as_json(outcomes)
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print_table(outcomes, out)
    if result["lateness_s_p99"] > run.LATE_S:
        click.echo(
            f"This machine was too slow to emulate on time (P99 lateness {result['lateness_s_p99'] * 1e3:.0f} ms): "
            "the latencies above include that. Try a lower --rate or a quieter machine.",
            err=True,
        )


def _provision(
    controller: str | None, rate: float | None, seconds: float | None, seed: int, out: Path, as_json: bool
) -> None:
    import asyncio
    import json
    import signal

    from block.autoscale.controllers import controller_from
    from block.autoscale.terms import Kind
    from block.demo import provisioning
    from block.demo.provisioning_view import display, print_table
    from block.errors import ConfigError
    from block.metrics.row import row_writer

    controller = controller or provisioning.CONTROLLER
    controller_from(controller, [Kind()])
    peak_rps = provisioning.PEAK_RPS if rate is None else rate
    seconds = provisioning.SECONDS if seconds is None else seconds
    if not (peak_rps > 0 and seconds > 0):
        raise ConfigError("--rate and --seconds must be greater than 0.")
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with display() as progress:
        try:
            outcome = asyncio.run(provisioning.run_provisioning(controller, peak_rps, seconds, seed, progress))
        except KeyboardInterrupt:
            raise click.Abort from None
    with row_writer(out / "rows.csv") as writer:
        for row in outcome.rows:
            writer.write(row)
    provisioning.write_decisions(outcome, out / "decisions.jsonl")
    provisioning.draw(outcome, out / "provisioning.png")
    if as_json:
        click.echo(json.dumps(provisioning.as_json(outcome)))
    else:
        print_table(outcome, out)


def _print_table(outcomes: Any, out: Path) -> None:
    from rich.console import Console

    from block.metrics.tables import summary_table

    console = Console() if Console().is_terminal else Console(width=120)
    console.print(summary_table({o.policy: o.summary for o in outcomes}, "the same load on four unequal instances"))
    console.print(f"Rows: {out / 'rows.csv'}   chart: {out / 'latency.png'}", highlight=False)


class _display:  # noqa: N801  (a function in use: `with _display(...) as progress`)
    """Live progress on stderr: one bar a policy with the median TTFT so far."""

    def __init__(self, policies: int, requests: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[ttft]}"),
            TimeElapsedColumn(), console=Console(stderr=True),
        )  # fmt: skip
        self._requests = requests
        self._tasks: dict[str, Any] = {}
        self._ttfts: dict[str, list[float]] = {}

    def __enter__(self) -> Any:
        self._bars.start()
        return self._hear

    def __exit__(self, *_error: object) -> None:
        self._bars.stop()

    def _hear(self, phase: str, row: Any) -> None:
        if phase not in self._tasks:
            total = None if phase == "starting instances" else self._requests
            self._tasks[phase] = self._bars.add_task(phase, total=total, ttft="")
            self._ttfts[phase] = []
            if "starting instances" in self._tasks and phase != "starting instances":
                self._bars.update(self._tasks["starting instances"], visible=False)
        if row is None:
            return
        ttfts = self._ttfts[phase]
        if row.ttft_s is not None:
            ttfts.append(row.ttft_s)
        if len(ttfts) % 10 == 1:
            median_s = sorted(ttfts)[len(ttfts) // 2]
            self._bars.update(self._tasks[phase], ttft=f"median TTFT {median_s * 1e3:.0f} ms")
        self._bars.advance(self._tasks[phase])
