"""What does an adapter beside frozen layers cost an answer? Bundles of the profiles int4_exact, nf4 and adapters.

    python scripts/bench_branch.py BUNDLE [BUNDLE ...] [--threads 2] [--repeats 100] [--cpu-time]

Each bundle's graph and the same graph without the adapter's branches answer one token after `--past` others, in turns,
in one process; of a bundle with adapters to swap the base alone, and each adapter. Writes benchmarks/branch.json and
.md.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from bench_runs import RESULTS, hardware_line, this_machine, write
from qlora_runtime import read_manifest
from qlora_runtime.schema import ADAPTER_FILE, ADAPTERS
from qlora_runtime.session import open_session, read_adapter

FROZEN = "/frozen"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--past", type=int, default=64, help="tokens in the cache")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--cpu-time", action="store_true", help="of the process, which other processes hardly change")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    found = {}
    for bundle in options.bundles:
        run, adapters = bundle.resolve().parent.parent.name, read_manifest(bundle).adapters
        if not adapters:
            found[run] = _compare(bundle, {}, options)
            continue
        found[f"{run}, no adapter"] = _compare(bundle, {}, options)
        for name in adapters:
            weights = read_adapter(bundle / ADAPTERS / name / ADAPTER_FILE)
            inputs = {key: value.numpy() for key, value in weights.items()}
            found[f"{run}, adapter {name}"] = _compare(bundle, inputs, options)
    _report(options, found)


def _compare(bundle: Path, adapter: dict[str, np.ndarray], options: argparse.Namespace) -> dict[str, Any]:
    """`adapter`: inputs of the graph with branches."""
    graph = bundle / "onnx" / "model.onnx"
    with tempfile.TemporaryDirectory(dir=bundle.parent) as folder:
        plain = Path(folder) / graph.name
        shutil.copyfile(f"{graph}_data", f"{plain}_data")
        branches = _without_branches(graph, plain)
        sessions = [open_session(path, options.threads) for path in (plain, graph)]
        feeds = [_feed(session, options.past) for session in sessions]
        feeds[1] |= adapter
        spent: list[list[float]] = [[], []]
        clock = time.process_time if options.cpu_time else time.perf_counter
        for turn in range(options.repeats):
            for which in (0, 1) if turn % 2 else (1, 0):
                begin = clock()
                sessions[which].run(["logits"], feeds[which])
                spent[which].append(clock() - begin)
    manifest = read_manifest(bundle)
    return {"plain_s": spent[0], "adapted_s": spent[1], "branches": branches, "profile": manifest.profile}


def _without_branches(graph: Path, plain: Path) -> int:
    """Writes `graph` with each frozen layer's output in the place of the adapted one's; returns how many there are."""
    model = onnx.load(graph, load_external_data=False)
    nodes = list(model.graph.node)
    adapted = [name.removesuffix(FROZEN) for node in nodes for name in node.output if name.endswith(FROZEN)]
    kept = []
    for node in nodes:
        owner = next((y for y in adapted if node.output[0] == y or node.output[0].startswith(f"{y}/")), None)
        if owner is None or node.output[0] == f"{owner}{FROZEN}":
            made = onnx.NodeProto.FromString(node.SerializeToString())
            made.output[0] = made.output[0] if owner is None else owner
            kept.append(made)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in used]
    inputs = [value for value in model.graph.input if "lora_" not in value.name]
    kept_inputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in inputs]
    del model.graph.input[:]
    model.graph.input.extend(kept_inputs)
    held = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors]
    del model.graph.initializer[:]
    model.graph.initializer.extend(held)
    onnx.save(model, plain)
    return len(adapted)


def _feed(session: ort.InferenceSession, past: int) -> dict[str, np.ndarray]:
    feed = {"input_ids": np.array([[5]]), "attention_mask": np.ones((1, past + 1), np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            feed[value.name] = np.zeros((1, value.shape[1], past, value.shape[3]), np.float32)
    return feed


def _report(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, of in found.items():
        plain, adapted = np.array(of["plain_s"]), np.array(of["adapted_s"])
        low, middle, high = np.percentile(plain / adapted, [25, 50, 75])
        rows.append(
            f"| {name} | {of['profile']} | {of['branches']} "
            f"| {1e3 * np.median(plain):.2f} | {1e3 * np.median(adapted):.2f} "
            f"| {middle:.3f} ({low:.3f} to {high:.3f}) | {plain.min() / adapted.min():.3f} |"
        )
    environment = this_machine()
    environment["machine"]["threads"] = options.threads
    table = (
        "# An adapter beside frozen layers: what it costs an answer\n\n"
        f"One token after {options.past}, with and without the adapter's branches, {options.repeats} pairs in turns. "
        "Speed is that of the graph with\nthem over that without: the median pair and the middle half of pairs, and "
        f"the fastest of each.{' Times are CPU time of the process.' if options.cpu_time else ''}\n\n"
        "| run | profile | branches | without, ms | with, ms | speed | of the fastest |\n"
        "|---|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\n`python scripts/bench_branch.py BUNDLE ... --threads {options.threads} --repeats {options.repeats}"
        f"{' --cpu-time' if options.cpu_time else ''}` on {hardware_line(environment)}"
    )
    write("branch", {"runs": found, **environment}, table, options.out)


if __name__ == "__main__":
    main()
