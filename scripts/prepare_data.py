"""Makes the rows of those shipped recipes whose data comes in a form of its own: OUT/NAME/train.jsonl and eval.jsonl.

    python scripts/prepare_data.py chat --data data --out data

addresses      addresses/labeled.xml of usaddress (MIT), as fetch_encoder.py leaves it in demo/encoder
topics         mmlu/{dev,val,test}/SUBJECT_SPLIT.csv of hendrycks/test (MIT)
summarization  dolly/databricks-dolly-15k.jsonl (CC BY-SA 3.0), or dolly/dolly_train.json, a part without categories
chat           oasst1/oa_questions.jsonl of OpenAssistant's validation part (artidoro/qlora)
code           none: the functions of this Python's own standard library (PSF-2.0)
recommender    e2e/devset.csv of tuetschek/e2e-dataset (CC BY-SA 4.0)

The same files give the same rows. Rows that belong together (a conversation, a restaurant's facts, a module) are held
out together.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import json
import re
import sysconfig
import tokenize
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Split = tuple[list[Row], list[Row]]
"""Rows to train on, and rows held out."""

TOPICS = {  # MMLU's own (hendrycks/test, categories.py), each with its subjects
    "biology": "college_biology high_school_biology",
    "business": "business_ethics management marketing",
    "chemistry": "college_chemistry high_school_chemistry",
    "computer science": "college_computer_science computer_security high_school_computer_science machine_learning",
    "culture": "human_sexuality sociology",
    "economics": "econometrics high_school_macroeconomics high_school_microeconomics",
    "engineering": "electrical_engineering",
    "geography": "high_school_geography",
    "health": "anatomy clinical_knowledge college_medicine human_aging medical_genetics nutrition "
    "professional_medicine virology",
    "history": "high_school_european_history high_school_us_history high_school_world_history prehistory",
    "law": "international_law jurisprudence professional_law",
    "math": "abstract_algebra college_mathematics elementary_mathematics high_school_mathematics "
    "high_school_statistics",
    "other": "global_facts miscellaneous professional_accounting",
    "philosophy": "formal_logic logical_fallacies moral_disputes moral_scenarios philosophy world_religions",
    "physics": "astronomy college_physics conceptual_physics high_school_physics",
    "politics": "high_school_government_and_politics public_relations security_studies us_foreign_policy",
    "psychology": "high_school_psychology professional_psychology",
}
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
WISH = "Which place would you recommend? {}"
_TURN = re.compile(r"(?:^| )### (Human|Assistant): ?")
_GIST = re.compile(
    r"summar|overview|rundown|(main|key) (points|ideas|events)|tell me about|describe|\bbrief|"
    r"^(what|who) (is|was) (?!.*\b(first|former|largest|biggest)\b)[^,]{3,60}\?$",
    re.IGNORECASE,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PREPARE, help="whose rows")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the files above (default data)")
    parser.add_argument("--out", type=Path, default=Path("data"), help="where NAME/ is written (default data)")
    options = parser.parse_args()
    folder: Path = options.out / options.name
    for part, rows in zip(("train", "eval"), PREPARE[options.name](options.data)):
        write_rows(folder / f"{part}.jsonl", rows)
        print(f"{folder / part}.jsonl: {len(rows)} rows")


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.rename(path)


def addresses(data: Path) -> Split:
    """Words with BIO tags: a part of an address is a span. Of the first 1000 addresses, every fifth is held out."""
    rows = [_address(element) for element in ElementTree.fromstring(_text(data / "addresses" / "labeled.xml"))]
    held_out = 200
    return [row for k, row in enumerate(rows) if k % 5 or k // 5 >= held_out], rows[::5][:held_out]


def topics(data: Path) -> Split:
    """Questions with their choices, and the topic of their subject: dev and val to train on; of test, every seventh
    is held out."""
    train: list[Row] = []
    held_out: list[Row] = []
    for topic, subjects in TOPICS.items():
        for subject in subjects.split():
            for split, rows in (("dev", train), ("val", train), ("test", held_out)):
                lines = csv.reader(_lines(data / "mmlu" / split / f"{subject}_{split}.csv"))
                rows += [{"text": "\n".join(cells[:5]), "label": topic} for cells in lines]
    return train, [row for row in held_out[::7] if row not in train]  # a few questions are in both


def summarization(data: Path) -> Split:
    """Dolly's rows of the category summarization. Of the part without categories those that ask for the gist of a
    text, told by their words and by an answer of at least 100 characters and at most half the text's length."""
    whole = data / "dolly" / "databricks-dolly-15k.jsonl"
    if whole.is_file():
        found = [json.loads(line) for line in _lines(whole)]
        rows = [_as_alpaca(row) for row in found if row["category"] == "summarization" and row["context"].strip()]
    else:
        rows = [row for row in json.loads(_text(data / "dolly" / "dolly_train.json")) if _asks_for_gist(row)]
    return _by_group(rows, lambda row: row["input"], every=5)


