"""What does each export profile cost, and how far is it from the model that was trained? Beside other engines' files.

    python scripts/bench_profiles.py RUN [RUN ...] [--rows 64] [--threads 2] [--peer-python VENV/bin/python]

RUNs are exported already (`qlora-kit export RUN --profiles ...`). The bundles of the first, onnxruntime-genai's stock
int4 of its merged weights and, where --peer-python names a Python with llama-cpp-python and gguf, llama.cpp's Q8_0,
Q4_0 and Q4_K_M of the same; of further runs the 4-bit codes that they were trained on. Of each form size, bits a linear
weight, seconds to load, peak memory, tokens/s, and distances from its trained model in fp32 on held-out rows; `right`
are the rows whose answer is the likeliest, token by token. Each figure comes from a fresh process; speeds are taken in
turns. Writes benchmarks/profiles.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_runs import RESULTS, hardware_line, this_machine, write

from qlora_kit.eval.intervals import Interval, bootstrap_ratio, exponentiate
from qlora_kit.export.codes import CODED_BASES
from qlora_kit.plan.shapes import model_shapes

HERE = Path(__file__).parent
LLAMA_CPP = ("Q8_0", "Q4_0", "Q4_K_M")
TURNS = 3
Found = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Form:
    """A model as a file or folder, made from `run`, and what runs it."""

    run: Path
    engine: str
    path: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="exported runs that generate, of one base")
    parser.add_argument("--rows", type=int, default=64, help="held-out rows that distances are taken on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", type=Path, help="a Python with llama-cpp-python and gguf")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_profiles"), help="scratch folder")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    forms = _forms(options)
    found: Found = {name: {"bytes": _size(form.path), "bits": _bits(form)} for name, form in forms.items()}
    for run in options.runs:
        _write_reference(run, options)
        for name, form in forms.items():
            if form.run == run:
                found[name]["quality"] = _child(options, "quality", form)
    for _ in range(TURNS):
        for name, form in forms.items():
            found[name].setdefault("speed", []).append(_child(options, "speed", form))
    _report(options, found)


def _write_reference(folder: Path, options: argparse.Namespace) -> None:
    """WORK/rows.json and WORK/reference.npy: what the trained model says in fp32, its codes never rounded."""
    import torch

    from qlora_kit.data.dataset import prepare
    from qlora_kit.export.rows import proof_rows
    from qlora_kit.model.load import to_reference
    from qlora_kit.train.restore import load_run_tokenizer, load_tuned
    from qlora_kit.train.run_folder import RunFolder

    run = RunFolder.open(folder)
    recipe = run.recipe()
    rows = [row for row, _ in proof_rows(prepare(recipe.data, load_run_tokenizer(run), recipe.run.seed), options.rows)]
    model = to_reference(load_tuned(run))
    with torch.no_grad():
        logits = [model(torch.tensor(row.input_ids)[None]).logits[0].numpy() for row in rows]
    np.save(options.work / "reference.npy", np.concatenate(logits))
    told = [
        {"input_ids": row.input_ids.tolist(), "loss_positions": np.flatnonzero(row.labels[1:] != -100).tolist()}
        for row in rows
    ]
    (options.work / "rows.json").write_text(json.dumps(told), encoding="utf-8")


def _forms(options: argparse.Namespace) -> dict[str, Form]:
    """Each form by its name; peers are made where they are not there yet."""
    forms, first = {}, options.runs[0]
    for run in options.runs:
        for manifest in sorted(run.glob("bundles/[a-z0-9]*/manifest.json")):
            name = manifest.parent.name
            if run == first or name in CODED_BASES:
                whose = name if run == first else f"{name} of {run.name}"
                forms[f"{whose}, genai"] = Form(run, "genai", manifest.parent)
                forms[f"{whose}, qlora-runtime"] = Form(run, "runtime", manifest.parent)
    stock, merged = options.work / "genai-int4", first / "merged"
    if not (stock / "genai_config.json").exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(merged), "-o", str(stock)]
        subprocess.run([*command, "-p", "int4", "-e", "cpu", "-c", str(options.work / "cache")], check=True)
    forms["onnxruntime-genai's int4"] = Form(first, "genai", stock)
    if options.peer_python:
        for kind in LLAMA_CPP:
            forms[f"llama.cpp {kind}"] = Form(first, "llama.cpp", _gguf(options, kind))
    return forms


def _gguf(options: argparse.Namespace, kind: str) -> Path:
    target: Path = options.work / f"{kind}.gguf"
    if not target.exists():
        merged = options.runs[0] / "merged"
        command = [str(options.peer_python), str(HERE / "write_gguf.py"), str(merged), str(target), kind]
        bits = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        target.with_suffix(".bits").write_text(bits.splitlines()[-1], encoding="utf-8")
    return target


def _child(options: argparse.Namespace, what: str, form: Form) -> dict[str, Any]:
    python = options.peer_python if form.engine == "llama.cpp" else sys.executable
    command = [str(python), str(HERE / "decoder_engines.py"), what, form.engine, str(form.path), str(options.work)]
    done = subprocess.run([*command, "--threads", str(options.threads)], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _size(path: Path) -> int:
    """Bytes of weights and graph; tokenizer and reference answers aside."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*.onnx*"))


