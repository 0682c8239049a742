"""Rows and their numbers from every kind of file, and what is said of broken ones."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from qlora_kit.data.examples import RowError
from qlora_kit.data.sources import fingerprint, read_rows
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSource


def source(path: Any, **fields: Any) -> Any:
    return DataSource.model_validate({"path": str(path)} | fields)


def rows_of(path: Any, **fields: Any) -> Any:
    return [(row.number, row.value) for row in read_rows(source(path, **fields))]


def only_error(path: Any) -> Any:
    errors = [(row.number, row.value) for row in read_rows(source(path)) if isinstance(row.value, RowError)]
    assert len(errors) == 1
    return errors[0][0], str(errors[0][1])


def test_jsonl_counts_lines_and_passes_blank_ones(tmp_path: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b\xc3\xbc"}')
    assert rows_of(path) == [(1, {"text": "a"}), (3, {"text": "bü"})]


def test_json_list_and_object_with_one_list(tmp_path: Any) -> None:
    path = tmp_path / "a.json"
    for tree in ([{"text": "a"}], {"version": 1, "data": [{"text": "a"}]}):
        path.write_text(json.dumps(tree))
        assert rows_of(path) == [(1, {"text": "a"})]


def test_csv_counts_lines_with_the_header(tmp_path: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"two\nlines",b\nc,"d, ""e"""\n', encoding="utf-8")
    assert rows_of(path) == [
        (2, {"prompt": "two\nlines", "completion": "b"}),
        (4, {"prompt": "c", "completion": 'd, "e"'}),
    ]


def test_tsv(tmp_path: Any) -> None:
    path = tmp_path / "a.TSV"
    path.write_text("prompt\tcompletion\na,b\tc\n")
    assert rows_of(path) == [(2, {"prompt": "a,b", "completion": "c"})]


