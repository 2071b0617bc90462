"""Readers of public prompt-and-answer sets, known by their shape: where an estimator can learn before there are logs.

Lengths are tokens where the set counts them, words times 1.3 otherwise. Fixed ``max_tokens`` of the sampling are kept.
"""

import gzip
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from block.errors import BadInputError
from block.length.records import Record, answer_tokens, read_log
from block.length.text import request_text


def read_records(paths: Iterable[Path], *, model: str = "") -> list[Record]:
    """All records of files and folders; ``model`` names the served model where a file does not.

    Raises:
        BadInputError: a path does not exist, holds nothing known, or cannot be read.
    """
    records: list[Record] = []
    for path in paths:
        if not path.exists():
            raise BadInputError(f"{path} does not exist.")
        before = len(records)
        records.extend(_read(path, model))
        if len(records) == before:
            raise BadInputError(f"{path} has no record with a prompt and a length.")
    return records


def _read(path: Path, model: str) -> Iterator[Record]:
    if path.is_dir() and not (path / "model_answer").is_dir():
        for child in sorted(path.iterdir()):
            if child.is_dir() or ".jsonl" in child.name or child.name.endswith((".json", ".json.gz", ".tar.gz")):
                yield from _read(child, model)
        return
    try:
        if path.is_dir():
            yield from _arena(_folder_files(path), path.name)
        elif path.name.endswith(".tar.gz"):
            yield from _archive(path)
        else:
            yield from _file(path, model)
    except (
        OSError,
        EOFError,
        tarfile.TarError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
    ) as error:
        raise BadInputError(f"{path} cannot be read as a set of prompts and answers: {error!r}.") from error


def _file(path: Path, model: str) -> Iterator[Record]:
    name = path.name.split(".")[0]
    if ".jsonl" not in path.name:
        for row in _loads(path.read_bytes()):
            yield _instruction(row, model or "gpt-4", name)
        return
    try:
        first: dict[str, Any] = next(_loads_lines(path.read_bytes()), {})
    except json.JSONDecodeError:
        first = {}  # a log: `read_log` says which line
    if not isinstance(first, dict):
        first = {}
    if "user_query" in first:
        for row in _loads_lines(path.read_bytes()):
            tokens = answer_tokens(row["chatgpt_response"])
            yield Record(text=row["user_query"], output_tokens=tokens, model=model or "chatgpt", dataset=name)
    elif "requests" in first:
        for row in _loads_lines(path.read_bytes()):
            for asked in row["requests"]:
                tokens = max(1, int(asked["Output Length"]))
                yield Record(text=asked["prompt"], output_tokens=tokens, model=model or "sharegpt", dataset=name)
    else:
        for record in read_log(path):
            yield record if record.model or not model else _named(record, model)


def _instruction(row: dict[str, Any], model: str, name: str) -> Record:
    asked = "\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
    return Record(text=asked, output_tokens=answer_tokens(row["response"]), model=model, dataset=name)


def _archive(path: Path) -> Iterator[Record]:
    with tarfile.open(path) as archive:
        files = {
            member.name: file.read() for member in archive if member.isfile() and (file := archive.extractfile(member))
        }
    name = path.name.split(".")[0]
    if any(file.endswith("question.jsonl") for file in files):
        yield from _arena(files, name)
        return
    for member_name, raw in files.items():
        if member_name.endswith((".json", ".jsonl")):
            yield from _sampling_report(json.loads(raw), name)


def _arena(files: dict[str, bytes], name: str) -> Iterator[Record]:
    """Questions and the answers of several models (FastChat's layout)."""
    asked: dict[str, list[str]] = {}
    for file, raw in files.items():
        if "question.jsonl" in file:
            for row in _loads_lines(raw):
                turn = row["turns"][0]
                asked[row["question_id"]] = turn["content"] if isinstance(turn, dict) else turn
    for file, raw in files.items():
        if "model_answer" not in file:
            continue
        for row in _loads_lines(raw):
            turn = row["choices"][0]["turns"][0]
            answer = turn["content"] if isinstance(turn, dict) else turn
            tokens = turn.get("token_len") if isinstance(turn, dict) else None
            if row["question_id"] in asked and answer.strip():
                text = str(asked[row["question_id"]])
                yield Record(
                    text=text, output_tokens=tokens or answer_tokens(answer), model=row["model_id"], dataset=name
                )


def _sampling_report(report: dict[str, Any], name: str) -> Iterator[Record]:
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


def _folder_files(folder: Path) -> dict[str, bytes]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _named(record: Record, model: str) -> Record:
    import msgspec

    return msgspec.structs.replace(record, model=model)


def _loads(raw: bytes) -> Any:
    return json.loads(_unzipped(raw))


def _loads_lines(raw: bytes) -> Iterator[Any]:
    return (json.loads(line) for line in _unzipped(raw).splitlines() if line.strip())


def _unzipped(raw: bytes) -> bytes:
    return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
