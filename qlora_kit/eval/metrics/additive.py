"""Scores that depend on their rows through sums of counts alone, so that a resample costs a sum and not a new score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, eye_array

from qlora_kit.eval.metrics.inputs import one_of

FloatArray = NDArray[np.float64]
Cells = tuple[NDArray[np.int64], NDArray[np.int64]]
AVERAGES = ("macro", "micro", "weighted")


@dataclass(frozen=True)
class AdditiveScore:
    """What each row counts, and the score of summed counts.

    Attributes:
        counts: float64 [rows, counts], dense or sparse.
        of_sums: float64 [samples, counts] to float64 [samples].
    """

    counts: csr_array | FloatArray
    of_sums: Callable[[FloatArray], FloatArray]

    @property
    def rows(self) -> int:
        return int(self.counts.shape[0])

    @property
    def value(self) -> float:
        """The score of all rows."""
        return float(self.of_sums(np.asarray(self.counts.sum(axis=0), dtype=np.float64)[np.newaxis, :])[0])


def label_counts(rows: int, labels: int, right: Cells, predicted: Cells, true: Cells) -> csr_array:
    """Per row and label: how often it was predicted rightly, predicted, and true.

    Args:
        right, predicted, true: (row, label) of each occurrence; a cell named twice counts twice.

    Returns:
        float64 [rows, 3 * labels]: right, then predicted, then true.
    """
    parts = (right, predicted, true)
    row = np.concatenate([np.asarray(cells[0], dtype=np.int64) for cells in parts])
    column = np.concatenate([np.asarray(cells[1], dtype=np.int64) + k * labels for k, cells in enumerate(parts)])
    return csr_array((np.ones(len(row)), (row, column)), shape=(rows, 3 * labels))


def f1_score(counts: csr_array, average: str, *, every_label: bool = False) -> AdditiveScore:
    """F1 over labels from `label_counts`, in 0..1; 0 where nothing is predicted or true, as in scikit-learn.

    Args:
        average: macro, micro or weighted (by how often a label is true).
        every_label: whether macro counts a label that is neither predicted nor true (F1 of 0) or leaves it out.

    Raises:
        EvalError: another average.
    """
    one_of("f1", "average", average, AVERAGES)

    def of_sums(sums: FloatArray) -> FloatArray:
        right, predicted, true = np.split(sums, 3, axis=1)  # [samples, labels] each
        if average == "micro":
            return _ratio(2 * right.sum(1), (predicted + true).sum(1))
        f1 = _ratio(2 * right, predicted + true)
        if average == "weighted":
            return _ratio((f1 * true).sum(1), true.sum(1))
        occurs = np.ones_like(f1) if every_label else (predicted + true > 0).astype(np.float64)
        return _ratio(f1.sum(1), occurs.sum(1))

    return AdditiveScore(counts, of_sums)


def matthews_score(counts: csr_array) -> AdditiveScore:
    """Multi-class Matthews correlation from `label_counts` of one label a row; 0 where it is undefined.

    Source: Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, 2004, eq. 8.
    """

    def of_sums(sums: FloatArray) -> FloatArray:
        right, predicted, true = np.split(sums, 3, axis=1)  # [samples, labels] each
        rows = true.sum(1)
        covariance = right.sum(1) * rows - (predicted * true).sum(1)
        spread = (rows**2 - (predicted**2).sum(1)) * (rows**2 - (true**2).sum(1))
        return _ratio(covariance, np.sqrt(spread))

    return AdditiveScore(counts, of_sums)


def pearson_score(predictions: FloatArray, references: FloatArray) -> AdditiveScore:
    """Pearson's correlation of two float64 [rows]; 0 where either side does not vary."""
    x, y = predictions - predictions.mean(), references - references.mean()  # sums of small numbers lose no digits
    counts = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)

    def of_sums(sums: FloatArray) -> FloatArray:
        rows, sum_x, sum_y, sum_xx, sum_yy, sum_xy = sums.T
        spread_x, spread_y = rows * sum_xx - sum_x**2, rows * sum_yy - sum_y**2
        varies = (spread_x > 1e-12 * rows * sum_xx) & (spread_y > 1e-12 * rows * sum_yy)
        scale = np.sqrt(np.where(varies, spread_x, 0)) * np.sqrt(np.where(varies, spread_y, 0))
        return np.clip(_ratio(rows * sum_xy - sum_x * sum_y, scale), -1, 1)

    return AdditiveScore(counts, of_sums)


def spearman_score(predictions: FloatArray, references: FloatArray) -> AdditiveScore:
    """Spearman's rank correlation of two float64 [rows]; 0 where either side does not vary.

    Ranks do not add up. What a row counts is itself: the sums say how often each row was drawn, and the ranks within
    a sample follow from them without sorting again.
    """
    groups_x, groups_y = (np.unique(side, return_inverse=True)[1] for side in (predictions, references))

    def of_sums(drawn: FloatArray) -> FloatArray:
        rows = drawn.sum(1, keepdims=True)
        x, y = (_mean_ranks(drawn, groups) - (rows + 1) / 2 for groups in (groups_x, groups_y))  # [samples, rows]
        xx, yy, xy = (np.einsum("sr,sr,sr->s", drawn, a, b) for a, b in ((x, x), (y, y), (x, y)))
        return np.clip(_ratio(xy, np.sqrt(xx) * np.sqrt(yy)), -1, 1)

    return AdditiveScore(csr_array(eye_array(len(predictions))), of_sums)


def _mean_ranks(drawn: FloatArray, groups: NDArray[np.int64]) -> FloatArray:
    """Ranks from 1 of each row in each sample, equal values sharing their mean rank: float64 [samples, rows].

    Args:
        drawn: [samples, rows], how often a sample holds a row.
        groups: [rows], place of the row's value among the distinct values, ascending.
    """
    one_hot = csr_array((np.ones(len(groups)), (np.arange(len(groups)), groups)))
    held = drawn @ one_hot  # [samples, distinct values]
    ranks: FloatArray = (np.cumsum(held, axis=1) - (held - 1) / 2)[:, groups]
    return ranks


def _ratio(top: FloatArray, bottom: FloatArray) -> FloatArray:
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
