"""Kernel tables of others become profiles, also where rows are missing or impossible."""

import csv
import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from block.errors import BadInputError, ConfigError, UnknownNameError
from block.steptime.importers.aiconfigurator import gpu_names, import_aiconfigurator
from block.steptime.importers.files import read_config
from block.steptime.importers.llmservingsim import import_llmservingsim
from block.steptime.importers.tables import clean
from block.steptime.importers.vidur import import_vidur
from block.steptime.profile import load_profile

OPERATORS = (
    "emb", "input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "post_attention_layernorm", "mlp_up_proj", "mlp_act",
    "mlp_down_proj", "add",
)  # fmt: skip
CONFIG = json.loads((Path(__file__).parent / "data" / "llama3.1-8b.prefix" / "engine.json").read_text())["model_config"]


def write_csv(file: Path, rows: list[dict[str, object]], compressed: bool = False) -> None:
    with gzip.open(file, "wt", newline="") if compressed else file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def vidur_directory(directory: Path, *, damaged: bool = False) -> Path:
    """Ten operators of 10 us + 0.05 us a token each, attention linear in what it reads; damaged: NaN and impossible rows."""
    mlp = []
    for tokens in (1, 8, 64, 128, 256, 512, 1024, 2048):
        row: dict[str, object] = {f"time_stats.{op}.median": 0.01 + 5e-5 * tokens for op in OPERATORS}
        if damaged and tokens == 256:
            row["time_stats.attn_post_proj.median"] = ""
            row["time_stats.attn_pre_proj.median"] = 0.0018
        sizes = {"n_embd": 4096, "n_expanded_embd": 11008, "vocab_size": 32000, "use_gated_mlp": "True"}
        mlp.append({**row, **sizes, "num_tokens": tokens, "num_tensor_parallel_workers": 1})
    attention: list[dict[str, object]] = []
    attention += [
        attention_row(n, 0, kv, False, decode=0.005 + 1e-6 * n * kv) for n in (1, 8, 32) for kv in (64, 512, 2048)
    ]
    attention += [
        attention_row(1, chunk, kv, True, prefill=0.005 + 1e-8 * chunk * (kv + chunk / 2))
        for chunk in (64, 512, 1024)
        for kv in (0, 512, 2048)
    ]
    if damaged:
        attention[0]["time_stats.attn_decode.median"] = "nan"
    write_csv(directory / "mlp.csv", mlp)
    write_csv(directory / "attention.csv.gz", attention, compressed=True)
    return directory


def attention_row(
    n: int, chunk: int, kv: int, is_prefill: bool, *, decode: float = 0.0, prefill: float = 0.0
) -> dict[str, object]:
    return {
        "batch_size": n, "prefill_chunk_size": chunk, "kv_cache_size": kv, "is_prefill": str(is_prefill),
        "num_tensor_parallel_workers": 1, "time_stats.attn_decode.median": decode, "time_stats.attn_prefill.median": prefill,
        "time_stats.attn_kv_cache_save.median": 0.002,
    }  # fmt: skip


def imported(directory: Path):
    return import_vidur(directory, layers=32, name="x", gpu="made up", model="x")


def test_vidurs_tables_add_up_over_the_layers(tmp_path):
    curve = imported(vidur_directory(tmp_path)).curve()
    # Nine operators a layer (the addition twice) plus attention and the cache's write; the embedding and the head once.
    layer_s = 10 * 0.01e-3 + 0.002e-3 + 0.005e-3
    assert curve.gpu_s(1, 500, 0, 0, 0) == pytest.approx(32 * (layer_s + 1e-9 * 500), rel=0.05)
    assert curve.kv_s == pytest.approx(32 * 1e-9, rel=0.02)
    assert curve.attention_s == pytest.approx(32 * 1e-11, rel=0.02)


def test_missing_and_impossible_rows_change_little(tmp_path):
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    good, bad = (
        imported(vidur_directory(tmp_path / "good")).curve(),
        imported(vidur_directory(tmp_path / "bad", damaged=True)).curve(),
    )
    for tokens in (64, 256, 300, 1024):
        assert bad.gpu_s(0, 0, tokens, 0, 1) == pytest.approx(good.gpu_s(0, 0, tokens, 0, 1), rel=0.03)


def test_clean_drops_what_cannot_be_and_never_falls():
    x = np.arange(1.0, 21.0)
    y = 1 + x / 10
    y[4:9] = 0.002  # a run of impossible values
    y[12], y[15] = np.nan, 40.0
    kept, values = clean(x, y)
    assert not {5, 6, 7, 8, 9, 13, 16} & set(kept.astype(int))
    assert (np.diff(values) >= 0).all()
    assert values == pytest.approx(1 + kept / 10)


def test_a_directory_without_tables_is_refused_with_a_reason(tmp_path):
    with pytest.raises(BadInputError, match=r"holds no mlp\.csv"):
        imported(tmp_path)
    with pytest.raises(BadInputError, match=r"holds no dense\.csv"):
        import_llmservingsim(tmp_path, layers=2, name="x", gpu="x", model="x")


