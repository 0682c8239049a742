"""One decoder in a process of its own, run by another engine: its speed and memory, or its distance from a reference.

    python scripts/decoder_engines.py speed|quality genai|runtime|llama.cpp PATH WORK [--threads 2]

`bench_profiles.py` starts it. WORK holds rows.json ([{"input_ids": [...], "loss_positions": [...]}]) and reference.npy
(float32 logits of all rows, [tokens, vocab]). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

PROMPT, ANSWER, REPEATS = 512, 64, 5
Logits = NDArray[np.float32]


class Engine(Protocol):
    def logits(self, ids: list[int]) -> Logits:
        """float32 [tokens, vocab] after each token."""

    def answer(self, prompt: list[int], tokens: int) -> Iterator[int]:
        """Greedy tokens."""


class Genai:
    """onnxruntime-genai for answers; its graph in plain onnxruntime for logits."""

    def __init__(self, folder: Path, threads: int, answers: bool) -> None:
        self.folder, self.threads = folder, threads
        if answers:
            import onnxruntime_genai as genai

            self.genai, config = genai, genai.Config(str(folder))
            options = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": options}}))
            self.model = genai.Model(config)
        else:
            self._open_graph()

    def _open_graph(self) -> None:
        import onnxruntime as ort

        config = json.loads((self.folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        self.session = ort.InferenceSession(str(self.folder / config["filename"]), options)
        shape = (1, config["num_key_value_heads"], 0, config["head_size"])
        past = [entry for entry in self.session.get_inputs() if entry.name.startswith("past")]
        self.past = {
            entry.name: np.zeros(shape, np.float16 if "float16" in entry.type else np.float32) for entry in past
        }

    def logits(self, ids: list[int]) -> Logits:
        row = np.array([ids])
        inputs = {"input_ids": row, "attention_mask": np.ones_like(row), **self.past}
        found: Logits = self.session.run(["logits"], inputs)[0][0].astype(np.float32)
        return found

    def answer(self, prompt: list[int], tokens: int) -> Iterator[int]:
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=len(prompt) + tokens, min_length=len(prompt) + tokens, do_sample=False)
        generator = self.genai.Generator(self.model, params)
        generator.append_tokens(np.array(prompt, np.int32))
        for _ in range(tokens):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])


class Runtime:
    """qlora-runtime."""

    def __init__(self, folder: Path, threads: int, answers: bool) -> None:
        from qlora_runtime import Bundle

        self.bundle = Bundle.open(folder, check_hashes=False, threads=threads)

    def logits(self, ids: list[int]) -> Logits:
        found: Logits = self.bundle.logits([ids])[0]
        return found

    def answer(self, prompt: list[int], tokens: int) -> Iterator[int]:
        yield from self.bundle.best_tokens(prompt, [0] * tokens)  # reads this many, whatever comes


class LlamaCpp:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, file: Path, threads: int, answers: bool) -> None:
        from llama_cpp import Llama

        self.model = Llama(
            str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, logits_all=not answers, verbose=False
        )

    def logits(self, ids: list[int]) -> Logits:
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids)])

    def answer(self, prompt: list[int], tokens: int) -> Iterator[int]:
        self.model.reset()
        self.model.eval(prompt)
        for place in range(tokens):
            token = int(self.model.sample(temp=0.0, repeat_penalty=1.0))
            yield token
            if place + 1 < tokens:
                self.model.eval([token])


ENGINES: dict[str, Any] = {"genai": Genai, "runtime": Runtime, "llama.cpp": LlamaCpp}


def speed(make: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds to load, bytes at the peak, tokens/s of reading and of answering, of each repeat."""
    before, started = _peak_bytes(), time.perf_counter()
    engine: Engine = make(answers=True)
    load_s = time.perf_counter() - started
    ids = [token for row in rows for token in row["input_ids"]]
    prompt = (ids * (1 + PROMPT // len(ids)))[:PROMPT]
    read, answered = [], []
    for _ in range(REPEATS):
        started = time.perf_counter()
        next(engine.answer(prompt, 1))
        read.append(PROMPT / (time.perf_counter() - started))
        stream = engine.answer(prompt[:32], ANSWER)
        next(stream)
        started = time.perf_counter()
        count = sum(1 for _ in stream)
        answered.append(count / (time.perf_counter() - started))
    return {
        "load_s": load_s,
        "peak_bytes": _peak_bytes() - before,
        "prefill_tokens_per_s": read,
        "decode_tokens_per_s": answered,
    }


def quality(make: Any, rows: list[dict[str, Any]], reference: Logits) -> dict[str, Any]:
    """Distances from the reference over all positions, and each row's loss."""
    engine: Engine = make(answers=False)
    start, sums, losses, right = 0, np.zeros(4), [], []
    for row in rows:
        ids = row["input_ids"]
        ours, theirs = engine.logits(ids), np.array(reference[start : start + len(ids)])
        start += len(ids)
        log_q, log_p = _log_softmax(ours), _log_softmax(theirs)
        difference = np.abs(ours - theirs)
        sums += [
            difference.mean(1).sum(),
            (np.exp(log_p) * (log_p - log_q)).sum(),
            (ours.argmax(1) == theirs.argmax(1)).sum(),
            0,
        ]
        sums[3] = np.maximum(sums[3], difference.max())
        places = np.array(row["loss_positions"])
        targets = np.array(ids)[places + 1]
        losses.append([float(-log[places, targets].sum()) for log in (log_q, log_p)] + [len(places)])
        right.append(bool((ours[places].argmax(1) == targets).all()))
    return {
        "mean_logit": sums[0] / start,
        "mean_kl": sums[1] / start,
        "top1_agreement": sums[2] / start,
        "max_logit": sums[3],
        "row_losses": losses,
        "right": right,
    }


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def _peak_bytes() -> int:
    """This process' largest resident set so far, mapped files included."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "quality"))
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("path", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rows = json.loads((options.work / "rows.json").read_text(encoding="utf-8"))

    def make(answers: bool) -> Engine:
        engine: Engine = ENGINES[options.engine](options.path, options.threads, answers)
        return engine

    if options.what == "speed":
        found = speed(make, rows)
    else:
        found = quality(make, rows, np.load(options.work / "reference.npy", mmap_mode="r"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
