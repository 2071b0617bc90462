"""``block predictor``: the sidecar of one engine."""

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--source",
    required=True,
    metavar="KIND:NAME",
    help="Whose state: vllm:NAME, emulate:NAME, shm:NAME or metrics:URL.",
)
@click.option("--profile", required=True, help="Step-time profile of the engine (see 'block profiles').")
@click.option(
    "--speed", default=1.0, show_default=True, help="Speed of the engine against the profile, where it is known."
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8200, show_default=True, help="0: any free port, which is printed.")
@click.option(
    "--min-interval-ms", default=5.0, show_default=True, help="Send a subscriber a snapshot at most this often."
)
@click.option(
    "--stale-after", default=3.0, show_default=True, help="Seconds after which a busy engine's snapshot is not used."
)
@click.option(
    "--calibrate/--no-calibrate", default=True, show_default=True,
    help="Correct the profile's scale slowly by the engine's own steps (at most by a factor of two).",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready.")
def command(
    *,
    source: str,
    profile: str,
    speed: float,
    host: str,
    port: int,
    min_interval_ms: float,
    stale_after: float,
    calibrate: bool,
    as_json: bool,
) -> None:
    """Serve one engine's scheduler state as a stream and predict what a request would meet there.

    \b
    GET  /snapshots  endless stream of frames: u32 little-endian length, snapshot
    POST /predict    {"prompt_tokens": 300, "output_tokens": 120, "harm": true} -> ttft_s, e2e_s, ...
    GET  /snapshot   the newest snapshot as JSON      GET /profile   the step times, with their scale
    GET  /health     503 and the reason when it cannot predict     GET /metrics   Prometheus

    \b
    Examples:
      block predictor --source emulate:a --profile h200-llama3.1-8b --port 8201
      block predictor --source vllm:prod-0 --profile ./my-gpu.json --port 8201
      curl localhost:8201/predict -d '{"prompt_tokens": 300, "quantiles": [[0.1, 20], [0.5, 150], [0.9, 500]]}'
    """
    import os

    from block.errors import ConfigError
    from block.predictor.program import run_predictor
    from block.predictor.serving import bind, run, url_of
    from block.predictor.source import open_source
    from block.steptime.profile import load_profile

    if not speed > 0:
        raise ConfigError(f"--speed must be greater than 0, not {speed}.")
    if min_interval_ms < 0 or stale_after <= 0:
        raise ConfigError("--min-interval-ms must not be negative and --stale-after must be greater than 0.")
    state_source = open_source(source, min_interval_ms / 1e3)
    step_times = load_profile(profile)
    with bind(host, port) as bound:
        url = url_of(bound)

        def on_ready() -> None:
            if as_json:
                import msgspec

                ready = {"url": url, "source": source, "profile": profile, "pid": os.getpid()}
                click.echo(msgspec.json.encode(ready).decode())
            else:
                click.echo(f"Predicting for {source} on {url}", err=True)

        run(
            run_predictor(state_source, step_times, bound, on_ready, speed=speed, min_interval_s=min_interval_ms / 1e3,
                          stale_after_s=stale_after, calibrating=calibrate)
        )  # fmt: skip
