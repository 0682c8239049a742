"""Scores of answers, translations, summaries and transcripts: by hand, and as the reference libraries give them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jiwer
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from qlora_kit.errors import EvalError
from qlora_kit.eval.metrics import compute_metric
from qlora_kit.eval.metrics.squad import answer_f1, normalize_answer

PREDICTIONS = ["The cat sat on the mat.", "", "Ein Ärger, 你好 …", "a dog ran"]
REFERENCES = [
    ["The cat sat on a mat.", "There is a cat on the mat."],
    ["nothing was said"],
    ["Der Ärger, 你好 …"],
    ["the dog ran away", "a dog runs", "dogs ran"],
]
FIRST = [row[0] for row in REFERENCES]


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Beatles!", "beatles"),
        ("an apple, a pear\tand the-sun", "apple pear and thesun"),
        ("Theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("Ärger „x“", "ärger „x“"),
        ("the", ""),
    ],
)
def test_answers_are_normalized(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


def test_answer_f1_counts_shared_words() -> None:
    assert answer_f1("the cat sat", "cat cat sat down") == pytest.approx(2 * (2 / 2) * (2 / 4) / (2 / 2 + 2 / 4))
    assert answer_f1("dog", "cat") == answer_f1("", "cat") == 0


def test_squad_takes_the_reference_that_fits_best() -> None:
    found = compute_metric(
        "squad", predictions=["the Cat!", "in Bern", ""], references=[["dog", "cat"], ["Bern", "Bern city"], ["x"]]
    )
    assert found["correct"] == [1, 0, 0]
    assert found["row_f1"] == [1.0, pytest.approx(2 / 3), 0.0]
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx((1 + 2 / 3) / 3)
    assert compute_metric("squad", predictions=["a b"], references=["B"])["correct"] == [1]


def test_squad_v2_scores_saying_that_there_is_no_answer() -> None:
    found = compute_metric(
        "squad_v2",
        predictions=["", "Bern", "", "the", "in Bern"],
        references=[[], [], ["Bern"], ["", "the"], ["Bern", "Bern city"]],
    )
    assert found["has_answer"] == [0, 0, 1, 0, 1]
    assert found["correct"] == [1, 0, 0, 1, 0]
    assert found["row_f1"] == [1.0, 0.0, 0.0, 1.0, pytest.approx(2 / 3)]
    assert found["has_answer_exact_match"] == 0
    assert found["has_answer_f1"] == pytest.approx(1 / 3)
    assert found["no_answer_exact_match"] == found["no_answer_f1"] == pytest.approx(2 / 3)
    assert found["exact_match"] == pytest.approx(2 / 5)
    assert "no_answer_f1" not in compute_metric("squad_v2", predictions=["x"], references=[["x"]])


@pytest.mark.parametrize("options", [{}, {"tokenize": "char"}, {"lowercase": True}])
def test_bleu_is_that_of_sacrebleu(options: dict) -> None:
    found = compute_metric("bleu", predictions=PREDICTIONS, references=FIRST, **options)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [FIRST], **options).score)
    assert 0 < found["bleu"] < 100
    assert f"tok:{options.get('tokenize', '13a')}" in found["signature"]


def test_bleu_by_hand_with_several_references() -> None:
    """5 of 6 words, 3 of 5 pairs, 1 of 4 triples, 1 word short of the closest reference."""
    found = compute_metric("bleu", predictions=["a b c d x e"], references=[["a b c f d e g", "c d"]])
    precisions = [5 / 6, 3 / 5, 1 / 4, 1 / 6]  # no run of four is shared: 1 / (2 * 3)
    assert found["precisions"] == pytest.approx([100 * p for p in precisions])
    assert found["brevity_penalty"] == pytest.approx(math.exp(1 - 7 / 6))
    wanted = 100 * math.exp(1 - 7 / 6) * math.prod(precisions) ** 0.25
    assert found["bleu"] == found["scores"][0] == pytest.approx(wanted)
    assert "nrefs:2" in found["signature"]


def test_bleu_takes_rows_with_different_numbers_of_references() -> None:
    found = compute_metric("bleu", predictions=PREDICTIONS, references=REFERENCES)
    assert "nrefs:var" in found["signature"]
    assert found["bleu"] > compute_metric("bleu", predictions=PREDICTIONS, references=FIRST)["bleu"]
    assert found["scores"][1] == 0
    assert found["scores"][3] == pytest.approx(sacrebleu.sentence_bleu(PREDICTIONS[3], REFERENCES[3]).score)


@pytest.mark.parametrize("word_order", [0, 2])
def test_chrf_is_that_of_sacrebleu(word_order: int) -> None:
    found = compute_metric("chrf", predictions=PREDICTIONS, references=REFERENCES, word_order=word_order)
    streams: list[list[Any]] = [[row[k] if k < len(row) else None for row in REFERENCES] for k in range(3)]
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, streams, word_order=word_order).score)
    rows = zip(PREDICTIONS, REFERENCES, strict=True)
    each = [sacrebleu.sentence_chrf(text, accepted, word_order=word_order).score for text, accepted in rows]
    assert found["scores"] == pytest.approx(each)
    assert f"nw:{word_order}" in found["signature"]


def test_rouge_is_that_of_rouge_score() -> None:
    found = compute_metric("rouge", predictions=PREDICTIONS, references=REFERENCES, use_stemmer=True)
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    for kind in kinds:
        each = [
            max(scorer.score(reference, text)[kind].fmeasure for reference in accepted)
            for text, accepted in zip(PREDICTIONS, REFERENCES, strict=True)
        ]
        assert found["scores"][kind] == pytest.approx(each)
        assert found[kind] == pytest.approx(sum(each) / 4)


def test_rouge_by_hand() -> None:
    """Two of three words; the lines of a summary may come in another order for ROUGE-Lsum alone."""
    found = compute_metric("rouge", predictions=["one two three"], references=["one two four five"])
    assert found["rouge1"] == pytest.approx(2 * 2 / (3 + 4))
    assert found["rouge2"] == pytest.approx(2 * 1 / (2 + 3))
    found = compute_metric("rouge", predictions=["c d\na b"], references=["a b\nc d"])
    assert (found["rougeL"], found["rougeLsum"]) == (pytest.approx(0.5), pytest.approx(1))


def test_rouge_of_other_scripts_needs_unicode_words() -> None:
    rows = {"predictions": ["Привет, мир"], "references": ["привет мир"]}
    assert compute_metric("rouge", **rows)["rouge1"] == 0
    assert compute_metric("rouge", **rows, tokenize="unicode")["rouge1"] == 1


def test_nist_by_hand() -> None:
    """Reference `a b b c`: a and c weigh log2(4/1), b log2(4/2), the pair `a b` log2(1/1) = 0, `b c` log2(2/1)."""
    found = compute_metric("nist", predictions=["a x b c"], references=["a b b c"], order=2)
    assert found["nist"] == pytest.approx((2 + 1 + 2) / 4 + 1 / 3)
    assert compute_metric("nist", predictions=["A X B C"], references=["a b b c"], order=2) == found


def test_nist_of_short_and_empty_predictions() -> None:
    """An order no prediction is long enough for adds nothing; two words of three cost half."""
    found = compute_metric("nist", predictions=["a b"], references=["a b c"])
    assert found["nist"] == pytest.approx(0.5 * math.log2(3))
    assert compute_metric("nist", predictions=[""], references=["a b c"]) == {"nist": 0.0}


def test_meteor_matches_words_and_stems_but_no_synonyms() -> None:
    def score(prediction: str, *references: str) -> float:
        found = compute_metric("meteor_exact_stem", predictions=[prediction], references=[list(references)])
        return found["meteor_exact_stem"]

    def by_hand(matches: int, words: int, reference_words: int, chunks: int) -> float:
        precision, recall = matches / words, matches / reference_words
        mean = precision * recall / (0.9 * precision + 0.1 * recall)
        return mean * (1 - 0.5 * (chunks / matches) ** 3)

    assert score("The dogs ran home", "the dog ran") == pytest.approx(by_hand(3, 4, 3, 1))
    assert score("a b c", "b a x c") == pytest.approx(by_hand(3, 3, 4, 3))
    assert score("big house", "large house") == pytest.approx(by_hand(1, 2, 2, 1))
    assert score("big house", "large house", "big house") == pytest.approx(by_hand(2, 2, 2, 1))
    assert score("", "word") == 0


@pytest.mark.parametrize(("name", "reference_rate"), [("wer", jiwer.wer), ("cer", jiwer.cer)])
def test_error_rates_are_those_of_jiwer(name: str, reference_rate: Callable[[list[str], list[str]], float]) -> None:
    found = compute_metric(name, predictions=PREDICTIONS, references=FIRST)
    assert found[name] == pytest.approx(reference_rate(FIRST, PREDICTIONS))
    assert found[name] == pytest.approx(sum(found["errors"]) / sum(found["lengths"]))
    assert sum(found["errors"]) == found["substitutions"] + found["deletions"] + found["insertions"]


def test_error_rates_by_hand() -> None:
    found = compute_metric("wer", predictions=["a b c d", "x z", ""], references=["a c", "x y", "q"])
    assert found["errors"] == [2, 1, 1]
    assert found["lengths"] == [2, 2, 1]
    assert (found["wer"], found["insertions"], found["substitutions"], found["deletions"]) == (0.8, 2, 1, 1)
    assert compute_metric("cer", predictions=["Käse"], references=["Kase"])["cer"] == 0.25
    assert compute_metric("wer", predictions=["a b"], references=["c"])["wer"] == 2


def test_normalized_transcripts() -> None:
    rows = {"predictions": ["Hello, World! [noise]"], "references": ["hello world"]}
    assert compute_metric("wer", **rows)["wer"] == 1.5
    assert compute_metric("wer", **rows, normalize=True)["wer"] == 0


@pytest.mark.parametrize(
    ("name", "predictions", "references", "options", "match"),
    [
        ("squad", ["a"], [[]], {}, "row 0 has no reference"),
        ("squad", ["a", None], [["a"], ["b"]], {}, "row 1 of predictions is no text"),
        ("squad_v2", ["a", "b"], [["a"], [None]], {}, "row 1 of references holds no text"),
        ("bleu", ["a", "b"], [["a"], []], {}, "row 1 has no reference"),
        ("bleu", ["a"], ["a"], {"tokenize": "flores200"}, "tokenize is unknown .*13a, intl, zh, char, none"),
        ("bleu", [1], ["a"], {}, "cannot be scored"),
        ("chrf", ["a", None], ["a", "b"], {}, "row 1 of predictions is no text"),
        ("rouge", ["a"], ["a"], {"tokenize": "latin"}, "tokenize is unknown .*ascii, unicode"),
        ("rouge", ["a", "b"], ["a"], {}, "different lengths"),
        ("nist", ["a", "b"], ["a", " "], {}, r"row 1 of references holds no text \(got ' '\)"),
        ("meteor_exact_stem", ["a"], [[]], {}, "row 0 has no reference"),
        ("wer", ["a"], [""], {}, "the references are empty"),
        ("wer", ["a", None], ["a", "b"], {}, "row 1 of predictions is no text"),
        ("cer", [], [], {}, "no rows"),
        ("wer", ["a"], ["a"], {"lower": True}, "cannot be scored"),
    ],
)
def test_wrong_input_is_named(name: str, predictions: list, references: list, options: dict, match: str) -> None:
    with pytest.raises(EvalError, match=match):
        compute_metric(name, predictions=predictions, references=references, **options)
