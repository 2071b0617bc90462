"""aiconfigurator's kernel tables (PyPI ``aiconfigurator-core``, an optional extra) to a step-time profile.

Its parquet files hold, per (GPU, engine version): matrix products ``m x n x k``, attention of prompts and of decoding batches,
all-reduces; all in ms. A model's products are looked up by (n, k), the nearest measured shape scaled by its weights.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from block.errors import BadInputError, ConfigError, UnknownNameError
from block.steptime.importers.tables import LayerTables, at, clean, to_profile
from block.steptime.profile import StepTimeProfile
from block.steptime.regress import Floats

MILLI = 1e-3
CONTEXT_MOST = 8192
EXTRA = "Install the optional extra: pip install 'block-llm[aiconfigurator]'."
ELEMENTWISE_LAYER_S = 20e-6  # norms, rotary embedding, activation, additions: not in the tables; a layer, short batches
ELEMENTWISE_TOKEN_S = 9e-9  # and a token, at 4.8 TB/s


def systems_dir() -> Path:
    """Where the tables are.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"aiconfigurator-core is not installed. {EXTRA}")
    return Path(next(iter(spec.submodule_search_locations))) / "systems" / "data"


def gpu_names() -> list[str]:
    """GPUs with vLLM tables."""
    return sorted(p.name for p in systems_dir().iterdir() if (p / "gemm" / "vllm").is_dir())


def import_aiconfigurator(
    config: dict[str, Any], *, system: str, name: str, model: str, tensor_parallel: int = 1
) -> StepTimeProfile:
    """The profile of a model's configuration on one GPU type, in 16 bits.

    Raises:
        ConfigError: the package is not installed.
        UnknownNameError: it has no vLLM tables of that GPU.
        BadInputError: the tables hold nothing near this model's shape.
    """
    if system not in gpu_names():
        raise UnknownNameError("GPU with vLLM tables", system, gpu_names())
    root = systems_dir() / system
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    layers, split = config["num_hidden_layers"], tensor_parallel
    if heads % split:
        raise BadInputError(f"{heads} attention heads cannot be split over {split} GPUs.")
    gemm, device = _read(root / "gemm", "gemm_perf", ("m", "n", "k", "latency"), {"gemm_dtype": "bfloat16"})
    grid = np.array(sorted({float(m) for m in gemm["m"] if m <= 8192}))

    def product(n: int, k: int) -> Floats:
        return _product(gemm, n, k, grid)

    kv_split = max(kv_heads // split, 1)
    intermediate = config["intermediate_size"] // split
    linear = (
        product((heads // split + 2 * kv_split) * head_dim, hidden) + product(hidden, heads // split * head_dim)
        + product(2 * intermediate, hidden) + product(hidden, intermediate)
        + ELEMENTWISE_LAYER_S + ELEMENTWISE_TOKEN_S * grid * (hidden / 4096) / split
    )  # fmt: skip
    if split > 1:
        linear = linear + 2 * _all_reduce(root, split, grid * hidden)
    shape = {"num_heads": heads // split, "num_key_value_heads": kv_split, "head_dim": head_dim}
    tables = LayerTables(
        layers, grid, layers * linear, grid, product(config["vocab_size"] // split, hidden),
        _attention(root, "generation_attention_perf", shape, layers), _attention(root, "context_attention_perf", shape, layers),
    )  # fmt: skip
    return to_profile(
        tables, name=name, gpu=device, model=model, tensor_parallel=split,
        source=f"imported from aiconfigurator-core's vLLM kernel tables ({system}; host assumed)", licence="Apache-2.0 (source)",
    )  # fmt: skip


def _read(directory: Path, table: str, columns: tuple[str, ...], where: dict[str, str]) -> tuple[dict[str, Any], str]:
    """The columns of the newest vLLM version's table, rows chosen by ``where``; and the device's name."""
    from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]

    files = sorted(directory.glob(f"vllm/*/{table}.parquet"), key=_version)
    if not files:
        raise BadInputError(f"{directory} holds no vLLM table {table}.")
    rows = parquet.read_table(files[-1], filters=[(c, "=", v) for c, v in where.items()] or None)
    if not rows.num_rows:
        raise BadInputError(f"{files[-1]} has no rows with {where}.")
    missing = [c for c in columns if c not in rows.schema.names and c != "window_size"]
    if missing:
        raise BadInputError(f"{files[-1]} lacks the columns {', '.join(missing)}.")
    found = {c: rows[c].to_numpy() if c in rows.schema.names else np.zeros(rows.num_rows) for c in columns}
    return found, str(rows["device"][0].as_py())


def _version(file: Path) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in file.parent.name.split(".")]


def _product(gemm: dict[str, Any], n: int, k: int, grid: Floats) -> Floats:
    """Seconds of an ``m x n x k`` product by m: the measured (n, k) nearest in shape, scaled by its weights."""
    shapes, which = np.unique(np.column_stack([gemm["n"], gemm["k"]]), axis=0, return_inverse=True)
    distance = np.abs(np.log(shapes[:, 0] / n)) + np.abs(np.log(shapes[:, 1] / k))
    for shape in np.argsort(distance):
        rows = which.reshape(-1) == shape
        if rows.sum() >= 8:
            measured = clean(gemm["m"][rows].astype(float), gemm["latency"][rows] * MILLI)
            return at(*measured, grid) * (n * k) / float(np.prod(shapes[shape]))
    raise BadInputError(f"The tables hold no matrix product near {n} x {k}.")


def _attention(root: Path, table: str, shape: dict[str, int], layers: int) -> Floats:
    columns = ("batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim", "window_size", "latency")
    rows, _ = _read(root / "attention", table, columns, {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16"})
    keep = (rows["window_size"] == 0) & (rows["head_dim"] == shape["head_dim"])
    kv = rows["num_key_value_heads"]
    # Decoding reads keys and values, so their heads count; a prompt's attention is arithmetic of the query heads.
    reads = table.startswith("generation")
    far_kv = np.abs(np.log(kv / shape["num_key_value_heads"]))
    far = np.abs(np.log(rows["num_heads"] / shape["num_heads"]))
    near = far_kv * (4 if reads else 1) + far * (1 if reads else 4)
    if not keep.any():
        raise BadInputError(f"The tables hold no attention with heads of {shape['head_dim']}.")
    keep &= near == near[keep].min()
    batch, new, step = (rows[c][keep].astype(float) for c in ("batch_size", "isl", "step"))
    seconds = rows["latency"][keep] * MILLI * layers
    usable = (new + step <= CONTEXT_MOST) & (seconds > 0)
    if reads:
        # One request with r times the key-value heads reads as much as r requests.
        requests = batch * float(kv[keep][0]) / shape["num_key_value_heads"]
        return np.asarray(np.column_stack([requests, new + step, seconds])[usable])
    seconds = seconds * shape["num_heads"] / float(rows["num_heads"][keep][0])
    return np.asarray(np.column_stack([new, step, seconds])[usable & (batch == 1)])


def _all_reduce(root: Path, gpus: int, elements: Floats) -> Floats:
    """Seconds of summing ``elements`` 16-bit numbers over the GPUs."""
    rows, _ = _read(root / "comm", "custom_allreduce_perf", ("num_gpus", "message_size", "latency", "backend"), {})
    keep = rows["num_gpus"] == gpus
    graph = keep & (rows["backend"] == "vllm_graph")
    keep = graph if graph.any() else keep
    if not keep.any():
        raise BadInputError(f"The tables hold no all-reduce over {gpus} GPUs.")
    return at(*clean(rows["message_size"][keep].astype(float), rows["latency"][keep] * MILLI), elements)
