"""A transformer regressor: a RoBERTa-class encoder from local weights, fine-tuned to lengths (the paper's tagger,
with a distribution instead of a number). Needs the extra ``block-llm[length-neural]``; trains on a GPU or a CPU.

The head gives the location and the scale of the log-length around its served model's median, trained by the
Laplace likelihood (so the location is a median). A fifth of the prompts is held out of the training and gives the
shapes, which calibrates the quantiles.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from block.errors import BadInputError
from block.length.data.records import Record
from block.length.distribution import Floats
from block.length.learn.encoder import load_encoder, seen_text
from block.length.learn.family import Family, fit_family
from block.length.learn.model import Place, ServedModel
from block.length.learn.tabulate import fold_of
from block.length.learn.train import RECORDS_MIN, levels, typical

FORMAT = "block-length-transformer"
VERSION = 1
_HEAD = "length.npz"
_SCALE_MIN, _SCALE_MAX = 0.03, 3.0


class TransformerRegressor:
    """A `model.Placer`: tokenizer, encoder and a linear head of (location, log scale)."""

    def __init__(
        self, tokenizer: Any, encoder: Any, head: Any, *, family: Family, served: dict[str, ServedModel],
        unknown: ServedModel, tokens_max: int, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.family, self.served, self.unknown = family, served, unknown
        self._tokenizer, self._encoder, self._head = tokenizer, encoder.to(device).eval(), head.to(device).eval()
        self._tokens_max, self._device = tokens_max, device

    def place(self, text: str, max_tokens: int | None, model: str) -> Place:
        """Where the answer to ``text`` lies; ``max_tokens`` is not looked at."""
        known = self.served.get(model)
        served = known or self.unknown
        effect, scale = self.tell([text])[0]
        return Place(served.offset + served.slope * float(effect), served.width * float(scale), known is not None)

    def tell(self, texts: list[str], batch: int = 32) -> Floats:
        """(effect, scale) of each text, (n, 2)."""
        import torch

        told = []
        with torch.inference_mode():
            for start in range(0, len(texts), batch):
                out = _forward(
                    self._tokenizer, self._encoder, self._head, texts[start : start + batch], self._tokens_max
                )
                told.append(out.double().cpu().numpy())
        return np.concatenate(told)

    def save(self, folder: Path) -> None:
        """Write encoder, tokenizer (Hugging Face's layout, safetensors) and head into ``folder``."""
        self._tokenizer.save_pretrained(folder)
        self._encoder.save_pretrained(folder)
        header = {
            "format": FORMAT, "version": VERSION, "tokens_max": self._tokens_max,
            "unknown": msgspec.to_builtins(self.unknown),
            "served": [msgspec.to_builtins(served) for served in self.served.values()],
        }  # fmt: skip
        arrays = {name: getattr(self.family, name) for name in Family.__struct_fields__}
        weight, bias = (part.detach().cpu().numpy() for part in (self._head.weight, self._head.bias))
        np.savez_compressed(
            folder / _HEAD,
            weight=weight,
            bias=bias,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            **arrays,
        )


def load_transformer(folder: Path, *, device: str = "cpu") -> TransformerRegressor:
    """A saved regressor.

    Raises:
        BadInputError: it is damaged or of another version.
        ConfigError: torch or transformers are not installed.
    """
    try:
        with np.load(folder / _HEAD, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays["header"].tobytes())
        if header.get("format") != FORMAT or header.get("version") != VERSION:
            raise BadInputError(f"{folder} is no length regressor of this version of Block: train it anew.")
        family = Family(*(arrays[name] for name in Family.__struct_fields__))
        served = {model.name: model for model in msgspec.convert(header["served"], list[ServedModel])}
        unknown = msgspec.convert(header["unknown"], ServedModel)
    except (OSError, ValueError, KeyError) as error:
        raise BadInputError(f"{folder} is not a length regressor, or a damaged one: {error}.") from error
    tokenizer, encoder = load_encoder(folder)
    head = _head(encoder, arrays["weight"], arrays["bias"])
    return TransformerRegressor(
        tokenizer, encoder, head, family=family, served=served, unknown=unknown, tokens_max=int(header["tokens_max"]),
        device=device,
    )  # fmt: skip


def fine_tune(
    records: Sequence[Record], weights: Path, *, epochs: int = 3, batch: int = 32, learning_rate: float = 5e-5,
    tokens_max: int = 256, device: str = "cpu", seed: int = 1, progress: Callable[[str], None] = lambda _: None,
) -> TransformerRegressor:  # fmt: skip
    """Fine-tune the encoder in ``weights`` on records, deterministic by ``seed`` on a CPU.

    Raises:
        BadInputError: too few records.
        ConfigError: torch or transformers are not installed, or ``weights`` holds no encoder.
    """
    if len(records) < RECORDS_MIN:
        raise BadInputError(f"{len(records)} records are too few to train on: at least {RECORDS_MIN} are needed.")
    tokenizer, encoder = load_encoder(weights)
    import torch

    torch.manual_seed(seed)
    head = _head(encoder)
    names = {name: place for place, name in enumerate(sorted({r.model for r in records}))}
    model = np.array([names[r.model] for r in records])
    log_tokens = np.log([r.output_tokens for r in records])
    offset, spread = levels(log_tokens, model)
    target = log_tokens - offset[model]
    held = np.array([fold_of(r.group, salt="held") == 0 for r in records])
    texts = [r.text for r in records]
    limit = min(tokens_max, int(getattr(encoder.config, "max_position_embeddings", tokens_max)) - 2)
    encoder.to(device).train()
    head.to(device)
    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=learning_rate, weight_decay=0.01)
    rng, rows = np.random.default_rng(seed), np.flatnonzero(~held)
    for epoch in range(epochs):
        order = rng.permutation(rows)
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            told = _forward(tokenizer, encoder, head, [texts[i] for i in some], limit)
            true = torch.tensor(target[some], dtype=told.dtype, device=told.device)
            loss = ((true - told[:, 0]).abs() / told[:, 1] + torch.log(told[:, 1])).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimiser.step()
        progress(f"epoch {epoch + 1} of {epochs}: loss {float(loss.detach()):.3f}")
    served = {
        name: ServedModel(name, int((model == m).sum()), float(offset[m]), float(spread[m]), 1.0, 1.0)
        for name, m in names.items()
    }
    flat = Family(np.array([0.1, 1.0]), np.zeros((2, 2)), np.array([1.0, 0.0]))
    made = TransformerRegressor(
        tokenizer, encoder, head, family=flat, served=served, unknown=typical(served), tokens_max=limit, device=device
    )
    out = np.flatnonzero(held) if held.sum() >= RECORDS_MIN // 5 else np.arange(len(records))
    told_out = made.tell([texts[i] for i in out])
    truncated = np.array([records[int(i)].truncated for i in out])
    prompts = len({records[int(i)].key for i in out})
    made.family = fit_family(target[out] - told_out[:, 0], told_out[:, 1], truncated, prompts=prompts)
    return made


def _head(encoder: Any, weight: Floats | None = None, bias: Floats | None = None) -> Any:
    import torch

    head = torch.nn.Linear(int(encoder.config.hidden_size), 2)
    with torch.no_grad():
        if weight is None or bias is None:
            head.weight.mul_(0.1)
            head.bias.copy_(torch.tensor([0.0, -0.7]))
        else:
            head.weight.copy_(torch.tensor(weight))
            head.bias.copy_(torch.tensor(bias))
    return head


def _forward(tokenizer: Any, encoder: Any, head: Any, texts: list[str], tokens_max: int) -> Any:
    """(n, 2): effect and scale, from the mean of the last layer over a text's tokens."""
    tokens = tokenizer(
        [seen_text(text) for text in texts], padding=True, truncation=True, max_length=tokens_max, return_tensors="pt"
    ).to(head.weight.device)
    hidden = encoder(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None].to(hidden.dtype)
    out = head((hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0))
    import torch

    return torch.stack([out[:, 0], out[:, 1].exp().clamp(_SCALE_MIN, _SCALE_MAX)], dim=1)
