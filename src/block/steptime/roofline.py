"""What arithmetic alone says about a model on a GPU: a weak prior where measured steps do not show the accelerator.

A token costs 2 FLOP per weight of the layers, and 4 x heads x head size x layers FLOP per token of context.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

# Dense 16-bit tensor throughput with 32-bit accumulation, FLOP/s, from the vendor's data sheets.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "A30": 165e12, "A40": 150e12, "L40S": 362e12,
    "RTX PRO 6000": 504e12, "RTX 4090": 165e12,
}  # fmt: skip
# Memory bandwidth, bytes/s, and streaming multiprocessors, from the same sheets.
BANDWIDTH = {"B200": 8.0e12, "H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "A30": 0.933e12, "A40": 0.696e12, "L40S": 0.864e12,
             "RTX PRO 6000": 1.79e12, "RTX 4090": 1.01e12}  # fmt: skip
PROCESSORS = {"B200": 148, "H200": 132, "H100": 132, "A100": 108, "A30": 56, "A40": 84, "L40S": 142, "RTX PRO 6000": 188,
              "RTX 4090": 128}  # fmt: skip
UTILISATION = 0.62  # of the peak in long prefills: 0.61-0.66 on our H200 runs


class Arithmetic(msgspec.Struct, frozen=True):
    """Seconds per prefill token in the layers, and per token x token of attention, of compute-bound work.

    ``tile_requests``: how many requests it takes for every processor of the GPU to attend to one head of one of them; ``kv_s``:
    seconds to read one token's 16-bit keys and values at the memory's full bandwidth; 0: unknown.
    """

    token_s: float
    attention_s: float
    tile_requests: float = 0.0
    kv_s: float = 0.0


def layer_weights(config: Mapping[str, Any]) -> float:
    """Weights in the transformer layers of a dense Llama-like model, from its ``config.json`` fields."""
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    attention = hidden * head * (2 * heads + 2 * kv_heads)
    return float(layers * (attention + 3 * hidden * int(config["intermediate_size"])))


def arithmetic(config: Mapping[str, Any], gpu: str, tensor_parallel: int) -> Arithmetic | None:
    """Compute-bound costs, or ``None`` if the GPU or a field of the configuration is unknown."""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name.lower() in gpu.lower()), None)
    try:
        weights = layer_weights(config)
        heads, layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
        head = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    except (KeyError, TypeError, ValueError):
        return None
    if peak is None:
        return None
    rate = peak * UTILISATION * tensor_parallel
    processors = next((n for name, n in PROCESSORS.items() if name.lower() in gpu.lower()), 0)
    kv_heads = max(int(config.get("num_key_value_heads") or heads) // tensor_parallel, 1)
    bandwidth = next((b for name, b in BANDWIDTH.items() if name.lower() in gpu.lower()), 0.0)
    kv_s = 4 * layers * kv_heads * head / bandwidth if bandwidth else 0.0
    return Arithmetic(2 * weights / rate, 4 * heads * head * layers / rate, processors / kv_heads, kv_s)
