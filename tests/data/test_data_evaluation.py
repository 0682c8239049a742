"""Held-out rows as questions, candidate answers, batches, and `data show`."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from qlora_kit.data.collate import collate
from qlora_kit.data.dataset import prepare
from qlora_kit.data.eval_rows import completions_in, encode_choice, eval_rows
from qlora_kit.data.masking import IGNORED, Encoded
from qlora_kit.data.report import DataReport
from qlora_kit.data.show import histogram, show
from qlora_kit.data.template import resolve_template
from qlora_kit.errors import DataError

REVIEWS = [{"prompt": f"review {k}", "completion": ["good", "bad"][k % 2]} for k in range(40)]


def encoded(*ids: Any) -> Any:
    return Encoded(np.array(ids, dtype=np.int32), np.array([IGNORED, *ids[1:]], dtype=np.int32))


def said(row: Any, tokenizer: Any) -> Any:
    return tokenizer.decode(row.input_ids[row.labels != IGNORED].tolist())


def test_prompts_are_what_training_saw_before_the_answer(smol: Any, section: Any, jsonl: Any) -> None:
    fields = section(train=jsonl(REVIEWS), eval=jsonl(REVIEWS[:5], "eval.jsonl"), system_prompt="")
    smol.chat_template = resolve_template(smol, fields)
    trained = prepare(fields, smol, 1).eval
    for row, whole in zip(eval_rows(fields, smol, 1), trained):
        first = int(np.flatnonzero(whole.labels != IGNORED)[0])
        assert row.prompt_ids.tolist() == whole.input_ids[:first].tolist() and row.prompt_ids.dtype == np.int32
        assert row.completion == REVIEWS[row.row - 1]["completion"]
        assert row.prompt_messages == [{"role": "user", "content": REVIEWS[row.row - 1]["prompt"]}]
        assert row.place.endswith(f"eval.jsonl row {row.row}") and row.source == 1
        choice = encode_choice(row, row.completion, smol)
        assert (choice.input_ids == whole.input_ids).all() and (choice.labels == whole.labels).all()
        assert said(encode_choice(row, "so so", smol), smol) == "so so<|im_end|>"


def test_prompts_without_a_template(base: Any, llama: Any, section: Any, jsonl: Any) -> None:
    fields = section(train=jsonl(REVIEWS), eval=jsonl([{"prompt": "fox:", "completion": " dog"}], "eval.jsonl"))
    (row,) = eval_rows(fields, base, 1)
    assert base.decode(row.prompt_ids.tolist()) == "fox:" and row.completion == " dog"
    assert said(encode_choice(row, " cat", base), base) == " cat<|endoftext|>"
    llama.chat_template = None
    (row,) = eval_rows(fields, llama, 1)
    assert row.prompt_ids[0] == llama.bos_token_id and llama.eos_token_id not in row.prompt_ids


def test_only_the_last_turn_of_a_chat_is_asked(chatml: Any, section: Any, jsonl: Any) -> None:
    turns = [("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    fields = section(train="unused.jsonl", eval=jsonl(rows))
    (row,) = eval_rows(fields, chatml, 1)
    assert row.completion == "a2" and [turn["content"] for turn in row.prompt_messages] == ["u1", "a1", "u2"]
    assert said(encode_choice(row, "x", chatml), chatml) == "x<|im_end|>"


def test_a_tool_call_is_asked_as_the_template_writes_it(base: Any, section: Any, jsonl: Any) -> None:
    calls = [{"function": {"name": "add", "arguments": {"x": 1}}}]
    rows = [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": calls}]}]
    fields = section(train="unused.jsonl", eval=jsonl(rows), chat_template="chatml")
    base.chat_template = resolve_template(base, fields)
    (row,) = eval_rows(fields, base, 1)
    assert row.completion == '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'


def test_a_sample_is_seeded_and_nested(chatml: Any, section: Any, jsonl: Any) -> None:
    fields = section(train="unused.jsonl", eval=jsonl(REVIEWS))
    few, more, other = ([row.row for row in eval_rows(fields, chatml, *args)] for args in ((1, 5), (1, 15), (2, 5)))
    assert len(few) == 5 and set(few) < set(more) and few != other and few == sorted(few)
    assert few != [1, 2, 3, 4, 5]


def test_rows_left_out_are_counted(chatml: Any, section: Any, jsonl: Any) -> None:
    long = {"prompt": "long " * 99, "completion": "good"}
    own = section(train=jsonl([long]), eval=jsonl([*REVIEWS, long], "eval.jsonl"), max_seq_len=64)
    report = DataReport([])
    assert len(eval_rows(own, chatml, 1, report=report)) == len(REVIEWS)
    assert report.left_out() == {own.eval: {"overlong": 1}}
    split, report = section(train=jsonl([*REVIEWS, long, long], "both.jsonl"), max_seq_len=64), DataReport([])
    eval_rows(split, chatml, 1, report=report)
    assert report.left_out() == {split.sources()[0].path: {"overlong": 2}}


def test_choices_of_the_training_rows(section: Any, jsonl: Any) -> None:
    assert completions_in(section(train=jsonl([*REVIEWS, 5, {"prompt": "p", "completion": ""}]))) == ["bad", "good"]
    chat = [{"instruction": "i", "output": "o"}]
    assert completions_in(section(train=jsonl(chat))) == ["o"]


def test_choices_that_are_none(section: Any, jsonl: Any) -> None:
    many = [{"prompt": "p", "completion": str(k)} for k in range(60)]
    with pytest.raises(DataError, match=r"more than 50 different completions.*eval\.choices"):
        completions_in(section(train=jsonl(many)))
    with pytest.raises(DataError, match=r"no completion in the training rows.*eval\.choices"):
        completions_in(section(train=jsonl([{"text": "t"}])))


def test_plain_text_asks_nothing(chatml: Any, section: Any, jsonl: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl row 1: plain text asks nothing"):
        eval_rows(section(train="unused.jsonl", eval=jsonl([{"text": "t"}])), chatml, 1)


def test_no_held_out_row(chatml: Any, section: Any, jsonl: Any) -> None:
    path = jsonl([{"prompt": "p", "completion": ""}])
    with pytest.raises(DataError, match=r"no held-out row"):
        eval_rows(section(train="unused.jsonl", eval=path, bad_rows="skip"), chatml, 1)


def test_collation_pads_right_and_masks_by_place() -> None:
    batch = collate([encoded(5, 2, 2), encoded(7, 8, 9, 2, 1)], pad_id=2, multiple_of=4)
    assert batch["input_ids"].tolist() == [[5, 2, 2, 2, 2, 2, 2, 2], [7, 8, 9, 2, 1, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 2, *[-100] * 5], [-100, 8, 9, 2, 1, *[-100] * 3]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize(("longest", "multiple", "seq"), [(1, 1, 1), (8, 8, 8), (9, 8, 16), (3, 64, 64)])
def test_collated_length(longest: Any, multiple: Any, seq: Any) -> None:
    assert collate([encoded(*range(longest))], 0, multiple)["input_ids"].shape == (1, seq)


def test_an_empty_batch() -> None:
    with pytest.raises(DataError, match="at least one row"):
        collate([], pad_id=0)


def test_show_marks_loss_without_colour(chatml: Any, section: Any, jsonl: Any) -> None:
    console = Console(width=200, record=True, file=StringIO())
    rows = [*REVIEWS, {"prompt": "[bold]markup[/bold]", "completion": ""}]
    show(section(train=jsonl(rows), bad_rows="skip"), chatml, 2, console, seed=1)
    text = console.export_text()
    assert "<|im_start|>assistant\n⟦" in text and "<|im_end|>⟧" in text and "{% for m in messages %}" in text
    assert "1 rows left out (empty completion)" in text and "Tokens a row" in text and "prompt_completion" in text


def test_show_of_a_stream(chatml: Any, section: Any, jsonl: Any) -> None:
    console = Console(width=200, record=True, file=StringIO())
    fields = section(train=jsonl(REVIEWS), eval=jsonl(REVIEWS[:2], "eval.jsonl"), streaming=True)
    show(fields, chatml, 3, console)
    text = console.export_text()
    assert text.count(" with loss\n") + text.count(" with loss ") >= 3 and "eval: " in text


def test_histogram_of_one_length() -> None:
    assert " 3 " in histogram(np.array([7, 7, 7])).plain


def test_the_report_is_json(chatml: Any, section: Any, jsonl: Any) -> None:
    report = prepare(section(train=jsonl(REVIEWS)), chatml, 1).report
    again = json.loads(json.dumps(report.to_json()))
    assert again["train"][0]["read"] == 40 and again["train"][0]["fingerprint"].startswith("sha256:")
