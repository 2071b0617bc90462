"""``block emulate``: an OpenAI-compatible server that behaves like a vLLM instance."""

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--profile", required=True, help="Step-time profile: how fast the GPU and the model are (see 'block profiles')."
)
@click.option("--speed", default=1.0, show_default=True, help="0.5: every step takes twice as long.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, help="0: any free port, which is printed.")
@click.option("--model", default="emulated", show_default=True, help="Name of the served model.")
@click.option("--served-model-name", multiple=True, help="Names to serve it under instead; may be repeated.")
@click.option("--api-key", help="Want this key on /v1.")
@click.option("--max-num-seqs", default=256, show_default=True, help="Requests in one step at most.")
@click.option("--max-num-batched-tokens", default=2048, show_default=True, help="Tokens in one step at most.")
@click.option("--num-gpu-blocks", "--num-gpu-blocks-override", default=4096, show_default=True, help="KV cache blocks.")
@click.option("--block-size", default=16, show_default=True, help="Tokens a KV cache block.")
@click.option("--max-model-len", default=8192, show_default=True, help="Longest context, tokens.")
@click.option("--async-scheduling/--no-async-scheduling", default=True, show_default=True)
@click.option("--enable-chunked-prefill/--no-enable-chunked-prefill", default=True, show_default=True)
@click.option("--enable-prefix-caching/--no-enable-prefix-caching", default=False, show_default=True)
@click.option("--scheduling-policy", type=click.Choice(["fcfs", "priority"]), default="fcfs", show_default=True)
@click.option(
    "--long-prefill-token-threshold",
    default=0,
    show_default=True,
    help="Prefill tokens of one request a step; 0: no cap.",
)
@click.option("--enable-prompt-tokens-details", is_flag=True, help="Report cached_tokens in usage.")
@click.option("--output-lengths", default="sharegpt", show_default=True,
              help="Answers left open by the request: sharegpt, fixed:N, lognormal:MEAN[,SIGMA], uniform:LOW,HIGH.")  # fmt: skip
@click.option("--seed", default=0, show_default=True)
@click.option("--name", help="Publish scheduler snapshots in shared memory under this name, for 'block predictor'.")
@click.option("--snapshot-interval-ms", default=2.0, show_default=True, help="Publish at most this often.")
@click.option("--publish-cached-blocks", is_flag=True, help="Put the prefix cache's contents into the snapshots.")
@click.option(
    "--startup-duration", default=0.0, show_default=True, help="Seconds of cold start, in which the port refuses."
)
@click.option("--fail-rate", default=0.0, show_default=True, help="Fraction of requests that get a 500.")
@click.option("--allow-faults", is_flag=True, help="Serve POST /emulate/fault: hang, slow, errors, break, exit.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready.")
def command(
    *, profile: str, speed: float, host: str, port: int, model: str, served_model_name: tuple[str, ...],
    api_key: str | None,
    scheduling_policy: str, enable_prompt_tokens_details: bool, output_lengths: str, seed: int, name: str | None,
    snapshot_interval_ms: float, publish_cached_blocks: bool, startup_duration: float, fail_rate: float,
    allow_faults: bool, as_json: bool, **limits: int | bool,
) -> None:  # fmt: skip
    """Serve OpenAI's API like a vLLM instance in real time, without a GPU.

    The engine model schedules as vLLM does, the profile says how long each step takes. An answer is as long as the
    header x-emulate-output-tokens says, or max_tokens where the request sets ignore_eos, or drawn from --output-lengths;
    its text is filler words of one token each. A token is four bytes of text.

    \b
    Examples:
      block emulate --profile h200-llama3.1-8b --port 8101 --name a
      block emulate --profile h200-llama3.1-8b --speed 0.5 --max-num-seqs 48 --num-gpu-blocks 1056 --port 8102 --name b
      curl -N localhost:8101/v1/completions -H 'Content-Type: application/json' \\
           -d '{"prompt": "Hello", "max_tokens": 20, "ignore_eos": true, "stream": true}'
      curl localhost:8101/emulate/lateness      # does this machine keep up?
    """
    import gc
    import os

    from block.emulate.config import EmulateConfig
    from block.emulate.program import emulate
    from block.engine.limits import limits_from
    from block.predictor.serving import bind, run, url_of

    config = EmulateConfig(
        limits=limits_from({**limits, "policy": scheduling_policy}),
        profile=profile, speed=speed, models=served_model_name or (model,), host=host, port=port, name=name, seed=seed,
        output_lengths=output_lengths, api_key=api_key, startup_s=startup_duration,
        snapshot_interval_s=snapshot_interval_ms / 1e3, publish_cached_blocks=publish_cached_blocks,
        fail_rate=fail_rate, allow_faults=allow_faults, prompt_tokens_details=enable_prompt_tokens_details,
    )  # fmt: skip
    with bind(host, port) as bound:
        url = url_of(bound)

        def on_ready() -> None:
            gc.collect()
            gc.freeze()  # what stands now stays: the collector need not look at it again between steps
            if as_json:
                import msgspec

                ready = {"url": url, "name": name, "pid": os.getpid(), "models": config.models, "profile": profile}
                click.echo(msgspec.json.encode(ready).decode())
            else:
                click.echo(f"Emulating {profile} as {', '.join(config.models)} on {url}", err=True)

        run(emulate(config, bound, on_ready))
