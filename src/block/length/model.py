"""A trained length model: numbers in arrays, saved as one .npz without pickles.

It says where the logarithm of an answer's length lies and how widely it spreads:

    words    = w . x / |x|                 x: hashed words of the prompt, weighted by how rare they are
    effect   = mix * trees(dense, words, offset, spread) + (1 - mix) * words    shared by all served models
    location = offset[m] + slope[m] * effect                          one offset and slope per served model
    scale    = width[m] * exp(trees(dense, effect, ...))

and a family of residual shapes by scale, taken from prompts that the model had not seen (so calibrated by
construction, as in split conformal prediction). Length = exp(location + residual).
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from block.errors import BadInputError
from block.length import shapes
from block.length.distribution import Floats
from block.length.features import DENSE_NAMES, HASH_SIZE, Features
from block.length.grid import TOKENS_MAX
from block.length.trees import Trees

FORMAT = "block-length"
VERSION = 1
LOCATION_STEP = 0.04
LOCATIONS: Floats = np.arange(0.0, np.log(TOKENS_MAX), LOCATION_STEP)
_TREES = tuple(Trees.__struct_fields__)
_BYTES_MAX = 64 << 20


class ServedModel(msgspec.Struct, frozen=True):
    """What is particular to one served model: the median and spread of its log-lengths, how strongly they follow
    the prompt (``slope``) and how much wider than told they lie around that (``width``)."""

    name: str
    records: int
    offset: float
    spread: float
    slope: float
    width: float


class Place(msgspec.Struct, frozen=True):
    """Where one request's log-length lies and how widely it spreads; ``known``: its served model was trained on."""

    location: float
    scale: float
    known: bool


class LengthModel(msgspec.Struct, frozen=True, kw_only=True):
    """See the module's text. ``linear``: w, and ``rarity``: (HASH_SIZE,) float32; ``dense_weights``: (2, dense) the
    linear part's weights of the standardised dense features; ``scales``: (s,) rising; ``residuals``: (s, knots)
    rising residuals in units of the scale; ``above``: (knots,) the share of lengths above each."""

    linear: NDArray[np.float32]
    rarity: NDArray[np.float32]
    intercept: float
    dense_mean: NDArray[np.float32]
    dense_weight: NDArray[np.float32]
    location_trees: Trees
    scale_trees: Trees
    mix: float
    scales: Floats
    residuals: Floats
    above: Floats
    served: dict[str, ServedModel]
    unknown: ServedModel
    about: dict[str, Any]

    def words_score(self, features: Features) -> float:
        """The linear part's effect of one request."""
        rarity = self.rarity[features.words]
        norm = float(np.sqrt(rarity @ rarity)) or 1.0
        dense = np.clip((features.dense - self.dense_mean), -CLIP, CLIP) @ self.dense_weight
        return float(rarity @ self.linear[features.words]) / norm + float(dense) + self.intercept

    def place(self, features: Features, model: str) -> Place:
        """Where a request to ``model`` lies."""
        served = self.served.get(model)
        at = served or self.unknown
        words = self.words_score(features)
        row = np.concatenate([features.dense, np.array([words, at.offset, at.spread], dtype=np.float32)])
        effect = self.mix * self.location_trees.one(row) + (1.0 - self.mix) * words
        row[-3] = effect
        scale = at.width * float(np.exp(self.scale_trees.one(row)))
        return Place(at.offset + at.slope * effect, scale, served is not None)

    def survivals(self) -> Floats:
        """Rows for a bank, (scales * locations, edges): scale-major, the locations as ``LOCATIONS``."""
        return np.concatenate(
            [
                shapes.around(knots * scale, self.above, LOCATIONS)
                for knots, scale in zip(self.residuals, self.scales, strict=True)
            ]
        )

    def row(self, location: float, scale: float) -> int:
        """The row of `survivals` nearest to a location and a scale."""
        s = int(np.searchsorted(np.sqrt(self.scales[1:] * self.scales[:-1]), scale))
        x = min(max(round(location / LOCATION_STEP), 0), len(LOCATIONS) - 1)
        return s * len(LOCATIONS) + x

    def save(self, path: Path) -> None:
        """Write the model to ``path`` (.npz)."""
        arrays: dict[str, Any] = {
            "linear": self.linear.astype(np.float16), "rarity": self.rarity.astype(np.float16),
            "dense_mean": self.dense_mean, "dense_weight": self.dense_weight, "scales": self.scales,
            "residuals": self.residuals, "above": self.above,
        }  # fmt: skip
        for name, trees in (("location", self.location_trees), ("scale", self.scale_trees)):
            arrays |= {f"{name}_{field}": getattr(trees, field) for field in _TREES}
        header = {
            "format": FORMAT, "version": VERSION, "features": list(DENSE_NAMES), "hash_size": HASH_SIZE,
            "intercept": self.intercept, "mix": self.mix, "about": self.about,
            "unknown": msgspec.to_builtins(self.unknown),
            "served": [msgspec.to_builtins(served) for served in self.served.values()],
        }  # fmt: skip
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)


