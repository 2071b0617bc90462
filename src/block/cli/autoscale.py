"""``block autoscale``: the right number of instances, before latency suffers."""

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--controller", help="Instead of the configured one and its options; written as replay:margin=0.1.")
@click.option("--host", help="Address of metrics and decisions. [127.0.0.1]")
@click.option("--port", type=int, help="Their port; 0 takes a free one. [8300]")
@click.option("--dry-run", is_flag=True, help="Decide and explain; start and stop nothing.")
@click.option("--check-config", is_flag=True, help="Check the configuration and exit.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line when ready, then one for every decision.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
def command(
    config: Path, controller: str | None, host: str | None, port: int | None, dry_run: bool, check_config: bool,
    as_json: bool, log_level: str,
) -> None:  # fmt: skip
    """Keep as many instances as the load needs: observe the gateways named in CONFIG (TOML), decide, start and stop.

    \b
    GET /decisions  why, newest first       GET /desired  the counts now in force
    GET /metrics    Prometheus              GET /health   503 when no decision was made for a while

    \b
    Examples:
      block autoscale autoscale.toml
      block autoscale autoscale.toml --dry-run
      block autoscale autoscale.toml --controller relief:threshold_s=5 --json
    """
    import asyncio
    import logging

    import msgspec

    from block.autoscale.live.program import check, run_autoscaler
    from block.autoscale.live.settings import load_settings
    from block.predictor.serving import bind, run, url_of

    settings = load_settings(config)
    changes: dict[str, Any] = {"controller": controller, "host": host, "port": port}
    changes = {name: value for name, value in changes.items() if value is not None}
    if controller is not None:
        changes["options"] = {}  # they are of the configured one
    settings = msgspec.structs.replace(settings, **changes)
    if check_config:
        asyncio.run(check(settings))
        kinds = ", ".join(kind.name for kind in settings.kinds)
        click.echo(f"The configuration is fine: {settings.controller} over {kinds}, actuator {_type_of(settings)}.")
        return
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    with bind(settings.host, settings.port) as bound:
        url = url_of(bound)

        def on_ready() -> None:
            if as_json:
                _tell({"url": url, "controller": settings.controller, "dry_run": dry_run})
            else:
                what = " (dry run)" if dry_run else ""
                click.echo(f"block autoscale: {settings.controller}, {url}{what}", err=True)

        run(run_autoscaler(settings, bound, on_ready, dry_run=dry_run, on_record=_tell_on if as_json else None))


def _type_of(settings: Any) -> str:
    return str(settings.actuator.__struct_config__.tag)


def _tell(value: Any) -> None:
    import msgspec

    click.echo(msgspec.json.encode(value).decode())


def _tell_on(value: Any) -> None:
    """Tell a decision; whoever read them may be gone, or the disk full, and instances need their autoscaler all the same."""
    import logging
    import os
    import sys

    try:
        _tell(value)
    except OSError as error:
        logging.getLogger("block.autoscale").warning("the decision could not be written as JSON: %s", error.strerror)
        if isinstance(error, BrokenPipeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
