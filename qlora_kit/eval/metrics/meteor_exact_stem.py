"""METEOR without its synonym stage, which needs WordNet: exact words and Porter stems; nltk underneath."""

from __future__ import annotations

from typing import Any

import evaluate
from nltk.translate.meteor_score import meteor_score

from qlora_kit.eval.metrics.inputs import reference_texts, text_features, texts
from qlora_kit.eval.metrics.text import mteval_words


class _NoSynonyms:
    """In place of WordNet: no word has synonyms."""

    def synsets(self, word: str) -> list[Any]:
        return []


class MeteorExactStem(evaluate.Metric):
    """`compute(predictions=, references=)`: an English text a row, one or more references.

    Exact and stem matches alone: lower than METEOR with synonyms, and not to be compared with it. Words are split as
    mteval-v13a splits them, in lower case; alpha 0.9, beta 3, gamma 0.5.

    Returns `meteor_exact_stem` in 0..1, the mean over rows, and `scores`, each row's with the reference that fits best.

    Raises:
        EvalError: a row without a reference, or a value that is no text.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="METEOR from exact and stem matches.",
            citation="Banerjee and Lavie, METEOR, ACL workshop on evaluation measures, 2005.",
            inputs_description="predictions: [rows] texts. references: [rows] or [rows][references] texts.",
            features=text_features(several=True),
        )

    def _compute(self, predictions: list[str], references: list[Any]) -> dict[str, Any]:
        name = "meteor_exact_stem"
        pairs = zip(texts(name, "predictions", predictions), reference_texts(name, references), strict=True)
        scores = [
            float(
                meteor_score([mteval_words(text) for text in accepted], mteval_words(prediction), wordnet=_NoSynonyms())
            )
            for prediction, accepted in pairs
        ]
        return {name: sum(scores) / len(scores), "scores": scores}
