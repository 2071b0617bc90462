"""Measured steps of one engine run, as arrays: the input of a fit.

A run directory holds ``engine.json`` (GPU, model, limits) and, per stage, ``STAGE.steps.csv.gz`` (one row an engine step) and
``STAGE.requests.csv.gz`` (one row a request). The columns are described in docs/engine-model.md.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from block.engine.limits import EngineLimits, limits_from
from block.errors import BadInputError

Floats = npt.NDArray[np.float64]
STEPS_SUFFIX = ".steps.csv.gz"
REQUESTS_SUFFIX = ".requests.csv.gz"


class StepLog(msgspec.Struct, frozen=True, eq=False):
    """The steps of one stage; every array has shape (steps,).

    ``scheduled_s``: the step's schedule() began; ``finished_s``: its results were in. ``context``: summed KV tokens of the
    decoding requests; ``prefill_work``: sum over chunks of tokens x (computed before + tokens / 2). ``prefilled``: sum over
    chunks of computed before + tokens; ``blocks_free``: after scheduling; both only if known.
    """

    name: str
    scheduled_s: Floats
    finished_s: Floats
    decode_requests: Floats
    context: Floats
    prefill_tokens: Floats
    prefill_work: Floats
    chunks: Floats
    prefilled: Floats | None = None
    blocks_free: Floats | None = None

    def __len__(self) -> int:
        return len(self.scheduled_s)

    @property
    def pure_decode(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.chunks == 0)

    def heat(self, memory_s: float) -> Floats:
        """Tokens prefilled before each step, shape (steps,); each counts exp(-age / ``memory_s``)."""
        found, left, counted_s = np.zeros(len(self)), 0.0, -np.inf
        began_s = np.maximum(self.scheduled_s, np.concatenate([[-np.inf], self.finished_s[:-1]]))
        for k, tokens in enumerate(self.prefill_tokens):
            left *= float(np.exp(-max(began_s[k] - counted_s, 0.0) / memory_s))
            found[k], counted_s = left, began_s[k]
            left += float(tokens)
        return found

    def shared(self, limits: EngineLimits) -> Floats:
        """Tokens in the cache of more than one running request, counted once less than held, shape (steps,); 0 if unknown."""
        if self.blocks_free is None or self.prefilled is None or not limits.enable_prefix_caching:
            return np.zeros(len(self))
        # On average half of every request's last block is empty.
        requests = self.decode_requests + self.chunks
        held = self.context + self.decode_requests + self.prefilled + 0.5 * limits.block_size * requests
        return np.asarray(np.maximum(held - (limits.blocks_usable - self.blocks_free) * limits.block_size, 0.0))

    @property
    def tokens(self) -> Floats:
        return self.decode_requests + self.prefill_tokens


class Run(msgspec.Struct, frozen=True):
    """A run directory: what ran, where, under which limits, and its stages."""

    path: Path
    gpu: str
    model: str
    tensor_parallel: int
    limits: EngineLimits
    stages: list[str]
    durations_s: dict[str, float]  # of the stages that state it
    model_config: dict[str, Any]


def read_run(path: Path) -> Run:
    """Read a run directory's ``engine.json``.

    Raises:
        BadInputError: no such directory, or it holds no readable ``engine.json`` or no stage.
    """
    if not path.is_dir():
        raise BadInputError(f"{path} is not a run directory.")
    file = path / "engine.json"
    try:
        fields = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise BadInputError(f"{path} holds no engine.json, so it is not a run directory.") from error
    except (OSError, ValueError) as error:
        raise BadInputError(f"{file} cannot be read: {error}.") from error
    if not isinstance(fields, Mapping):
        raise BadInputError(f"{file} is not a JSON object.")
    parallel, shape = fields.get("tensor_parallel", 1), fields.get("model_config") or {}
    if not isinstance(parallel, int) or parallel < 1:
        raise BadInputError(f"{file}: tensor_parallel must be a whole number of at least 1, not {parallel!r}.")
    if not isinstance(shape, Mapping):
        raise BadInputError(f"{file}: model_config must be a JSON object, as in the model's config.json.")
    suffixes = (REQUESTS_SUFFIX, STEPS_SUFFIX)
    stages = sorted({p.name.removesuffix(suffix) for suffix in suffixes for p in path.glob(f"*{suffix}")})
    if not stages:
        raise BadInputError(f"{path} holds no stage (STAGE{REQUESTS_SUFFIX} and STAGE{STEPS_SUFFIX}).")
    return Run(
        path=path,
        gpu=str(fields.get("gpu", "unknown")),
        model=str(fields.get("model", "unknown")),
        tensor_parallel=parallel,
        limits=limits_from(fields),
        stages=stages,
        durations_s=_durations(fields.get("stages"), file),
        model_config=dict(shape),
    )


def _durations(stages: object, file: Path) -> dict[str, float]:
    if not isinstance(stages, Mapping):
        return {}
    told = {k: v["duration_s"] for k, v in stages.items() if isinstance(v, Mapping) and "duration_s" in v}
    for stage, duration_s in told.items():
        if not isinstance(duration_s, int | float) or not duration_s > 0:
            raise BadInputError(f"{file}: the stage {stage} needs a duration_s above 0, not {duration_s!r}.")
    return told


def read_rows(file: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a gzip CSV file that must have the columns ``needed``.

    Raises:
        BadInputError: no such file, not gzip CSV, empty, or a column is missing.
    """
    try:
        with gzip.open(file, "rt", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except FileNotFoundError as error:
        raise BadInputError(f"There is no file {file}.") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise BadInputError(f"{file} is not a gzip CSV file: {error}.") from error
    missing = [c for c in needed if not rows or c not in rows[0]]
    if missing:
        raise BadInputError(f"{file} has no rows with the columns {', '.join(missing)}.")
    return rows


def read_steps(file: Path) -> StepLog:
    """Read one ``STAGE.steps.csv.gz``.

    Raises:
        BadInputError: the file is not a step log.
    """
    rows = read_rows(
        file, ("schedule_start_s", "update_start_s", "decode_requests", "decode_context_tokens", "prefill_chunks")
    )
    try:
        chunks = [_chunks(row["prefill_chunks"]) for row in rows]
        numbers = {
            column: finite(np.array([float(row[column]) for row in rows]), column)
            for column in ("schedule_start_s", "update_start_s", "decode_requests", "decode_context_tokens")
        }
        blocks_free = rows_as_floats(rows, "kv_blocks_free") if "kv_blocks_free" in rows[0] else None
    except (ValueError, TypeError) as error:
        raise BadInputError(f"{file} is not a step log: {error}.") from error
    return StepLog(
        name=file.name.removesuffix(STEPS_SUFFIX),
        scheduled_s=numbers["schedule_start_s"],
        finished_s=numbers["update_start_s"],
        decode_requests=numbers["decode_requests"],
        context=numbers["decode_context_tokens"],
        prefill_tokens=np.array([float(sum(n for n, _ in c)) for c in chunks]),
        prefill_work=np.array([sum(n * (before + 0.5 * n) for n, before in c) for c in chunks], dtype=float),
        chunks=np.array([float(len(c)) for c in chunks]),
        prefilled=np.array([float(sum(n + before for n, before in c)) for c in chunks]),
        blocks_free=blocks_free,
    )


def _chunks(text: str) -> list[tuple[int, int]]:
    pairs = [chunk.partition("@") for chunk in text.split()]
    if not all(separator for _, separator, _ in pairs):
        raise ValueError(f"prefill_chunks holds {text!r}, not tokens@computed_before")
    return [(int(tokens), int(before)) for tokens, _, before in pairs]


def rows_as_floats(rows: list[dict[str, Any]], column: str) -> Floats:
    """One column as floats; an empty field is 0.

    Raises:
        ValueError: something there is not a finite number.
    """
    return finite(np.array([float(row[column] or 0) for row in rows]), column)


def finite(values: Floats, column: str) -> Floats:
    """The values themselves.

    Raises:
        ValueError: one is infinite or not a number.
    """
    if not np.isfinite(values).all():
        raise ValueError(f"{column} holds {values[~np.isfinite(values)][0]}")
    return values


def read_stage_steps(run: Run, stage: str) -> StepLog:
    """The steps of one stage of a run, without those that belong to the next one.

    Raises:
        BadInputError: the stage has no step log, or a malformed one.
    """
    log = read_steps(run.path / f"{stage}{STEPS_SUFFIX}")
    return cut(log, run.durations_s[stage]) if stage in run.durations_s else log


def cut(log: StepLog, until_s: float) -> StepLog:
    """The steps scheduled before ``until_s`` (a stage's log may run on into the next stage)."""
    keep = log.scheduled_s < until_s
    columns = [f for f in StepLog.__struct_fields__ if f != "name" and getattr(log, f) is not None]
    arrays = {f: getattr(log, f)[keep] for f in columns}
    return StepLog(name=log.name, **arrays)


def cuda_graph_sizes(most: int) -> npt.NDArray[np.int64]:
    """Batch sizes for which vLLM captures CUDA graphs; a smaller batch is padded to the next one."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]
    return np.array([s for s in sizes if s < most] + [next((s for s in sizes if s >= most), most)])
