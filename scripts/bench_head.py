"""What does a head in 8 or 4 bit cost? Held-out loss before and after a short training, SmolLM2.

    python scripts/bench_head.py [--steps 20] [--rows 100] [--recipe smollm2-sentiment]

Each head is trained with itself. Its loss is taken through its codes, and through the same model with the dequantized
head, expanded whole; then compared with the run whose head is in 16 bit. Writes benchmarks/head_quant.json and .md.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from bench_runs import RESULTS, environment, hardware_line, train_run, write

HEADS = {"none": "16 bit", "int8": "int8", "nf4": "nf4, double"}
ROWS_AT_ONCE = 10
READ = """\
Through codes or through the dequantized head the loss is the same: pieces only sum in another order. int8 stays
under 0.5% of the 16-bit head's loss, before training and after; nf4 does not, so `plan --budget` chooses int8 alone.
"""
SEED, SAMPLES = 0, 10_000  # of the bootstrap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="smollm2-sentiment")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=100, help="held-out rows that the loss is taken over")
    parser.add_argument("--train-on", choices=("assistant", "all"), default="all", help="tokens that carry loss")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_head"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    found = {head: measured(options, head) for head in HEADS}
    report(options, found)


def measured(options: argparse.Namespace, head: str) -> dict[str, Any]:
    """Trains with the head in codes; gives bytes of the head, and losses as `row_sums` gives them."""
    import torch

    from qlora_kit.model.quantized_head import coded_head
    from qlora_kit.train.restore import load_run_base, load_run_tokenizer, load_tuned
    from qlora_kit.train.run_folder import RunFolder

    torch.set_num_threads(options.threads)
    overrides = [
        f"base.head_quant={head}",
        f"data.train_on={options.train_on}",
        f"train.max_steps={options.steps}",
        f"train.threads={options.threads}",
        "train.warmup_steps=2",
        "train.eval_every=null",
        "train.eval_batches=1",
        "eval.samples=0",
    ]
    run = RunFolder.open(train_run(options.recipe, f"head-{head}", options.out, overrides))
    batches = held_out(run, load_run_tokenizer(run), options.rows)
    models: dict[str, Any] = {"base": load_run_base(run), "trained": load_tuned(run)}
    codes = coded_head(models["base"])
    size = models["base"].get_output_embeddings().weight.nbytes if codes is None else codes.stored_bytes()
    found: dict[str, Any] = {"bytes": size, "environment": environment(run.path)}
    for name, model in models.items():
        found[name] = row_sums(model, batches)
        if codes is not None:
            found[f"{name}, dequantized"] = row_sums(with_plain_head(model), batches)
    return found


def held_out(run: Any, tokenizer: Any, rows: int) -> list[Any]:
    """The first held-out rows, in batches."""
    from qlora_kit.data.collate import collate
    from qlora_kit.data.dataset import prepare

    recipe = run.recipe()
    taken = list(prepare(recipe.data, tokenizer, recipe.run.seed).eval)[:rows]
    parts = [taken[k : k + ROWS_AT_ONCE] for k in range(0, len(taken), ROWS_AT_ONCE)]
    return [collate(part, tokenizer.pad_token_id) for part in parts]


def with_plain_head(model: Any) -> Any:
    """The model, in place, with the dequantized weight instead of codes."""
    import torch
    from torch import nn

    from qlora_kit.model.quantized_head import CodedEmbedding, coded_head

    head = coded_head(model)
    assert head is not None
    weight = nn.Parameter(head.dequantize(torch.bfloat16), requires_grad=False)
    plain = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    plain.weight = weight
    embedding = model.get_input_embeddings()
    if isinstance(embedding, CodedEmbedding):
        model.set_input_embeddings(embedding.expanded(weight))
    model.set_output_embeddings(plain)
    return model


def row_sums(model: Any, batches: list[Any]) -> np.ndarray:
    """Summed loss and loss tokens of each row, [rows, 2]."""
    import torch

    from qlora_kit.tasks.loss import row_losses

    with torch.no_grad():
        found = [torch.stack(row_losses(model.eval(), batch), 1) for batch in batches]
    return torch.cat(found).double().numpy()


def change(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """How much larger our loss is, in shares of theirs, with a 95% bootstrap interval over rows."""
    from qlora_kit.eval.intervals import bootstrap

    def shares(drawn: np.ndarray) -> np.ndarray:
        ratios = [one[drawn, 0].sum(1) / one[drawn, 1].sum(1) for one in (ours, theirs)]
        return np.asarray(ratios[0] / ratios[1] - 1)

    found = bootstrap(len(ours), shares, SAMPLES, 0.95, SEED)
    return found.value, found.low, found.high


def loss(sums: np.ndarray) -> float:
    return float(sums[:, 0].sum() / sums[:, 1].sum())


def report(options: argparse.Namespace, found: dict[str, Any]) -> None:
    rows, tree = [], {}
    for head, label in HEADS.items():
        for moment in ("base", "trained"):
            ours = found[head][moment]
            line: dict[str, Any] = {"loss": loss(ours), "bytes": found[head]["bytes"]}
            cells = ["", ""]
            if head != "none":
                line["against_dequantized"] = loss(ours) / loss(found[head][f"{moment}, dequantized"]) - 1
                line["against_16_bit"] = change(ours, found["none"][moment])
                value, low, high = line["against_16_bit"]
                cells = [f"{line['against_dequantized']:+.4%}", f"{value:+.2%} [{low:+.2%}, {high:+.2%}]"]
            tree[f"{head}, {moment}"] = line
            size = f"{line['bytes'] / 2**20:.1f} MiB"
            rows.append(f"| {label} | {size} | {moment} | {line['loss']:.4f} | {cells[0]} | {cells[1]} |")
    env = found["none"]["environment"]
    tokens = int(found["none"]["base"][:, 1].sum())
    table = (
        "# The head in 8 or 4 bit\n\n"
        f"{options.recipe}: SmolLM2-135M, NF4 base, bf16; loss in nats a token on {options.rows} held-out rows "
        f"({tokens} tokens: {options.train_on}), before and after {options.steps} steps, each trained with its own "
        "head. The head is the embedding too. Brackets are 95% bootstrap intervals over rows.\n\n"
        "| head | bytes | | held-out loss | against the dequantized head, whole | against 16 bit |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"`python scripts/bench_head.py --steps {options.steps} --rows {options.rows}` on "
        + hardware_line(env)
        + f"\n{READ}"
    )
    about = {"recipe": options.recipe, "steps": options.steps, "rows": options.rows, "train_on": options.train_on}
    write("head_quant", about | {"heads": tree} | env, table, options.results)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
