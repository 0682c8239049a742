"""Character error rate of transcripts; jiwer underneath."""

from __future__ import annotations

from typing import Any

import evaluate
import jiwer

from qlora_kit.eval.metrics.inputs import text_features
from qlora_kit.eval.metrics.text import edit_scores


class Cer(evaluate.Metric):
    """`compute(predictions=, references=, normalize=False)` with one transcript a row.

    Args:
        normalize: compare as Whisper's papers do for any language: lower case, no punctuation, nothing in brackets.

    Returns:
        `cer`: substituted, deleted and inserted characters a reference character, spaces counted, from 0 up
        (insertions can take it past 1); `substitutions`, `deletions`, `insertions`, and each row's `errors` and
        `lengths` in characters, whose ratio of sums is `cer`.

    Raises:
        EvalError: a value that is no text, or references without a character.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Edits a reference character.",
            citation="Morris, Maier and Green, From WER and RIL to MER and WIL, Interspeech 2004.",
            inputs_description="predictions, references: [rows] texts.",
            features=text_features(several=False),
        )

    def _compute(self, predictions: list[str], references: list[str], normalize: bool = False) -> dict[str, Any]:
        return edit_scores("cer", jiwer.process_characters, predictions, references, normalize)
