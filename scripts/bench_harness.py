"""lm-eval's numbers by its own `hf` back-end, by our torch path and by an fp32 bundle: the same rows, the same numbers.

    python scripts/bench_harness.py --data PATH [--out runs/bench_harness]

PATH holds mmlu/, gsm8k/ and wikitext-2/. Tasks that are not asked keep what benchmarks/harness.json says of them; an
empty --rows writes the tables again. The model is the demo's SmolLM2-135M in fp32: a run of one step, at a learning
rate that changes nothing, makes the bundle. Writes benchmarks/harness.json and .md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_runs import RESULTS, environment, hardware_line, train_run, write

ROWS = ["mmlu_anatomy=40", "gsm8k=5", "wikitext=20"]
TOLERANCE = {"metrics": 1e-5, "log_probabilities": 1e-4}  # relative where numbers are above 1
HF, TORCH, BUNDLE = "hf", "torch", "bundle_fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mmlu/, gsm8k/ and wikitext-2/")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_harness"))
    parser.add_argument("--rows", nargs="*", default=ROWS, metavar="TASK=N", help=f"default: {' '.join(ROWS)}")
    parser.add_argument("--characters", type=int, help="of each WikiText article only the first so many, to be quick")
    options = parser.parse_args()
    run = _untrained_run(options.out)
    data = _shortened(options) if options.characters else options.data
    found = _known()
    for task, rows in (text.split("=") for text in options.rows):
        by_backend = {name: _evaluate(load(), task, data, int(rows)) for name, load in _backends(run).items()}
        cut = f", the first {options.characters} characters" if options.characters and task == "wikitext" else ""
        found = _known() | {f"{task}{cut}": by_backend}
        _report(found, environment(run))
    _report(found, environment(run))
    for by_backend in found.values():
        for name in (TORCH, BUNDLE):
            if any(_distance(by_backend, name, what) > most for what, most in TOLERANCE.items()):
                sys.exit(f"{name} differs from {HF}")


def _shortened(options: argparse.Namespace) -> Path:
    """A folder like --data, with the beginnings of the articles."""
    from qlora_kit.eval.harness.local_rows import read_wikitext

    folder: Path = options.out / "data"
    (folder / "wikitext-2").mkdir(parents=True, exist_ok=True)
    for name in ("mmlu", "gsm8k"):
        if not (folder / name).exists():
            (folder / name).symlink_to((options.data / name).resolve())
    pages = [page[: options.characters] for page in read_wikitext(options.data, "")["test"]["page"]]
    text = "".join(page if page.endswith("\n") else f"{page}\n" for page in pages)
    (folder / "wikitext-2" / "test.txt").write_text(text, encoding="utf-8")
    return folder


def _known() -> dict[str, Any]:
    """What was found before, by task."""
    file = RESULTS / "harness.json"
    tasks: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["tasks"] if file.exists() else {}
    return tasks


def _untrained_run(out: Path) -> Path:
    """A run whose adapter is as good as zero on a base that is not quantized, and its fp32 bundle."""
    out.mkdir(parents=True, exist_ok=True)
    held_out = out / "eval.jsonl"
    lines = Path("demo/eval.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    held_out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    overrides = [
        f"data.eval={held_out}",
        "base.quant=none",
        "base.compute_dtype=fp32",
        "train.max_steps=1",
        "train.warmup_steps=0",
        "train.lr=1.0e-12",
        "export.profiles=[fp32]",
    ]
    run = train_run("smollm2-sentiment", "untrained", out, overrides)
    if not (run / "bundles" / "fp32").is_dir():
        subprocess.run([sys.executable, "-m", "qlora_kit.cli", "export", str(run)], check=True)
    return run


def _backends(path: Path) -> dict[str, Callable[[], Any]]:
    """Name of each back-end, and a function that loads it as a model of lm-eval's."""
    from lm_eval.models.huggingface import HFLM

    from qlora_kit.eval.harness.engines import engine_of
    from qlora_kit.eval.harness.language_model import HarnessModel
    from qlora_kit.eval.run import find_forms
    from qlora_kit.model.load import to_reference
    from qlora_kit.train.restore import load_run_base, load_run_tokenizer
    from qlora_kit.train.run_folder import RunFolder

    run = RunFolder.open(path)
    tokenizer = load_run_tokenizer(run)
    forms: dict[str, Any] = dict(find_forms(run, tokenizer))

    def hf() -> Any:
        model: Any = to_reference(load_run_base(run, "none")).eval()
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)

    return {
        HF: hf,
        TORCH: lambda: HarnessModel(engine_of(forms["base"]())),
        BUNDLE: lambda: HarnessModel(engine_of(forms["bundle_fp32"]())),
    }


