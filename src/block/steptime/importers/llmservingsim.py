"""LLMServingSim's vLLM profiles: ``dense.csv``, ``per_sequence.csv``, ``attention.csv``, microseconds of a layer.

``skew.csv``, where there is one, has attention over batches in which some contexts are four times as long as the others.
"""

from pathlib import Path

import numpy as np

from block.errors import BadInputError
from block.steptime.importers.files import find, read_csv
from block.steptime.importers.tables import LayerTables, at, clean, column, to_profile
from block.steptime.profile import StepTimeProfile
from block.steptime.regress import Floats

PER_LAYER = {
    "layernorm": 2,
    "qkv_proj": 1,
    "rotary_emb": 1,
    "o_proj": 1,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
}
ONCE = ("embedding", "final_layernorm")
HEAD = ("lm_head", "sampler")
MICRO = 1e-6
CONTEXT_MOST = 8192  # longer contexts would dominate the fit of the slopes
UNEVEN = 3  # the longest context against the mean; in ShareGPT-like traffic 3.6 to 6


def import_llmservingsim(
    directory: Path, *, layers: int, name: str, gpu: str, model: str, tensor_parallel: int = 1
) -> StepTimeProfile:
    """The profile of one ``tpN`` directory.

    Raises:
        BadInputError: files, columns or operators are missing.
    """
    dense = read_csv(find(directory, "dense"), ("layer", "tokens", "time_us"))
    heads = read_csv(find(directory, "per_sequence"), ("layer", "sequences", "time_us"))
    grid = np.unique(column(dense, "tokens"))

    def operator(of: str) -> Floats:
        return _operator(dense, of, "tokens", grid, directory)

    linear = sum((count * operator(of) for of, count in PER_LAYER.items()), np.zeros(len(grid)))
    once = sum((operator(of) for of in ONCE), np.zeros(len(grid)))
    sequences = np.unique(column(heads, "sequences"))
    head = sum((_operator(heads, of, "sequences", sequences, directory) for of in HEAD), np.zeros(len(sequences)))
    decode, prefill = _attention(directory, layers)
    uneven = _uneven(directory, decode)
    tables = LayerTables(layers, grid, layers * linear + once, sequences, head, decode, prefill, uneven)
    return to_profile(
        tables, name=name, gpu=gpu, model=model, tensor_parallel=tensor_parallel,
        source="imported from LLMServingSim's vLLM 0.19 profiles (kernels, host assumed)", licence="MIT (source)",
    )  # fmt: skip


def _operator(rows: list[dict[str, str]], of: str, key: str, grid: Floats, directory: Path) -> Floats:
    part = [r for r in rows if r["layer"] == of]
    if not part:
        raise BadInputError(f"{directory} has no measurements of {of}: only dense Llama-like models can be imported.")
    return at(*clean(column(part, key), column(part, "time_us") * MICRO), grid)


def _attention(directory: Path, layers: int) -> tuple[Floats, Floats]:
    rows = read_csv(find(directory, "attention"), ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"))
    chunk, before = column(rows, "prefill_chunk"), column(rows, "kv_prefill")
    n, kv, seconds = column(rows, "n_decode"), column(rows, "kv_decode"), column(rows, "time_us") * MICRO * layers
    usable = np.isfinite(seconds) & (seconds > 0)
    decode = usable & (chunk == 0) & (n > 0) & (kv <= CONTEXT_MOST)
    prefill = usable & (n == 0) & (chunk > 0) & (before <= CONTEXT_MOST)
    if decode.sum() < 4 or prefill.sum() < 4:
        raise BadInputError(f"{directory} holds too few attention measurements.")
    return np.column_stack([n, kv, seconds])[decode], np.column_stack([chunk, before, seconds])[prefill]


def _uneven(directory: Path, decode: Floats) -> Floats:
    """Rows (requests, mean context, seconds, seconds if even). Of the skewed times only the ratios count."""
    try:
        file = find(directory, "skew")
    except BadInputError:
        return np.zeros((0, 4))
    needed = ("regime", "n", "kv_big", "kv_mean", "t_mean_us", "t_skew_us")
    rows = [r for r in read_csv(file, needed) if r["regime"] == "pure"]
    n, longest, mean, even, skewed = (column(rows, name) for name in needed[1:])
    usable = (
        (longest > UNEVEN * mean) & (mean <= CONTEXT_MOST) & (even > 0) & np.isfinite(skewed) & np.isin(n, decode[:, 0])
    )
    found = []
    for requests, each, ratio in np.column_stack([n, mean, skewed / even])[usable].tolist():
        of_n = decode[decode[:, 0] == requests]
        of_n = of_n[np.argsort(of_n[:, 1])]
        even_s = float(np.interp(each, of_n[:, 1], of_n[:, 2]))
        found.append((requests, each, ratio * even_s, even_s))
    return np.array(found).reshape(-1, 4)
