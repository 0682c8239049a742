"""Scores texts that `qlora-kit predict` wrote as `qlora-kit eval` does (eval.answer: text), with 95% intervals.

    qlora-kit predict RUN --input rows.jsonl --output answers.jsonl
    python scripts/score_texts.py answers.jsonl --reference target

With --group, rows with the same value there are one row: its first answer, against the references of all of them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_kit.data.examples import RowError
from qlora_kit.data.sources import read_rows
from qlora_kit.eval.intervals import Interval
from qlora_kit.eval.task_score import interval
from qlora_kit.eval.task_scores import METEOR_NOTE, texts
from qlora_kit.recipe import DataSource


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, help="what predict wrote: .jsonl or .csv")
    parser.add_argument("--reference", required=True, metavar="COLUMN", help="the text to compare with")
    parser.add_argument("--answer", default="generated_text", metavar="COLUMN", help="default generated_text")
    parser.add_argument("--group", metavar="COLUMN", help="rows with the same value here share their references")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args()
    answers, references = answers_and_references(options.answers, options.answer, options.reference, options.group)
    found = scores(answers, references)
    if options.json:
        print(json.dumps({"rows": len(answers), "scores": {name: asdict(value) for name, value in found.items()}}))
        return
    print(f"{len(answers)} rows")
    for name, value in found.items():
        print(f"{name:17} {value.value:8.4f} [{value.low:.4f}, {value.high:.4f}]")
    print(METEOR_NOTE)


def scores(answers: list[str], references: list[list[str]], seed: int = 0) -> dict[str, Interval]:
    """BLEU and chrF in 0..100, NIST from 0 up, the others in 0..1; references: [rows][references]."""
    return {name: interval(score, seed) for name, score in texts(answers, references).scores.items()}


def answers_and_references(
    path: Path, answer: str, reference: str, group: str | None = None
) -> tuple[list[str], list[list[str]]]:
    """[rows] and [rows][references].

    Raises:
        SystemExit: a row has no such column, or no text in it.
        DataError: the file cannot be read.
    """
    answers: list[str] = []
    references: dict[Any, list[str]] = {}
    for row in read_rows(DataSource(path=str(path))):
        if isinstance(row.value, RowError):
            raise SystemExit(f"{path} row {row.number}: {row.value}")
        for column in (answer, reference, *([group] if group else [])):
            if not isinstance(row.value.get(column), str):
                raise SystemExit(
                    f"{path} row {row.number}: no text in column {column!r}; it has {', '.join(row.value)}"
                )
        key = row.value[group] if group else row.number
        if key not in references:
            answers.append(row.value[answer])
        references.setdefault(key, []).append(row.value[reference])
    return answers, list(references.values())


if __name__ == "__main__":
    main()
