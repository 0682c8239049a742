"""E2E's meaning representations with all their references, and the BLEU of a run's texts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

MAX_NEW_TOKENS, ROWS_AT_ONCE = 80, 25


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
    lines = [json.dumps({"mr": mr, "ref": references[mr][0], "references": references[mr]}) for mr in chosen]
    held_out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [f"data.train={data / 'devset.csv'}", f"data.eval={held_out}"]


def bleu(run_folder: Path, held_out: Path) -> float:
    """BLEU, 0..100, of greedy texts for the rows of `write_e2e`, in the run's compute dtype."""
    from qlora_kit.data.eval_rows import eval_rows
    from qlora_kit.data.report import DataReport
    from qlora_kit.eval.metrics import compute_metric
    from qlora_kit.generate import decode, generate_greedily
    from qlora_kit.model.quantized import expanded
    from qlora_kit.train.restore import load_run_tokenizer, load_tuned
    from qlora_kit.train.run_folder import RunFolder

    run = RunFolder.open(run_folder)
    model, tokenizer = load_tuned(run), load_run_tokenizer(run)
    asked = eval_rows(run.recipe().data, tokenizer, 0, None, DataReport([]))
    with expanded(model, model.dtype):
        prompts = [row.prompt_ids.tolist() for row in asked]
        ids = generate_greedily(model, tokenizer, prompts, MAX_NEW_TOKENS, ROWS_AT_ONCE)
    said = [decode(tokenizer, answer).strip() for answer in ids]
    references = [json.loads(line)["references"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    (run_folder / "texts.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    return float(compute_metric("bleu", predictions=said, references=references)["bleu"])
