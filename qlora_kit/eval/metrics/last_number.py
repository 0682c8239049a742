"""Share of rows whose final number is the reference's: the check of GSM8K and other worked arithmetic."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import datasets
import evaluate

from qlora_kit.errors import EvalError

# A sign counts only where it cannot be a subtraction or a hyphen ("10-3", "covid-19"); commas only between thousands.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]])[-−+])?(?:\$ ?(?P<inner>[-−])?)?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
)
_MARKED = re.compile(r"####[ \t]*(?P<rest>[^\n]*)")


def last_number(text: str) -> Decimal | None:
    """The number a worked answer ends in, or None where it holds none.

    The first `#### N` wins: a model that does not stop goes on with a question of its own, and with that one's
    answer. Without the mark it is the last number of the text. `$`, thousands' commas, a trailing dot and a percent
    sign are dropped; `5`, `5.0` and `$5.00` are the same number. A fraction `1/2` reads as 2.
    """
    for marked in _MARKED.finditer(text):
        found = _NUMBER.search(marked["rest"])
        if found:
            return _value(found)
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _value(found: re.Match[str]) -> Decimal:
    sign = (found["sign"] or found["inner"] or "").strip()
    magnitude = Decimal(found["digits"].replace(",", ""))
    return -magnitude if sign in ("-", "−") else magnitude


class LastNumber(evaluate.Metric):
    """`compute(predictions=, references=)` with one text a row; each reference must hold a number.

    Returns `last_number` in 0..1 and `correct`, 0 or 1 a row; a prediction without a number is wrong.

    Raises:
        EvalError: a reference holds no number.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of rows whose final number equals the reference's.",
            citation="Cobbe et al., Training Verifiers to Solve Math Word Problems, 2021 (the `#### N` mark).",
            inputs_description="predictions, references: [rows] texts.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        expected = [last_number(reference) for reference in references]
        if None in expected:
            row = expected.index(None)
            raise EvalError(
                f"last_number: reference {row} holds no number",
                got=references[row][:200],
                allowed="`#### N`, or a text with a number",
                fix="Mend the row, or use exact_match",
            )
        correct = [int(last_number(text) == number) for text, number in zip(predictions, expected, strict=True)]
        return {"last_number": sum(correct) / len(correct), "correct": correct}
