"""Losses and answers of one form: the plain computation, whatever the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from qlora_runtime import Bundle
from tiny_models import tiny_ids, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from qlora_kit.data.masking import Encoded
from qlora_kit.errors import EvalError
from qlora_kit.eval.scorers import BundleScorer, Scorer, TorchScorer
from qlora_kit.generate import generate_ids

LENGTHS = (5, 31, 2, 17, 17, 9, 40)


@pytest.fixture(scope="module")
def rows() -> list[Encoded]:
    """Rows of different lengths; loss on their last tokens, and in one row on tokens in between too."""
    encoded = []
    for k, length in enumerate(LENGTHS):
        ids = tiny_ids(seed=k, rows=1, length=length)[0].numpy().astype(np.int32)
        labels = ids.copy()
        labels[: max(1, length // 2)] = -100
        if k == 3:
            labels[10:12] = -100
        encoded.append(Encoded(ids, labels))
    return encoded


@pytest.fixture(scope="module")
def merged(exported_run: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(exported_run / "merged").eval()


def plain_losses(model: Any, rows: list[Encoded]) -> list[tuple[float, int]]:
    """Row by row from all logits, in float64."""
    found = []
    for row in rows:
        ids = torch.tensor(row.input_ids, dtype=torch.long)[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        labels = torch.tensor(row.labels, dtype=torch.long)
        losses = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        found.append((losses.item(), int((labels[1:] != -100).sum())))
    return found


def same(found: list[tuple[float, int]], expected: list[tuple[float, int]], tolerance: float) -> None:
    assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=tolerance)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_torch_losses_are_the_plain_ones(rows: list[Encoded], arch: str, batch_size: int) -> None:
    model = tiny_model(arch)
    same(TorchScorer(model, tiny_tokenizer(), batch_size).losses(rows), plain_losses(model, rows), 1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_bundle_losses_are_the_plain_ones(
    rows: list[Encoded], exported_run: Path, merged: Any, batch_size: int
) -> None:
    bundle = Bundle.open(exported_run / "bundles" / "fp32")
    same(BundleScorer(bundle, tiny_tokenizer(), batch_size).losses(rows), plain_losses(merged, rows), 1e-4)


def test_losses_belong_to_their_rows_in_any_order(rows: list[Encoded], merged: Any) -> None:
    scorer = TorchScorer(merged, tiny_tokenizer(), 3)
    order = [4, 0, 6, 2, 5, 1, 3]
    straight = scorer.losses(rows)
    same(scorer.losses([rows[k] for k in order]), [straight[k] for k in order], 1e-5)


def test_pad_tokens_do_not_count(rows: list[Encoded], merged: Any) -> None:
    """pad is eos here: a short row beside a long one has the loss that it has alone."""
    scorer = TorchScorer(merged, tiny_tokenizer(), 2)
    alone, beside = scorer.losses([rows[2]])[0], scorer.losses([rows[2], rows[6]])[0]
    assert beside == pytest.approx(alone, rel=1e-5)


def test_answers_of_bundle_and_torch_are_the_same(exported_run: Path, merged: Any) -> None:
    tokenizer = tiny_tokenizer()
    prompts = [tiny_ids(seed=k, rows=1, length=4 + 3 * k)[0].tolist() for k in range(4)]
    scorers: list[Scorer] = [
        TorchScorer(merged, tokenizer, 2),
        BundleScorer(Bundle.open(exported_run / "bundles" / "fp32"), tokenizer, 2),
    ]
    answers = [scorer.answers(prompts, 12) for scorer in scorers]
    assert answers[0] == answers[1] and len(set(answers[0])) > 1
    assert scorers[1].answers(prompts, 3) == scorers[0].answers(prompts, 3) != answers[0]


def test_answers_end_before_the_end_token(exported_run: Path, merged: Any) -> None:
    tokenizer = tiny_tokenizer()
    prompt = tiny_ids(seed=0, rows=1, length=6)[0].tolist()
    scorers = [
        TorchScorer(merged, tokenizer, 1),
        BundleScorer(Bundle.open(exported_run / "bundles" / "fp32"), tokenizer, 1),
    ]
    ids = generate_ids(merged, tokenizer, prompt, 4)
    assert tokenizer.eos_token_id not in ids
    tokenizer.chat_template, tokenizer.eos_token = None, tokenizer.convert_ids_to_tokens(ids[2])
    expected = tokenizer.decode(ids[: ids.index(ids[2])], skip_special_tokens=True)
    assert [scorer.answers([prompt], 9) for scorer in scorers] == [[expected], [expected]]


def test_a_row_longer_than_the_bundles_context_is_refused(exported_run: Path) -> None:
    scorer = BundleScorer(Bundle.open(exported_run / "bundles" / "fp32"), tiny_tokenizer(), 2)
    with pytest.raises(EvalError, match=r"bundles/fp32: .*context.*128.*Shorten the rows"):
        scorer.answers([list(range(3, 200))], 4)
