"""One row per request: what was asked, where it went, when things happened. Written as CSV or Parquet.

Times are seconds from the run's start. Latencies are measured from ``intended_s``, when the workload said to send,
so a late load generator or a waiting gateway shows in them.
"""

import csv
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Literal, Protocol, Self

import msgspec

from block.errors import BadInputError, ConfigError

Status = Literal["finished", "failed", "rejected"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One offered request. ``None`` is unknown or did not happen.

    ``status``: ``finished`` got its whole answer; ``rejected`` was refused before any work; ``failed`` is the rest,
    with the reason in ``error``. ``tpot_s`` is (e2e - ttft) / (output tokens - 1), ``None`` for one-token outputs.
    """

    id: str
    policy: str
    instance: str | None
    intended_s: float
    sent_s: float
    first_token_s: float | None
    finished_s: float | None
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None
    e2e_s: float | None
    tpot_s: float | None
    status: Status
    error: str | None = None
    preemptions: int | None = None
    predicted_ttft_s: float | None = None
    predicted_e2e_s: float | None = None


FIELDS: Final = tuple(field.name for field in msgspec.structs.fields(Row))
_INTEGERS: Final = frozenset({"prompt_tokens", "output_tokens", "preemptions"})
_TEXTS: Final = frozenset({"id", "policy", "instance", "status", "error"})


def finished_row(
    *, id: str, policy: str, instance: str | None, intended_s: float, sent_s: float, first_token_s: float | None,  # noqa: A002
    finished_s: float, prompt_tokens: int, output_tokens: int, preemptions: int | None = None,
    predicted_ttft_s: float | None = None, predicted_e2e_s: float | None = None,
) -> Row:  # fmt: skip
    """The row of a request that got its whole answer; derives latencies. ``first_token_s``: None if not streamed."""
    tpot_s = None
    if first_token_s is not None and output_tokens > 1:
        tpot_s = (finished_s - first_token_s) / (output_tokens - 1)
    return Row(
        id=id, policy=policy, instance=instance, intended_s=intended_s, sent_s=sent_s, first_token_s=first_token_s,
        finished_s=finished_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens,
        ttft_s=None if first_token_s is None else first_token_s - intended_s, e2e_s=finished_s - intended_s,
        tpot_s=tpot_s,
        status="finished", preemptions=preemptions, predicted_ttft_s=predicted_ttft_s, predicted_e2e_s=predicted_e2e_s,
    )  # fmt: skip


class RowWriter(Protocol):
    """Takes rows as they come; leaving the ``with`` block, also by an exception, completes the file."""

    def write(self, row: Row) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def row_writer(path: Path) -> RowWriter:
    """A writer by the file's suffix: ``.csv`` or ``.parquet``.

    Raises:
        ConfigError: another suffix, a folder that does not exist, or Parquet without pyarrow.
    """
    check_rows_path(path)
    return _CsvWriter(path) if path.suffix == ".csv" else _ParquetWriter(path)


def check_rows_path(path: Path) -> None:
    """Say before a long run that its rows could not be written; errors as ``row_writer``."""
    if not path.parent.is_dir():
        raise ConfigError(f"The folder {path.parent} does not exist.")
    if path.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"Rows are written as .csv or .parquet, not {path.name}.")
    if path.suffix == ".parquet":
        _pyarrow()


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows to a file; errors as ``row_writer``."""
    with row_writer(path) as writer:
        for row in rows:
            writer.write(row)


def read_rows(path: Path) -> list[Row]:
    """Rows that ``row_writer`` wrote.

    Raises:
        BadInputError: no such file, or not rows (with the line).
    """
    if path.suffix == ".parquet":
        return [_row(fields, f"{path}") for fields in _pyarrow().parquet.read_table(path).to_pylist()]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            return [_row(fields, f"{path}, line {number}") for number, fields in enumerate(lines, 2)]
    except FileNotFoundError as error:
        raise BadInputError(f"There is no file of rows {path}.") from error


def _row(fields: dict[str, Any], where: str) -> Row:
    known = {name: value for name, value in fields.items() if name in FIELDS and value not in ("", None)}
    try:
        return msgspec.convert({**dict.fromkeys(FIELDS), "policy": ""} | known, Row, strict=False)
    except msgspec.ValidationError as error:
        raise BadInputError(f"{where}: not a row ({error}).") from error


class _CsvWriter:
    """One line a row, flushed as it goes, so that a killed run keeps what it had."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("w", newline="", encoding="utf-8")
        self._csv = csv.writer(self._file)
        self._csv.writerow(FIELDS)

    def write(self, row: Row) -> None:
        self._csv.writerow(["" if value is None else value for value in msgspec.structs.astuple(row)])
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _ParquetWriter:
    """Row groups of up to 5,000 rows; the footer is written on leaving the ``with`` block."""

    def __init__(self, path: Path) -> None:
        self._arrow = _pyarrow()
        kinds = {name: self._arrow.int64() if name in _INTEGERS else self._arrow.float64() for name in FIELDS}
        kinds |= dict.fromkeys(_TEXTS, self._arrow.string())
        self._schema = self._arrow.schema(list(kinds.items()))
        self._writer = self._arrow.parquet.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []

    def write(self, row: Row) -> None:
        self._rows.append(msgspec.structs.asdict(row))
        if len(self._rows) >= 5000:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(self._arrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._rows:
            self._flush()
        self._writer.close()


def _pyarrow() -> Any:
    try:
        pyarrow = import_module("pyarrow")
        import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow: pip install pyarrow, or write .csv.") from error
    return pyarrow
