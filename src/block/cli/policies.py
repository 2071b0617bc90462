"""``block policies``: the table of policies."""

from typing import Any

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def command(*, as_json: bool) -> None:
    """List the routing policies: what each looks at, and its options.

    \b
    Examples:
      block policies
      block policies --json
      block serve --policy block-k:k=3 --instance http://localhost:8101,predictor=http://localhost:8201
    """
    import inspect

    import msgspec

    from block.errors import UserError
    from block.policy.table import make_policy, policy_names, policy_spec

    rows: list[dict[str, Any]] = []
    for name in policy_names():
        row: dict[str, Any] = {"name": name, "description": "", "needs": None, "options": {}, "unavailable": None}
        try:
            spec = policy_spec(name)
            row["description"] = spec.description
            row["options"] = {option: p.default for option, p in inspect.signature(spec.make).parameters.items()}
            row["needs"] = make_policy(name).rank.needs.name.lower()
        except UserError as error:  # one that cannot be used here hides none of the others
            row["unavailable"] = str(error)
        rows.append(row)
    if as_json:
        click.echo(msgspec.json.encode(rows).decode())
        return
    from rich.table import Table

    from block.metrics.tables import stdout

    table = Table("policy", "chooses", "needs", "options", box=None, header_style="bold", pad_edge=False)
    for row in rows:
        choices = ", ".join(f"{k}={v}" for k, v in row["options"].items())
        table.add_row(row["name"], row["unavailable"] or row["description"], row["needs"] or "-", choices)
    stdout().print(table)
