"""Scores of one label a row or several, of numbers, tags, found answers and texts, each as sums over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from qlora_kit.eval.metrics import additive_score, compute_metric
from qlora_kit.eval.metrics.additive import AdditiveScore, Cells, f1_score, label_counts
from qlora_kit.eval.metrics.seqeval import span_report
from qlora_kit.eval.task_score import RankScore, Score, TaskScores, mean
from qlora_kit.task_settings import TaskSettings

METEOR_NOTE = (
    "meteor_exact_stem matches exact words and English stems alone, no synonyms (those need WordNet): "
    "not to be compared with published METEOR"
)


def task_scores(
    settings: TaskSettings, answers: Sequence[Any], references: Sequence[Any], labels: list[str]
) -> TaskScores:
    """The scores of a task.

    Args:
        answers, references: [rows], `TaskAnswer.value` and `AnswerReader.expected`.
        labels: of the task, in the order of the model's outputs.

    Raises:
        EvalError: the rows cannot be scored.
    """
    match settings.type:
        case "classification" if getattr(settings, "multi_label", False):
            return several_labels(answers, references, labels)
        case "classification" | "image_classification":
            return one_label(answers, references, labels)
        case "regression":
            return numbers(answers, references)
        case "tagging" if getattr(settings, "scheme", "bio") == "bio":
            return spans(answers, references)
        case "tagging":
            return tags(answers, references, labels)
        case "question_answering":
            return found_answers(answers, references, getattr(settings, "unanswerable", False))
        case "speech_recognition":
            return transcripts(answers, references)
        case _:
            return texts(answers, references)


def one_label(answers: Sequence[str], references: Sequence[str], labels: list[str]) -> TaskScores:
    """Accuracy, F1 and Matthews correlation of one label a row."""
    sides = {"predictions": list(answers), "references": list(references), "labels": labels}
    whole = compute_metric("f1", **sides)
    scores: dict[str, Score] = {
        "accuracy": mean(whole["correct"]),
        "f1_macro": additive_score("f1", average="macro", **sides),
        "f1_micro": additive_score("f1", average="micro", **sides),
        "matthews": additive_score("matthews", **sides),
    }
    return TaskScores(scores, {"per_label": whole["per_label"]}, whole["correct"])


def several_labels(answers: Sequence[Any], references: Sequence[Any], labels: list[str]) -> TaskScores:
    """F1 of any number of labels a row, and the share of rows where all are right."""
    sides = {"predictions": _indicators(answers, labels), "references": _indicators(references, labels)}
    whole = compute_metric("f1", labels=labels, **sides)
    scores: dict[str, Score] = {
        "f1_micro": additive_score("f1", labels=labels, average="micro", **sides),
        "f1_macro": additive_score("f1", labels=labels, average="macro", **sides),
        "exact_match": mean(whole["correct"]),
    }
    return TaskScores(scores, {"per_label": whole["per_label"]}, whole["correct"])


def _indicators(rows: Sequence[Any], labels: list[str]) -> list[list[int]]:
    return [[int(label in row) for label in labels] for row in rows]


def numbers(answers: Sequence[float], references: Sequence[float]) -> TaskScores:
    """Correlations, where the references vary, and the mean squared error."""
    predicted, true = np.asarray(answers), np.asarray(references)
    errors = mean(compute_metric("mse", predictions=list(answers), references=list(references))["squared_errors"])
    if len(set(references)) < 2:
        return TaskScores({"mse": errors}, {}, None)  # no correlation is defined

    def spearman(index: Any) -> float:
        """Pearson's correlation of the ranks; as quick as a resample has to be."""
        a, b = rankdata(predicted[index]), rankdata(true[index])
        return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else 0.0

    scores: dict[str, Score] = {
        "pearson": additive_score("pearson", predictions=list(answers), references=list(references)),
        "spearman": RankScore(spearman, len(true)),
        "mse": errors,
    }
    return TaskScores(scores, {}, None)