def _bits(form: Form) -> float:
    """Bits of a weight of the layers' linears, scales, zero points and side branches included; head aside."""
    path = form.path
    if path.is_file():
        return float(path.with_suffix(".bits").read_text(encoding="utf-8"))
    import onnx

    graph = onnx.load(next(path.rglob("*.onnx")), load_external_data=False).graph
    stored = {tensor.name: _tensor_bytes(tensor) for tensor in graph.initializer}
    products = [node for node in graph.node if "MatMul" in node.op_type and "logits" not in node.output]
    for node in graph.node:  # scales lie in fp16 behind a Cast
        if node.op_type == "Cast" and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
    spent = sum(stored.get(name, 0) for node in products for name in node.input[1:])
    config = json.loads((form.run / "merged" / "config.json").read_text(encoding="utf-8"))
    return 8 * spent / sum(linear.weights for linear in model_shapes(config).linears)


def _tensor_bytes(tensor: Any) -> int:
    external = {entry.key: entry.value for entry in tensor.external_data}
    return int(external["length"]) if "length" in external else len(tensor.raw_data)


def _perplexity_ratio(quality: dict[str, Any]) -> Interval:
    """Of the form's perplexity to the reference's, with a 95% bootstrap interval over rows."""
    ours, theirs, tokens = np.array(quality["row_losses"]).T
    return exponentiate(bootstrap_ratio(ours - theirs, tokens))


def _report(options: argparse.Namespace, found: Found) -> None:
    rows = []
    for name, form in found.items():
        speed, quality = form["speed"], form["quality"]
        ratio = _perplexity_ratio(quality)
        form["perplexity_ratio"] = asdict(ratio)
        read = np.concatenate([turn["prefill_tokens_per_s"] for turn in speed])
        answered = np.concatenate([turn["decode_tokens_per_s"] for turn in speed])
        rows.append(
            f"| {name} | {form['bytes'] / 2**20:.0f} | {form['bits']:.2f} "
            f"| {np.median([turn['load_s'] for turn in speed]):.1f} "
            f"| {max(turn['peak_bytes'] for turn in speed) / 2**20:.0f} "
            f"| {np.median(read):.0f} ({read.min():.0f} to {read.max():.0f}) "
            f"| {np.median(answered):.0f} ({answered.min():.0f} to {answered.max():.0f}) "
            f"| {quality['mean_logit']:.4f} | {quality['top1_agreement']:.2%} | {np.mean(quality['right']):.1%} "
            f"| {ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}] |"
        )
    environment = this_machine()
    environment["machine"]["threads"] = options.threads
    table = (
        "# Export profiles: size, speed and distance from the trained model\n\n"
        f"{', '.join(run.name for run in options.runs)}; {options.rows} held-out rows. "
        f"Prefill reads 512 tokens; decode answers 64 after 32; "
        f"medians of {TURNS} processes\nwith 5 repeats each, and their range. Bits are those of the layers' linears "
        "with scales and adapters.\n\n"
        "| form | MiB | bits | load, s | peak, MiB | prefill, tokens/s | decode, tokens/s | mean logit distance "
        "| top-1 | right | perplexity ratio |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\n"
        f"`python scripts/bench_profiles.py RUN ... --rows {options.rows}` on {hardware_line(environment)}"
        "\n![frontier](profiles.png)\n"
    )
    write("profiles", {"forms": found, **environment}, table, options.out)
    _plot(found, options.out / "profiles.png")


def _plot(found: Found, file: Path) -> None:
    """Bits a weight against what they cost in perplexity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="bits a linear weight", ylabel="perplexity ratio - 1", xscale="log", yscale="log")
    for name, form in found.items():
        x, y = form["bits"], max(1e-6, abs(form["perplexity_ratio"]["value"] - 1))
        axes.plot(x, y, "o")
        axes.annotate(name, (x, y), fontsize=7, xytext=(4, 2), textcoords="offset points")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
