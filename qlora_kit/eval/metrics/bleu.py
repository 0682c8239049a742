"""Corpus BLEU with any number of references a row; sacrebleu underneath."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from sacrebleu.metrics import BLEU

from qlora_kit.eval.metrics.additive import AdditiveScore, FloatArray
from qlora_kit.eval.metrics.inputs import one_of, text_features, texts
from qlora_kit.eval.metrics.text import reference_streams

TOKENIZERS = ("13a", "intl", "zh", "char", "none")
"""Those of sacrebleu that need neither a download nor another package."""


class Bleu(evaluate.Metric):
    """`compute(predictions=, references=, tokenize="13a", lowercase=False)`: a text a row, one or more references.

    Args:
        tokenize: one of `TOKENIZERS`.

    Returns:
        `bleu` in 0..100, as the field prints it; `precisions` of 1 to 4 words in 0..100, `brevity_penalty`,
        `prediction_words`, `reference_words`, sacrebleu's `signature`, and `scores`: BLEU of each row alone,
        with the orders it has words for.

    Raises:
        EvalError: a row without a reference, a value that is no text, or an unknown tokenizer.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Corpus BLEU.",
            citation="Papineni et al., BLEU, ACL 2002; Post, A Call for Clarity in Reporting BLEU Scores, WMT 2018.",
            inputs_description="predictions: [rows] texts. references: [rows] or [rows][references] texts.",
            features=text_features(several=True),
        )

    def _compute(
        self, predictions: list[str], references: list[Any], tokenize: str = "13a", lowercase: bool = False
    ) -> dict[str, Any]:
        one_of("bleu", "tokenize", tokenize, TOKENIZERS)
        streams = reference_streams("bleu", references)
        corpus = BLEU(tokenize=tokenize, lowercase=lowercase)
        score = corpus.corpus_score(texts("bleu", "predictions", predictions), streams)
        by_row = BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=True)
        pairs = zip(predictions, zip(*streams), strict=True)
        return {
            "bleu": score.score,
            "precisions": score.precisions,
            "brevity_penalty": score.bp,
            "prediction_words": score.sys_len,
            "reference_words": score.ref_len,
            "signature": str(corpus.get_signature()),
            "scores": [by_row.sentence_score(text, _given(accepted)).score for text, accepted in pairs],
        }


def additive_score(
    predictions: Sequence[str], references: Sequence[Any], tokenize: str = "13a", lowercase: bool = False
) -> AdditiveScore:
    """Corpus BLEU as n-gram matches that add up over rows; arguments and errors as in `Bleu`."""
    one_of("bleu", "tokenize", tokenize, TOKENIZERS)
    by_row = BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=True)
    pairs = zip(texts("bleu", "predictions", predictions), zip(*reference_streams("bleu", references)), strict=True)
    found = [by_row.sentence_score(text, _given(accepted)) for text, accepted in pairs]
    counts = np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in found], dtype=np.float64)
    return AdditiveScore(counts, _of_sums)


def _of_sums(sums: FloatArray) -> FloatArray:
    """[samples, 4 matches, 4 totals, prediction words, reference words] to [samples] in 0..100."""
    rows = sums.astype(np.int64).tolist()
    scores = [BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score for row in rows]
    return np.array(scores)


def _given(accepted: Sequence[str | None]) -> list[str]:
    return [text for text in accepted if text is not None]
