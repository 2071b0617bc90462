"""Replay a recorded scheduler trace through the model and compare every decision.

Format (gzip JSON lines): a header ``{"engine": {limits...}}``, then one object per ``schedule()`` call with the arrivals
since the last call ``[id, prompt_tokens, max_tokens, priority(, output_tokens(, content))]``, scheduled ``[id, tokens]``, and
running, waiting, blocks_free, preempted after the call. ``trace_rows`` describes what else is understood. A request that is neither
running nor waiting any more has ended: by EOS if the results just taken in have a token for it, else it was aborted.
"""

import gzip
import json
import math
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from block.engine.limits import EngineLimits
from block.engine.scheduler import Scheduler
from block.engine.sequence import Sequence
from block.engine.trace_rows import Arrival, Call, Chains, read_call, read_header
from block.errors import BadInputError, BlockError


class TraceVerdict(msgspec.Struct, frozen=True):
    """``early_stops`` counts requests that ended before max_tokens (EOS or abort): an input, taken from the trace."""

    calls: int
    mismatches: int
    first_mismatch: dict[str, Any] | None
    requests: int
    preemptions: int
    early_stops: int


def validate_trace(path: Path) -> TraceVerdict:
    """Compare the model with a recorded trace, call by call; after a mismatch the model goes on from its own state.

    Raises:
        BadInputError: the file is not such a trace, or its engine does what the model does not.
    """
    limits, calls = _read(path)
    return _Replay(limits).run(calls)


class _Replay:
    def __init__(self, limits: EngineLimits) -> None:
        self._scheduler = Scheduler(limits)
        self._sequences: dict[str, Any] = {}
        self._aborted: set[str] = set()  # known beforehand to be aborted
        self._in_flight: deque[Any] = deque()
        self._batches_max = 2 if limits.async_scheduling else 1
        self._early_stops = 0

    def run(self, calls: list[Call]) -> TraceVerdict:
        scheduler, in_flight = self._scheduler, self._in_flight
        mismatches, first, preemptions = 0, None, 0
        for number, call in enumerate(calls):
            for arrival in call.arrivals:
                self._arrive(arrival)
            self._abort_as_recorded(call)
            batch = scheduler.schedule()
            preemptions += len(batch.preempted)
            wrong = self._difference(batch, call)
            if wrong:
                mismatches += 1
                first = first or {"call": number, **wrong}
            if batch.sequences:
                in_flight.append(batch)
            if in_flight and (len(in_flight) >= self._batches_max or not batch.sequences):
                oldest = in_flight.popleft()
                if number + 1 < len(calls):
                    self._stop_as_recorded(oldest, calls[number + 1])
                scheduler.update(oldest)
        return TraceVerdict(len(calls), mismatches, first, len(self._sequences), preemptions, self._early_stops)

    def _arrive(self, arrival: Arrival) -> None:
        # The recorder kept ids in arrival order, which is vLLM's tie-break too.
        sequence = Sequence(
            arrival.key, arrival.prompt_tokens, arrival.max_tokens, priority=arrival.priority,
            order=float(len(self._sequences)), stop_after=arrival.output_tokens, block_keys=arrival.content,
        )  # fmt: skip
        self._sequences[str(arrival.key)] = sequence
        if arrival.aborted:
            self._aborted.add(str(arrival.key))
        self._scheduler.add(sequence)

    def _stop_as_recorded(self, batch: Any, following: Call) -> None:
        """Let the requests that get a token now and are gone at the next call end with it, as by EOS.

        Before their results are taken in, because what ends together gives back its blocks in the batch's order.
        """
        for sequence, samples in zip(batch.sequences, batch.samples, strict=True):
            name = str(sequence.key)
            if (
                samples
                and name not in self._aborted
                and following.gone(name)
                and sequence.output < sequence.stop_after - 1
            ):
                sequence.stop_after = sequence.output + 1
                self._early_stops += 1

    def _abort_as_recorded(self, call: Call) -> None:
        """End what the real engine had ended before this call, and not with its last token."""
        present = (*self._scheduler.running, *self._scheduler.waiting)
        for sequence in [s for s in present if call.gone(str(s.key))]:
            self._scheduler.abort(sequence)
            self._early_stops += 1

    def _difference(self, batch: Any, call: Call) -> dict[str, Any]:
        """The fields of ``call`` in which the model decided otherwise."""
        scheduler = self._scheduler
        model: dict[str, Any] = {
            "scheduled": {s.key: n for s, n in zip(batch.sequences, batch.tokens, strict=True)},
            "running": [s.key for s in scheduler.running],
            "waiting": [s.key for s in scheduler.waiting],
            "blocks_free": scheduler.blocks_free,
            "preempted": [s.key for s in batch.preempted],
        }
        wrong = {}
        for field, real in call.decisions.items():
            ours = model[field]
            if isinstance(real, int) and not isinstance(ours, int):
                ours = len(ours)  # only a count was recorded
            if _named(ours) != _named(real):
                wrong[field] = {"model": ours, "real": real}
        return wrong


def _named(value: Any) -> Any:
    """Ids as strings: one trace may write them as numbers and, as keys of an object, as strings."""
    if isinstance(value, Mapping):
        return {str(key): tokens for key, tokens in value.items()}
    return [str(key) for key in value] if isinstance(value, list) else value


def _read(path: Path) -> tuple[EngineLimits, list[Call]]:
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt") if zipped else path.open() as lines:
            return _parse(lines)
    except FileNotFoundError as error:
        raise BadInputError(f"There is no trace file {path}.") from error
    except BlockError as error:
        raise BadInputError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is not a scheduler trace: it is not text.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadInputError(f"{path} cannot be read: {error}.") from error


def _parse(lines: Iterator[str]) -> tuple[EngineLimits, list[Call]]:
    limits, shared_tokens, calls = EngineLimits(), 0, list[Call]()
    chains: Chains = {}
    arrived: set[str] = set()
    before_s = -math.inf
    number = 0
    for number, line in enumerate(lines, 1):
        try:
            row: Any = json.loads(line) if line.strip() else None
            if number == 1:
                limits, shared_tokens = read_header(row)
            elif line.strip():
                calls.append(read_call(row, limits, shared_tokens, chains))
                _check_order(calls[-1], arrived)
                at_s = row.get("t_s")
                if isinstance(at_s, int | float):
                    if at_s < before_s:
                        raise ValueError(f"t_s goes back from {before_s} to {at_s}: the rows are out of order")
                    before_s = at_s
        except (ValueError, TypeError) as error:
            what = "it is not JSON" if isinstance(error, json.JSONDecodeError) else error
            raise BadInputError(f"Not a scheduler trace, line {number}: {what}.") from error
    if not calls:
        raise BadInputError("Not a scheduler trace: it holds no schedule() call." if number else "The trace is empty.")
    return limits, calls


def _check_order(call: Call, arrived: set[str]) -> None:
    """Every request arrives once, and before anything else is said of it. ``arrived`` is brought up to date."""
    for arrival in call.arrivals:
        if str(arrival.key) in arrived:
            raise ValueError(f"request {arrival.key} arrives a second time")
        arrived.add(str(arrival.key))
    unknown = {str(key) for key in call.decisions["scheduled"]} | (call.present or frozenset())
    if unknown := unknown - arrived:
        raise ValueError(f"request {min(unknown)} is there before it arrived: rows are missing or out of order")
