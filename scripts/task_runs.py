"""A short run of every text task on real rows, with NF4 and LoRA on MiniLM: what bench_bundles.py exports.

The rows come from the files that docs/recipes.md names, below demo/ and data/. Translation starts from a small T5 of
random weights that is trained whole: no pretrained encoder-decoder comes inside a package.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from bench_runs import train_run
from prepare_data import Row, addresses, write_rows

ENCODER, DATA = Path("demo/encoder"), Path("data")
Section = dict[str, Any]
RATINGS = {"low": 1.0, "average": 3.0, "high": 5.0, "1 out of 5": 1.0, "3 out of 5": 3.0, "5 out of 5": 5.0}
HELD_OUT = 600


@dataclass(frozen=True)
class Shipped:
    """A shipped recipe; `whole`: trained to its end, as a short run of it hardly decides anything."""

    recipe: str
    whole: bool = False


def train_task(name: str, runs: Path, steps: int) -> Path:
    """The finished run of one of `TASKS` below `runs`, trained where it is not there yet."""
    task = TASKS[name]
    if isinstance(task, Shipped):
        short = [] if task.whole else [f"train.max_steps={steps}", "train.epochs=null", "train.save_every=null"]
        return train_run(task.recipe, task.recipe, runs, short)
    runs.mkdir(parents=True, exist_ok=True)
    settings, data = task(runs / "rows" / name)
    translates = settings["type"] == "seq2seq"
    model = _random_t5(runs / "t5") if translates else ENCODER / "model"
    recipe = {
        "run": {"name": name},
        "task": settings,
        "base": {"model": str(model), **({"quant": "none", "compute_dtype": "fp32"} if translates else {})},
        "adapter": {"method": "full"} if translates else {"method": "lora", "rank": 16, "alpha": 32},
        "data": {"max_seq_len": 256, "overlong": "truncate", **data},
        "train": {
            "optimizer": "adamw",
            "lr": 1e-3,
            "warmup_steps": 20,
            "micro_batch_size": 16,
            "max_steps": 4 * steps if translates else steps,  # the T5 starts from nothing
            "gradient_checkpointing": False,
        },
    }
    file = runs / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return train_run(str(file), name, runs, [])


def address_parts(rows: Path) -> tuple[Section, Section]:
    """usaddress: its 1,513 addresses, half of them held out."""
    train, held_out = addresses(ENCODER)
    every = train + held_out
    return {"type": "tagging"}, _written(rows, every)


def same_facts(rows: Path) -> tuple[Section, Section]:
    """Pairs out of E2E: do these facts and this text belong together? Every other text is the one 40 rows on."""
    found = _restaurants()
    pairs = [
        {
            "text_a": row["mr"],
            "text_b": found[(k + 40 * (k % 2)) % len(found)]["ref"],
            "label": "other" if k % 2 else "same",
        }
        for k, row in enumerate(found)
    ]
    return {"type": "classification"}, _written(rows, pairs)


def facts_named(rows: Path) -> tuple[Section, Section]:
    """Several labels out of E2E: which kinds of facts does a text state?"""
    stated = [{"text": row["ref"], "label": re.findall(r"(\w[\w ]*)\[", row["mr"])} for row in _restaurants()]
    return {"type": "classification", "multi_label": True}, _written(rows, stated)


def rating(rows: Path) -> tuple[Section, Section]:
    """A number out of E2E: how do a restaurant's guests rate it, from 1 to 5?"""
    found = [(row, re.search(r"customer rating\[(.*?)\]", row["mr"])) for row in _restaurants()]
    rated = [{"text": row["ref"], "score": RATINGS[said[1]]} for row, said in found if said]
    return {"type": "regression"}, _written(rows, rated)


def translation(_: Path) -> tuple[Section, Section]:
    """Multi30k: English to German."""
    folder = DATA / "multi30k"
    files = {"train": str(folder / "train.{en,de}"), "eval": str(folder / "test_2016_flickr.{en,de}")}
    return {"type": "seq2seq", "max_target_len": 64}, files


TASKS: dict[str, Shipped | Callable[[Path], tuple[Section, Section]]] = {
    "sentiment": Shipped("minilm-sentiment"),
    "intents": Shipped("minilm-banking77"),
    "pairs": same_facts,
    "several-labels": facts_named,
    "regression": rating,
    "entities": Shipped("minilm-wnut17", whole=True),
    "addresses": address_parts,
    "answers": Shipped("minilm-squad", whole=True),
    "translation": translation,
}


def _restaurants() -> list[Row]:
    with (DATA / "e2e" / "devset.csv").open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def _written(folder: Path, rows: list[Row]) -> Section:
    """Held out are the last rows: other restaurants than those before."""
    write_rows(folder / "train.jsonl", rows[:-HELD_OUT])
    write_rows(folder / "eval.jsonl", rows[-HELD_OUT:])
    return {part: str(folder / f"{part}.jsonl") for part in ("train", "eval")}


def _random_t5(folder: Path) -> Path:
    """3 layers of width 192 either side, with MiniLM's word pieces."""
    if not (folder / "config.json").is_file():
        import torch
        from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(ENCODER / "model")
        tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
        shape: Section = {"d_model": 192, "d_kv": 32, "d_ff": 512, "num_layers": 3, "num_heads": 6}
        ids: Section = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.sep_token_id}
        torch.manual_seed(7)
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
        config = AutoConfig.for_model("t5", vocab_size=len(tokenizer), **shape, **ids)
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
