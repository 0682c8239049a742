"""Tiny benchmark files in the published formats."""

from __future__ import annotations

import csv
import json
from pathlib import Path

WORDS = ("stone", "salt", "rope", "bread", "iron", "sea")


def write_task_data(folder: Path, subjects: tuple[str, ...] = ("anatomy",)) -> Path:
    """FOLDER/mmlu, gsm8k, truthfulqa and wikitext-2, a few rows each. Returns `folder`."""
    for subject in subjects:
        for split, rows in (("dev", 5), ("test", 6)):
            file = folder / "mmlu" / split / f"{subject}_{split}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w", encoding="utf-8", newline="") as opened:
                csv.writer(opened).writerows(
                    [f"What is {k}?", "None", "a, boat", WORDS[k % 6], str(k), "ABCD"[k % 4]] for k in range(rows)
                )
    for split in ("train", "test"):
        rows = [{"question": f"How many {word}?", "answer": f"So {k}.\n#### {k}"} for k, word in enumerate(WORDS)]
        write(folder / "gsm8k" / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    truths = [
        {
            "question": f"Is {word} old?",
            "mc1_targets": {"choices": [f"yes {word}", "no", "a boat"], "labels": [1, 0, 0]},
            "mc2_targets": {"choices": [f"yes {word}", "so", "no"], "labels": [1, 1, 0]},
        }
        for word in WORDS
    ]
    write(folder / "truthfulqa" / "validation.json", json.dumps(truths))
    articles = [f" = {word} = \n \n The {word} , and the boat . \n \n = = Of {word} = = \n \n It was short . \n \n" * 1
                for word in WORDS[:4]]  # fmt: skip
    write(folder / "wikitext-2" / "test.txt", " \n" + "".join(articles))
    return folder


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
