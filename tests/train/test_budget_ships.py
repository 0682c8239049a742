"""What AdaLoRA may publish: only what fits the budget."""

from __future__ import annotations

from pathlib import Path

from tiny_runs import RISING, tiny_tree, train_here, write_gibberish

from qlora_kit.adapters.peft_format import read_adapter
from qlora_kit.recipe_file import parse_recipe


def test_a_best_step_before_the_budget_is_reached_is_not_published(tmp_path: Path, tiny_llama: Path) -> None:
    """On held-out rows whose loss rises, where LoRA would publish an early step."""
    write_gibberish(tmp_path / "eval.jsonl")
    budget = {"method": "adalora", "rank": 2, "init_rank": 4, "prune_every": 1, "final_share": 0.25, "dropout": 0.0}
    tree = tiny_tree(tmp_path, tiny_llama, train={**RISING, "lr": 0.05})
    run = train_here(parse_recipe({**tree, "adapter": budget}))
    published = read_adapter(run.adapter)
    ranks = [len(tensor) for key, tensor in published.tensors.items() if key.endswith("lora_A.weight")]
    layers = 14
    assert sum(ranks) <= 2 * layers
    evals = [record["step"] for record in run.metrics() if record["kind"] == "eval"]
    assert min(evals) < 6 <= run.manifest()["adapter"]["step"]  # the last quarter of 8 steps begins at 6
