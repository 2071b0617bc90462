"""A trained length model: numbers in arrays, saved as one .npz without pickles.

It says where the logarithm of an answer's length lies and how widely it spreads:

    words    = w . x / |x| + v . (dense - mean) + u . vector           x: hashed words, weighted by how rare they are
    pull     = pull_weight * (log of the tokens that the prompt asks for - offset[m]), 0 where it asks for none
    own      = own_weight * (mix * trees(dense, words, level, told) + (1 - mix) * words)     level: offset[m], spread[m]
    told     = base_weight * (base effect - base_center) + own                   shared by all served models
    effect   = told + pull
    location = offset[m] + slope[m] * told + pull                     offset, slope, width: one per served model m
    scale    = width[m] * exp(scale_weight * trees(dense, effect, level, told) + base_scale_weight * base log-scale + const)

``vector`` is a sentence embedding where the model was trained with an encoder (`encoder`), else it has no columns. The
base is a model of other records, whose effect and log-scale are ``told``: what transfers between prompt sets and served
models, so that a few hundred records of one's own are enough. Without one both are 0.
"""

import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from block.errors import BadInputError, ConfigError
from block.length.distribution import Floats
from block.length.learn.family import Family
from block.length.learn.trees import Trees
from block.length.prompt.features import ABSENT, ASKED, DENSE_NAMES, HASH_SIZE, Features, features_of

FORMAT = "block-length"
VERSION = 3
CLIP = 6.0
"""Dense features are cut this far from their mean in the linear part, which must not run away."""

LEVEL_RECORDS = 30
"""Records of a served model from which on the trees see its own level instead of the typical one."""

_TREES = tuple(Trees.__struct_fields__)
_BYTES_MAX = 64 << 20
_TOLD = 5
"""Columns of the trees after the dense features: words (then the effect), offset, spread, the base's effect and log-scale."""

_FLOAT32 = ("linear", "rarity", "dense_mean", "dense_weight", "vector_mean", "vector_weight")
_NUMBERS = (
    "intercept", "pull_weight", "mix", "own_weight", "own_low",
    "own_high", "scale_weight", "base_weight", "base_center", "base_scale_weight",
)  # fmt: skip
_FAMILY = tuple(Family.__struct_fields__)

Vector = NDArray[np.float32]


class Place(msgspec.Struct, frozen=True):
    """Where one request's log-length lies and how widely it spreads; ``known``: its served model was trained on."""

    location: float
    scale: float
    known: bool


class Placer(Protocol):
    """What `learned.LearnedEstimator` needs of a model, whatever it looks like inside."""

    @property
    def family(self) -> Family: ...

    def place(self, text: str, max_tokens: int | None, model: str) -> Place: ...


class TextEncoder(Protocol):
    """Turns texts into vectors of one length (`encoder.SentenceEncoder`)."""

    @property
    def about(self) -> dict[str, str]: ...

    def encode(self, texts: list[str]) -> Vector: ...


class ServedModel(msgspec.Struct, frozen=True):
    """What is particular to one served model: the median and spread of its log-lengths, how strongly they follow
    the prompt (``slope``) and how much wider than told they lie around that (``width``)."""

    name: str
    records: int
    offset: float
    spread: float
    slope: float
    width: float


class Effect(NamedTuple):
    """In logs: what the prompt tells, what it asks for, how widely answers spread."""

    told: float
    pull: float
    log_scale: float


