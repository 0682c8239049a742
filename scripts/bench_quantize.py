"""4-bit quantization on a CPU: this toolkit's path against bitsandbytes' own loop, on the matrices of 7B models.

    python scripts/bench_quantize.py [--repeats 7] [--threads 1] [--shapes llama-3.1-8b qwen2.5-7b mistral-7b]

Both run in one process, turn by turn on the same weights; a ratio is of one turn's two times. Codes and statistics are
compared byte by byte each time. Writes benchmarks/quantize.json and .md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench_runs import RESULTS, hardware_line, this_machine, write
from make_shapes import shapes

from qlora_kit.plan.shapes import model_shapes

BAR = 5.0  # times faster


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["llama-3.1-8b", "qwen2.5-7b", "mistral-7b"])
    parser.add_argument("--kinds", nargs="+", default=["nf4", "fp4"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    rows = [
        {"kind": kind, "shape": list(shape), **measure(kind, shape, options.repeats)}
        for kind in options.kinds
        for shape in matrices(options.shapes)
    ]
    _report(options, rows)


def matrices(names: list[str]) -> list[tuple[int, int]]:
    """The distinct [out, in] of the models' linear layers, smallest first."""
    linears = [linear for name in names for linear in model_shapes(shapes()[name]).linears]
    found = {(linear.out_features, linear.in_features) for linear in linears}
    return sorted(found, key=lambda shape: shape[0] * shape[1])


def measure(kind: str, shape: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Seconds of each turn on a bf16 weight [out, in], and whether all bytes were the same."""
    import bitsandbytes as bnb
    import torch

    from qlora_kit.kernels.quantize_4bit import quantize_4bit

    if torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::quantize_4bit", "CPU"):
        raise SystemExit("bitsandbytes' own loop is replaced in this process: nothing to compare with")
    code = bnb.functional.get_4bit_type(kind, "cpu")
    weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    theirs, ours, equal = [], [], True
    for _ in range(repeats + 1):  # the first turn warms up
        began = time.perf_counter()
        expected = torch.ops.bitsandbytes.quantize_4bit(weight, 64, kind, torch.uint8)
        between = time.perf_counter()
        found = quantize_4bit(weight, 64, code)
        ended = time.perf_counter()
        theirs.append(between - began)
        ours.append(ended - between)
        equal &= all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    return {"bitsandbytes_s": theirs[1:], "ours_s": ours[1:], "bytes_equal": equal}


def _report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    lines, ratios = [], []
    for row in rows:
        out_features, in_features = row["shape"]
        weights = out_features * in_features / 1e6
        turns = [theirs / ours for theirs, ours in zip(row["bitsandbytes_s"], row["ours_s"])]
        ratios += turns
        rates = [f"{weights / median(row[key]):.0f}" for key in ("bitsandbytes_s", "ours_s")]
        same = "yes" if row["bytes_equal"] else "NO"
        spread = f"{median(turns):.1f} ({min(turns):.1f} to {max(turns):.1f})"
        lines.append(f"| {row['kind']} | {out_features} × {in_features} | {' | '.join(rates)} | {spread} | {same} |")
    env = this_machine()
    slow = sum(ratio < BAR for ratio in ratios)
    table = (
        "# Quantizing to 4 bit on a CPU\n\n"
        f"bf16 weights, blocks of 64, {options.repeats} turns each; million weights a second, and the median (least to "
        "largest) of each turn's ratio.\n\n"
        "| kind | matrix | bitsandbytes' loop | here | times faster | same bytes |\n|---|---|---|---|---|---|\n"
        + "\n".join(lines)
        + f"\n\nAll turns: median {median(ratios):.1f}, least {min(ratios):.1f}; {slow} of {len(ratios)} below "
        f"{BAR:.0f} times.\n\n`python scripts/bench_quantize.py --repeats {options.repeats} "
        f"--threads {options.threads}` on " + hardware_line(env)
    )
    write("quantize", {"rows": rows, **env}, table, options.out)


if __name__ == "__main__":
    main()
