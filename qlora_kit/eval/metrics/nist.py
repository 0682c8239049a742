"""NIST of a corpus: BLEU's kin that weighs rare n-grams more; nltk underneath."""

from __future__ import annotations

from typing import Any

import evaluate
from nltk.translate.nist_score import corpus_nist

from qlora_kit.eval.metrics.inputs import reference_texts, text_features, texts
from qlora_kit.eval.metrics.text import mteval_words


class Nist(evaluate.Metric):
    """`compute(predictions=, references=, order=5, lowercase=True)`: a text a row, one or more references.

    Words are split as mteval-v13a splits them, which also ignores case unless told otherwise.

    Returns:
        `nist`, from 0 up: information in bits of the shared n-grams a predicted n-gram, summed over orders 1 to
        `order`, times the length penalty. It depends on all references at once, so that rows have none of their own.

    Raises:
        EvalError: a row without a reference, a reference without words, or a value that is no text.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Corpus NIST.",
            citation="Doddington, Automatic Evaluation of MT Quality Using N-gram Co-Occurrence Statistics, HLT 2002.",
            inputs_description="predictions: [rows] texts. references: [rows] or [rows][references] texts.",
            features=text_features(several=True),
        )

    def _compute(
        self, predictions: list[str], references: list[Any], order: int = 5, lowercase: bool = True
    ) -> dict[str, Any]:
        predicted = [mteval_words(text, lowercase) for text in texts("nist", "predictions", predictions)]
        accepted = [
            [mteval_words(text, lowercase) for text in row]
            for row in reference_texts("nist", references, no_blank=True)
        ]
        # An order no prediction is long enough for adds nothing to the sum, and nltk would divide by zero.
        longest = min(order, max(map(len, predicted)))
        return {"nist": float(corpus_nist(accepted, predicted, n=longest)) if longest else 0.0}
