"""Models of 7 and 8 billion weights on a CPU: memory while loading as NF4, and of a full training step.

    python scripts/bench_7b.py --shapes llama-3.1-8b [--work FOLDER] [--layers 2] [--threads 2]

Writes each shape's checkpoint with random weights (about 16 GB on disk, removed afterwards unless --keep), loads it in
a fresh process, and trains a few steps in another: rank 16 on all linears, micro batch 1, checkpointing. Memory
is anonymous memory: pages of the checkpoint's own files, which the system may drop at any time, don't count;
they are told apart. Linux only. Writes benchmarks/7b_shapes.json and .md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_runs import RESULTS, hardware_line, this_machine, write
from make_shapes import shapes, write_shape

from qlora_kit.train.memory_limit import anonymous_bytes

GIB = 2**30
OVER_QUANTIZED_GIB = 1.0  # bar while loading: quantized size and so much
STEP_GIB = 7.2  # bar of a training step
STEPS = 3
POLL_S = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-3.1-8b", "qwen2.5-7b", "mistral-7b"])
    parser.add_argument("--layers", type=int, help="only so many layers, for a trial")
    parser.add_argument("--zeros-from", type=int, help="layers from this one on are zeros that take no disk (a trial)")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/bench_7b"))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there, and use those that are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options, options.work)))
        return
    rows = [_measure(options, name) for name in options.shapes]
    _report(options, rows)


def _measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    folder = options.work / name
    if not (options.keep and (folder / "model.safetensors.index.json").is_file()):
        config = shapes()[name] | ({"num_hidden_layers": options.layers} if options.layers else {})
        write_shape(config, folder, zeros_from=options.zeros_from)
        write_tokenizer(folder)
    try:
        return {"shape": name, **{child: _in_a_process(options, child, folder) for child in CHILDREN}}
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def _in_a_process(options: argparse.Namespace, child: str, folder: Path) -> dict[str, Any]:
    limits = ["--threads", str(options.threads), "--sequence", str(options.sequence)]
    command = [sys.executable, __file__, "--child", child, "--work", str(folder), *limits]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(name_and_figures(child, found), file=sys.stderr)
    return found


def name_and_figures(child: str, found: dict[str, Any]) -> str:
    return f"{child}: " + ", ".join(f"{key} {value}" for key, value in found.items())


def load(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Loads as NF4 and looks at memory meanwhile."""
    import torch

    from qlora_kit.model.load import load_base
    from qlora_kit.model.quantized import QuantizedLinear
    from qlora_kit.model.source import find_base

    torch.set_num_threads(options.threads)
    imported = anonymous_bytes()
    source = find_base(str(folder))
    began = time.perf_counter()
    with watched() as peak:
        model = load_base(source, "nf4")
    seconds = time.perf_counter() - began
    codes = sum(layer.stored_bytes() for layer in model.modules() if isinstance(layer, QuantizedLinear))
    plain = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "imports_gib": imported / GIB,
        "codes_gib": codes / GIB,
        "quantized_model_gib": (codes + plain) / GIB,
        "peak_gib": max(peak) / GIB,
        "after_gib": anonymous_bytes() / GIB,
        "mapped_gib": plain / GIB,
        "seconds": seconds,
    }


def step(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains STEPS steps through the toolkit's own loop, and looks at memory meanwhile."""
    from qlora_kit.recipe_file import parse_recipe
    from qlora_kit.train.loop import begin, train_step
    from qlora_kit.train.run_folder import RunFolder
    from qlora_kit.train.session import start_session

    imported = anonymous_bytes()
    recipe = parse_recipe(recipe_for(folder, options))
    run = RunFolder.create(recipe, overwrite=True)
    with run.lock():
        with watched() as loading:
            session = start_session(recipe, run)
            begin(session)
        with watched() as peak:
            stats = [train_step(session, number) for number in range(1, STEPS + 1)]
        session.end()
    times = [one.seconds for one in stats]
    return {
        "imports_gib": imported / GIB,
        "before_gib": peak[0] / GIB,
        "peak_loading_gib": max(loading) / GIB,
        "peak_gib": max(peak) / GIB,
        "tokens": stats[-1].tokens,
        "losses": [one.loss for one in stats],
        "seconds": times,
        "tokens_per_s": stats[-1].tokens / min(times[1:]),
    }


def recipe_for(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    text = "".join(chr(97 + place * 7 % 26) for place in range(2 * options.sequence))  # a token a character
    rows.write_text("".join(json.dumps({"text": text[k:]}) + "\n" for k in range(40)), encoding="utf-8")
    return {
        "run": {"name": "step", "out_dir": str(folder / "runs")},
        "base": {"model": str(folder), "quant": "nf4"},
        "adapter": {"rank": 16, "target_modules": "all-linear"},
        "data": {"train": str(rows), "max_seq_len": options.sequence, "overlong": "truncate"},
        "train": {
            "micro_batch_size": 1,
            "grad_accum_steps": 1,
            "gradient_checkpointing": True,
            "max_steps": STEPS,
            "threads": options.threads,
        },
    }


CHILDREN = {"load": load, "step": step}


@contextmanager
def watched() -> Iterator[list[int]]:
    """Anonymous bytes every few milliseconds of the block."""
    seen, done = [anonymous_bytes()], threading.Event()

    def look() -> None:
        while not done.wait(POLL_S):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()
        seen.append(anonymous_bytes())


def write_tokenizer(folder: Path) -> None:
    """One token a byte: the shapes come without a tokenizer, and the text does not matter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def _report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        loaded, trained = row["load"], row["step"]
        held = loaded["peak_gib"] <= loaded["quantized_model_gib"] + OVER_QUANTIZED_GIB
        fits = max(trained["peak_gib"], trained["peak_loading_gib"]) < STEP_GIB
        lines.append(
            f"| {row['shape']} | {loaded['quantized_model_gib']:.2f} | {loaded['peak_gib']:.2f} "
            f"({'held' if held else 'NOT held'}) | {loaded['seconds']:.0f} | {trained['peak_gib']:.2f} "
            f"({'held' if fits else 'NOT held'}) | {trained['tokens_per_s']:.2f} |"
        )
    env = this_machine()
    part = f" **A trial with {options.layers} layers.**" if options.layers else ""
    part += f" **A trial: layers from {options.zeros_from} on are zeros.**" if options.zeros_from is not None else ""
    table = (
        "# 7B and 8B on a CPU\n\n"
        "Exact shapes, random weights, NF4 with double quantization; rank 16 on all linears, micro batch 1 × "
        f"{options.sequence} tokens, gradient checkpointing, torch's AdamW.{part} Memory is the process's whole "
        "anonymous memory, its imports included; weights that are not quantized stay mapped to the checkpoint's files "
        "and are not part of it.\n\n"
        f"| model | quantized, GiB | peak while loading (bar: quantized + {OVER_QUANTIZED_GIB:.0f}) | seconds "
        f"| peak of a step (bar: {STEP_GIB}) | tokens/s |\n|---|---|---|---|---|---|\n"
        + "\n".join(lines)
        + f"\n\n`python scripts/bench_7b.py --threads {options.threads}` on "
        + hardware_line(env)
    )
    write(
        "7b_shapes",
        {"rows": rows, "layers": options.layers, "zeros_from": options.zeros_from, **env},
        table,
        options.out,
    )


if __name__ == "__main__":
    main()