CLIP = 6.0
"""Dense features are cut at this distance from their mean in the linear part, which must not run away."""


def load_model(path: Path) -> LengthModel:
    """A saved model.

    Raises:
        BadInputError: no such file, not a length model, damaged, or of another version.
    """
    try:
        if path.stat().st_size > _BYTES_MAX:
            raise BadInputError(f"{path} is too large to be a length model.")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays["header"].tobytes())
        _check_header(path, header)
        return _checked(path, _of_arrays(arrays, header))
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, msgspec.ValidationError) as error:
        raise BadInputError(f"{path} is not a length model: {error}.") from error


def _check_header(path: Path, header: dict[str, Any]) -> None:
    if header.get("format") != FORMAT:
        raise BadInputError(f"{path} is not a length model.")
    if header.get("version") != VERSION or header["features"] != list(DENSE_NAMES) or header["hash_size"] != HASH_SIZE:
        raise BadInputError(
            f"{path} is a length model of another version of Block (format {header.get('version')}, this one reads "
            f"{VERSION}): train it anew with `block length train`."
        )


def _of_arrays(arrays: dict[str, NDArray[Any]], header: dict[str, Any]) -> LengthModel:
    served = msgspec.convert(header["served"], list[ServedModel])
    return LengthModel(
        linear=arrays["linear"].astype(np.float32),
        rarity=arrays["rarity"].astype(np.float32),
        intercept=float(header["intercept"]),
        dense_mean=arrays["dense_mean"].astype(np.float32),
        dense_weight=arrays["dense_weight"].astype(np.float32),
        location_trees=Trees(*(arrays[f"location_{field}"] for field in _TREES)),
        scale_trees=Trees(*(arrays[f"scale_{field}"] for field in _TREES)),
        mix=float(header["mix"]),
        scales=arrays["scales"].astype(np.float64),
        residuals=arrays["residuals"].astype(np.float64),
        above=arrays["above"].astype(np.float64),
        served={model.name: model for model in served},
        unknown=msgspec.convert(header["unknown"], ServedModel),
        about=header["about"],
    )


def _checked(path: Path, model: LengthModel) -> LengthModel:
    """Shapes and numbers that an estimate relies on."""
    dense = len(DENSE_NAMES)
    whole = (
        model.linear.shape == model.rarity.shape == (HASH_SIZE,)
        and model.dense_mean.shape == model.dense_weight.shape == (dense,)
        and model.residuals.shape == (len(model.scales), len(model.above))
        and all(np.isfinite(a).all() for a in (model.linear, model.rarity, model.residuals, model.scales, model.above))
        and all(_walkable(trees, dense + 3) for trees in (model.location_trees, model.scale_trees))
        and len(model.scales) > 1
    )
    if not whole:
        raise BadInputError(f"{path} is a damaged length model: its parts do not fit together.")
    return model


def _walkable(trees: Trees, features: int) -> bool:
    nodes = len(trees.value)
    inside = all(
        len(part) == 0 or (part.min() >= 0 and part.max() < limit)
        for part, limit in ((trees.roots, nodes), (trees.left, nodes), (trees.right, nodes), (trees.feature, features))
    )
    same = len(trees.left) == len(trees.right) == len(trees.feature) == len(trees.threshold) == nodes
    return inside and same and bool(np.isfinite(trees.value).all())