def chat(data: Path) -> Split:
    """The English conversations; those that begin with the same question stay together."""
    rows = [json.loads(line) for line in _lines(data / "oasst1" / "oa_questions.jsonl")]
    chats = [{"messages": conversation(row["input"], row["output"])} for row in rows if row["lang"] == "en"]
    return _by_group(chats, lambda row: row["messages"][0]["content"])


def code(_: Path) -> Split:
    """Functions with a docstring, whole: to go on from signature and docstring is what HumanEval asks."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(library.rglob("*.py")) if not NOT_LIBRARY & set(file.relative_to(library).parts)]
    found = [(file, text) for file in files for text in documented_functions(file)]
    train, held_out = _by_group([{"file": file, "text": text} for file, text in found], lambda row: row["file"])
    return [{"text": row["text"]} for row in train], [{"text": row["text"]} for row in held_out]


def recommender(data: Path) -> Split:
    """What is said of a restaurant, without its name, to its name; one list of facts is on one side alone."""
    rows = list(csv.DictReader(_lines(data / "e2e" / "devset.csv")))
    train, held_out = _by_group(rows, lambda row: row["mr"])
    wishes = [_wish(row) for row in train]
    return wishes, [wish for wish in map(_wish, held_out) if wish not in wishes]  # other facts, the same words


PREPARE: dict[str, Callable[[Path], Split]] = {
    "addresses": addresses,
    "topics": topics,
    "summarization": summarization,
    "chat": chat,
    "code": code,
    "recommender": recommender,
}


def conversation(before: str, answer: str) -> list[dict[str, str]]:
    """The turns of `### Human: ... ### Assistant: ... ### Human: ... ### Assistant:`, and the answer to them.

    Raises:
        SystemExit: the turns do not alternate, or one is empty.
    """
    _, *parts = _TURN.split(f"{before} {answer}" if before.endswith(":") else before)
    said_by, contents = parts[::2], [content.strip() for content in parts[1::2]]
    if len(said_by) % 2 or said_by != ["Human", "Assistant"] * (len(said_by) // 2) or not all(contents) or not said_by:
        raise SystemExit(f"no conversation of a human and an assistant in turn: {before[:80]!r} ...")
    return [
        {"role": "user" if name == "Human" else "assistant", "content": text} for name, text in zip(said_by, contents)
    ]


def documented_functions(file: Path) -> Iterator[str]:
    """Sources of a module's public functions with a docstring and a body, of 100 to 1500 characters."""
    with tokenize.open(file) as opened:  # in the encoding that the file declares
        source = opened.read()
    lines = source.split("\n")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            text = _source_of(node, lines)
            if 100 <= len(text) <= 1500 and not node.name.startswith("_"):
                yield text


def _source_of(node: ast.FunctionDef, lines: list[str]) -> str:
    """As ast.get_source_segment, which splits the whole module for each function."""
    *body, last = lines[node.lineno - 1 : node.end_lineno]
    return "\n".join([*body, last.encode()[: node.end_col_offset].decode()])[node.col_offset :]


def _address(element: ElementTree.Element) -> Row:
    words, tags, before = [], [], ""
    for part in element:
        for word in (part.text or "").split():
            words.append(word)
            tags.append(f"{'I' if part.tag == before else 'B'}-{part.tag}")
            before = part.tag
    return {"words": words, "tags": tags}


def _asks_for_gist(row: Row) -> bool:
    return bool(_GIST.search(row["instruction"])) and 100 <= len(row["output"]) <= len(row["input"]) / 2


def _as_alpaca(row: Row) -> Row:
    return {"instruction": row["instruction"], "input": row["context"], "output": row["response"]}


def _wish(row: Row) -> Row:
    found = re.search(r"name\[(.*?)\]", row["mr"])
    if found is None:
        raise SystemExit(f"no name[...] among the facts: {row['mr']!r}")
    name = found[1]
    bare = re.escape(name.removeprefix("The "))
    text = re.sub(rf"\b(the )?{bare}\w*", "this place", row["ref"], flags=re.IGNORECASE)
    return {"prompt": WISH.format(text), "completion": name}


def _by_group(rows: list[Row], group: Callable[[Row], Any], every: int = 10) -> Split:
    """One group in `every`, in the order they appear, is held out."""
    places: dict[Any, int] = {}
    for row in rows:
        places.setdefault(group(row), len(places))
    sides: Split = ([], [])
    for row in rows:
        sides[places[group(row)] % every == every - 1].append(row)
    return sides


def _lines(path: Path) -> io.StringIO:
    """Ends at line feeds alone: a text may hold U+2028, which `splitlines` would end a line at."""
    return io.StringIO(_text(path), newline="")


def _text(path: Path) -> str:
    if not path.is_file():
        raise SystemExit(f"no file {path}; --data names the folder it lies in, docs/recipes.md where it is from")
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
