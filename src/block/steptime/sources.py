"""What ``block fit`` is given: run directories and step logs, read into the fit's input."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from block.engine.limits import EngineLimits
from block.errors import BadInputError
from block.steptime.delays import Calls
from block.steptime.steplog import (
    REQUESTS_SUFFIX,
    STEPS_SUFFIX,
    Run,
    StepLog,
    read_rows,
    read_run,
    read_stage_steps,
    rows_as_floats,
)

WARM_UP = "warm"  # stages of this name heat up an engine; their first steps are not typical


class Measured(msgspec.Struct, frozen=True, eq=False):
    """Logs with the limits they were recorded under, their requests, and what ran."""

    logs: list[tuple[StepLog, EngineLimits]]
    calls: list[tuple[StepLog, Calls]]
    gpu: str
    model: str
    tensor_parallel: int
    model_config: dict[str, Any]
    stages: list[str]  # run/stage


def read_measured(paths: Iterable[Path]) -> Measured:
    """Read run directories (all their stages but warm-up) and single ``STAGE.steps.csv.gz`` files (beside their engine.json).

    Raises:
        BadInputError: a path is neither, a file is malformed, or the paths are of different GPUs or models.
    """
    logs: list[tuple[StepLog, EngineLimits]] = []
    calls: list[tuple[StepLog, Calls]] = []
    runs: list[Run] = []
    names: list[str] = []
    for run, stages in map(_stages, paths):
        runs.append(run)
        for stage in stages:
            log = read_stage_steps(run, stage)
            logs.append((log, run.limits))
            names.append(f"{run.path.name}/{stage}")
            file = run.path / f"{stage}{REQUESTS_SUFFIX}"
            if file.exists():
                calls.append((log, read_calls(file)))
    if not runs:
        raise BadInputError("There is nothing to fit: name run directories or step logs.")
    subjects = {(run.gpu, run.model, run.tensor_parallel) for run in runs}
    if len(subjects) > 1:
        names_of = ", ".join(sorted(f"{model} on {gpu}" for gpu, model, _ in subjects))
        raise BadInputError(f"One profile is of one GPU and model, not of {len(subjects)}: {names_of}.")
    return Measured(logs, calls, runs[0].gpu, runs[0].model, runs[0].tensor_parallel, runs[0].model_config, names)


def _stages(path: Path) -> tuple[Run, Sequence[str]]:
    if path.is_dir():
        run = read_run(path)
        with_steps = [s for s in run.stages if s != WARM_UP and (path / f"{s}{STEPS_SUFFIX}").exists()]
        if not with_steps:
            raise BadInputError(f"{path} holds no step log (STAGE{STEPS_SUFFIX}).")
        return run, with_steps
    if not path.exists():
        raise BadInputError(f"There is no file or directory {path}.")
    if not path.name.endswith(STEPS_SUFFIX):
        raise BadInputError(f"{path} is neither a run directory nor a step log (STAGE{STEPS_SUFFIX}).")
    return read_run(path.parent), [path.name.removesuffix(STEPS_SUFFIX)]


def read_calls(file: Path) -> Calls:
    """Arrivals and ends of a stage's requests.

    Raises:
        BadInputError: the file is not a table of requests.
    """
    rows = read_rows(file, ("arrived_s", "e2e_s"))
    try:
        arrived = rows_as_floats(rows, "arrived_s")
        return Calls(arrived, arrived + rows_as_floats(rows, "e2e_s"))
    except (ValueError, TypeError) as error:
        raise BadInputError(f"{file} is not a table of requests: {error}.") from error
