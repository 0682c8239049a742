"""Share of rows whose text is a reference text, white space at both ends aside."""

from __future__ import annotations

from typing import Any

import evaluate

from qlora_kit.eval.metrics.inputs import reference_texts, text_features


class ExactMatch(evaluate.Metric):
    """`compute(predictions=, references=, ignore_case=False)`: a text a row, one or more references.

    Returns `exact_match` in 0..1 and `correct`, 0 or 1 a row.

    Raises:
        EvalError: a row without a reference, or a reference that is no text.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of rows whose stripped text equals the stripped reference.",
            citation="Rajpurkar et al., SQuAD, EMNLP 2016 (there also without articles and punctuation).",
            inputs_description="predictions: [rows] texts. references: [rows] or [rows][references] texts.",
            features=text_features(several=True),
        )

    def _compute(self, predictions: list[str], references: list[Any], ignore_case: bool = False) -> dict[str, Any]:
        def normalize(text: str) -> str:
            return text.strip().casefold() if ignore_case else text.strip()

        pairs = zip(predictions, reference_texts("exact_match", references), strict=True)
        correct = [int(normalize(prediction) in map(normalize, accepted)) for prediction, accepted in pairs]
        return {"exact_match": sum(correct) / len(correct), "correct": correct}
