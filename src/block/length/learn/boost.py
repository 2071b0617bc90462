"""Boosted trees by LightGBM, small and deterministic: how the location and the spread are learned."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from block.errors import ConfigError
from block.length.distribution import Floats
from block.length.learn.tabulate import FOLDS, Table
from block.length.learn.trees import DEPTH_MAX, Trees, from_lightgbm


class Boost:
    """LightGBM with small trees, deterministic."""

    def __init__(self, rounds: int, threads: int, leaf: int, objective: str) -> None:
        self._rounds = rounds
        self._parameters = {
            "objective": objective, "num_leaves": 15, "max_depth": DEPTH_MAX, "learning_rate": min(10.0 / rounds, 0.1),
            "min_data_in_leaf": leaf, "feature_fraction": 0.5, "bagging_fraction": 0.8, "bagging_freq": 1,
            "lambda_l2": 5.0, "use_missing": False, "num_threads": threads, "seed": 1, "deterministic": True,
            "force_col_wise": True, "verbose": -1, "max_bin": 63,
        }  # fmt: skip

    def fit(self, columns: NDArray[np.float32], target: Floats) -> Trees:
        return from_lightgbm(self._train(columns, target).dump_model())

    def out_of_fold(self, columns: NDArray[np.float32], target: Floats, fold: NDArray[np.int64]) -> Floats:
        guess = np.zeros(len(target))
        for k in range(FOLDS):
            out = fold == k
            guess[out] = self._train(columns[~out], target[~out]).predict(columns[out])
        return guess

    def _train(self, columns: NDArray[np.float32], target: Floats) -> Any:
        try:
            import lightgbm
        except ImportError as error:
            raise ConfigError("Training needs LightGBM: pip install 'block-llm[length]'.") from error
        return lightgbm.train(self._parameters, lightgbm.Dataset(columns, target), self._rounds)


def leaf_rows(table: Table) -> int:
    """Rows a leaf must hold: about 20 prompts' worth, for rows of one prompt are no independent evidence."""
    rows = len(table.fold)
    return int(min(20 * max(rows / (table.prompt.max() + 1), 1.0), max(rows / 12, 5)))
