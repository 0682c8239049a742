"""Exact match and F1 of extracted answers where a text may hold none, as SQuAD v2.0 defines them."""

from __future__ import annotations

from typing import Any

import evaluate

from qlora_kit.eval.metrics.inputs import reference_texts, text_features, texts
from qlora_kit.eval.metrics.squad import answer_f1, normalize_answer


class SquadV2(evaluate.Metric):
    """`compute(predictions=, references=)`: a text a row, and [rows][answers] accepted texts.

    The empty prediction says that there is no answer; a row without references, or with empty ones alone, has none.
    There a prediction scores 1 where nothing is left of it once normalized, else 0.

    Returns:
        In 0..1: `exact_match` and `f1` of all rows, `has_answer_*` and `no_answer_*` of the rows of either kind, left
        out where there are none; `correct`, 0 or 1 a row, `row_f1`, and `has_answer`, 0 or 1 a row.

    Raises:
        EvalError: a value that is no text.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exact match and word F1 of normalized answers, or of saying that there is none.",
            citation="Rajpurkar et al., Know What You Don't Know: Unanswerable Questions for SQuAD, ACL 2018.",
            inputs_description="predictions: [rows] texts. references: [rows][answers] texts, none or more.",
            features=text_features(several=True),
        )

    def _compute(self, predictions: list[str], references: list[Any]) -> dict[str, Any]:
        texts("squad_v2", "predictions", predictions)
        rows = reference_texts("squad_v2", references, none_allowed=True)
        accepted = [[answer for answer in answers if normalize_answer(answer)] for answers in rows]
        has_answer = [int(bool(answers)) for answers in accepted]
        pairs = list(zip(predictions, accepted, strict=True))
        correct = [
            int(normalize_answer(p) in (map(normalize_answer, answers) if answers else [""])) for p, answers in pairs
        ]
        row_f1 = [
            max(answer_f1(p, answer) for answer in answers) if answers else float(right)
            for (p, answers), right in zip(pairs, correct, strict=True)
        ]
        scores = {"exact_match": _mean(correct), "f1": _mean(row_f1)}
        for kind, wanted in (("has_answer", 1), ("no_answer", 0)):
            chosen = [row for row, has in enumerate(has_answer) if has == wanted]
            if chosen:
                scores[f"{kind}_exact_match"] = _mean([correct[row] for row in chosen])
                scores[f"{kind}_f1"] = _mean([row_f1[row] for row in chosen])
        return {**scores, "correct": correct, "row_f1": row_f1, "has_answer": has_answer}


def _mean(values: list[Any]) -> float:
    return float(sum(values) / len(values))
