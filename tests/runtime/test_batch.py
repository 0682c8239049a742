"""Files of prompts: answered row by row, resumed where they broke off, errors with file and line."""

import json
from pathlib import Path

import pytest
from qlora_runtime import Bundle, Sampling
from qlora_runtime import batch as batch_module
from qlora_runtime.batch import PARTIAL, answer_file
from qlora_runtime.errors import ArgumentError, ChatTemplateError, PromptTooLongError
from qlora_runtime.generate import generate

SAMPLING = Sampling(max_new_tokens=5, temperature=0.9, seed=3)
ROWS = [
    {"prompt": "The bridge", "id": 1},
    {"messages": [{"role": "user", "content": "Wo? \u2028 漢字"}]},
    {"id": None, "prompt": "Bread"},
]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path, Path]:
    return write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl", tmp_path / f"out.jsonl{PARTIAL}"


@pytest.fixture
def broken_off(bundle, files, monkeypatch) -> tuple[Path, Path, Path]:
    """Two rows are answered, and the third line is half on the disk."""
    prompts, answers, partial = files
    asked = []

    def two_then_none(*arguments):
        asked.append(arguments)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return generate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "generate", two_then_none)
        with pytest.raises(KeyboardInterrupt):
            answer_file(bundle, prompts, answers, SAMPLING)
    with partial.open("ab") as file:
        file.write(b'{"id": null, "pro')
    return files


def test_each_row_keeps_its_columns_and_gets_its_answer(bundle, files):
    prompts, answers, partial = files
    assert answer_file(bundle, prompts, answers, SAMPLING) == 0
    for row, line in zip(ROWS, lines_of(answers), strict=True):
        assert line == row | vars(generate(bundle, row.get("prompt") or row["messages"], SAMPLING))
    assert not partial.exists()


def test_a_run_that_broke_off_goes_on_and_ends_in_the_same_bytes(bundle, broken_off, tmp_path, monkeypatch):
    prompts, answers, partial = broken_off
    assert not answers.exists()
    assert len(partial.read_bytes().splitlines()) == 4  # settings, two answers, half a line
    asked = []
    monkeypatch.setattr(batch_module, "generate", lambda *given: asked.append(given[1]) or generate(*given))
    assert answer_file(bundle, prompts, answers, SAMPLING) == 2
    assert asked == ["Bread"]
    answer_file(bundle, prompts, tmp_path / "whole.jsonl", SAMPLING)
    assert answers.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


def test_rows_behind_may_have_been_mended(bundle, broken_off):
    prompts, answers, _ = broken_off
    write(prompts, [*ROWS[:2], {"prompt": "Salt"}])
    assert answer_file(bundle, prompts, answers, SAMPLING) == 2
    assert lines_of(answers)[2]["prompt"] == "Salt"


def test_other_options_do_not_go_on(bundle, broken_off):
    prompts, answers, _ = broken_off
    with pytest.raises(ArgumentError, match=r"other options.*remove"):
        answer_file(bundle, prompts, answers, Sampling(max_new_tokens=5, seed=4))


@pytest.mark.parametrize("rows", [[{"prompt": "Other"}, *ROWS[1:]], ROWS[:1]])
def test_other_rows_do_not_go_on(bundle, broken_off, rows):
    prompts, answers, partial = broken_off
    before = partial.read_bytes()
    write(prompts, rows)
    with pytest.raises(ArgumentError, match=r"out.jsonl.partial, line [23]: .*in.jsonl has another row there"):
        answer_file(bundle, prompts, answers, SAMPLING)
    assert partial.read_bytes() == before[: before.rindex(b"\n") + 1]


def test_a_damaged_partial_file_is_said_to_be(bundle, files):
    prompts, answers, partial = files
    partial.write_text("{\n")
    with pytest.raises(ArgumentError, match=r"out.jsonl.partial is damaged.*Remove it"):
        answer_file(bundle, prompts, answers, SAMPLING)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"prompt": "word " * 200}, PromptTooLongError, r"in.jsonl, line 4: .*Shorten"),
        ({"messages": [{"role": "king", "content": ""}]}, ChatTemplateError, r"in.jsonl, line 4: .*unknown role"),
        ({"messages": ["x"]}, ArgumentError, r"line 4: messages\[0\]"),
        ({"prompt": ""}, ArgumentError, "line 4: .*at least one token"),
        ({"prompt": "a", "messages": []}, ArgumentError, "line 4: expected"),
        ({"prompt": "a", "text": "b"}, ArgumentError, r"line 4: the answer's columns \['text'\]"),
        ({"prompt": "a", "x": float("nan")}, ArgumentError, "line 4: column 'x'"),
        ([1], ArgumentError, "line 4: expected an object"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named_before_anything_is_run(bundle, files, row, error, message):
    prompts, answers, partial = files
    write(prompts, [*ROWS, row])
    with pytest.raises(error, match=message):
        answer_file(bundle, prompts, answers, SAMPLING)
    assert not answers.exists() and not partial.exists()


def test_the_prompts_are_not_written_over(bundle, files):
    prompts, _, _ = files
    with pytest.raises(ArgumentError, match="holds the prompts"):
        answer_file(bundle, prompts, prompts, SAMPLING)
    assert lines_of(prompts) == ROWS


def test_a_partial_file_of_another_bundle_does_not_go_on(broken_off, bundle_dir):
    prompts, answers, _ = broken_off
    manifest = json.loads((bundle_dir / "manifest.json").read_text())
    (bundle_dir / "manifest.json").write_text(json.dumps(manifest | {"created": "2026-01-01T00:00:00+00:00"}))
    with pytest.raises(ArgumentError, match="another bundle"):
        answer_file(Bundle.open(bundle_dir, threads=1), prompts, answers, SAMPLING)
