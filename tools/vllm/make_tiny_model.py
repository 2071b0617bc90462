#!/usr/bin/env python3
"""Make a small random-weight Llama that vLLM can serve, without any download.

    make_tiny_model.py DIRECTORY [--hidden 64] [--layers 2] [--vocab 512] [--no-weights]

Writes config.json, a byte-level BPE tokenizer trained on generated text, a chat template and, unless ``--no-weights``
(serve then with ``--load-format dummy``), random weights. Needs tokenizers, numpy and safetensors; neither torch nor
transformers.
"""

import argparse
import json
import random
from pathlib import Path

WORDS = (  # noqa: SIM905 - a sentence reads better than a list
    "a request enters the queue of an engine and waits until its blocks fit then every step computes one token for each "
    "of the running ones while prompts are cut into chunks that share the budget with them so long prompts delay short "
    "answers when memory is full the last one admitted loses its place returns to the head of the line and starts over"
).split()
END = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_tokenizer(directory: Path, vocab: int) -> int:
    """Train and save a tokenizer; returns the size that its vocabulary really got."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    chance = random.Random(0)
    text = (" ".join(chance.choices(WORDS, k=chance.randint(5, 40))) for _ in range(500))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos_token": END, "eos_token": END, "pad_token": END}
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 1 << 20,
            "chat_template": CHAT_TEMPLATE,
            **special,
        },
    )
    write_json(directory / "special_tokens_map.json", special)
    return int(tokenizer.get_vocab_size())


def write_weights(path: Path, *, hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    chance = np.random.default_rng(0)
    head = hidden // heads

    def matrix(rows: int, columns: int):
        return (0.05 * chance.standard_normal((rows, columns), dtype=np.float32)).astype(np.float16)

    ones = np.ones(hidden, np.float16)
    tensors = {
        "model.embed_tokens.weight": matrix(vocab, hidden),
        "lm_head.weight": matrix(vocab, hidden),
        "model.norm.weight": ones,
    }
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            tensors[f"{layer}self_attn.{name}_proj.weight"] = matrix(rows, hidden)
        tensors[f"{layer}self_attn.o_proj.weight"] = matrix(hidden, heads * head)
        tensors[f"{layer}mlp.gate_proj.weight"] = matrix(inner, hidden)
        tensors[f"{layer}mlp.up_proj.weight"] = matrix(inner, hidden)
        tensors[f"{layer}mlp.down_proj.weight"] = matrix(hidden, inner)
        tensors[f"{layer}input_layernorm.weight"] = ones.copy()
        tensors[f"{layer}post_attention_layernorm.weight"] = ones.copy()
    save_file(tensors, path, metadata={"format": "pt"})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    for name, default in (
        ("hidden", 64),
        ("layers", 2),
        ("heads", 2),
        ("kv-heads", 1),
        ("inner", 128),
        ("vocab", 512),
        ("max-model-len", 8192),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-weights", action="store_true")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    vocab = max(args.vocab, write_tokenizer(args.directory, args.vocab))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": args.hidden, "intermediate_size": args.inner,
        "num_hidden_layers": args.layers, "num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads,
        "head_dim": args.hidden // args.heads, "vocab_size": vocab, "max_position_embeddings": args.max_model_len,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16", "use_cache": True,
    }  # fmt: skip
    write_json(args.directory / "config.json", config)
    write_json(args.directory / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    if not args.no_weights:
        write_weights(
            args.directory / "model.safetensors", hidden=args.hidden, layers=args.layers, heads=args.heads,
            kv_heads=args.kv_heads, inner=args.inner, vocab=vocab,
        )  # fmt: skip


if __name__ == "__main__":
    main()
