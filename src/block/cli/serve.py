"""``block serve``: the gateway."""

from typing import Any

import click

POLICY_HELP = "How to choose an instance; options as in block-k:k=4. All names: block policies."


LISTS = frozenset({"--worker-urls", "--cors-allowed-origins", "--request-id-headers", "--selector"})
"""Options that take several values behind each other, as in other routers."""


class ServeCommand(click.Command):
    """Takes ``--worker-urls URL URL`` as ``--worker-urls URL --worker-urls URL``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        of: str | None = None
        for at, arg in enumerate(args):
            if arg.startswith("-"):
                of = arg if arg in LISTS else None
            elif of is not None and args[at - 1] != of:
                spread.append(of)
            spread.append(arg)
        return super().parse_args(ctx, spread)


@click.command(cls=ServeCommand)
@click.option(
    "--instance",
    "instances",
    multiple=True,
    metavar="URL[,predictor=URL|,profile=NAME][,name=NAME]",
    help="An engine; repeat for more. With a profile instead of a predictor the gateway models it from its streams.",
)
@click.option(
    "--worker-urls",
    multiple=True,
    metavar="URL [URL ...]",
    help="Engines without predictors, separated by spaces or commas.",
)
@click.option("--static-backends", metavar="URL,URL", help="The same, spelled as production-stack does.")
@click.option(
    "--static-models", metavar="NAME,NAME", help="Taken and not needed: every engine is asked for its models."
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False),
    help="TOML file; reloaded when it changes and on SIGHUP.",
)
@click.option("--host", help="Address to listen on. [127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on; 0 takes a free one. [8000]")
@click.option("--workers", type=int, help="Processes that share the port. [1]")
@click.option("--admin-port", type=int, help="A port of its own for /admin, /metrics and decisions.")
@click.option("--admin-host", help="Address of that port. [127.0.0.1]")
@click.option("--prometheus-port", type=int, help="A port of its own for /metrics and health, beside the main one.")
@click.option("--prometheus-host", help="Address of that port. [127.0.0.1]")
@click.option(
    "--service-discovery",
    type=click.Choice(["static", "file", "dns", "k8s"]),
    is_flag=False,
    flag_value="k8s",
    help="Where more instances are found, and lost; k8s where no word follows. [static: nowhere]",
)
@click.option(
    "--selector",
    "--k8s-label-selector",
    multiple=True,
    metavar="KEY=VALUE [KEY=VALUE ...]",
    help="Labels of pods (k8s).",
)
@click.option("--service-discovery-port", "--k8s-port", type=int, help="Port of those pods. [8000]")
@click.option("--service-discovery-namespace", "--k8s-namespace", help="Their namespace. [default]")
@click.option("--discovery-file", type=click.Path(dir_okay=False), help="llm-d's endpoint file, or TOML [[instances]].")
@click.option("--discovery-name", metavar="HOST:PORT|_SRV._TCP.NAME", help="DNS name of all instances.")
@click.option("--discovery-interval-secs", "discovery_interval_s", type=float, help="How often DNS is asked. [10]")
@click.option("--discovery-predictor-port", type=int, help="Predictors' port on the hosts that are discovered.")
@click.option("--discovery-profile", help="Profile of the engines that are discovered, where they have no predictor.")
@click.option("--policy", "--routing-logic", "policy", help=POLICY_HELP + " [block]")
@click.option("--length-estimator", help="How output lengths are estimated. [history]")
@click.option(
    "--predict",
    type=click.Choice(["local", "remote"]),
    help="What-ifs in this process, or asked of the predictors. [local]",
)
@click.option(
    "--count-tokens",
    type=click.Choice(["events", "usage"]),
    help="In streams of engines with a profile: by events, or by usage that is asked for and taken out again. [events]",
)
@click.option("--seed", type=int, help="Seed of ties and random choices.")
@click.option("--stale-after-secs", "stale_after_s", type=float, help="Evidence older than this is not used. [2]")
@click.option("--max-concurrent-requests", type=int, help="Beyond it requests queue. [16384]")
@click.option("--instance-in-flight-max", type=int, help="Requests that one instance gets at a time. [4096]")
@click.option("--queue-size", type=int, help="Beyond it requests are answered 429. [1024]")
@click.option("--queue-timeout-secs", "queue_timeout_s", type=float, help="Longest wait in the queue. [10]")
@click.option("--request-timeout-secs", "request_timeout_s", type=float, help="Longest time for one request. [1800]")
@click.option("--retry-max-retries", "retries", type=int, help="Retries of a request not yet answered. [3]")
@click.option("--disable-retries", is_flag=True, help="None of those.")
@click.option(
    "--cb-failure-threshold", type=int, help="Failures in a row that open an instance's circuit; 0 is never. [5]"
)
@click.option(
    "--cb-open-secs", "--cb-timeout-duration-secs", "cb_open_s", type=float, help="For how long it stays open. [5]"
)
@click.option("--disable-circuit-breaker", is_flag=True, help="It never opens.")
@click.option(
    "--health-check-path", "--health-check-endpoint", "health_check_path", help="What is asked of engines. [/health]"
)
@click.option("--health-failure-threshold", type=int, help="Failed checks in a row that take an instance out. [3]")
@click.option("--health-check-interval-secs", "health_check_interval_s", type=float, help="[2]")
@click.option("--health-check-timeout-secs", "health_check_timeout_s", type=float, help="[2]")
@click.option(
    "--hang-after-secs", "hang_after_s", type=float, help="Silence that makes an instance suspect; 0 is off. [0.75]"
)
@click.option(
    "--continue-streams",
    "--migration-limit",
    "continue_streams",
    type=int,
    help="How often a stream whose instance dies goes on elsewhere, where that can be exact; 0 is off. [0]",
)
@click.option(
    "--shutdown-grace-period-secs",
    "--drain-timeout",
    "shutdown_grace_period_s",
    type=float,
    help="For answers to finish after SIGTERM. [60]",
)
@click.option(
    "--api-key", "api_keys", multiple=True, help="Key that clients must send; better in BLOCK_API_KEYS or a file."
)
@click.option("--api-key-file", type=click.Path(dir_okay=False), help="File of keys, one a line.")
@click.option("--admin-key", help="Opens /admin; better in BLOCK_ADMIN_KEY.")
@click.option("--tls-cert-path", type=click.Path(dir_okay=False), help="Certificate (PEM) to serve HTTPS with.")
@click.option("--tls-key-path", type=click.Path(dir_okay=False), help="Its key, where the certificate's file has none.")
@click.option(
    "--tls-ca-path", type=click.Path(dir_okay=False), help="Clients must show a certificate of this authority."
)
@click.option(
    "--upstream-ca-path",
    "--ca-cert-paths",
    "upstream_ca_path",
    type=click.Path(dir_okay=False),
    help="Authority of https:// instances.",
)
@click.option(
    "--upstream-cert-path",
    "--client-cert-path",
    "upstream_cert_path",
    type=click.Path(dir_okay=False),
    help="Certificate to show to instances.",
)
@click.option(
    "--upstream-key-path", "--client-key-path", "upstream_key_path", type=click.Path(dir_okay=False), help="Its key."
)
@click.option(
    "--admission",
    type=click.Choice(["all", "deadline"]),
    help="deadline: answer 429 where no instance is expected to meet a request's SLO headers. [all]",
)
@click.option("--sse-keep-alive-secs", "sse_keep_alive_s", type=float, help="Comments in silent streams; 0 is off. [0]")
@click.option(
    "--tracing/--no-tracing",
    "--enable-trace/--disable-trace",
    "tracing",
    default=None,
    help="OpenTelemetry spans, set up by OTEL_* variables. [no]",
)
@click.option(
    "--request-bytes-max", "--max-payload-size", "request_bytes_max", type=int, help="Largest request body. [33554432]"
)
@click.option(
    "--cors-allowed-origins",
    multiple=True,
    metavar="ORIGIN [ORIGIN ...]",
    help="Web pages that may ask; * is all. [none]",
)
@click.option(
    "--request-id-headers", multiple=True, metavar="NAME [NAME ...]", help="Where a request's id is. [x-request-id]"
)
@click.option(
    "--log-requests", type=click.Path(dir_okay=False), help="Append finished requests to this file (JSON lines)."
)
@click.option(
    "--log-prompts",
    type=click.Choice(["off", "features", "full"]),
    help="What that file keeps of prompts: nothing, counts and hashed words, or the text. [off]",
)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "warn", "error", "critical"]), help="[info]"
)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any setting of docs/gateway.md, written as in a variable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready.")
@click.option("--dump-config", is_flag=True, help="Print the whole configuration as TOML and exit.")
@click.option("--check-config", is_flag=True, help="Check the configuration and exit.")
def command(
    config_file: str | None, as_json: bool, dump_config: bool, check_config: bool, sets: tuple[str, ...], **flags: Any
) -> None:
    """Serve OpenAI's API in front of several engines, sending each request where it is predicted to do best.

    Every option is also a variable (BLOCK_PORT, BLOCK_POLICY, ...; lists are separated by spaces) and a key of the TOML
    file. Flags win over variables, variables over the file.

    \b
    Examples:
      block serve --instance http://gpu1:8000,predictor=http://gpu1:9000 \\
                  --instance http://gpu2:8000,predictor=http://gpu2:9000
      block serve --instance http://gpu1:8000,profile=h200-llama3.1-8b,max-num-seqs=128 \\
                  --instance http://gpu2:8000,profile=h200-llama3.1-8b,max-num-seqs=128
      block serve --policy least-outstanding --worker-urls http://gpu1:8000 http://gpu2:8000
      block serve --service-discovery file --discovery-file endpoints.yaml --workers 4 --admin-port 8001
      block serve --config gateway.toml --port 8080
      block serve --config gateway.toml --dump-config
    """
    from block.gateway import config as configuration
    from block.policy.table import policy_from

    given = _given(flags)

    def load() -> configuration.GatewayConfig:
        return configuration.load_config(given, file=config_file, sets=sets)

    config = load()
    policy_from(config.policy)
    if dump_config:
        click.echo(configuration.dump_config(config), nl=False)
    elif check_config:
        from block.gateway.serve import check

        check(config)
        click.echo(f"The configuration is fine: {len(config.instances)} instances, policy {config.policy}.")
    else:
        _serve(config, load, as_json)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """Only what was given on the command line, under the configuration's names."""
    from block.gateway.config import parse_instance

    urls = list(flags.pop("instances"))
    urls += [url for text in flags.pop("worker_urls") for url in text.replace(",", " ").split()]
    urls += [url for url in (flags.pop("static_backends") or "").split(",") if url]
    models = flags.pop("static_models")
    if models is not None and len(models.split(",")) != len(urls):
        raise click.UsageError("--static-models must name one model for each backend.")
    _as_ours(flags)
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    for name in ("api_keys", "cors_allowed_origins"):
        if name in given:
            given[name] = list(given[name])
    if urls:
        given["instances"] = [parse_instance(url) for url in urls]
    return given