def test_a_tensor_parallelism_that_was_not_measured_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="tensor parallelism 4"):
        import_vidur(vidur_directory(tmp_path), layers=32, name="x", gpu="x", model="x", tensor_parallel=4)


def test_llmservingsims_tables_add_up_over_the_layers(tmp_path):
    layers = (
        "layernorm",
        "qkv_proj",
        "rotary_emb",
        "o_proj",
        "gate_up_proj",
        "act_fn",
        "down_proj",
        "embedding",
        "final_layernorm",
    )
    sizes = (1, 8, 64, 512, 2048)
    write_csv(
        tmp_path / "dense.csv", [{"layer": x, "tokens": t, "time_us": 10 + 0.1 * t} for x in layers for t in sizes]
    )
    heads = [{"layer": x, "sequences": n, "time_us": 50 + n} for x in ("lm_head", "sampler") for n in (1, 8, 64, 256)]
    write_csv(tmp_path / "per_sequence.csv", heads)
    grid = [(0, 0, n, kv) for n in (1, 8, 64) for kv in (64, 1024)] + [
        (c, kv, 0, 0) for c in (64, 512) for kv in (0, 1024)
    ]
    rows = [
        {
            "prefill_chunk": c,
            "kv_prefill": b,
            "n_decode": n,
            "kv_decode": kv,
            "time_us": 5 + 1e-3 * n * kv + 1e-5 * c * (b + c / 2),
        }
        for c, b, n, kv in grid
    ]
    write_csv(tmp_path / "attention.csv", rows)
    even = import_llmservingsim(tmp_path, layers=4, name="x", gpu="x", model="x").curve()
    # With contexts as unlike as in traffic, attention over n requests takes n / 2 us more; in another unit.
    skewed = [
        {"regime": "pure", "n": n, "kv_mean": 1000, "kv_big": 3400, "t_mean_us": 3, "t_skew_us": 3 + 1.5 * n / (5 + n)}
        for n in (8, 64)
    ]
    write_csv(tmp_path / "skew.csv", [*skewed, {**skewed[1], "regime": "mixed", "t_skew_us": 100}])
    curve = import_llmservingsim(tmp_path, layers=4, name="x", gpu="x", model="x").curve()
    for n in (8, 64):
        more_s = curve.gpu_s(n, n * 1e3, 0, 0, 0) - even.gpu_s(n, n * 1e3, 0, 0, 0)
        assert more_s == pytest.approx(4 * 0.5e-6 * n, rel=0.05)
    # Eight operators a layer (the norm twice) and attention; embedding, last norm, head and sampler once.
    assert curve.gpu_s(1, 0, 0, 0, 0) == pytest.approx(4 * (8 * 10.1e-6 + 5e-6) + 2 * 10.1e-6 + 2 * 51e-6, rel=0.02)
    assert curve.kv_s == pytest.approx(4e-9, rel=0.02)


def test_a_config_of_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_local_experts": 8}))
    with pytest.raises(BadInputError, match="mixture of experts"):
        read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"hidden_size": 1}')
    with pytest.raises(BadInputError, match="num_hidden_layers"):
        read_config(tmp_path / "config.json")


needs_tables = pytest.mark.skipif(
    importlib.util.find_spec("aiconfigurator_core") is None,
    reason="needs the extra: pip install 'block-llm[aiconfigurator]'",
)


@needs_tables
def test_an_imported_h200_profile_decodes_within_a_tenth_of_the_measured_one():
    curve = import_aiconfigurator(CONFIG, system="h200_sxm", name="x", model="llama3.1-8b").curve()
    measured = load_profile("h200-llama3.1-8b").curve()
    for n in (1, 16, 64, 128):
        assert curve.gpu_s(n, 500 * n, 0, 0, 0) == pytest.approx(measured.gpu_s(n, 500 * n, 0, 0, 0), rel=0.1)


@needs_tables
def test_two_gpus_are_faster_than_one_and_slower_than_half():
    one, two = (
        import_aiconfigurator(CONFIG, system="h100_sxm", name="x", model="x", tensor_parallel=t).curve() for t in (1, 2)
    )
    ratio = two.gpu_s(32, 16_000, 0, 0, 0) / one.gpu_s(32, 16_000, 0, 0, 0)
    assert 0.5 < ratio < 0.9


@needs_tables
def test_a_gpu_without_tables_lists_those_that_have_some():
    assert {"h100_sxm", "h200_sxm", "a100_sxm"} <= set(gpu_names())
    with pytest.raises(UnknownNameError, match="h100_sxm"):
        import_aiconfigurator(CONFIG, system="h300", name="x", model="x")


@pytest.mark.skipif(
    importlib.util.find_spec("aiconfigurator_core") is not None, reason="says what to install where it is not"
)
def test_without_the_extra_it_says_what_to_install():
    with pytest.raises(ConfigError, match="aiconfigurator"):
        gpu_names()
