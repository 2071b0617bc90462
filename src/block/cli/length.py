"""``block length``: train, score and ask the output-length estimator."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from block.core import Request
    from block.length.data.records import Record
    from block.length.learn.model import LengthModel, Placer, TextEncoder

_PATH = click.Path(path_type=Path)
_SEEN_BY_CHANCE = 200  # one in so many may look seen: hashes of 32 bits, common prompts such as "hi"
_BASE = "Start from what this model knows of other prompts; none: from nothing. [the shipped one]"


@click.group()
def command() -> None:
    """Estimate how long answers will be: train on logs, score on unseen prompts, ask for one prompt.

    \b
    DATA are JSONL logs ({"model", "messages" or "prompt", "max_tokens", "output_tokens"}, gzipped or not), rows that
    a gateway logged, or prompt-and-answer sets (instructions, questions, ShareGPT's conversations, FastChat's folders;
    JSON lines, JSON or tar.gz); folders are read whole. Where a row counts no tokens, its answer's words do, times 1.3.
    """


@command.command()
@click.argument("data", nargs=-1, required=True, type=_PATH)
@click.option("-o", "--output", required=True, type=_PATH, help="The model file (.npz), a folder with --transformer.")
@click.option("--model", default="", help="The served model, where DATA does not name it.")
@click.option("--base", default="", metavar="FILE", help=_BASE)
@click.option("--encoder", type=_PATH, help="A sentence encoder's folder: adds embeddings (extra length-neural).")
@click.option("--transformer", type=_PATH, help="An encoder's folder: fine-tunes it instead (extra length-neural).")
@click.option("--epochs", default=3, show_default=True, type=click.IntRange(1), help="With --transformer.")
@click.option("--device", default="cpu", show_default=True, help="With --transformer: cpu or cuda.")
@click.option("--rounds", default=250, show_default=True, type=click.IntRange(1), help="Boosted trees.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def train(
    data: tuple[Path, ...], output: Path, model: str, base: str, encoder: Path | None, transformer: Path | None,
    epochs: int, device: str, rounds: int, threads: int, as_json: bool,
) -> None:  # fmt: skip
    """Train an estimator on DATA and write it to a file that `--length-estimator learned:FILE` takes.

    \b
    Examples:
      block length train requests.jsonl -o lengths.npz
      block length train logs/ more.jsonl.gz -o lengths.npz --model llama-3.1-8b
      block length train today.jsonl -o newer.npz --base lengths.npz
      block length train requests.jsonl -o lengths.npz --encoder ./all-MiniLM-L6-v2
      block length train requests.jsonl -o tagger/ --transformer ./roberta-base --device cuda
    """
    import json
    import time

    from rich.console import Console

    from block.errors import ConfigError
    from block.length.data.sets import read_records
    from block.length.learn.train import fit

    if encoder is not None and transformer is not None:
        raise ConfigError("Either --encoder or --transformer, not both.")
    if base and transformer is not None:
        raise ConfigError(
            "Either --base or --transformer, not both: an encoder that is fine-tuned starts from no base."
        )
    if not output.parent.is_dir():
        raise ConfigError(f"The folder {output.parent} does not exist.")
    if transformer is None and output.is_dir():
        raise ConfigError(f"{output} is a folder: name a file.")
    records = read_records(data, model=model)
    click.echo(f"{len(records)} record{'s' * (len(records) != 1)}", err=True)
    started_s = time.perf_counter()
    if transformer is not None:
        from block.length.learn.transformer import fine_tune

        tuned = fine_tune(
            records, transformer, epochs=epochs, device=device, progress=lambda s: click.echo(s, err=True)
        )
        tuned.save(output)
        served = tuned.served
    else:
        with Console(stderr=True).status("training, some minutes for tens of thousands of records"):
            fitted = fit(records, base=_base(base), encoder=_encoder(encoder), rounds=rounds, threads=threads)
        fitted.save(output)
        served = fitted.served
    size = sum(f.stat().st_size for f in ([output] if output.is_file() else output.iterdir()))
    made: dict[str, object] = {
        "file": str(output), "bytes": size, "records": len(records), "served_models": sorted(served),
        "train_s": round(time.perf_counter() - started_s, 2),
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(made))
    else:
        click.echo(
            f"{output}: {len(served)} served model{'s' * (len(served) != 1)}, {size / 1e6:.2f} MB, {made['train_s']} s"
        )


@command.command("eval")
@click.argument("data", nargs=-1, required=True, type=_PATH)
@click.option("--model-file", type=_PATH, help="Score this model on DATA, instead of one cross-validated on DATA.")
@click.option("--model", default="", help="The served model, where DATA does not name it.")
@click.option("--base", default="", metavar="FILE", help=_BASE)
@click.option("--encoder", type=_PATH, help="Cross-validate with sentence embeddings of this encoder.")
@click.option("--rounds", default=250, show_default=True, type=click.IntRange(1), help="Boosted trees.")
@click.option("--folds", default=5, show_default=True, type=click.IntRange(2, 20))
@click.option("--separately", is_flag=True, help="Train on each set alone instead of on all together.")
@click.option("--by-set", is_flag=True, help="Leave out the lines of single served models.")
@click.option("--json", "as_json", is_flag=True, help="Print all scores as JSON.")
def evaluate(
    data: tuple[Path, ...], model_file: Path | None, model: str, base: str, encoder: Path | None, rounds: int, folds: int,
    separately: bool, by_set: bool, as_json: bool,
) -> None:  # fmt: skip
    """Score estimators on prompts of DATA that they have not seen, against baselines and the noise floor.

    Folds are made by normalised prompt; baselines see the same folds. With --model-file that model is scored as it
    is ("learned"), and as a gateway would have corrected it after serving the other folds ("corrected"). Prompts that
    it remembers from its training are left out; a base that remembers some is not started from.

    \b
    Examples:
      block length eval requests.jsonl
      block length eval requests.jsonl --model-file lengths.npz --json
      block length eval sets/ --separately --by-set
    """
    import json

    import msgspec
    from rich.console import Console

    from block.length.data.sets import read_records
    from block.length.evaluation.report import report, report_tables
    from block.length.evaluation.scores import TELLERS, cross_validate, tell_corrected, tell_learned
    from block.length.learn.train import fit
    from block.length.learned import load_placer

    records = read_records(data, model=model)
    tellers = dict(TELLERS)
    if model_file is not None:
        placer = load_placer(model_file)
        records = _unseen(records, placer, model_file)
        tellers |= {"learned": lambda _: tell_learned(placer), "corrected": lambda train: tell_corrected(placer, train)}
    else:
        sentence, start = _encoder(encoder), _unseeing(_base(base), records)
        tellers["learned"] = lambda train: tell_learned(fit(train, base=start, encoder=sentence, rounds=rounds))
    told = {}
    console = Console(stderr=True)
    with console.status("reading features") as status:
        parts = sorted({r.dataset for r in records}) if separately else [None]
        for part in parts:
            some = [r for r in records if part is None or r.dataset == part]
            if model_file is None:
                _enough(len(some), folds)
            told[part] = (some, cross_validate(some, tellers, folds=folds, progress=status.update))
    reports = [one for some, quantiles in told.values() for one in report(some, quantiles, by_model=not by_set)]
    if as_json:
        click.echo(json.dumps([msgspec.to_builtins(one) for one in reports]))
        return
    out = Console(width=max(Console().width, 100) if Console().is_terminal else 200)
    for table in report_tables(reports, "learned"):
        out.print(table)


@command.command()
@click.argument("prompt")
@click.option("--model-file", type=_PATH, help="A model of `block length train`. [the shipped one]")
@click.option("--served", default="", help="The served model's name.")
@click.option("--max-tokens", type=click.IntRange(1))
@click.option("--generated", default=0, show_default=True, type=click.IntRange(0), help="Tokens that came already.")
@click.option("--picture", type=_PATH, help="Draw the distribution: .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="Print the estimate as JSON.")
def predict(
    prompt: str, model_file: Path | None, served: str, max_tokens: int | None, generated: int, picture: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Say how long the answer to PROMPT will be (- reads it from standard input; JSON messages and whole request bodies too).

    \b
    Examples:
      block length predict "List ten ideas for a birthday party"
      block length predict "Write an essay on rivers" --max-tokens 800 --generated 300 --json
      cat prompt.txt | block length predict - --model-file lengths.npz --picture length.png
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from block.errors import ConfigError
    from block.length.evaluation.report import draw, estimate_json
    from block.length.learned import LearnedEstimator

    if picture is not None and (picture.suffix not in (".png", ".svg") or not picture.parent.is_dir()):
        raise ConfigError("Pictures are written as .png or .svg, into a folder that exists.")
    request = _asked(_standard_input() if prompt == "-" else prompt, served, max_tokens)
    text = request.prompt or ""
    estimator = LearnedEstimator(model=model_file)
    _warn_of_unknown(estimator.model, served)
    estimate = estimator.estimate(request)
    if picture is not None:
        draw(estimate, picture, generated=generated, title=text[:80].replace("\n", " ").replace("$", r"\$"))
    shown = estimate_json(estimate, generated)
    if as_json:
        click.echo(json.dumps(shown))
        return
    table = Table(title=f"output tokens, expected {shown['expected_total_tokens']:.0f} (by {shown['source']})")
    for q in shown["quantiles"]:
        table.add_column(f"{float(q):.0%}", justify="right")
    table.add_row(*(str(tokens) for tokens in shown["quantiles"].values()))
    Console().print(table)


def _asked(text: str, served: str, max_tokens: int | None) -> "Request":
    """A request of plain text, of JSON messages, or of an API's whole body."""
    import json

    from block.core import Request
    from block.length.prompt.text import request_text

    body: dict[str, object] = {"prompt": text}
    if text.lstrip()[:2] in ("[{", '{"'):
        try:
            given = json.loads(text)
        except ValueError:
            given = text
        given = {"messages": given} if isinstance(given, list) else given
        body = given if isinstance(given, dict) and {"messages", "prompt"} & given.keys() else body
    told = body.get("max_tokens", body.get("max_completion_tokens"))
    cap = told if max_tokens is None and isinstance(told, int) and told > 0 else max_tokens
    model = served or (body["model"] if isinstance(body.get("model"), str) else "")
    prompt = request_text(body)
    return Request(
        id="asked",
        arrived_s=0.0,
        prompt_tokens=max(1, len(prompt) // 4),
        max_tokens=cap,
        model=str(model),
        prompt=prompt,
    )


def _warn_of_unknown(placer: "Placer", served: str) -> None:
    from block.length.learn.model import LengthModel

    if served and isinstance(placer, LengthModel) and served not in placer.served:
        names = sorted(name for name in placer.served if name)
        known = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "one without a name"
        click.echo(f"Not trained on {served}: told of a typical served model. Known: {known}.", err=True)


def _standard_input() -> str:
    return sys.stdin.buffer.read().decode("utf-8", "replace")


def _base(name: str) -> "LengthModel | None":
    from block.length.learn.model import load_model
    from block.length.learned import SHIPPED

    return None if name == "none" else load_model(Path(name) if name else SHIPPED)


def _unseeing(base: "LengthModel | None", records: "list[Record]") -> "LengthModel | None":
    """The base, unless it was trained on prompts that are to be scored."""
    seen = 0 if base is None else int(base.has_seen([r.group for r in records]).sum())
    if seen <= len(records) // _SEEN_BY_CHANCE:
        return base
    click.echo(f"{seen} of {len(records)} prompts were in the base's training: scored without it.", err=True)
    return None


def _unseen(records: "list[Record]", placer: "Placer", path: Path) -> "list[Record]":
    """The records whose prompts the model was not trained on, as far as it remembers."""
    from block.errors import BadInputError
    from block.length.learn.model import LengthModel

    seen = placer.has_seen([r.group for r in records]) if isinstance(placer, LengthModel) else [False] * len(records)
    kept = [record for record, known in zip(records, seen, strict=True) if not known]
    if len(kept) < len(records):
        click.echo(f"{len(records) - len(kept)} of {len(records)} records left out: trained on.", err=True)
    if not kept:
        raise BadInputError(f"{path} was trained on all of these prompts: score it on others.")
    return kept


def _enough(records: int, folds: int) -> None:
    """A sentence in the user's numbers, where all folds but one would be too few to train on."""
    from block.errors import BadInputError
    from block.length.learn.train import RECORDS_MIN

    needed = -(-RECORDS_MIN * folds // (folds - 1))
    if records < needed:
        raise BadInputError(
            f"Too few records to train and score on {folds} folds: {records}, and at least {needed} are needed."
        )


def _encoder(path: Path | None) -> "TextEncoder | None":
    if path is None:
        return None
    from block.length.learn.encoder import SentenceEncoder

    return SentenceEncoder(path)
