"""Forms with several scores: texts against all their references, and paired differences of any such forms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from qlora_kit.eval.forms import FormResult, PairResult, disagreement
from qlora_kit.eval.task_score import TaskScores, difference, interval
from qlora_kit.eval.task_scores import texts


def text_scored(form: FormResult, references: Sequence[Sequence[str]], seed: int = 0) -> tuple[FormResult, TaskScores]:
    """The form with the scores of its answers and their 95% intervals, and what differences are computed from.

    Args:
        references: [rows][references].

    Raises:
        EvalError: the rows cannot be scored.
    """
    found = texts(form.per_row.answer or [], references)
    scores = {name: interval(score, seed) for name, score in found.scores.items()}
    return replace(form, scores=scores, details=found.details), found


def pairs_of(names: Iterable[str]) -> list[tuple[str, str]]:
    """Tuned against the bases, and all that was made from it against tuned; as far as they are among `names`."""
    there = list(names)
    pairs = [("tuned", name) for name in there if name.startswith("base")]
    pairs += [(name, "tuned") for name in there if name.startswith(("merged", "bundle"))]
    return [pair for pair in pairs if set(pair) <= set(there)]


def score_pairs(
    results: dict[str, FormResult], scored: dict[str, TaskScores], seed: int, numbers: bool = False
) -> list[PairResult]:
    """The paired difference in every score.

    Args:
        numbers: answers are numbers, which never agree to the last digit and are not counted as other ones.
    """
    pairs = []
    for a, b in pairs_of(results):
        other = None if numbers else disagreement(results[a].per_row.answer, results[b].per_row.answer)
        for name, score in scored[a].scores.items():
            found = difference(score, scored[b].scores[name], seed)
            pairs.append(PairResult(a, b, name, found.value, found.low, found.high, other))
    return pairs
