"""Reads logs and public sets of prompts and answers: JSONL, JSON, CSV, all perhaps gzipped, archives and folders of them.

What a row means is told by its fields (`rows`). Two layouts are more than rows: FastChat's arena folders (questions
and the answers of several models) and sampling reports (prompts with outputs under several settings). Lengths are
tokens where the set counts them, words times 1.3 otherwise. Fixed ``max_tokens`` of the sampling are kept.
"""

import csv
import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from block.errors import BadInputError
from block.length.data.records import Record, answer_tokens
from block.length.data.rows import ROW, records_of
from block.length.prompt.text import request_text

_TABLES = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
_KNOWN = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".tar.gz", ".tgz", ".tar", *_TABLES)
_UNREAD = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"(\xb5/\xfd": "a Zstandard file",
    b"PK\x03\x04": "a zip file",
}
"""What other files begin with."""

_REMEDY = "a row needs output_tokens or the answer's text, and prompt or messages"


def read_records(paths: Iterable[Path], *, model: str = "") -> list[Record]:
    """All records of files and folders; ``model`` names the served model where a record does not.

    Raises:
        BadInputError: a path does not exist, holds nothing known, or cannot be read.
    """
    records: list[Record] = []
    for path in paths:
        if not path.exists():
            raise BadInputError(f"{path} does not exist.")
        before = len(records)
        records.extend(
            record if record.model else msgspec.structs.replace(record, model=model) for record in _read(path)
        )
        if len(records) == before:
            names = _field_names(path)
            found = f" (found: {', '.join(names)})" if names else ""
            raise BadInputError(f"{path} has no record: {_REMEDY}{found}.")
    return records


