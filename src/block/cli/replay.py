"""``block replay``: open-loop load against any OpenAI endpoint."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from block.metrics.row import Row, RowWriter
    from block.replay.client import ReplayOptions
    from block.workload import Offered, WorkloadConfig


@click.command()
@click.argument("url")
@click.option(
    "--rate", "rate_rps", type=float, help="Mean requests per second [10; with --arrivals trace: as recorded]."
)
@click.option("--requests", type=int, help="How many [1000, or the whole trace].")
@click.option("--duration", "duration_s", type=float, help="Stop sending after so many seconds.")
@click.option(
    "--arrivals", default="poisson", show_default=True, help="When they come.",
    type=click.Choice(["poisson", "gamma", "constant", "bursts", "trace"]),
)  # fmt: skip
@click.option(
    "--cv2", "gap_cv2", default=1.0, show_default=True, help="Squared variation of gamma gaps; above 1 is bursty."
)
@click.option("--on", "on_s", default=10.0, show_default=True, help="Mean seconds of a burst.")
@click.option("--off", "off_s", default=10.0, show_default=True, help="Mean seconds between bursts.")
@click.option("--lengths", default="sharegpt", show_default=True, help="Length table: a shipped name or a JSON file.")
@click.option("--prompt-tokens", type=int, help="Fixed prompt length (with --output-tokens).")
@click.option("--output-tokens", type=int, help="Fixed output length (with --prompt-tokens).")
@click.option(
    "--trace", help="Take lengths (and times) from a trace: CSV (Azure, BurstGPT, Splitwise, own rows) or Mooncake."
)
@click.option("--seed", default=1, show_default=True, help="The same seed offers the same requests.")
@click.option("--endpoint", type=click.Choice(["completions", "chat"]), default="completions", show_default=True)
@click.option("--model", default="", help="Model name [the first that the server lists].")
@click.option(
    "--length-mode", type=click.Choice(["exact", "header", "natural"]), default="exact", show_default=True,
    help="exact: max_tokens and ignore_eos (vLLM); header: x-emulate-output-tokens; natural: the model ends.",
)  # fmt: skip
@click.option("--max-tokens", default=4096, show_default=True, help="Bound of the output unless --length-mode exact.")
@click.option("--stream/--no-stream", default=True, show_default=True)
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, help="Seconds for one whole answer.")
@click.option("--header", "headers", multiple=True, metavar="NAME:VALUE", help="An HTTP header, repeatable.")
@click.option("--label", default="", help="What the rows call the policy.")
@click.option("--slo-ttft", "slo_ttft_s", type=float, help="Target seconds to the first token.")
@click.option("--slo-tpot", "slo_tpot_s", type=float, help="Target seconds per output token.")
@click.option("--slo-e2e", "slo_e2e_s", type=float, help="Target seconds to the end.")
@click.option("--out", type=click.Path(path_type=Path), help="Write one row a request: .csv or .parquet.")
@click.option("--chart", type=click.Path(path_type=Path), help="Draw the latencies: .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(url: str, **options: Any) -> None:
    """Send an open-loop workload to URL and measure at the client.

    Each request is sent when the schedule says, whatever became of the others; latency counts from that time, and how
    late the load generator itself was is reported. Works with any server that speaks OpenAI's API.

    \b
    Examples:
      block replay http://127.0.0.1:8000 --rate 8 --requests 500
      block replay http://127.0.0.1:8000 --arrivals gamma --cv2 4 --duration 60 --slo-ttft 1 --out rows.csv
      block replay http://127.0.0.1:8000 --trace azure-2023-conv.csv.gz --arrivals trace --rate 5 --json
      block replay https://api.example.org --endpoint chat --length-mode natural --header "authorization: Bearer KEY"
    """
    import json

    from block.metrics.charts import check_chart_path, latency_chart
    from block.metrics.tables import summary_json

    if options["chart"] is not None:
        check_chart_path(options["chart"])
    offered = _offered(options)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        rows, interrupted = runner.run(_replay(offered, url, _replay_options(options), options["out"]))
    summary = _summary(rows, options)
    if options["chart"] is not None and rows:
        latency_chart({options["label"] or url: rows}, options["chart"])
    if options["as_json"]:
        click.echo(json.dumps({**summary_json(summary), "interrupted": interrupted}))
    else:
        _print(summary, rows, options, interrupted)
    if interrupted:
        sys.exit(130)


def _loop_factory() -> "Callable[[], asyncio.AbstractEventLoop] | None":
    try:
        import uvloop
    except ImportError:  # not made for Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _workload(options: dict[str, Any]) -> "WorkloadConfig":
    from block.errors import ConfigError
    from block.workload import WorkloadConfig

    if options["arrivals"] == "trace" and options["trace"] is None:
        raise ConfigError("--arrivals trace needs --trace FILE.")
    if (options["prompt_tokens"] is None) != (options["output_tokens"] is None):
        raise ConfigError("--prompt-tokens and --output-tokens go together.")
    rate_rps = options["rate_rps"]
    if rate_rps is None and options["arrivals"] != "trace":
        rate_rps = 10.0
    WorkloadConfig(rate_rps=rate_rps)  # refuses a rate that is none
    requests = options["requests"]
    if requests is None and options["trace"] is None:
        # Enough for the duration with a wide margin; what lies beyond it is cut.
        duration_s = options["duration_s"]
        if duration_s is not None and not 0 < duration_s < float("inf"):
            raise ConfigError(f"--duration must be above 0 seconds, not {duration_s}.")
        requests = 1000 if duration_s is None else int((rate_rps or 0) * duration_s * 2) + 100
    copied = ("arrivals", "gap_cv2", "on_s", "off_s", "lengths", "prompt_tokens", "output_tokens", "trace")
    return WorkloadConfig(rate_rps=rate_rps, requests=requests, **{name: options[name] for name in copied})


def _offered(options: dict[str, Any]) -> "list[Offered]":
    from block.errors import ConfigError
    from block.workload import offer

    offered = offer(_workload(options), options["seed"])
    if options["duration_s"] is not None:
        offered = [one for one in offered if one.request.arrived_s <= options["duration_s"]]
    if not offered:
        raise ConfigError("No request falls into that duration: raise --rate or --duration.")
    return offered


def _replay_options(options: dict[str, Any]) -> "ReplayOptions":
    from block.errors import ConfigError
    from block.replay.client import ReplayOptions

    pairs = [text.partition(":") for text in options["headers"]]
    if any(not colon or not name.strip() for name, colon, _ in pairs):
        raise ConfigError("Write a header as NAME:VALUE.")
    copied = ("endpoint", "model", "length_mode", "max_tokens", "stream", "timeout_s", "seed")
    return ReplayOptions(
        **{name: options[name] for name in copied},
        policy=options["label"],
        headers={name.strip(): text.strip() for name, _, text in pairs},
    )


async def _replay(
    offered: "list[Offered]", url: str, options: "ReplayOptions", out: Path | None
) -> "tuple[list[Row], bool]":
    """The rows, those that ended before a Ctrl-C at least, and whether there was one."""
    import contextlib
    import signal

    from block.metrics.row import row_writer

    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(row_writer(out)) if out is not None else None
        task = asyncio.create_task(_with_progress(offered, url, options, rows, writer))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            return rows, True
    return rows, False


async def _with_progress(
    offered: "list[Offered]", url: str, options: "ReplayOptions", rows: "list[Row]", writer: "RowWriter | None"
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from block.replay.client import replay

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("TTFT {task.fields[ttft]}  failed {task.fields[failed]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        bar = progress.add_task("answered", total=len(offered), ttft="-", failed=0)
        failed = 0

        def on_row(row: "Row") -> None:
            nonlocal failed
            rows.append(row)
            if writer is not None:
                writer.write(row)
            failed += row.status != "finished"
            ttft = "-" if row.ttft_s is None else f"{row.ttft_s * 1000:.0f} ms"
            progress.update(bar, advance=1, ttft=ttft, failed=failed)

        await replay(offered, url, options, on_row=on_row)


def _summary(rows: "list[Row]", options: dict[str, Any]) -> Any:
    from block.core import Slo
    from block.metrics import summarize

    targets = (options["slo_ttft_s"], options["slo_tpot_s"], options["slo_e2e_s"])
    return summarize(rows, Slo(*targets) if any(t is not None for t in targets) else None)


def _print(summary: Any, rows: "list[Row]", options: dict[str, Any], interrupted: bool) -> None:
    from collections import Counter

    from block.metrics.tables import stdout, summary_table

    console = stdout()
    console.print(summary_table({options["label"] or "all": summary}, first_column="run"))
    late_ms = summary.lateness_s_p99 * 1000
    console.print(f"load generator's own lateness: P50 {summary.lateness_s_p50 * 1000:.1f} ms, P99 {late_ms:.1f} ms")
    for reason, count in Counter(row.error for row in rows if row.error).most_common(5):
        console.print(f"[red]{count} x[/red] {reason}", highlight=False)
    if interrupted:
        console.print("interrupted: the figures are of the requests answered until then")
