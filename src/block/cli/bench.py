"""``block bench``: how fast the predictor is on this machine."""

import click


@click.group()
def command() -> None:
    """Measure Block's hot paths on this machine.

    \b
    Examples:
      block bench whatif
      block bench whatif --json
    """


@command.command()
@click.option("--seconds", default=1.0, show_default=True, help="CPU time per scenario.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def whatif(seconds: float, as_json: bool) -> None:
    """Microseconds of one what-if, from a state in memory and from a snapshot's bytes.

    \b
    Examples:
      block bench whatif
      block bench whatif --seconds 5 --json
    """
    from block.predict.bench import measure_whatif, print_whatif

    print_whatif(measure_whatif(seconds), as_json)