def _as_ours(flags: dict[str, Any]) -> None:
    """Flags of other routers that have no setting of the same kind here."""
    if flags.pop("disable_retries"):
        flags["retries"] = 0
    if flags.pop("disable_circuit_breaker"):
        flags["cb_failure_threshold"] = 0
    flags["log_level"] = {"warn": "warning", "critical": "error"}.get(flags["log_level"], flags["log_level"])
    labels, port = ",".join(flags.pop("selector")), flags.pop("service_discovery_port") or 8000
    namespace = flags.pop("service_discovery_namespace") or "default"
    if labels:
        flags["discovery_name"] = f"{namespace}/pods:{labels}:{port}"


def _serve(config: Any, reload: Any, as_json: bool) -> None:
    import logging

    from block.errors import ConfigError

    if not config.instances and config.service_discovery == "static" and not (config.admin_key or config.admin_port):
        raise ConfigError(
            "No instance is given: add --instance URL, --service-discovery, or --admin-key KEY to add them while it runs."
        )
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    if config.workers > 1:
        _supervise(config, reload, as_json)
    else:
        _run(config, reload, lambda gateway: _started(config, as_json, gateway.port, len(gateway.pool.ready())))


def _started(config: Any, as_json: bool, port: int, ready: int) -> None:
    """The first line printed."""
    import json
    import os

    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"{'http' if config.tls_cert_path is None else 'https'}://{host}:{port}"
    if as_json:
        click.echo(json.dumps({"url": url, "pid": os.getpid(), "ready": ready}))
        return
    workers = f"{config.workers} workers, " if config.workers > 1 else ""
    of = f" of {len(config.instances)}" if config.service_discovery == "static" else ""
    click.echo(f"block serve: {url}, {workers}policy {config.policy}, {ready}{of} instances ready", err=True)