def test_a_csv_of_a_spreadsheet_is_separated_by_semicolons(tmp_path: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text;score\n"salt, and oil";3,5\n', encoding="utf-8")
    assert rows_of(path) == [(2, {"text": "salt, and oil", "score": "3,5"})]
    path.write_text("text,score\nsalt; oil,3\n", encoding="utf-8")
    assert rows_of(path) == [(2, {"text": "salt; oil", "score": "3"})]


def test_tsv_with_and_without_quoting(tmp_path: Any) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"Bad start\tneg\ngreat\tpos\nso he said: bye"\tneg\n"Best" film\tpos\n')
    assert [(number, row["text"], row["label"]) for number, row in rows_of(path)] == [
        (2, '"Bad start', "neg"),
        (3, "great", "pos"),
        (4, 'so he said: bye"', "neg"),
        (5, '"Best" film', "pos"),
    ]
    path.write_text('text\tlabel\n"a\tb ""c"""\tneg\r\nd "e"\tpos\n', newline="")
    assert [row["text"] for _, row in rows_of(path)] == ['a\tb "c"', 'd "e"']


def test_a_csv_cell_of_a_megabyte(tmp_path: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 1_000_000 + "\n")
    assert len(rows_of(path)[0][1]["text"]) == 1_000_000


def test_parquet(tmp_path: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    rows = [{"messages": [{"role": "user", "content": f"{k}"}]} for k in range(300)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert rows_of(path) == list(enumerate(rows, 1))


def test_hub_dataset(monkeypatch: Any) -> None:
    import datasets
    import huggingface_hub

    made = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    asked = []

    def load(name: Any, config: Any, split: Any, revision: Any, streaming: Any) -> Any:
        asked.append((name, config, split, revision, streaming))
        return made

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "dataset_info", offline)
    assert rows_of("owner/name:main@test[:2]") == [(1, {"text": "a"}), (2, {"text": "b"})]
    rows_of("owner/name", split="validation", revision="v1")
    assert asked == [("owner/name", "main", "test[:2]", None, False), ("owner/name", None, "validation", "v1", False)]
    pinned = source("owner/name", revision="v1")
    assert fingerprint(pinned) == "revision:v1"
    assert fingerprint(source("owner/name")) == f"fingerprint:{made._fingerprint}"
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *_, **__: type("Info", (), {"sha": "abc"}))
    assert fingerprint(source("owner/name"), streaming=True) == "commit:abc"
    assert fingerprint(pinned) == fingerprint(pinned, streaming=True) == "revision:v1", "as without a network"


def test_hub_dataset_that_does_not_load(monkeypatch: Any) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("Dataset 'owner/nmae' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"owner/nmae \(split 'train'\): neither a file here nor a hub dataset"):
        rows_of("owner/nmae")
    with pytest.raises(DataError, match=r"\(split 'train', revision 'v9'\): neither .* the revision and the network"):
        rows_of("owner/nmae", revision="v9")


def test_a_file_has_no_revision(tmp_path: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"revision means a hub id's version; .*a\.jsonl is a file \(got 'v1'\)"):
        rows_of(path, revision="v1")


def test_fingerprint_is_the_files_sha256(tmp_path: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n')
    assert fingerprint(source(path)) == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


FILES = [
    ("missing.jsonl", None, r"no file .*missing\.jsonl.*relative paths start at"),
    ("empty.jsonl", b"", r"empty\.jsonl is empty \(0 bytes\)"),
    ("blank.jsonl", b"\n \n", r"blank\.jsonl holds no rows"),
    ("none.json", b"[]", r"none\.json holds no rows"),
    ("head.csv", b"text\n", r"head\.csv holds no rows"),
    ("notes.txt", b"hello", r"unknown file ending \(got '\.txt'\)\. Allowed: \.jsonl"),
    ("utf16.jsonl", '{"text": "a"}'.encode("utf-16"), r"is UTF-16, not UTF-8.*iconv -f UTF-16"),
    ("latin.csv", b"text\nok\nK\xf6ln\n", r"latin\.csv row 3: not UTF-8: byte 0xf6 at byte 2 of the line.*iconv"),
    ("latin.json", b'[{"text":\n"K\xf6ln"}]', r"latin\.json row 2: not UTF-8: byte 0xf6.*iconv"),
    ("broken.json", b'[{"text": "a"}', r"broken\.json: broken JSON: .*line 1 column"),
    ("lines.json", b'{"text": "a"}\n{"text": "b"}\n', r"looks like JSON Lines: rename it to \.jsonl"),
    ("two.json", b'{"train": [], "test": []}', r"an object with 2 lists \(got \['train', 'test'\]\)"),
    ("number.json", b"7", r"number\.json holds a int.*a list of rows"),
    ("twice.csv", b"text,text\na,b\n", r"row 1: not a header with a different name for each column"),
    ("nameless.csv", b"text,\na,b\n", r"row 1: not a header"),
    ("quotes.csv", b'text\nok\n"a" b\n', r"quotes\.csv row 3: broken CSV"),
    ("bad.parquet", b"PAR1 but not really", r"bad\.parquet is not a readable Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=[name for name, _, _ in FILES])
def test_files_that_cannot_be_read(name: Any, content: Any, message: Any, tmp_path: Any) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        rows_of(path)


def test_a_folder_is_no_file(tmp_path: Any) -> None:
    with pytest.raises(DataError, match=r"is a folder.*Name the file in it"):
        rows_of(tmp_path)


def test_neither_path_nor_hub_id() -> None:
    with pytest.raises(DataError, match=r"no data at \.\./a b/c"):
        rows_of("../a b/c")


LINES = [
    ("a.jsonl", b'{"text": "a"}\n{"text": \n{"text": "c"}\n', 2, r"broken JSON: Expecting value"),
    ("b.jsonl", b'{"text": "a"}\n["b"]\n', 2, r"row is a list, not an object: \['b'\]"),
    ("c.jsonl", b'{"text": "a"}\n{"text": "K\xf6ln"}\n', 2, r"not UTF-8: byte 0xf6 at byte 12 of the line"),
    ("d.json", b'[{"text": "a"}, 5]', 2, r"row is a int, not an object: 5"),
    (
        "e.csv",
        b"prompt,completion\na,b\nc,d,e\n",
        3,
        r"too many cells: 3, where the header has 2 \(prompt, completion\)",
    ),
    ("f.csv", b"prompt,completion\na\n", 2, r"too few cells: 1, where the header has 2.*separator or a line break"),
    ("g.tsv", b"a\tb\nc\td\te\n", 2, r"too many cells: 3.*Quote cells that hold tabs, each closed on its own line"),
]


@pytest.mark.parametrize(("name", "content", "number", "message"), LINES, ids=[line[0] for line in LINES])
def test_rows_that_cannot_be_read_are_handed_on(
    name: Any, content: Any, number: Any, message: Any, tmp_path: Any
) -> None:
    import re

    path = tmp_path / name
    path.write_bytes(content)
    at, text = only_error(path)
    assert at == number and re.search(message, text)
