"""E2E's meaning representations with all their references, and the scores of what a run says of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path


def write_e2e(data: Path, held_out: Path, rows: int) -> list[str]:
    """Writes `rows` of the test set's meaning representations, evenly over it, each with all its references.

    Returns: the overrides of the recipe smollm2-e2e that use them.
    """
    references: dict[str, list[str]] = {}
    with (data / "testset_w_refs.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            references.setdefault(row["mr"], []).append(row["ref"])
    facts = list(references)
    chosen = [facts[k * len(facts) // rows] for k in range(min(rows, len(facts)))]
    lines = [json.dumps({"mr": mr, "ref": references[mr]}) for mr in chosen]
    held_out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [
        f"data.train={data / 'devset.csv'}",
        f"data.eval={held_out}",
        "eval.max_rows=null",
        "eval.batch_size=25",
        "eval.dtype=compute",
    ]


def text_scores(run_folder: Path) -> dict[str, float]:
    """What `qlora-kit eval --form tuned` finds: BLEU and chrF in 0..100, NIST from 0 up, the others in 0..1."""
    from rich.console import Console

    from qlora_kit.eval.run import evaluate_run
    from qlora_kit.train.run_folder import RunFolder

    found = evaluate_run(RunFolder.open(run_folder), Console(quiet=True), ["tuned"])
    return {name: score.value for name, score in found.forms["tuned"].scores.items()}
