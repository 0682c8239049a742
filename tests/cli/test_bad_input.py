"""Wrong recipes, datasets and base models: 63 cases here, through `qlora-kit train`.

With the 48 in test_bad_runs.py (adapters, checkpoints, bundles, options) 111 go through the command line;
tests/recipe, tests/data and tests/adapters hold more at their own level.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from tiny_models import save_tiny_model, tiny_tokenizer
from tiny_run import train, write_recipe, write_rows

RECIPES: dict[str, tuple[str, str]] = {  # the recipe's text (empty: as it should be) or an override, and the message
    "not YAML": ("run: [", r"recipe\.yaml is not valid YAML"),
    "empty": ("# nothing", "holds no recipe"),
    "a key twice": ("run: {name: a, name: b}", "key given twice: name"),
    "sections missing": ("run: {name: a}", r"base: missing.* data: missing.* train: missing"),
    "misspelt field": ("adapter.rnk=4", "unknown key.*did you mean rank"),
    "misspelt section": ("trian.lr=1e-3", "unknown key.*did you mean train"),
    "wrong type": ("train.lr=fast", r"train\.lr: got 'fast' \(str\); input should be a valid number"),
    "no finite number": ("train.lr=nan", r"train\.lr: got 'nan' \(str\); numbers must be finite"),
    "out of range": ("adapter.rank=0", r"adapter\.rank: got 0 .*greater than or equal to 1"),
    "not among the choices": ("base.quant=int3", r"base\.quant: got 'int3'.*'nf4', 'fp4', 'int8', 'int4' or 'none'"),
    "steps and epochs": ("train.epochs=2", "exactly one of max_steps and epochs"),
    "no override": ("train.lr", "not an override.*section.key=value"),
    "override of a value": ("run.name.a=b", "name is not a section"),
    "override not YAML": ("train.lr=[", "not valid YAML.*Quote it"),
    "packing": ("data.packing=true", "packing is not available yet"),
    "a name that is a path": ("run.name=../x", "should match pattern"),
    "streaming without steps": ("data.streaming=true data.eval=null", "a stream has no known length"),
    "a place that is a file": ("run.out_dir={folder}/train.jsonl", "cannot be written|Not a directory"),
    "no such layer": ("adapter.target_modules=[q_prj]", r"that can be adapted .*q_prj.*did you mean q_proj"),
    "a rank for no layer": ("adapter.rank_pattern.q_prj=4", r"rank_pattern matches no layer .*did you mean q_proj"),
    "no layer at all": ("adapter.target_modules=conv.*", "matches no layer.*Allowed: .*q_proj"),
    "broken expression": ("adapter.target_modules=(q", "not a regular expression"),
    "no such module": ("adapter.modules_to_save=[heads]", "modules_to_save matches no module.*lm_head"),
    "no such template": ("data.chat_template=chatlm", r"no chat template chatlm.*alpaca, chatml, zephyr"),
}
GOOD = {"prompt": "a", "completion": "b"}
DATA: dict[str, tuple[str, Any, str]] = {  # file name, rows or bytes or text (None: no file), message
    "no file": ("rows.jsonl", None, r"no file .*rows\.jsonl.*Check the path"),
    "no rows": ("rows.jsonl", "", r"rows\.jsonl is empty"),
    "blank lines": ("rows.jsonl", "\n\n", "holds no rows"),
    "unknown ending": ("rows.txt", "a", r"unknown file ending .*\.jsonl"),
    "broken JSON line": ("rows.jsonl", json.dumps(GOOD) + '\n{"prompt": ', r"rows\.jsonl row 2: broken JSON"),
    "row is a list": ("rows.jsonl", "[1]", r"row 1: row is a list, not an object"),
    "missing column": ("rows.jsonl", [GOOD, {"prompt": "a"}], r"rows\.jsonl row 2: .*completion"),
    "unknown columns": (
        "rows.jsonl",
        [{"film": "a", "mark": "b"}],
        r"row 1: no schema fits.*film.*mark.*data\.columns",
    ),
    "mixed schemas": ("rows.jsonl", [GOOD, {"text": "a"}], r"rows\.jsonl row 2"),
    "empty completion": ("rows.jsonl", [GOOD, {"prompt": "a", "completion": ""}], r"row 2: .*completion.* is empty"),
    "completion is a number": ("rows.jsonl", [{"prompt": "a", "completion": 5}], r"row 1: .*completion"),
    "latin-1": ("rows.jsonl", '{"text": "\xe9"}'.encode("latin-1"), r"row 1: not UTF-8.*iconv"),
    "UTF-16": ("rows.jsonl", '{"text": "a"}'.encode("utf-16"), r"UTF-16, not UTF-8.*iconv"),
    "JSON of two lists": ("rows.json", '{"a": [], "b": []}', "an object with 2 lists"),
    "JSON lines called JSON": ("rows.json", '{"a": 1}\n{"a": 2}', r"rename it to \.jsonl"),
    "torn quote in CSV": ("rows.csv", 'prompt,completion\n"a,b\n', r"rows\.csv row 2: broken CSV"),
    "cells too many": ("rows.csv", "prompt,completion\na,b,c\n", r"row 2: too many cells"),
    "a column twice": ("rows.csv", "prompt,prompt\na,b\n", "not a header"),
    "not Parquet": ("rows.parquet", "PAR1", "not a readable Parquet file"),
    "all too long": ("rows.jsonl", [{"prompt": "long " * 99, "completion": "b"}], "no usable row.*max_seq_len 96"),
    "one prompt alone": ("rows.jsonl", [GOOD], "none can be held out.*set data.eval"),
    "unknown role": ("rows.jsonl", [{"messages": [{"role": "bot", "content": "a"}]}], r"row 1: .*role"),
    "no assistant": ("rows.jsonl", [{"messages": [{"role": "user", "content": "a"}]}], r"row 1: .*assistant"),
}


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path, tiny_llama)


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes(recipe: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = RECIPES[kind]
    overrides = []
    if ":" in text or text.startswith("#"):
        recipe.write_text(text, encoding="utf-8")
    else:
        overrides = text.format(folder=recipe.parent).split(" ")
    refused(["train", str(recipe), *overrides], message, recipe.parent, capsys)


@pytest.mark.parametrize("kind", DATA)
def test_datasets(recipe: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, message = DATA[kind]
    path = recipe.parent / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif content is not None:
        write_rows(path, content)
    refused(["train", str(recipe), f"data.train={path}", "data.eval=null"], message, recipe.parent, capsys)


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_end(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    change_json(folder / "tokenizer_config.json", eos_token=None)


def a_shard_short(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {  # what is done to a model folder, and the message
    "no folder": (shutil.rmtree, r"base\.model names no model .*Allowed: a hub id, a folder or a \.gguf file"),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "torn config": (lambda f: (f / "config.json").write_text('{"a'), r"config\.json is not JSON"),
    "unknown kind": (lambda f: change_json(f / "config.json", model_type="llamma"), "cannot be loaded.*llamma"),
    "needs code": (
        lambda f: (f / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "x.Y"}}'),
        "needs Python code.*trust_remote_code",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights.*Convert it to safetensors"),
    "only a pickle": (only_a_pickle, r"only pytorch_model\.bin, which is a pickle and could run code"),
    "torn weights": (lambda f: cut(f / "model.safetensors"), "cannot be loaded.*whole weight files"),
    "a shard short": (a_shard_short, r"shard model-2\.safetensors is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    "torn tokenizer": (lambda f: cut(f / "tokenizer.json"), "no tokenizer.*Put the tokenizer's files"),
    "no end token": (without_end, r"no eos_token.*tokenizer_config\.json"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_model_folders(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = MODELS[kind]
    model = save_tiny_model(tmp_path / "model")
    recipe = write_recipe(tmp_path, model)
    damage(model)
    refused(["train", str(recipe)], message, tmp_path, capsys)


def test_rows_longer_than_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, save_tiny_model(tmp_path / "model", "gpt2"), data={"max_seq_len": 1000})
    write_rows(tmp_path / "train.jsonl", [{"prompt": "a bridge " * 50, "completion": "good"}] * 4)
    refused(["train", str(recipe)], r"rows of up to \d{3} tokens.*holds 128.*data\.max_seq_len=128", tmp_path, capsys)


@pytest.mark.parametrize(
    "content, message", [(b"GGML", "is not a GGUF file"), (b"GGUF\x03", "cannot be read"), (None, "no such GGUF file")]
)
def test_gguf_files(recipe: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe.parent / "model.gguf"
    if content:
        path.write_bytes(content)
    refused(["train", str(recipe), f"base.model={path}"], message, recipe.parent, capsys)


def test_a_corrected_recipe_trains_where_the_wrong_one_failed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("data.train=nowhere.jsonl", f"base.model={recipe.parent}/nowhere", "adapter.target_modules=[x]"):
        refused(["train", str(recipe), wrong], "no file|names no model|matches no layer", recipe.parent, capsys)
    run = train(recipe)
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    refused(["train", str(recipe)], "holds a run already.*--resume.*--overwrite", recipe.parent, capsys)
    overwrite = ["train", str(recipe), "--overwrite"]
    refused([*overwrite, "data.train=nowhere.jsonl"], "no file nowhere", recipe.parent, capsys)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before, "the old run is still there"


def test_this_table_is_as_long_as_it_says() -> None:
    assert len(RECIPES) + len(DATA) + len(MODELS) + 4 == 63
