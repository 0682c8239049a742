"""Which rows prove a bundle: held-out ones first, then training rows, those that were calibrated on last."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_model, tiny_ids, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.data.dataset import PreparedData
from qlora_kit.data.encoded_rows import EncodedRows
from qlora_kit.data.masking import IGNORED, Encoded
from qlora_kit.data.report import DataReport
from qlora_kit.errors import ExportError
from qlora_kit.export.reference import GREEDY_TOKENS, Question, reference_answers
from qlora_kit.export.rows import CALIBRATION_ROWS, calibration_rows, proof_rows, reference_rows


def stored(contents: list[int], tokens: int = 20) -> EncodedRows:
    """A row for each content, which is its first token and its hash; longer as the content is larger."""
    rows = EncodedRows()
    for content in contents:
        ids = np.full(tokens + content % 7, content, dtype=np.int32)
        labels = np.where(np.arange(len(ids)) < 9, np.int32(IGNORED), ids)
        rows.append(Encoded(ids, labels, 0, content, False), content)
    return rows.seal()


def data(train: list[int], held_out: list[int], tokens: int = 20) -> PreparedData:
    return PreparedData(stored(train), stored(held_out, tokens), DataReport([], template=None))


def chosen(prepared: PreparedData, prompts: int) -> dict[int, str]:
    """Row number: where it comes from. No row twice."""
    rows = proof_rows(prepared, prompts)
    assert len({row.row for row, _ in rows}) == len(rows)
    return {row.row: origin for row, origin in rows}


def test_enough_held_out_rows_need_no_others() -> None:
    found = chosen(data([*range(50)], [*range(100, 140)]), 16)
    assert len(found) == 16 and set(found.values()) == {"held_out"}


def test_the_rest_comes_from_training_rows_that_were_not_calibrated_on() -> None:
    prepared = data([*range(100)], [200, 201])
    calibrated = {row[0] for row in calibration_rows(prepared)}
    found = chosen(prepared, 12)
    assert Counter(found.values()) == {"held_out": 2, "training": 10} and len(calibrated) == CALIBRATION_ROWS
    assert not calibrated & found.keys()


def test_where_there_are_too_few_calibrated_ones_come_last() -> None:
    assert Counter(chosen(data([*range(20)], [200]), 16).values()) == {
        "held_out": 1,
        "training": 4,
        "calibration": 11,
    }
    assert Counter(chosen(data([1, 2, 3], [200]), 16).values()) == {"held_out": 1, "calibration": 3}


def test_a_row_drawn_twice_or_held_out_too_comes_once() -> None:
    found = chosen(data([1, 1, 1, 2, 200, 2, 2, *range(3, 19)], [200]), 16)
    assert found[200] == "held_out" and len(found) == 16
    assert chosen(data([5] * 40 + [200], [200]), 16) == {200: "held_out", 5: "calibration"}


@pytest.mark.parametrize(
    ("train", "prompts", "tokens", "got"),
    [([], 16, 90, "1 rows with 90 tokens"), ([1], 1, 90, "1 rows"), ([], 16, 4, "1 rows with")],
)
def test_too_little_proves_nothing(train: list[int], prompts: int, tokens: int, got: str) -> None:
    with pytest.raises(ExportError, match=rf"too little to prove a bundle on \(got '{got}.*at least 2 rows with 32"):
        proof_rows(data(train, [13 * 7], tokens), prompts)


def test_answers_of_a_batch_are_those_of_each_prompt_token_by_token(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = [tiny_ids(seed, rows=1, length=length)[0].tolist() for seed, length in enumerate((9, 30, 14))]
    questions = [Question(row, [IGNORED] * 5 + row[5:], 5) for row in ids]
    for row, asked in zip(reference_answers(model, tokenizer, questions, tmp_path), questions, strict=True):
        said = torch.tensor([asked.input_ids[:5]])
        for token, margin in zip(row.greedy_ids, row.margins, strict=True):
            best = model(said).logits[0, -1].topk(2)
            assert token == best.indices[0] and abs(margin - (best.values[0] - best.values[1])) < 1e-5
            said = torch.cat([said, best.indices[None, :1]], dim=1)
        assert len(row.greedy_ids) == GREEDY_TOKENS or row.greedy_ids[-1] == tokenizer.eos_token_id
        np.testing.assert_allclose(row.logits, model(torch.tensor([row.input_ids])).logits[0].detach(), atol=1e-6)
        assert row.loss_positions == list(range(4, len(asked.input_ids) - 1))


def test_logits_that_cannot_be_kept_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "model"))
    with pytest.raises(ExportError, match=r"logits cannot be kept in .*file.*lower export.verify_prompts"):
        reference_rows(model, tiny_tokenizer(), [], tmp_path / "file")