def _evaluate(model: Any, task: str, data: Path, limit: int) -> dict[str, Any]:
    """lm-eval's metrics, and each row's metrics and answers."""
    import lm_eval

    from qlora_kit.eval.harness.tasks import load_tasks

    started = time.perf_counter()
    found: Any = lm_eval.evaluate(model, load_tasks([task], data), limit=limit, bootstrap_iters=1)
    samples = sorted(found["samples"][task], key=lambda sample: (sample["filter"], sample["doc_id"]))
    numbers = {key: value for key, value in found["results"][task].items() if "," in key and "_stderr" not in key}
    rows = [[list(_flat(answer)) for answer in sample["resps"]] for sample in samples]
    return {"metrics": numbers, "rows": len({s["doc_id"] for s in samples}), "answers": rows} | {
        "seconds": round(time.perf_counter() - started, 1)
    }


def _flat(value: Any) -> Any:
    """The numbers and texts of nested lists, one after the other."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _distance(by_backend: dict[str, Any], name: str, what: str) -> float:
    """The largest difference of a back-end from `hf`, relative where numbers are above 1; infinite where a generated
    answer, or whether a continuation is the greedy one, differs.

    Args:
        what: `metrics`, or `log_probabilities` (and answers).
    """
    key = {"metrics": "metrics", "log_probabilities": "answers"}[what]
    sides = (by_backend[side][key] for side in (HF, name))
    expected, got = ([*_flat([*side.values()] if isinstance(side, dict) else side)] for side in sides)
    found = 0.0
    for one, other in zip(expected, got, strict=True):
        if isinstance(one, float) and isinstance(other, float):
            found = max(found, abs(other - one) / max(1.0, abs(one)))
        elif one != other:
            return float("inf")
    return found


def _report(found: dict[str, Any], env: dict[str, Any]) -> None:
    from importlib.metadata import version

    scores, distances = [], []
    for task, by_backend in found.items():
        rows = str(by_backend[HF]["rows"])
        for key in by_backend[HF]["metrics"]:
            numbers = [f"{by_backend[name]['metrics'][key]:.7g}" for name in (HF, TORCH, BUNDLE)]
            scores.append(" | ".join(["", task, key.removesuffix(",none"), rows, *numbers, ""]).strip())
        far = [f"{_distance(by_backend, name, what):.1e}" for what in TOLERANCE for name in (TORCH, BUNDLE)]
        seconds = [f"{by_backend[name]['seconds']:.0f}" for name in (HF, TORCH, BUNDLE)]
        distances.append(" | ".join(["", task, *far, *seconds, ""]).strip())
    table = (
        "# lm-eval's numbers by three back-ends\n\nSmolLM2-135M-Instruct (the demo's file, dequantized) in fp32 on the "
        "same rows: lm-eval's own `hf` back-end, our torch\npath, an fp32 ONNX bundle.\n\n"
        "| task | metric | rows | `hf` | torch | bundle |\n|---|---|---|---|---|---|\n" + "\n".join(scores) + "\n\n"
        "The largest differences from `hf`, relative where numbers are above 1. Generated answers, and which "
        "continuations are\ngreedy, are the same in all (`inf` otherwise). Allowed: "
        + ", ".join(f"{most:.0e} for {what.replace('_', '-')}" for what, most in TOLERANCE.items())
        + ".\n\n| task | metrics, torch | metrics, bundle | log-probabilities, torch | log-probabilities, bundle "
        "| `hf`, s | torch, s | bundle, s |\n|---|---|---|---|---|---|---|---|\n" + "\n".join(distances) + "\n\n"
        "The seconds are of a busy machine, and no comparison.\n\n`python scripts/bench_harness.py --data PATH` on "
        f"lm-eval {version('lm-eval')}, onnxruntime {version('onnxruntime')}; " + hardware_line(env)
    )
    write("harness", {"tolerance": TOLERANCE, "tasks": found, "lm_eval": version("lm-eval"), **env}, table)


if __name__ == "__main__":
    main()
