"""The linear part of the length model: ridge regression on hashed words and dense features, one row per prompt."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import lsqr

from block.length.distribution import Floats
from block.length.learn.model import CLIP, Vector

RIDGES = (0.12, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 32.0)
_DENSE_SHARE = 0.08  # how much a dense feature, at one standard deviation, weighs against the whole bag of words
_VECTOR_SHARE = 0.7  # how much an embedding (of length 1) does
_PICKING = 2000  # prompts held out that are enough to pick a ridge by
_TOLERANCE = 1e-4


class Linear(NamedTuple):
    """w, v, u and the intercept."""

    words: Vector
    dense: Vector
    vector: Vector
    intercept: float


class WordsRidge:
    """Fits effect = w . x / |x| + v . clip(dense - mean) + u . (vector - mean) + intercept.

    ``words``: sparse (rows, HASH_SIZE) of ones; ``dense``: (rows, dense); ``vectors``: (rows, dimensions), perhaps of
    none; ``prompt``: (rows,) index of the prompt; ``fold``: (rows,) fold of the prompt. Rows of one prompt are
    averaged, and count a little more than one row.
    """

    def __init__(
        self, words: Any, dense: Vector, vectors: Vector, prompt: NDArray[np.int64], fold: NDArray[np.int64]
    ) -> None:
        _, first = np.unique(prompt, return_index=True)
        self._prompt, self._fold = prompt, fold[first]
        seen = np.asarray((words[first] > 0).sum(axis=0)).ravel()
        rarity = np.sqrt(np.log((len(first) + 1) / (seen + 1)))  # the root: common cue words matter ("explain")
        self.rarity: Vector = np.where(seen > 1, rarity, 0.0).astype(np.float32)
        self._used = np.flatnonzero(self.rarity)  # of the hashed terms some percent: the rest weigh nothing
        weighted = words[first].multiply(self.rarity).tocsr()[:, self._used]
        norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
        self.mean: Vector = dense[first].mean(axis=0)
        self._scale = _DENSE_SHARE / np.maximum(dense[first].std(axis=0), 0.02)
        standard = np.clip(dense[first] - self.mean, -CLIP, CLIP) * self._scale
        bag = sparse.diags(1.0 / np.maximum(norms, 1e-6)) @ weighted
        self.vector_mean: Vector = vectors[first].mean(axis=0)
        embedded = _VECTOR_SHARE * (vectors[first] - self.vector_mean)
        self._columns = sparse.hstack([bag, sparse.csr_matrix(standard), sparse.csr_matrix(embedded)]).tocsr()
        self._parts = bag.shape[1], bag.shape[1] + standard.shape[1]
        self._ridge = RIDGES[0]

    def out_of_fold(self, target: Floats) -> Floats:
        """Effects of all rows, each from the other folds; picks the ridge that is best at it. Shape (rows,)."""
        mean, weight = self._averaged(target)
        folds = np.unique(self._fold)
        held = np.cumsum([(self._fold == fold).sum() for fold in folds])
        tried = folds[: int(np.searchsorted(held, _PICKING)) + 1]
        scored = {ridge: self._scores(mean, weight, ridge, tried) for ridge in RIDGES}
        seen = np.isin(self._fold, tried)
        errors = {
            ridge: float(np.average(np.abs(mean - score)[seen], weights=weight[seen]))
            for ridge, score in scored.items()
        }
        self._ridge = min(errors, key=lambda ridge: errors[ridge])
        score = scored[self._ridge] + self._scores(mean, weight, self._ridge, folds[len(tried) :])
        out: Floats = score[self._prompt]
        return out

    def fit(self, target: Floats) -> Linear:
        """The weights on all rows, with the ridge that `out_of_fold` picked."""
        mean, weight = self._averaged(target)
        solution, intercept = self._solve(np.ones(len(mean), dtype=bool), mean, weight, self._ridge)
        used, dense, vector = np.split(solution.astype(np.float32), self._parts)
        words = np.zeros(len(self.rarity), dtype=np.float32)
        words[self._used] = used
        return Linear(words, (dense * self._scale).astype(np.float32), vector * np.float32(_VECTOR_SHARE), intercept)

    def _averaged(self, target: Floats) -> tuple[Floats, Floats]:
        rows = np.bincount(self._prompt)
        return np.bincount(self._prompt, target) / rows, rows / (rows + 1.0)

    def _scores(self, mean: Floats, weight: Floats, ridge: float, folds: NDArray[np.int64]) -> Floats:
        """Effects of the prompts of these folds, each from all other folds, and 0 of the others. Shape (prompts,)."""
        score = np.zeros(len(mean))
        for fold in folds:
            out = self._fold == fold
            solution, intercept = self._solve(~out, mean, weight, ridge)
            score[out] = self._columns[out] @ solution + intercept
        return score

    def _solve(self, rows: NDArray[np.bool_], mean: Floats, weight: Floats, ridge: float) -> tuple[Floats, float]:
        root = np.sqrt(weight[rows])
        intercept = float(np.average(mean[rows], weights=weight[rows]))
        left = sparse.diags(root) @ self._columns[rows]
        right = root * (mean[rows] - intercept)
        damp = float(np.sqrt(ridge))
        solution: Floats = lsqr(left, right, damp=damp, atol=_TOLERANCE, btol=_TOLERANCE, iter_lim=150)[0]
        return solution, intercept
