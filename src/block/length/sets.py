"""Reads logs and public sets of prompts and answers: JSONL, JSON, both gzipped, archives and folders of them.

What a row means is told by its fields (`rows`). Two layouts are more than rows: FastChat's arena folders (questions
and the answers of several models) and sampling reports (prompts with outputs under several settings). Lengths are
tokens where the set counts them, words times 1.3 otherwise. Fixed ``max_tokens`` of the sampling are kept.
"""

import gzip
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from block.errors import BadInputError
from block.length.records import Record, answer_tokens
from block.length.rows import records_of
from block.length.text import request_text

_KNOWN = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".tar.gz", ".tgz", ".tar")
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
            raise BadInputError(f"{path} has no record: {_REMEDY}.")
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
            yield from _rows(path.read_bytes(), str(path), path.name.split(".")[0])
    except (OSError, EOFError, zlib.error, tarfile.TarError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadInputError(f"{path} cannot be read as prompts and answers: {error!r}.") from error


def _rows(raw: bytes, where: str, dataset: str) -> Iterator[Record]:
    """Records of a JSON document (rows, or a sampling report) or of JSON lines."""
    text = _unzipped(raw)
    if text.lstrip()[:1] == b"[" or b"\n" not in text.strip():
        document = _decoded(text)
        if isinstance(document, list):
            for number, row in enumerate(document, 1):
                yield from _of_row(row, f"{where}, row {number}", dataset)
            return
        if isinstance(document, Mapping) and isinstance(document.get("prompts"), list):
            yield from _sampling_report(document, dataset)
            return
    yield from _lines(text, where, dataset)


def _lines(text: bytes, where: str, dataset: str) -> Iterator[Record]:
    """One row a line. The last may be unfinished: a log that is still written, or whose writer was stopped."""
    lines = [(number, line) for number, line in enumerate(text.split(b"\n"), 1) if line.strip()]
    if lines and _decoded(lines[0][1]) is None:  # no lines: a document over several of them, or nothing known
        document = _decoded(text)
        if isinstance(document, Mapping) and isinstance(document.get("prompts"), list):
            yield from _sampling_report(document, dataset)
            return
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
