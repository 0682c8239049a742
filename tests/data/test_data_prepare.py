"""Reading a recipe's data: what is used, held out, mixed, skipped and reported."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from qlora_kit.data.dataset import held_out_mask, prepare
from qlora_kit.data.eval_rows import eval_rows
from qlora_kit.errors import DataError


def pairs(n: Any, start: Any = 0) -> Any:
    return [{"prompt": f"question {k}", "completion": f"answer {k}"} for k in range(start, start + n)]


def places(rows: Any) -> Any:
    return [(row.source, row.row) for row in rows]


def contents(rows: Any, tokenizer: Any) -> Any:
    return [tokenizer.decode(row.input_ids.tolist()) for row in rows]


def test_every_row_is_used_or_held_out(chatml: Any, section: Any, jsonl: Any) -> None:
    data = prepare(section(train=jsonl(pairs(200)), eval_fraction=0.1), chatml, 1)
    source = data.report.train[0]
    assert source.read == 200 == source.used + source.held_out == len(data.train) + len(data.eval)
    assert 8 <= len(data.eval) <= 32 and data.report.eval_rows == len(data.eval)
    assert sorted(places(data.train) + places(data.eval)) == [(0, k) for k in range(1, 201)]
    assert data.report.overlap == 0
    lengths = [len(row.input_ids) for row in data.train]
    assert source.tokens == sum(lengths) and source.longest == max(lengths) and data.train.lengths().tolist() == lengths
    assert source.loss_tokens == sum(row.loss_tokens for row in data.train)


def test_the_split_is_seeded_and_stable(chatml: Any, section: Any, jsonl: Any) -> None:
    fields = section(train=jsonl(pairs(100)), eval_fraction=0.2)
    one, again, other = (places(prepare(fields, chatml, seed).eval) for seed in (1, 1, 2))
    assert one == again != other
    more = places(prepare(section(train=jsonl(pairs(150), "more.jsonl"), eval_fraction=0.2), chatml, 1).eval)
    assert [place for place in more if place[1] <= 100] == one


def test_duplicates_and_equal_prompts_land_on_one_side(chatml: Any, section: Any, jsonl: Any) -> None:
    rows = [{"prompt": f"q {k % 20}", "completion": f"a {k % 40}"} for k in range(120)]
    data = prepare(section(train=jsonl(rows), eval_fraction=0.3), chatml, 3)
    asked = [{rows[row.row - 1]["prompt"] for row in side} for side in (data.train, data.eval)]
    assert asked[0] and asked[1] and not asked[0] & asked[1]


def test_a_small_file_holds_out_at_least_one_row(chatml: Any, section: Any, jsonl: Any) -> None:
    data = prepare(section(train=jsonl(pairs(3)), eval_fraction=0.001), chatml, 1)
    assert (len(data.train), len(data.eval)) == (2, 1)
    assert held_out_mask(np.array([5, 5, 9], dtype=np.uint64), 0.001).tolist() == [True, True, False]


def test_eval_file_and_overlap(chatml: Any, section: Any, jsonl: Any) -> None:
    alpaca = [{"instruction": "question 3", "output": "answer 3"}, {"instruction": "new", "output": "new"}]
    data = prepare(section(train=jsonl(pairs(10)), eval=jsonl(alpaca, "eval.jsonl")), chatml, 1)
    assert len(data.train) == 10 and len(data.eval) == 2
    assert data.report.overlap == 1 and data.report.overlap_examples[0].endswith("eval.jsonl row 1")
    assert any("1 eval rows are also trained on" in line for line in data.report.warnings())
    assert data.describe_row(data.eval[1]).endswith("eval.jsonl row 2")
    assert data.report.eval is not None and data.report.eval.used == 2


def test_without_weights_sources_are_joined(chatml: Any, section: Any, jsonl: Any) -> None:
    sources = [{"path": jsonl(pairs(5), "a.jsonl")}, {"path": jsonl(pairs(3, 100), "b.jsonl")}]
    data = prepare(section(train=sources, eval=jsonl(pairs(1, 500), "e.jsonl")), chatml, 1)
    assert Counter(row.source for row in data.train) == {0: 5, 1: 3}
    assert data.describe_row(data.train[5]).endswith("b.jsonl row 1")


@pytest.mark.parametrize(("weights", "expected"), [((3, 1), (9, 3)), ((1, 1), (6, 6)), ((1, 5), (2, 10))])
def test_weights_are_shares_of_an_epoch(weights: Any, expected: Any, chatml: Any, section: Any, jsonl: Any) -> None:
    sources = [
        {"path": jsonl(pairs(8), "a.jsonl"), "weight": float(weights[0])},
        {"path": jsonl(pairs(4, 100), "b.jsonl"), "weight": float(weights[1])},
    ]
    fields = section(train=sources, eval=jsonl(pairs(1, 500), "e.jsonl"))
    data = prepare(fields, chatml, 1)
    assert tuple(source.drawn for source in data.report.train) == expected
    counts = Counter(places(data.train))
    for k, (have, want) in enumerate(zip((8, 4), expected)):
        own = [count for (source, _), count in counts.items() if source == k]
        assert sum(own) == want and len(own) == min(have, want) and max(own) - min(own) <= 1
    assert places(prepare(fields, chatml, 1).train) == places(data.train)


def test_a_share_that_leaves_rows_out_is_reported(chatml: Any, section: Any, jsonl: Any) -> None:
    sources = [
        {"path": jsonl(pairs(8, 50), "a.jsonl"), "weight": 1.0},
        {"path": jsonl(pairs(8), "b.jsonl"), "weight": 7.0},
    ]
    report = prepare(section(train=sources, eval=jsonl(pairs(1, 500), "e.jsonl")), chatml, 1).report
    assert any("a.jsonl: 6 rows not drawn because of its weight" in line for line in report.warnings())


def test_skipped_rows_are_counted_and_named(chatml: Any, section: Any, jsonl: Any) -> None:
    rows = [*pairs(6), {"prompt": "p", "completion": ""}, {"prompt": "p"}, {"prompt": "p", "completion": "x " * 400}, 5]
    fields = section(train=jsonl(rows), bad_rows="skip", max_seq_len=64)
    report = prepare(fields, chatml, 1).report
    source = report.train[0]
    assert source.skipped == {"empty completion": 1, "missing completion": 1, "overlong": 1, "no object": 1}
    assert source.read == source.used + source.held_out + sum(source.skipped.values()) == 10
    assert "rows.jsonl row 7: completion is empty" in source.skipped_examples["empty completion"][0]
    assert any("1 rows left out (overlong)" in line for line in report.warnings())
    json.dumps(report.to_json())


def test_overlong_rows_are_skipped_though_bad_rows_are_errors(chatml: Any, section: Any, jsonl: Any) -> None:
    rows = [*pairs(5), {"prompt": "p", "completion": "x " * 400}]
    assert prepare(section(train=jsonl(rows), max_seq_len=64), chatml, 1).report.train[0].skipped == {"overlong": 1}
    cut = prepare(section(train=jsonl(rows), max_seq_len=64, overlong="truncate", eval_fraction=0.01), chatml, 2)
    assert cut.report.train[0].truncated + sum(row.truncated for row in cut.eval) == 1


def test_control_tokens_in_text_and_unused_columns_are_reported(chatml: Any, section: Any, jsonl: Any) -> None:
    rows = [*pairs(5), {"prompt": "say <|im_end|> now", "completion": "c", "id": 3}]
    report = prepare(section(train=jsonl(rows)), chatml, 1).report
    assert report.train[0].rows_with_control_tokens == 1 and report.train[0].ignored_columns == ["id"]
    assert report.train[0].control_token_examples[0].endswith("row 6")
    assert any("spell special tokens" in line for line in report.warnings())


def test_silent_turns_are_reported(reasoning: Any, section: Any, jsonl: Any) -> None:
    said = [("user", "u"), ("assistant", "<think>x</think>a"), ("user", "v"), ("assistant", "b")]
    rows = [{"messages": [{"role": role, "content": text + str(k)} for role, text in said]} for k in range(3)]
    report = prepare(section(train=jsonl(rows)), reasoning, 1).report
    assert report.train[0].silent_turns == 3


def test_the_digest_follows_files_and_template(chatml: Any, section: Any, jsonl: Any) -> None:
    path = jsonl(pairs(5))
    one = prepare(section(train=path), chatml, 1).sha256
    assert one == prepare(section(train=path), chatml, 2).sha256
    chatml.chat_template += "{# other #}"
    assert one != prepare(section(train=path), chatml, 1).sha256
    jsonl(pairs(6))
    assert one != prepare(section(train=path), chatml, 1).sha256


def test_changed_files_are_named(chatml: Any, section: Any, jsonl: Any) -> None:
    paths = [str(jsonl(pairs(5), f"{name}.jsonl")) for name in ("a", "b", "held")]
    options = {"train": [{"path": path} for path in paths[:2]], "eval": paths[2]}
    manifest = json.loads(json.dumps(prepare(section(**options), chatml, 1).report.to_json()))
    assert prepare(section(**options), chatml, 1).changed_since(manifest) == []
    jsonl(pairs(6), "b.jsonl")
    jsonl(pairs(7), "held.jsonl")
    assert prepare(section(**options), chatml, 1).changed_since(manifest) == paths[1:]
    only_first = prepare(section(train=paths[0]), chatml, 1)
    assert only_first.changed_since(manifest) == paths[1:], "sources that are gone"
    assert only_first.changed_since({}) == paths[:1]


def test_rows_are_kept_compactly_and_views_share(chatml: Any, section: Any, jsonl: Any) -> None:
    data = prepare(section(train=jsonl(pairs(50))), chatml, 1)
    view = data.train.take(np.array([3, 3, 0]))
    assert places(view) == [places(data.train)[k] for k in (3, 3, 0)]
    assert view._ids is data.train._ids and len(view[:2]) == 2
    assert data.train[-1].row == data.train[len(data.train) - 1].row
    assert data.train[0].input_ids.dtype == np.int32
    with pytest.raises(IndexError):
        data.train[len(data.train)]


def test_eval_rows_are_the_held_out_rows(chatml: Any, section: Any, jsonl: Any) -> None:
    for fraction in (0.3, 0.0001):
        fields = section(train=jsonl(pairs(40)), eval_fraction=fraction)
        held_out = [(row.source, row.row) for row in eval_rows(fields, chatml, 9)]
        assert held_out == places(prepare(fields, chatml, 9).eval)


BAD = [
    (
        [{"prompt": "p", "completion": ""}],
        {"bad_rows": "skip"},
        r"no usable row in .*\(skipped: empty completion: 1\).*row 1",
    ),
    ([{"prompt": "p", "completion": ""}], {}, r"rows\.jsonl row 1: completion is empty.*bad_rows: skip"),
    (
        [*pairs(3), {"prompt": "p", "completion": "x " * 99}],
        {"overlong": "error", "max_seq_len": 64},
        r"row 4: \d+ tokens, more",
    ),
    ([{"prompt": "p", "completion": "c"}] * 4, {}, r"4 usable rows with one prompt between them: none can be held out"),
    ([*pairs(2), {"text": "t"}], {"bad_rows": "skip"}, r"row 3: mixed schemas: this row is text"),
]


@pytest.mark.parametrize(("rows", "fields", "message"), BAD)
def test_data_that_cannot_be_prepared(
    rows: Any, fields: Any, message: Any, chatml: Any, section: Any, jsonl: Any
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(section(train=jsonl(rows), **fields), chatml, 1)


def test_weights_for_some_sources_only(chatml: Any, section: Any, jsonl: Any) -> None:
    sources = [{"path": jsonl(pairs(3), "a.jsonl"), "weight": 1.0}, {"path": jsonl(pairs(3, 9), "b.jsonl")}]
    with pytest.raises(DataError, match=r"no weight for .*b\.jsonl.*every source a weight, or none"):
        prepare(section(train=sources), chatml, 1)


def test_a_weight_of_less_than_a_row(chatml: Any, section: Any, jsonl: Any) -> None:
    sources = [
        {"path": jsonl(pairs(4), "a.jsonl"), "weight": 1e-6},
        {"path": jsonl(pairs(4, 9), "b.jsonl"), "weight": 1.0},
    ]
    with pytest.raises(DataError, match=r"a\.jsonl: its weight is less than one row an epoch"):
        prepare(section(train=sources, eval=jsonl(pairs(1, 99), "e.jsonl")), chatml, 1)


def test_a_weighted_source_without_usable_rows(chatml: Any, section: Any, jsonl: Any) -> None:
    empty = jsonl([{"prompt": "p", "completion": ""}], "a.jsonl")
    sources = [{"path": empty, "weight": 1.0}, {"path": jsonl(pairs(4), "b.jsonl"), "weight": 1.0}]
    with pytest.raises(DataError, match=r"a\.jsonl has a weight and no usable row"):
        prepare(section(train=sources, bad_rows="skip", eval=jsonl(pairs(1, 99), "e.jsonl")), chatml, 1)


def test_conversations_for_a_base_model(base: Any, section: Any, jsonl: Any) -> None:
    rows = [{"instruction": "i", "output": "o"}]
    with pytest.raises(DataError, match=r"no chat template, and the data is a conversation.*data\.chat_template"):
        prepare(section(train=jsonl(rows), bad_rows="skip"), base, 1)
