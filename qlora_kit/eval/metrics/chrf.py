"""Corpus chrF and chrF++ with any number of references a row; sacrebleu underneath."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import evaluate
import numpy as np
from sacrebleu.metrics import CHRF

from qlora_kit.eval.metrics.additive import AdditiveScore, FloatArray
from qlora_kit.eval.metrics.inputs import text_features, texts
from qlora_kit.eval.metrics.text import reference_streams


class Chrf(evaluate.Metric):
    """`compute(predictions=, references=, word_order=0, lowercase=False)`: a text a row, one or more references.

    Args:
        word_order: longest n-gram of words; 0 is chrF, 2 is chrF++. N-grams of characters go up to 6, beta is 2.

    Returns:
        `chrf` in 0..100, as the field prints it; sacrebleu's `signature`; `scores`: each row's alone.

    Raises:
        EvalError: a row without a reference, or a value that is no text.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Corpus chrF.",
            citation="Popovic, chrF, WMT 2015; chrF++, WMT 2017; Post, WMT 2018.",
            inputs_description="predictions: [rows] texts. references: [rows] or [rows][references] texts.",
            features=text_features(several=True),
        )

    def _compute(
        self, predictions: list[str], references: list[Any], word_order: int = 0, lowercase: bool = False
    ) -> dict[str, Any]:
        chrf = CHRF(word_order=word_order, lowercase=lowercase)
        counts = _row_counts(chrf, predictions, references)
        each = _of_sums(chrf, counts)
        score = float(_of_sums(chrf, counts.sum(axis=0, keepdims=True))[0])
        return {"chrf": score, "signature": str(chrf.get_signature()), "scores": each.tolist()}


def additive_score(
    predictions: Sequence[str], references: Sequence[Any], word_order: int = 0, lowercase: bool = False
) -> AdditiveScore:
    """Corpus chrF as n-gram matches that add up over rows; arguments and errors as in `Chrf`."""
    chrf = CHRF(word_order=word_order, lowercase=lowercase)
    return AdditiveScore(_row_counts(chrf, predictions, references), partial(_of_sums, chrf))


# sacrebleu has no public way to a row's counts; its range in pyproject.toml is narrow for that reason.
def _row_counts(chrf: CHRF, predictions: Sequence[str], references: Sequence[Any]) -> FloatArray:
    """float64 [rows, 3 * orders]: n-grams of the prediction, of the best reference, and of both, order by order."""
    streams = reference_streams("chrf", references)
    found = chrf._extract_corpus_statistics(texts("chrf", "predictions", predictions), streams)
    return np.array(found, dtype=np.float64)


def _of_sums(chrf: CHRF, sums: FloatArray) -> FloatArray:
    """[samples, 3 * orders] to [samples] in 0..100."""
    return np.array([chrf._compute_f_score(row) for row in sums.tolist()])