def spans(answers: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> TaskScores:
    """F1 of the spans of BIO tags, and the share of words with the right tag."""
    sides = {"predictions": [list(row) for row in answers], "references": [list(row) for row in references]}
    whole = compute_metric("seqeval", **sides)
    scores: dict[str, Score] = {"span_f1": additive_score("seqeval", **sides), "word_accuracy": _words(**sides)}
    details: dict[str, Any] = {"per_type": whole["per_type"]}
    if whole["per_type"]:
        details["report"] = span_report(digits=4, **sides)
    return TaskScores(scores, details, whole["correct"])


def tags(answers: Sequence[Sequence[str]], references: Sequence[Sequence[str]], labels: list[str]) -> TaskScores:
    """Share of words with the right tag, and macro F1 over words; rows are resampled whole."""
    cells = [
        [(row, labels.index(tag)) for row, names in enumerate(side) for tag in names] for side in (answers, references)
    ]
    right = [a for a, b in zip(*cells, strict=True) if a == b]
    found, predicted, true = (_columns(part) for part in (right, *cells))
    scores: dict[str, Score] = {
        "word_accuracy": _words(answers, references),
        "f1_macro": f1_score(label_counts(len(references), len(labels), found, predicted, true), "macro"),
    }
    flat = [[tag for row in side for tag in row] for side in (answers, references)]
    whole = compute_metric("f1", predictions=flat[0], references=flat[1], labels=labels)
    correct = [int(list(a) == list(b)) for a, b in zip(answers, references, strict=True)]
    return TaskScores(scores, {"per_label": whole["per_label"]}, correct)


def found_answers(answers: Sequence[str], references: Sequence[Sequence[str]], unanswerable: bool) -> TaskScores:
    """Word F1 and exact match as SQuAD defines them; v2's where a text may hold no answer."""
    whole = compute_metric(
        "squad_v2" if unanswerable else "squad",
        predictions=list(answers),
        references=[list(accepted) for accepted in references],
    )
    right, row_f1 = np.asarray(whole["correct"]), np.asarray(whole["row_f1"])
    scores: dict[str, Score] = {"f1": mean(row_f1), "exact_match": mean(right)}
    if unanswerable:
        has = np.asarray(whole["has_answer"])
        scores["has_answer_f1"] = mean(row_f1 * has, has)
        scores["has_answer_exact_match"] = mean(right * has, has)
        scores["no_answer_exact_match"] = mean(right * (1 - has), 1 - has)
    return TaskScores(scores, {}, whole["correct"])


def texts(answers: Sequence[str], references: Sequence[str | Sequence[str]]) -> TaskScores:
    """BLEU and chrF in 0..100, NIST from 0 up, METEOR, ROUGE and exact match in 0..1; one or more references a row."""
    sides = {"predictions": list(answers), "references": list(references)}
    rouge = compute_metric("rouge", **sides)["scores"]
    correct = compute_metric("exact_match", **sides)["correct"]
    scores: dict[str, Score] = {
        "bleu": additive_score("bleu", **sides),
        "nist": additive_score("nist", **sides),
        "meteor_exact_stem": mean(compute_metric("meteor_exact_stem", **sides)["scores"]),
        "chrf": additive_score("chrf", **sides),
        **{kind: mean(values) for kind, values in rouge.items()},
        "exact_match": mean(correct),
    }
    details = {f"{name}_signature": compute_metric(name, **sides)["signature"] for name in ("bleu", "chrf")}
    return TaskScores(scores, details | {"note": METEOR_NOTE}, correct)


def transcripts(answers: Sequence[str], references: Sequence[str]) -> TaskScores:
    """Word and character error rates, as they are and as Whisper's papers count them, and exact match."""
    sides = {"predictions": list(answers), "references": list(references)}
    scores: dict[str, Score] = {}
    for name, normalize in (("wer", False), ("wer_normalized", True), ("cer", False)):
        found = compute_metric(name.partition("_")[0], normalize=normalize, **sides)
        scores[name] = mean(found["errors"], found["lengths"])
    correct = compute_metric("exact_match", **sides)["correct"]
    return TaskScores(scores | {"exact_match": mean(correct)}, {}, correct)


def _words(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> AdditiveScore:
    """Right words by words."""
    right = [sum(a == b for a, b in zip(*row, strict=True)) for row in zip(predictions, references, strict=True)]
    return mean(right, [len(row) for row in references])


def _columns(cells: list[tuple[int, int]]) -> Cells:
    rows, columns = np.array(cells, dtype=np.int64).reshape(-1, 2).T
    return rows, columns
