"""Boosted regression trees as flat arrays: trained by LightGBM, evaluated by numpy alone.

So a gateway needs no LightGBM, and one row costs some ten numpy calls over all trees at once (bench/length.py
compares with LightGBM's own single-row prediction).
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

DEPTH_MAX = 6


class Trees(msgspec.Struct, frozen=True):
    """A sum of trees. Nodes of all trees in one array each; a leaf is its own child and splits nowhere.

    ``roots``: (trees,) int32; ``feature``, ``left``, ``right``: (nodes,) int32; ``threshold``, ``value``: (nodes,)
    float32; a row goes left where feature <= threshold.
    """

    roots: NDArray[np.int32]
    feature: NDArray[np.int32]
    threshold: NDArray[np.float32]
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    value: NDArray[np.float32]

    def one(self, row: NDArray[np.float32]) -> float:
        """The sum for one row, shape (features,)."""
        node = self.roots
        for _ in range(DEPTH_MAX):
            goes_left = row[self.feature[node]] <= self.threshold[node]
            node = np.where(goes_left, self.left[node], self.right[node])
        return float(self.value[node].sum())

    def many(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """The sums for rows of shape (n, features)."""
        total = np.zeros(len(rows))
        every = np.arange(len(rows))
        for root in self.roots:
            node = np.full(len(rows), root)
            for _ in range(DEPTH_MAX):
                goes_left = rows[every, self.feature[node]] <= self.threshold[node]
                node = np.where(goes_left, self.left[node], self.right[node])
            total += self.value[node]
        return total


def from_lightgbm(dump: Mapping[str, Any]) -> Trees:
    """Flat arrays of ``Booster.dump_model()``. Trees no deeper than ``DEPTH_MAX``, numeric splits, no missing values."""
    nodes: list[tuple[int, float, int, int, float]] = []
    roots = [_flatten(tree["tree_structure"], nodes) for tree in dump["tree_info"]]
    feature, threshold, left, right, value = zip(*nodes, strict=True) if nodes else ((), (), (), (), ())
    return Trees(
        np.array(roots, dtype=np.int32), np.array(feature, dtype=np.int32), _below(threshold),
        np.array(left, dtype=np.int32), np.array(right, dtype=np.int32), np.array(value, dtype=np.float32),
    )  # fmt: skip


def _flatten(node: Mapping[str, Any], nodes: list[tuple[int, float, int, int, float]]) -> int:
    place = len(nodes)
    if "leaf_value" in node and "split_feature" not in node:
        nodes.append((0, np.inf, place, place, float(node["leaf_value"])))
        return place
    nodes.append((0, 0.0, 0, 0, 0.0))
    left = _flatten(node["left_child"], nodes)
    right = _flatten(node["right_child"], nodes)
    nodes[place] = (int(node["split_feature"]), float(node["threshold"]), left, right, 0.0)
    return place


def _below(thresholds: tuple[float, ...]) -> NDArray[np.float32]:
    """Float32 thresholds that are not above the float64 ones, so that float32 rows fall as they did in training."""
    exact = np.array(thresholds, dtype=np.float64)
    rounded = exact.astype(np.float32)
    too_high = rounded.astype(np.float64) > exact
    rounded[too_high] = np.nextafter(rounded[too_high], np.float32(-np.inf))
    return rounded
