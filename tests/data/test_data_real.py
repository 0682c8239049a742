"""Published datasets, where a checkout of them lies beside the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data.dataset import prepare
from qlora_kit.data.masking import IGNORED
from qlora_kit.data.template import resolve_template

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def head(name: Any, rows: Any, tmp_path: Any) -> Any:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not here")
    made = tmp_path / f"head{path.suffix}"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        made.write_text("\n".join(text.splitlines()[:rows]), encoding="utf-8")
    else:
        made.write_text(json.dumps(json.loads(text)[:rows]), encoding="utf-8")
    return str(made)


def last_words(data: Any, tokenizer: Any) -> Any:
    row = data.train[0]
    return tokenizer.decode(row.input_ids[row.labels != IGNORED].tolist())


def test_gsm8k(chatml: Any, section: Any, tmp_path: Any) -> None:
    fields = section(train=head("gsm8k/train.jsonl", 300, tmp_path), max_seq_len=4096)
    data = prepare(fields, chatml, 1)
    assert data.report.train[0].schema == "prompt_completion" and not data.report.train[0].skipped
    assert "#### 72<|im_end|>" in last_words(data, chatml) and len(data.train) + len(data.eval) == 300


def test_dolly(base: Any, section: Any, tmp_path: Any) -> None:
    fields = section(train=head("dolly/dolly_train.json", 300, tmp_path), chat_template="alpaca", max_seq_len=8192)
    base.chat_template = resolve_template(base, fields)
    data = prepare(fields, base, 1)
    assert data.report.train[0].schema == "alpaca"
    assert data.report.train[0].used + data.report.train[0].held_out == 300
    assert last_words(data, base).endswith("<|endoftext|>")


def test_glaive_tool_calls(base: Any, section: Any, tmp_path: Any) -> None:
    fields = section(
        train=head("glaive_toolcall/glaive_toolcall_en_demo.json", 100, tmp_path),
        chat_template="chatml",
        max_seq_len=9000,
    )
    base.chat_template = resolve_template(base, fields)
    data = prepare(fields, base, 1)
    assert data.report.train[0].schema == "sharegpt" and data.report.train[0].silent_turns == 0
    assert not data.report.train[0].skipped
    assert any("<tool_call>" in base.decode(row.input_ids[row.labels != IGNORED].tolist()) for row in data.train)


def test_open_assistant_converted_to_messages(chatml: Any, section: Any, tmp_path: Any) -> None:
    import re

    source = Path(head("oasst1/oa_questions.jsonl", 100, tmp_path))
    made = tmp_path / "messages.jsonl"
    with made.open("w", encoding="utf-8") as file:
        for line in source.read_text(encoding="utf-8").split("\n"):
            row = json.loads(line)
            texts = re.split(r"### (?:Human|Assistant):", row["input"] + " " + row["output"])[1:]
            roles = ["user" if k % 2 == 0 else "assistant" for k in range(len(texts))]
            turns = [{"role": role, "content": text.strip()} for role, text in zip(roles, texts)]
            file.write(json.dumps({"messages": turns}) + "\n")
    data = prepare(section(train=str(made), bad_rows="skip", max_seq_len=20000), chatml, 1)
    counts = data.report.train[0]
    assert counts.read == 100 and counts.used > 80
    turns_with_loss = [int(((row.labels != IGNORED)[1:] & (row.labels == IGNORED)[:-1]).sum()) for row in data.train]
    assert min(turns_with_loss) >= 1 and max(turns_with_loss) > 1
