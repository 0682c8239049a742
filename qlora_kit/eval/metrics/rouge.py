"""ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum; Google's rouge-score underneath."""

from __future__ import annotations

import re
from typing import Any

import evaluate
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from qlora_kit.eval.metrics.inputs import one_of, reference_texts, text_features, texts

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
TOKENIZERS = ("ascii", "unicode")
_WORD = re.compile(r"\w+")


class UnicodeWords(Tokenizer):
    """Words of any script, case-folded: rouge-score's own tokenizer drops every letter outside a-z."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.casefold())


class Rouge(evaluate.Metric):
    """`compute(predictions=, references=, use_stemmer=False, tokenize="ascii")`: a text a row, one or more references.

    Args:
        use_stemmer: compare Porter stems of words over 3 letters (English).
        tokenize: `ascii`, as published scores have it (a-z and 0-9 only); `unicode` for other languages, where
            nothing is stemmed.

    Returns:
        `rouge1`, `rouge2`, `rougeL`, `rougeLsum`: mean F1 over rows in 0..1, each row with the reference that fits
        best; `scores`: {kind: one a row}. ROUGE-Lsum takes each line of a text as a sentence.

    Raises:
        EvalError: a row without a reference, a value that is no text, an unknown tokenizer.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 of shared n-grams and of the longest common subsequence.",
            citation="Lin, ROUGE: A Package for Automatic Evaluation of Summaries, ACL 2004.",
            inputs_description="predictions: [rows] texts. references: [rows] or [rows][references] texts.",
            features=text_features(several=True),
        )

    def _compute(
        self, predictions: list[str], references: list[Any], use_stemmer: bool = False, tokenize: str = "ascii"
    ) -> dict[str, Any]:
        one_of("rouge", "tokenize", tokenize, TOKENIZERS)
        words = UnicodeWords() if tokenize == "unicode" else None
        scorer = RougeScorer(list(KINDS), use_stemmer=use_stemmer, tokenizer=words)
        pairs = zip(texts("rouge", "predictions", predictions), reference_texts("rouge", references), strict=True)
        rows = [scorer.score_multi(accepted, prediction) for prediction, accepted in pairs]
        scores = {kind: [float(row[kind].fmeasure) for row in rows] for kind in KINDS}
        return {**{kind: sum(each) / len(each) for kind, each in scores.items()}, "scores": scores}
