"""Vidur's profile CSVs (``mlp.csv``, ``attention.csv``: medians in ms, per operator and layer) to a step-time profile.

They have no language-model head: it is taken as a matrix product as fast per weight as the up projection. Attention may also come
as points (op, batch_size, prefill_chunk_size, kv_cache_size, median_ms).
"""

from pathlib import Path

import numpy as np

from block.errors import BadInputError
from block.steptime.importers.files import find, read_csv
from block.steptime.importers.tables import LayerTables, at, clean, column, to_profile
from block.steptime.profile import StepTimeProfile
from block.steptime.regress import Floats

PER_LAYER = (
    "input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "post_attention_layernorm", "mlp_up_proj", "mlp_act",
    "mlp_down_proj",
)  # fmt: skip
ADDS = 2  # residual additions a layer
MILLI = 1e-3


def import_vidur(
    directory: Path,
    *,
    layers: int,
    name: str,
    gpu: str,
    model: str,
    tensor_parallel: int = 1,
    attention: Path | None = None,
) -> StepTimeProfile:
    """The profile of one (GPU, model) directory; ``attention``: a file of points instead of ``attention.csv``.

    Raises:
        BadInputError: files or columns are missing, or hold no usable rows of that tensor parallelism.
    """
    rows = [
        r for r in read_csv(find(directory, "mlp"), ("num_tokens", "num_tensor_parallel_workers", "time_stats.mlp_up_proj.median"))
        if r["num_tensor_parallel_workers"] == str(tensor_parallel)
    ]  # fmt: skip
    if not rows:
        raise BadInputError(f"{directory} has no measurements with tensor parallelism {tensor_parallel}.")
    tokens = column(rows, "num_tokens")
    grid = np.unique(tokens)

    def operator(of: str) -> Floats:
        return at(*clean(tokens, column(rows, f"time_stats.{of}.median") * MILLI), grid)

    linear = sum((operator(of) for of in PER_LAYER), np.zeros(len(grid))) + ADDS * operator("add")
    first = rows[0]
    expanded = float(first["n_expanded_embd"])
    gates = 2 if first["use_gated_mlp"] == "True" else 1
    head = operator("mlp_up_proj") * float(first["vocab_size"]) / (gates * expanded)
    decode, prefill = (
        _attention(attention, layers) if attention else _attention_table(directory, tensor_parallel, layers)
    )
    save = _kv_save(directory, tensor_parallel, attention, grid)
    tables = LayerTables(layers, grid, layers * (linear + save) + operator("emb"), grid, head, decode, prefill)
    return to_profile(
        tables, name=name, gpu=gpu, model=model, tensor_parallel=tensor_parallel,
        source="imported from Vidur's profiles (kernels; host assumed)", licence="MIT (source)",
    )  # fmt: skip


def _attention_table(directory: Path, tensor_parallel: int, layers: int) -> tuple[Floats, Floats]:
    rows = read_csv(find(directory, "attention"), ("batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill"))
    rows = [r for r in rows if r.get("num_tensor_parallel_workers", "1") == str(tensor_parallel)]
    found = {}
    for is_prefill, op in ((False, "attn_decode"), (True, "attn_prefill")):
        part = [r for r in rows if (r["is_prefill"] == "True") == is_prefill]
        found[is_prefill] = _rows(
            column(part, "prefill_chunk_size") if is_prefill else column(part, "batch_size"),
            column(part, "kv_cache_size"), column(part, f"time_stats.{op}.median") * MILLI * layers, str(directory),
        )  # fmt: skip
    return found[False], found[True]


def _attention(points: Path, layers: int) -> tuple[Floats, Floats]:
    rows = read_csv(points, ("op", "batch_size", "prefill_chunk_size", "kv_cache_size", "median_ms"))
    found = {}
    for op, key in (("attn_decode", "batch_size"), ("attn_prefill", "prefill_chunk_size")):
        part = [r for r in rows if r["op"] == op]
        found[op] = _rows(
            column(part, key), column(part, "kv_cache_size"), column(part, "median_ms") * MILLI * layers, str(points)
        )
    return found["attn_decode"], found["attn_prefill"]


def _rows(x: Floats, kv: Floats, seconds: Floats, where: str) -> Floats:
    table = np.column_stack([x, kv, seconds])
    table = table[np.isfinite(table).all(axis=1) & (table[:, 2] > 0) & (table[:, 0] > 0)]
    if len(table) < 4:
        raise BadInputError(f"{where} holds only {len(table)} usable attention measurements.")
    return table


def _kv_save(directory: Path, tensor_parallel: int, attention: Path | None, grid: Floats) -> Floats:
    """Seconds of writing the tokens' keys and values, per layer."""
    if attention is not None:
        rows = [r for r in read_csv(attention, ("op",)) if r["op"] == "attn_kv_cache_save"]
        tokens = np.maximum(column(rows, "prefill_chunk_size"), column(rows, "batch_size"))
        seconds = column(rows, "median_ms") * MILLI
    else:
        rows = read_csv(find(directory, "attention"), ("batch_size", "prefill_chunk_size"))
        rows = [r for r in rows if r.get("num_tensor_parallel_workers", "1") == str(tensor_parallel)]
        tokens = np.maximum(column(rows, "prefill_chunk_size"), column(rows, "batch_size"))
        seconds = column(rows, "time_stats.attn_kv_cache_save.median") * MILLI
    unique = np.unique(tokens)
    medians = np.array([np.nanmedian(seconds[tokens == t]) for t in unique])
    return at(*clean(unique, medians), grid)
