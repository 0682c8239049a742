"""Share of rows whose text is the reference text, white space at both ends aside."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    """`compute(predictions=, references=, ignore_case=False)` with one text a row.

    Returns `exact_match` in 0..1 and `correct`, 0 or 1 a row.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of rows whose stripped text equals the stripped reference.",
            citation="Rajpurkar et al., SQuAD, EMNLP 2016 (there also without articles and punctuation).",
            inputs_description="predictions, references: [rows] texts. ignore_case: compare case-folded texts.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str], ignore_case: bool = False) -> dict[str, Any]:
        def normalize(text: str) -> str:
            return text.strip().casefold() if ignore_case else text.strip()

        pairs = zip(predictions, references, strict=True)
        correct = [int(normalize(prediction) == normalize(reference)) for prediction, reference in pairs]
        return {"exact_match": sum(correct) / len(correct), "correct": correct}
