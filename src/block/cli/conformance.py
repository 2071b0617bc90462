"""``block conformance``: does a gateway do what OpenAI's clients and HTTP expect?"""

import asyncio
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from block.conformance import Result


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("url", required=False)
@click.option("--model", default="", help="Model to ask for [the first that the gateway lists].")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="API key; also checks that requests without it get 401.")
@click.option("--only", multiple=True, metavar="GROUP", help="Only this group of checks, repeatable.")
@click.option(
    "--engine", "engines", multiple=True, metavar="URL", help="An engine behind it, whose /metrics shows cancels."
)
@click.option("--timeout", "timeout_s", default=15.0, show_default=True, help="Seconds for one answer.")
@click.option(
    "--quiet", "quiet_s", default=0.5, show_default=True, help="Seconds of silence that mean nothing more comes."
)
@click.option(
    "--patience", "patience_s", default=0.0, help="Seconds to wait for the gateway's own time limits [0: do not]."
)
@click.option("--list", "listed", is_flag=True, help="Say what is checked and why, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(url: str | None, **options: Any) -> None:
    """Check any OpenAI-compatible gateway (or engine) from outside: errors, streams, headers, limits, cancellation.

    Sends some hundreds of small requests, among them broken and hostile ones: point it at a test instance, not at
    somebody's production. Exit code 1 when a required check fails; recommended ones are reported only.

    \b
    Examples:
      block conformance http://127.0.0.1:8000
      block conformance http://127.0.0.1:8000 --only smuggling --only limits --patience 20
      block conformance https://gateway.example.org --model llama --api-key KEY --json
      block conformance http://127.0.0.1:8000 --engine http://127.0.0.1:8101 --engine http://127.0.0.1:8102
      block conformance --list
    """
    import msgspec

    from block.conformance import Outcome, all_checks

    if options.pop("listed"):
        _print_checks(options["only"])
        return
    if url is None:
        raise click.UsageError("Say which gateway: block conformance http://HOST:PORT")
    as_json = options.pop("as_json")
    all_checks(options["only"])  # a wrong name ends here, before anything is sent
    results = asyncio.run(_run(url, **options))
    if as_json:
        counts = {outcome.value: sum(r.outcome is outcome for r in results) for outcome in Outcome}
        failed = [f"{r.group}/{r.name}" for r in results if r.fatal]
        click.echo(msgspec.json.encode({"url": url, "counts": counts, "failed": failed, "results": results}).decode())
    else:
        _print_results(results)
    if any(result.fatal for result in results):
        sys.exit(1)


async def _run(url: str, only: tuple[str, ...], **options: Any) -> "list[Result]":
    from rich.console import Console

    from block.conformance import all_checks, open_target, run_checks

    console = Console(stderr=True)
    total = len(all_checks(only))
    async with open_target(url, **options) as target:
        with console.status("") as status:
            return await run_checks(target, only, _counter(total, status.update))


def _counter(total: int, show: "Callable[[str], None]") -> "Callable[[Result], None]":
    done = 0

    def count(result: "Result") -> None:
        nonlocal done
        done += 1
        show(f"{done} of {total} checks, last {result.group}/{result.name}")

    return count


def _print_results(results: "list[Result]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from block.conformance import Outcome

    styles = {Outcome.PASS: "green", Outcome.FAIL: "bold red", Outcome.NOT_APPLICABLE: "dim"}
    table = Table(
        "group", "check", "", "result", "claim, or what was seen", box=None, header_style="bold", pad_edge=False
    )
    for r in results:
        seen = Text(r.claim if not r.detail else f"{r.claim} {r.detail[0].upper()}{r.detail[1:]}.")
        if r.outcome is Outcome.FAIL:
            seen.append(f"\n{r.reference}", style="dim")
        style = "yellow" if r.outcome is Outcome.FAIL and not r.required else styles[r.outcome]
        table.add_row(r.group, r.name, "" if r.required else "recommended", Text(str(r.outcome), style=style), seen)
    console = Console()
    console.print(table)
    passed, fatal = sum(r.outcome is Outcome.PASS for r in results), sum(r.fatal for r in results)
    advice = sum(r.outcome is Outcome.FAIL for r in results) - fatal
    skipped = sum(r.outcome is Outcome.NOT_APPLICABLE for r in results)
    console.print(f"\n{passed} passed, {fatal} required and {advice} recommended failed, {skipped} not applicable.")


def _print_checks(only: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    from block.conformance import all_checks

    table = Table("group", "check", "", "claim", "reference", box=None, header_style="bold", pad_edge=False)
    for group, check in all_checks(only):
        table.add_row(group, check.name, "" if check.required else "recommended", check.claim, check.reference)
    Console().print(table)
