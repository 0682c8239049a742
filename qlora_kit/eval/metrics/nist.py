"""NIST of a corpus: BLEU's kin that weighs rare n-grams more; nltk underneath."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import evaluate
import numpy as np
from nltk.translate.nist_score import corpus_nist, nist_length_penalty
from nltk.util import ngrams

from qlora_kit.eval.metrics.additive import AdditiveScore, FloatArray
from qlora_kit.eval.metrics.inputs import reference_texts, text_features, texts
from qlora_kit.eval.metrics.text import mteval_words

Words = list[str]
Weights = dict[tuple[str, ...], float]


class Nist(evaluate.Metric):
    """`compute(predictions=, references=, order=5, lowercase=True)`: a text a row, one or more references.

    Words are split as mteval-v13a splits them, which also ignores case unless told otherwise.

    Returns:
        `nist`, from 0 up: information in bits of the shared n-grams a predicted n-gram, summed over orders 1 to
        `order`, times the length penalty. It depends on all references at once, so that rows have none of their own.

    Raises:
        EvalError: a row without a reference, a reference without words, or a value that is no text.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Corpus NIST.",
            citation="Doddington, Automatic Evaluation of MT Quality Using N-gram Co-Occurrence Statistics, HLT 2002.",
            inputs_description="predictions: [rows] texts. references: [rows] or [rows][references] texts.",
            features=text_features(several=True),
        )

    def _compute(
        self, predictions: list[str], references: list[Any], order: int = 5, lowercase: bool = True
    ) -> dict[str, Any]:
        predicted, accepted = _words(predictions, references, lowercase)
        # An order no prediction is long enough for adds nothing to the sum, and nltk would divide by zero.
        longest = min(order, max(map(len, predicted)))
        return {"nist": float(corpus_nist(accepted, predicted, n=longest)) if longest else 0.0}


def additive_score(
    predictions: Sequence[str], references: Sequence[Any], order: int = 5, lowercase: bool = True
) -> AdditiveScore:
    """Corpus NIST as information that adds up over rows; arguments and errors as in `Nist`.

    What an n-gram weighs is settled by all references, and stays so when rows are resampled.
    """
    predicted, accepted = _words(predictions, references, lowercase)
    orders = range(1, min(order, max(map(len, predicted))) + 1)
    weights = _information([text for row in accepted for text in row], order)
    counts = [_row_counts(words, row, orders, weights) for words, row in zip(predicted, accepted, strict=True)]
    return AdditiveScore(np.array(counts, dtype=np.float64), partial(_of_sums, len(orders)))


def _words(
    predictions: Sequence[str], references: Sequence[Any], lowercase: bool
) -> tuple[list[Words], list[list[Words]]]:
    predicted = [mteval_words(text, lowercase) for text in texts("nist", "predictions", predictions)]
    rows = reference_texts("nist", references, no_blank=True)
    return predicted, [[mteval_words(text, lowercase) for text in row] for row in rows]


def _information(references: list[Words], order: int) -> Weights:
    """Bits of each n-gram, given the words before its last (Doddington 2002, equation 2)."""
    found = Counter(gram for words in references for n in range(1, order + 1) for gram in ngrams(words, n))
    found[()] = sum(map(len, references))
    return {gram: math.log2(found[gram[:-1]] / times) for gram, times in found.items() if gram}


def _row_counts(words: Words, references: list[Words], orders: range, weights: Weights) -> list[float]:
    """Of each order the bits shared with the reference that fits best; of each the n-grams; both lengths."""
    bits, grams, reference_words = [], [], 0
    for order in orders:
        said = Counter(ngrams(words, order))
        # Of equal bits the longest reference, as nltk has it.
        best = max((_shared(said, reference, order, weights), len(reference)) for reference in references)
        bits.append(best[0])
        grams.append(said.total())
        reference_words += best[1]
    return [*bits, *grams, reference_words, len(words) * len(orders)]


def _shared(said: Counter[tuple[str, ...]], reference: Words, order: int, weights: Weights) -> float:
    there = said & Counter(ngrams(reference, order))
    return sum(weights[gram] * times for gram, times in there.items())


def _of_sums(orders: int, sums: FloatArray) -> FloatArray:
    """[samples, bits of each order, n-grams of each order, reference words, predicted words] to [samples]."""
    bits, grams, lengths = np.split(sums, [orders, 2 * orders], axis=1)
    information = np.divide(bits, grams, out=np.zeros_like(bits), where=grams > 0).sum(axis=1)
    penalties = [nist_length_penalty(*pair) if pair[0] else 0.0 for pair in lengths.tolist()]
    return np.asarray(information * penalties)