def _run(config: Any, reload: Any, started: Any, workers: Any = None, parent: int | None = None) -> None:
    import asyncio
    import signal

    from block.gateway.serve import run

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # a reload waits until there is something to reload
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(run(config, reload, started, workers, parent))


def _supervise(config: Any, reload: Any, as_json: bool) -> None:
    import contextlib
    import sys

    from block.errors import BlockError, UserError
    from block.gateway.processes.supervisor import USER_ERROR, Place, Supervisor
    from block.gateway.processes.workers import Workers
    from block.policy.table import policy_from

    def refresh() -> None:
        nonlocal config
        with contextlib.suppress(BlockError):  # the workers say what is wrong with it
            new = reload()
            policy_from(new.policy)
            new.all_keys()
            config = new

    def serve(place: Place) -> int:
        own = place.config(config)
        try:
            _run(
                own, lambda: place.config(reload()), lambda gateway: place.say_ready(len(gateway.pool.ready())),
                Workers(place.directory, place.number, config.workers), place.parent,
            )  # fmt: skip
        except UserError as error:
            click.echo(f"block: {error}", err=True)
            return USER_ERROR
        return 0

    supervisor = Supervisor(config, serve, refresh)
    code = supervisor.run(lambda ready: _started(config, as_json, supervisor.port, ready))
    if code:
        sys.exit(code)


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