def _read(path: Path) -> Iterator[Record]:
    if path.is_dir() and not (path / "model_answer").is_dir():
        for child in sorted(path.iterdir()):
            if child.is_dir() or child.name.endswith(_KNOWN) or ".jsonl" in child.name:
                yield from _read(child)
        return
    try:
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.is_file()]
            yield from _arena({str(file.relative_to(path)): file.read_bytes() for file in files}, path.name)
        elif path.name.endswith((".tar.gz", ".tgz", ".tar")):
            yield from _archive(path)
        else:
            raw = path.read_bytes()
            kind = next((kind for start, kind in _UNREAD.items() if raw.startswith(start)), None)
            if kind is not None:
                raise BadInputError(
                    f"{path} is {kind}, which is not read: write its rows as JSON lines (pandas: "
                    'frame.to_json("rows.jsonl", orient="records", lines=True)).'
                )
            separator = next((_TABLES[end] for end in _TABLES if path.name.endswith(end)), None)
            if separator is not None:
                yield from _table(_unzipped(raw), separator, str(path), path.name.split(".")[0])
            else:
                yield from _rows(raw, str(path), path.name.split(".")[0])
    except (OSError, EOFError, zlib.error, tarfile.TarError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadInputError(f"{path} cannot be read as prompts and answers: {error!r}.") from error


def _table(text: bytes, separator: str, where: str, dataset: str) -> Iterator[Record]:
    """Records of a table with a row of names on top."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(text.decode("utf-8-sig")), delimiter=separator), 2):
            yield from _of_row({name: cell for name, cell in row.items() if cell}, f"{where}, row {number}", dataset)
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInputError(f"{where} is not a table that can be read: {error}.") from error


def _rows(raw: bytes, where: str, dataset: str) -> Iterator[Record]:
    """Records of a JSON document (rows, columns, rows in a field, or a sampling report) or of JSON lines."""
    text = _unzipped(raw)
    document = _document(text)
    if isinstance(document, Mapping) and isinstance(document.get("prompts"), list):
        yield from _sampling_report(document, dataset)
    elif document is None or (isinstance(document, Mapping) and _rows_of(document) == [document]):
        yield from _lines(text, where, dataset)
    else:
        for number, row in enumerate(_rows_of(document), 1):
            yield from _of_row(row, f"{where}, row {number}", dataset)


def _document(text: bytes) -> Any:
    """The file as one JSON document; ``None`` if it is JSON lines, or nothing known."""
    first = next((line for line in text.split(b"\n") if line.strip()), b"")
    whole = text.lstrip()[:1] == b"[" or first.strip() == text.strip() or _decoded(first) is None
    return _decoded(text) if whole else None


def _rows_of(document: Any) -> list[Any]:
    """The rows of a document: itself a list of them, one row, columns of one length, or with rows in its fields."""
    if not isinstance(document, Mapping):
        return document if isinstance(document, list) else [document]
    lists = [field for field in document.values() if isinstance(field, list)]
    of_rows = [field for field in lists if all(isinstance(one, Mapping) for one in field)]
    if len(document) == len(lists) > 1 and not of_rows and len(set(map(len, lists))) == 1:
        return [dict(zip(document, row, strict=True)) for row in zip(*lists, strict=True)]
    inside = [] if ROW & document.keys() else [row for field in of_rows for row in field]
    return inside or [document]


def _field_names(path: Path) -> list[str]:
    """Names of the fields of a file's first row, to tell a user what was found; none where that cannot be told."""
    if path.is_dir() or path.suffix in (".tar", ".tgz") or path.name.endswith(".tar.gz"):
        return []
    text = _unzipped(path.read_bytes())
    first = text.strip().split(b"\n")[0]
    separator = next((_TABLES[end] for end in _TABLES if path.name.endswith(end)), None)
    if separator is not None:
        return first.decode("utf-8", "replace").split(separator)[:20]
    document = _document(text)
    rows = [_decoded(first)] if document is None else _rows_of(document)
    return [str(name) for name in rows[0]][:20] if rows and isinstance(rows[0], Mapping) else []


def _lines(text: bytes, where: str, dataset: str) -> Iterator[Record]:
    """One row a line, or one in all. The last line may be unfinished: a log still written, or whose writer was stopped."""
    lines = [(number, line) for number, line in enumerate(text.split(b"\n"), 1) if line.strip()]
    if len(lines) > 1 and _decoded(lines[0][1]) is None and _decoded(text) is not None:
        lines = [(lines[0][0], text)]
    for number, line in lines:
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if len(lines) > 1 and number == lines[-1][0]:
                return
            raise BadInputError(f"{where}, line {number} is not JSON: {error}.") from error
        yield from _of_row(row, f"{where}, line {number}", dataset)


def _of_row(row: Any, where: str, dataset: str) -> Iterator[Record]:
    if not isinstance(row, Mapping):
        raise BadInputError(f"{where} is not a JSON object: {_REMEDY}.")
    try:
        yield from records_of(row, dataset)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BadInputError(f"{where} cannot be understood: {error}.") from error


def _archive(path: Path) -> Iterator[Record]:
    with tarfile.open(path) as archive:
        files = {
            member.name: file.read() for member in archive if member.isfile() and (file := archive.extractfile(member))
        }
    name = path.name.split(".")[0]
    if any("question.jsonl" in file for file in files):
        yield from _arena(files, name)
        return
    for member, raw in files.items():
        if member.endswith((".json", ".jsonl", ".gz")):
            yield from _rows(raw, f"{path}, {member}", name)


def _arena(files: dict[str, bytes], name: str) -> Iterator[Record]:
    """Questions and the answers of several models (FastChat's layout); the first turn alone."""
    asked: dict[str, str] = {}
    for file, raw in files.items():
        if "question.jsonl" in file:
            for row in _loads_lines(raw):
                turn = row["turns"][0]
                asked[row["question_id"]] = str(turn["content"] if isinstance(turn, dict) else turn)
    for file, raw in files.items():
        if "model_answer" not in file or ".jsonl" not in file:
            continue
        for row in _loads_lines(raw):
            turn = row["choices"][0]["turns"][0]
            answer = turn["content"] if isinstance(turn, dict) else turn
            tokens = turn.get("token_len") if isinstance(turn, dict) else None
            if row["question_id"] in asked and answer.strip():
                yield Record(
                    text=asked[row["question_id"]],
                    output_tokens=tokens or answer_tokens(answer),
                    model=row["model_id"],
                    dataset=name,
                )


def _sampling_report(report: Mapping[str, Any], name: str) -> Iterator[Record]:
    """Prompts with outputs under several decoding settings (Open-Assistant's reports)."""
    for asked in report["prompts"]:
        for result in asked["results"]:
            parameters = result["sampling_params"]
            cap = parameters.get("max_tokens") or parameters.get("max_new_tokens")
            for output in result["outputs"]:
                if output.strip():
                    tokens = answer_tokens(output)
                    yield Record(
                        text=request_text(asked), output_tokens=min(tokens, cap) if cap else tokens,
                        model=report["model_name"], max_tokens=cap, dataset=name,
                    )  # fmt: skip


def _loads_lines(raw: bytes) -> Iterator[Any]:
    try:
        for line in _unzipped(raw).splitlines():
            if line.strip():
                yield json.loads(line)
    except ValueError as error:
        raise TypeError(f"a line is not JSON: {error}") from error


def _decoded(text: bytes) -> Any:
    """The JSON document, or ``None``."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _unzipped(raw: bytes) -> bytes:
    return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
