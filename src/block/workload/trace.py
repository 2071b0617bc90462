"""Readers of recorded workloads. The format is told from the file's first line; ``.gz`` is unpacked.

CSV         a column of prompt tokens, one of output tokens and maybe one of times (seconds, or dates), under the names that
            public traces give them: Azure's, BurstGPT's, Splitwise's, Vidur's, and those of Block's own rows and runs
JSON lines  timestamp (ms), input_length, output_length, hash_ids (one per 512 tokens of the prompt): Mooncake's
"""

import csv
import gzip
import math
import zlib
from collections.abc import Callable
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import IO, Final

import msgspec

from block.core import PromptBlocks
from block.errors import BadInputError

MOONCAKE_BLOCK_TOKENS: Final = 512


class TraceRequest(msgspec.Struct, frozen=True):
    """One recorded request; ``arrived_s`` in seconds on the trace's own clock, ``None`` where it has no times."""

    arrived_s: float | None
    prompt_tokens: int
    output_tokens: int
    blocks: PromptBlocks | None = None


def read_trace(path: Path) -> list[TraceRequest]:
    """All requests of a trace file, in the file's order.

    Raises:
        BadInputError: no such file, an unknown format, or a bad line (with its number).
    """
    requests: list[TraceRequest] = []
    try:
        with _open(path) as lines:
            first = lines.readline()
            parse, has_header = _format_of(first, path)
            for number, line in enumerate(lines if has_header else chain([first], lines), 2 if has_header else 1):
                if line.strip():
                    requests.append(_parsed(parse, line, requests[-1] if requests else None, f"{path}, line {number}"))
    except FileNotFoundError as error:
        raise BadInputError(f"There is no trace file {path}.") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} cannot be read: {error}.") from error
    if not requests:
        raise BadInputError(f"{path} has no requests.")
    return requests


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


Parse = Callable[[str], TraceRequest]

# Names of columns and fields, compared without case, blanks and underscores.
_TIMES: Final = ("timestamp", "arriveds", "arrivaltimestamp", "arrivaltime", "arrivedat", "intendeds", "time")
_PROMPTS: Final = (
    "prompttokens",
    "contexttokens",
    "numprefilltokens",
    "requesttokens",
    "inputtokens",
    "inputlength",
    "promptsize",
)
_OUTPUTS: Final = ("outputtokens", "generatedtokens", "numdecodetokens", "responsetokens", "outputlength", "tokensize")


def _format_of(first: str, path: Path) -> tuple[Parse, bool]:
    """The parser of one line, and whether the first line is a header."""
    if first.lstrip().startswith("{"):
        return _mooncake, False
    columns = _cells(first)
    plain = ["".join(name.lower().split()).replace("_", "") for name in columns]
    prompt, output = (_place(plain, names) for names in (_PROMPTS, _OUTPUTS))
    if prompt is None or output is None:
        raise BadInputError(
            f"{path} is no known trace: its first line must name a column of prompt tokens and one of output tokens (such as "
            "prompt_tokens and output_tokens, ContextTokens and GeneratedTokens, or num_prefill_tokens and num_decode_tokens), "
            "or be a JSON object with timestamp, input_length and output_length."
        )
    time = _place(plain, _TIMES)

    def parse(line: str) -> TraceRequest:
        cells = _cells(line)
        if len(cells) != len(columns):
            raise ValueError(f"{len(cells)} columns instead of {len(columns)}")
        return TraceRequest(None if time is None else _seconds(cells[time]), int(cells[prompt]), int(cells[output]))

    return parse, True


def _place(columns: list[str], names: tuple[str, ...]) -> int | None:
    return next((columns.index(name) for name in names if name in columns), None)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in next(csv.reader([line]), [])]


def _seconds(text: str) -> float:
    """Seconds as a number, or a date and time."""
    try:
        seconds = float(text)
    except ValueError:
        # Some have seven digits of a second: one more than fromisoformat takes.
        whole, _, fraction = text.partition(".")
        return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
    if not math.isfinite(seconds):
        raise ValueError(f"{text} is no time")
    return seconds


def _parsed(parse: Parse, line: str, before: TraceRequest | None, where: str) -> TraceRequest:
    try:
        request = parse(line)
    except (ValueError, msgspec.DecodeError) as error:
        raise BadInputError(f"{where}: {error}.") from error
    if request.prompt_tokens < 1 or request.output_tokens < 0:
        raise BadInputError(f"{where}: {request.prompt_tokens} prompt and {request.output_tokens} output tokens.")
    if before is not None and before.arrived_s is not None and (request.arrived_s or 0.0) < before.arrived_s:
        raise BadInputError(f"{where}: its time lies before that of the request above.")
    return request


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


_mooncake_decoder = msgspec.json.Decoder(_MooncakeLine)


def _mooncake(line: str) -> TraceRequest:
    fields = _mooncake_decoder.decode(line)
    blocks = PromptBlocks(MOONCAKE_BLOCK_TOKENS, tuple(fields.hash_ids)) if fields.hash_ids else None
    return TraceRequest(fields.timestamp / 1000, fields.input_length, fields.output_length, blocks)
