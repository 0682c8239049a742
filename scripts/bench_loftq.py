"""How much of what NF4 loses does LoftQ give back before the first step? Answer loss on GSM8K, SmolLM2.

    python scripts/bench_loftq.py --data PATH/gsm8k [--ranks 16 64] [--iterations 1 5] [--rows 50]

The 16-bit base, the NF4 base, and on it LoftQ by weights alone, weighed by the mean squares of each layer's inputs,
and by their whole second moments, over training rows. Writes benchmarks/loftq.json and .md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from bench_runs import RESULTS, hardware_line, this_machine, write

ROWS_AT_ONCE = 5
BASE = Path(__file__).parent.parent / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHED_BY = {"plain": "weights alone", "diagonal": "inputs' mean squares", "full": "inputs' second moments"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--rows", type=int, default=50, help="test rows that the loss is taken over")
    parser.add_argument("--calibration-rows", type=int, default=32, help="training rows that weigh the inputs")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    bench = Bench(options)
    losses = {"16 bit": bench.loss("none"), "NF4": bench.loss("nf4")}
    seconds: dict[str, float] = {}
    for iterations in options.iterations:
        for rank in options.ranks:
            for weighed in WEIGHED_BY:
                name = f"{weighed}, rank {rank}, {iterations} turns"
                losses[name], seconds[name] = bench.started(weighed, rank, iterations)
                report(options, losses, seconds)  # each time: what is done stays done


class Bench:
    """Rows, tokenizer and moments, read once; a model for each figure."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from qlora_kit.data.collate import collate
        from qlora_kit.data.dataset import prepare
        from qlora_kit.data.template import resolve_template
        from qlora_kit.model.load import load_tokenizer
        from qlora_kit.model.source import find_base

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self.source = find_base(str(options.base))
        tokenizer = load_tokenizer(self.source.folder)
        with gsm8k(options) as section:
            template = resolve_template(tokenizer, section)
            tokenizer.chat_template = tokenizer.chat_template if template is None else template
            data = prepare(section, tokenizer, seed=0)
        self.batches, self.calibration = (
            [collate(rows[k : k + ROWS_AT_ONCE], tokenizer.pad_token_id) for k in range(0, len(rows), ROWS_AT_ONCE)]
            for rows in (
                sorted(part, key=lambda row: len(row.input_ids)) for part in (list(data.eval), list(data.train))
            )
        )
        self.moments: dict[bool, dict[str, Any]] = {}

    def model(self, quant: str, whole: bool = False) -> Any:
        from qlora_kit.model.load import load_base

        return load_base(self.source, quant, quantize_later=whole)

    def loss(self, quant: str) -> np.ndarray:
        return self._losses(self.model(quant))

    def started(self, weighed: str, rank: int, iterations: int) -> tuple[np.ndarray, float]:
        """(losses as `_losses` gives them, processor seconds of the decompositions) of a fresh LoftQ adapter."""
        import torch

        from qlora_kit.adapters.inject import wanted_targets
        from qlora_kit.adapters.input_moments import input_moments
        from qlora_kit.adapters.settings import LoftqSettings
        from qlora_kit.adapters.svd_init import Loftq

        model = self.model("nf4", whole=True)
        method = Loftq(LoftqSettings(rank=rank, alpha=2.0 * rank, iterations=iterations))
        if weighed != "plain":
            full = weighed == "full"
            if full not in self.moments:
                targets = wanted_targets(model, method.settings)
                self.moments[full] = input_moments(model, targets, self.calibration, full)
            method.moments = dict(self.moments[full])
        torch.manual_seed(0)
        started = time.process_time()
        method.inject(model)
        seconds = time.process_time() - started
        return self._losses(model.eval()), seconds

    def _losses(self, model: Any) -> np.ndarray:
        """Summed loss and loss tokens of each row, [rows, 2]."""
        import torch

        from qlora_kit.model.quantized import expanded
        from qlora_kit.tasks.loss import row_losses

        with expanded(model, torch.bfloat16):
            found = [torch.stack(row_losses(model, batch), 1) for batch in self.batches]
        return torch.cat(found).double().numpy()


@contextmanager
def gsm8k(options: argparse.Namespace) -> Iterator[Any]:
    """The data section over the first training and test rows."""
    from qlora_kit.recipe import DataSection

    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("train", options.calibration_rows), ("test", options.rows)):
            lines = (options.data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            (Path(folder) / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        columns = {"prompt": "question", "completion": "answer"}
        yield DataSection.model_validate(
            {"train": f"{folder}/train.jsonl", "eval": f"{folder}/test.jsonl", "columns": columns, "max_seq_len": 512,
             "system_prompt": ""}
        )  # fmt: skip


def mean_loss(losses: np.ndarray) -> float:
    return float(losses[:, 0].sum() / losses[:, 1].sum())


def closed(losses: dict[str, np.ndarray], name: str) -> Any:
    """Share of the gap between NF4 and 16 bit that is closed, with a bootstrap interval over rows."""
    from qlora_kit.eval.intervals import bootstrap

    def share(rows: np.ndarray) -> np.ndarray:
        sums = {key: losses[key][rows].sum(1) for key in ("16 bit", "NF4", name)}  # [resamples, 2]
        means = {key: value[:, 0] / value[:, 1] for key, value in sums.items()}
        return (means["NF4"] - means[name]) / (means["NF4"] - means["16 bit"])

    return bootstrap(len(losses[name]), share, 2000, 0.95, 0)


def report(options: argparse.Namespace, losses: dict[str, np.ndarray], seconds: dict[str, float]) -> None:
    from dataclasses import asdict

    found = {name: closed(losses, name) for name in seconds}
    tree = {
        "rows": len(losses["NF4"]),
        "calibration_rows": options.calibration_rows,
        "answer_loss": {name: mean_loss(values) for name, values in losses.items()},
        "gap_closed": {name: asdict(share) for name, share in found.items()},
        "cpu_seconds_to_start": seconds,
        **this_machine(),
    }
    base, nf4 = mean_loss(losses["16 bit"]), mean_loss(losses["NF4"])
    rows = [f"| 16 bit | | | {base:.4f} | | |", f"| NF4 | | | {nf4:.4f} | 0% | |"]
    for name, share in found.items():
        weighed, rank, turns = name.split(", ")
        rows.append(
            f"| LoftQ, {WEIGHED_BY[weighed]} | {rank.split()[1]} | {turns.split()[0]} | {mean_loss(losses[name]):.4f} "
            f"| {share.value:.0%} [{share.low:.0%}, {share.high:.0%}] | {seconds[name]:.0f} |"
        )
    command = f"python scripts/bench_loftq.py --data PATH/gsm8k --rows {options.rows}"
    table = (
        "# LoftQ before the first step\n\n"
        f"SmolLM2-135M, GSM8K answers, loss in nats a token on {tree['rows']} test rows; NF4 with double quantization, "
        "bf16\narithmetic and adapters. Inputs are weighed over "
        f"{options.calibration_rows} training rows. Brackets are 95% bootstrap intervals over rows.\n\n"
        "| base and adapter, fitted to | rank | turns | answer loss | gap closed | CPU seconds |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(rows) + f"\n\n`{command}` on " + hardware_line(tree)
    )
    write("loftq", tree, table, options.out)


if __name__ == "__main__":
    main()