class LengthModel(msgspec.Struct, frozen=True, kw_only=True):
    """See the module's text. ``linear`` (w), ``rarity``: (HASH_SIZE,); ``dense_*``: (dense features,);
    ``vector_*``: (dimensions,), of length 0 without an encoder, else ``encoder`` is needed to place a request.
    ``own_low`` and ``own_high`` bound what the model adds to its base, so that an odd prompt gets nothing absurd.
    ``prompts``: hashes of the prompts that it was trained on, (n,) rising, or none (`prompt_hashes`)."""

    linear: Vector
    rarity: Vector
    intercept: float
    dense_mean: Vector
    dense_weight: Vector
    vector_mean: Vector
    vector_weight: Vector
    location_trees: Trees
    scale_trees: Trees
    pull_weight: float
    own_low: float
    own_high: float
    mix: float
    own_weight: float
    scale_weight: float
    family: Family
    served: dict[str, ServedModel]
    unknown: ServedModel
    about: dict[str, Any]
    encoder: TextEncoder | None = None
    base: "LengthModel | None" = None
    base_weight: float = 0.0
    base_center: float = 0.0
    base_scale_weight: float = 0.0
    prompts: NDArray[np.uint32] = np.zeros(0, dtype=np.uint32)

    def place(self, text: str, max_tokens: int | None, model: str) -> Place:
        """Where the answer to ``text`` lies. Bounded work; raises nothing whatever the text."""
        return self.place_features(features_of(text, max_tokens), text, model)

    def place_features(self, features: Features, text: str, model: str) -> Place:
        """The same from features; ``text`` is read by an encoder alone."""
        known = self.served.get(model)
        served = known or self.unknown
        at = self.effect(features, text, served)
        location = served.offset + served.slope * at.told + at.pull
        return Place(location, served.width * math.exp(at.log_scale), known is not None)

    def effect(self, features: Features, text: str, served: ServedModel) -> Effect:
        """What one request's answer differs by from a served model's level, before its slope and width. A base speaks of
        no model in particular."""
        base, base_scale = 0.0, 0.0
        if self.base is not None:
            at = self.base.effect(features, text, self.base.unknown)
            base, base_scale = self.base.unknown.slope * at.told - self.base_center, at.log_scale
        rarity = self.rarity[features.words]
        norm = float(np.sqrt(rarity @ rarity)) or 1.0
        words = self.intercept + float(rarity @ self.linear[features.words]) / norm
        words += float(np.clip(features.dense - self.dense_mean, -CLIP, CLIP) @ self.dense_weight)
        if self.encoder is not None:
            words += float((self.encoder.encode([text])[0] - self.vector_mean) @ self.vector_weight)
        seen = served if served.records >= LEVEL_RECORDS else self.unknown
        level = np.array([words, seen.offset, seen.spread, base, base_scale], dtype=np.float32)
        row = np.concatenate([features.dense, level])
        own = self.own_weight * (self.mix * self.location_trees.one(row) + (1.0 - self.mix) * words)
        told = self.base_weight * base + min(max(own, self.own_low), self.own_high)
        pull = self.pull_weight * float(asked_pull(features.dense[None, :], served.offset)[0])
        row[-_TOLD] = told + pull
        log_scale = self.scale_weight * self.scale_trees.one(row) + self.base_scale_weight * base_scale
        return Effect(told, pull, log_scale)

    def effects(self, dense: Vector, bags: Any) -> tuple[Floats, Floats]:
        """What `effect` tells (told and pull together, log-scale) of many requests to no served model in particular.
        ``dense``: (n, dense features); ``bags``: sparse (n, HASH_SIZE) of ones.

        Raises:
            ConfigError: the model reads embeddings, which a base may not.
        """
        if self.encoder is not None:
            raise ConfigError("A model that was trained with --encoder cannot be the base of another.")
        base, base_scale = np.zeros(len(dense)), np.zeros(len(dense))
        if self.base is not None:
            base, base_scale = self.base.effects(dense, bags)
            base = base - self.base_center
        norm = np.sqrt(bags @ (self.rarity.astype(np.float64) ** 2))
        words = self.intercept + (bags @ (self.rarity * self.linear).astype(np.float64)) / np.where(norm > 0, norm, 1.0)
        words = words + np.clip(dense - self.dense_mean, -CLIP, CLIP) @ self.dense_weight
        offset, spread = (np.full(len(dense), level) for level in (self.unknown.offset, self.unknown.spread))
        rows = np.column_stack([dense, words, offset, spread, base, base_scale]).astype(np.float32)
        own = self.own_weight * (self.mix * self.location_trees.many(rows) + (1.0 - self.mix) * words)
        told = self.base_weight * base + np.clip(own, self.own_low, self.own_high)
        rows[:, -_TOLD] = told + self.pull_weight * asked_pull(dense, offset)
        log_scale = self.scale_weight * self.scale_trees.many(rows) + self.base_scale_weight * base_scale
        return self.unknown.slope * told, log_scale

    def has_seen(self, groups: Iterable[str]) -> NDArray[np.bool_]:
        """Which of these prompts (`records.Record.group`) the model was trained on, where it remembers them."""
        return np.isin(prompt_hashes(groups), self.prompts)

    def save(self, path: Path) -> None:
        """Write the model to ``path`` (.npz), its base included."""
        path.write_bytes(self._packed())

    def _packed(self) -> bytes:
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _FLOAT32}
        arrays |= {name: arrays[name].astype(np.float16) for name in ("linear", "rarity")}
        arrays |= {name: getattr(self.family, name) for name in _FAMILY}
        for name, trees in (("location", self.location_trees), ("scale", self.scale_trees)):
            arrays |= {f"{name}_{field}": getattr(trees, field) for field in _TREES}
        header = {
            "format": FORMAT, "version": VERSION, "features": list(DENSE_NAMES), "hash_size": HASH_SIZE,
            **{name: getattr(self, name) for name in _NUMBERS}, "about": self.about,
            "encoder": None if self.encoder is None else self.encoder.about,
            "unknown": msgspec.to_builtins(self.unknown),
            "served": [msgspec.to_builtins(served) for served in self.served.values()],
        }  # fmt: skip
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        arrays["prompts"] = self.prompts
        arrays["base"] = np.frombuffer(b"" if self.base is None else self.base._packed(), dtype=np.uint8)
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()


