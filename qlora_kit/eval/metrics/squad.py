"""Exact match and F1 of extracted answers, as SQuAD v1.1 defines them."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

import evaluate

from qlora_kit.eval.metrics.inputs import reference_texts, text_features, texts

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, words one space apart.

    Source: Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016, section 6.1.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_f1(prediction: str, reference: str) -> float:
    """F1 in 0..1 of the words two normalized answers share; 0 where they share none."""
    predicted, true = normalize_answer(prediction).split(), normalize_answer(reference).split()
    shared = sum((Counter(predicted) & Counter(true)).values())
    return 2 * shared / (len(predicted) + len(true)) if shared else 0.0


class Squad(evaluate.Metric):
    """`compute(predictions=, references=)`: a text a row, and [rows] or [rows][answers] accepted texts.

    Returns `exact_match` and `f1` in 0..1 (SQuAD's own script prints percent), each row scored against the reference
    that fits best; `correct`, 0 or 1 a row, and `row_f1`.

    Raises:
        EvalError: a row without a reference, or a value that is no text.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exact match and word F1 of normalized answers.",
            citation="Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016.",
            inputs_description="predictions: [rows] texts. references: [rows][answers] texts, one or more.",
            features=text_features(several=True),
        )

    def _compute(self, predictions: list[str], references: list[Any]) -> dict[str, Any]:
        accepted = reference_texts("squad", references)
        pairs = list(zip(texts("squad", "predictions", predictions), accepted, strict=True))
        correct = [int(normalize_answer(p) in map(normalize_answer, answers)) for p, answers in pairs]
        row_f1 = [max(answer_f1(p, answer) for answer in answers) for p, answers in pairs]
        rows = len(pairs)
        return {"exact_match": sum(correct) / rows, "f1": sum(row_f1) / rows, "correct": correct, "row_f1": row_f1}