def prompt_hashes(groups: Iterable[str]) -> NDArray[np.uint32]:
    """What a model remembers prompts by: 32 bits each, in order. Shape (n,)."""
    return np.array([zlib.crc32(group.encode("utf-8", "surrogatepass")) for group in groups], dtype=np.uint32)


def asked_pull(dense: Vector, offset: Floats | float) -> Floats:
    """How far the length that each prompt asks for lies from its model's level, in logs; 0 where it asks for none.
    ``dense``: (n, dense features); ``offset``: (n,) or one. Shape (n,)."""
    asked = dense[:, ASKED].astype(np.float64)
    pull: Floats = np.where(asked == ABSENT, 0.0, asked - offset)
    return pull


def load_model(path: Path) -> LengthModel:
    """A saved model.

    Raises:
        BadInputError: no such file, not a length model, damaged, or of another version.
        ConfigError: it needs an encoder whose library or weights are not there.
    """
    try:
        if path.stat().st_size > _BYTES_MAX:
            raise BadInputError(f"{path} is too large to be a length model.")
        model = _unpacked(path, path.read_bytes())
    except FileNotFoundError as error:
        raise BadInputError(f"There is no length model {path}: make one with `block length train`.") from error
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise BadInputError(f"{path} is not a length model, or a damaged one.") from error
    if not _fits_together(model):
        raise BadInputError(f"{path} is a damaged length model: its parts do not fit together.")
    return model


def _unpacked(path: Path, raw: bytes) -> LengthModel:
    with np.load(io.BytesIO(raw), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays["header"].tobytes())
    _check_header(path, header)
    base = _unpacked(path, arrays["base"].tobytes()) if len(arrays["base"]) else None
    return _of_arrays(arrays, header, base)


def _check_header(path: Path, header: dict[str, Any]) -> None:
    if header.get("format") != FORMAT:
        raise BadInputError(f"{path} is not a length model.")
    same = header["features"] == list(DENSE_NAMES) and header["hash_size"] == HASH_SIZE
    if header.get("version") != VERSION or not same:
        why = "other features" if header.get("version") == VERSION else f"this one reads {VERSION}"
        raise BadInputError(
            f"{path} is a length model of another version of Block (format {header.get('version')}, {why}): train it "
            "anew with `block length train`."
        )


def _of_arrays(arrays: dict[str, NDArray[Any]], header: dict[str, Any], base: LengthModel | None) -> LengthModel:
    encoder: TextEncoder | None = None
    if header["encoder"] is not None:
        from block.length.learn.encoder import encoder_of

        encoder = encoder_of(header["encoder"])
    parts: dict[str, Any] = {name: arrays[name].astype(np.float32) for name in _FLOAT32}
    parts |= {name: float(header[name]) for name in _NUMBERS}
    return LengthModel(
        **parts,
        location_trees=Trees(*(arrays[f"location_{field}"] for field in _TREES)),
        scale_trees=Trees(*(arrays[f"scale_{field}"] for field in _TREES)),
        family=Family(*(arrays[name].astype(np.float64) for name in _FAMILY)),
        served={model.name: model for model in msgspec.convert(header["served"], list[ServedModel])},
        unknown=msgspec.convert(header["unknown"], ServedModel),
        about=dict(header["about"]),
        encoder=encoder,
        base=base,
        prompts=arrays["prompts"].astype(np.uint32),
    )


def _fits_together(model: LengthModel) -> bool:
    """Shapes and numbers that an estimate relies on."""
    dense, family = len(DENSE_NAMES), model.family
    numbers = [*(getattr(model, name) for name in _FLOAT32), *(getattr(family, name) for name in _FAMILY)]
    return (
        model.linear.shape == model.rarity.shape == (HASH_SIZE,)
        and model.dense_mean.shape == model.dense_weight.shape == (dense,)
        and model.vector_mean.shape == model.vector_weight.shape
        and len(family.scales) > 1
        and family.residuals.shape == (len(family.scales), len(family.above))
        and all(np.isfinite(part).all() for part in numbers)
        and all(np.isfinite(getattr(model, name)) for name in _NUMBERS)
        and (model.base is None or _fits_together(model.base))
        and all(_walkable(trees, dense + _TOLD) for trees in (model.location_trees, model.scale_trees))
    )


def _walkable(trees: Trees, features: int) -> bool:
    nodes = len(trees.value)
    limits = ((trees.roots, nodes), (trees.left, nodes), (trees.right, nodes), (trees.feature, features))
    inside = all(len(part) == 0 or (part.min() >= 0 and part.max() < limit) for part, limit in limits)
    same = len(trees.left) == len(trees.right) == len(trees.feature) == len(trees.threshold) == nodes
    return inside and same and bool(np.isfinite(trees.value).all())
