"""Wrong options, and damaged runs, adapters, checkpoints and bundles: see test_bad_input.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_run import changed_copy, label_rows, write_rows

from qlora_kit.cli import main

WEIGHTS = "adapter_model.safetensors"
A_LAYER = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
Damage = Callable[[Path], Any]


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def change_tensor(folder: Path, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    changed = change(tensors.pop(A_LAYER))
    save_file(tensors | ({} if changed is None else {A_LAYER: changed.contiguous()}), folder / WEIGHTS)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


ADAPTERS: dict[str, tuple[Damage, str]] = {  # what is done to RUN/adapter, and what generate says
    "no folder": (shutil.rmtree, "holds no adapter yet.*--resume"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), r"adapter_config\.json is missing"),
    "torn configuration": (
        lambda f: (f / "adapter_config.json").write_text("{"),
        "is not JSON.*Save the adapter again",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), rf"{WEIGHTS} is missing"),
    "torn weights": (lambda f: cut(f / WEIGHTS), rf"{WEIGHTS} is damaged.*again"),
    "another method": (lambda f: change_json(f / "adapter_config.json", peft_type="IA3"), "got 'IA3'.*Allowed: .*LORA"),
    "what is not supported": (
        lambda f: change_json(f / "adapter_config.json", use_qalora=True),
        "use_qalora is not supported",
    ),
    "a tensor short": (lambda f: change_tensor(f, lambda _: None), r"(up_proj|lora_A).* is (missing|not part)"),
    "another shape": (lambda f: change_tensor(f, lambda t: t[:, :-1]), r"shape of .*up_proj\.lora_A"),
    "not finite": (lambda f: change_tensor(f, lambda t: t * float("nan")), r"up_proj\.lora_A.* holds NaN or Inf"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(trained_run: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = ADAPTERS[kind]
    run = changed_copy(trained_run, tmp_path / "run")
    damage(run / "adapter")
    refused(["generate", str(run), "--prompt", "a"], message, tmp_path, capsys)


def other_rows(run: Path) -> None:
    recipe = run / "recipe.yaml"
    rows = write_rows(run.parent / "other.jsonl", label_rows(25))
    lines = recipe.read_text(encoding="utf-8").splitlines()
    recipe.write_text("\n".join(f"  train: {rows}" if "train.jsonl" in line else line for line in lines), "utf-8")


CHECKPOINTS: dict[str, tuple[Damage, list[str], str]] = {  # damage to an unfinished run, overrides, message
    "no run": (shutil.rmtree, [], r"is no run folder: recipe\.yaml is missing"),
    "broken recipe": (lambda r: (r / "recipe.yaml").write_text("run: ["), [], r"recipe\.yaml is not valid YAML"),
    "broken manifest": (lambda r: (r / "manifest.json").write_text("{"), [], r"manifest\.json is not JSON"),
    "changed recipe": (lambda r: None, ["train.lr=1e-9"], r"changed recipe: train\.lr: 0\.02 -> 1e-09.*new run"),
    "other data": (other_rows, [], "was trained on other data than data.train.*Put the files back"),
    "torn weights": (lambda r: cut(r / "checkpoints/step-000003/adapter" / WEIGHTS), [], "is not what was written"),
    "torn state": (lambda r: cut(r / "checkpoints/step-000003/state.json"), [], r"state\.json is not what was written"),
    "no hashes": (lambda r: (r / "checkpoints/step-000003/hashes.json").unlink(), [], "no whole checkpoint is left"),
    "no checkpoint left": (lambda r: shutil.rmtree(r / "checkpoints"), [], "Put the folder back, or start again"),
    "start again too": (lambda r: None, ["--overwrite"], "--resume goes on with a run, --overwrite starts it again"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(trained_run: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, overrides, message = CHECKPOINTS[kind]
    run = changed_copy(trained_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-000006")
    shutil.rmtree(run / "adapter")
    change_json(run / "manifest.json", status="interrupted", step=3)
    damage(run)
    refused(["train", "--resume", str(run), *overrides], message, tmp_path, capsys)


def reject(bundle: Path) -> None:
    tree = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    change_json(bundle / "manifest.json", verification=tree["verification"] | {"passed": False})


BUNDLES: dict[str, tuple[Damage, str]] = {  # what is done to a bundle, and what generate says
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"MissingFileError: .*manifest\.json"),
    "torn manifest": (lambda f: cut(f / "manifest.json"), r"FormatError: .*manifest\.json"),
    "another format": (lambda f: change_json(f / "manifest.json", format="bundle/9"), "UnknownFormatError: .*bundle/9"),
    "no graph": (lambda f: (f / "onnx/model.onnx").unlink(), r"MissingFileError: onnx/model\.onnx"),
    "torn weights": (lambda f: cut(f / "onnx/model.onnx_data"), r"HashMismatchError: onnx/model\.onnx_data"),
    "changed template": (lambda f: (f / "chat_template.jinja").write_text("x"), "HashMismatchError: chat_template"),
    "a file too many": (lambda f: (f / "extra.bin").write_text("x"), r"UnexpectedFileError: extra\.bin"),
    "no configuration": (lambda f: (f / "genai_config.json").unlink(), r"MissingFileError: genai_config\.json"),
    "rejected": (reject, "did not pass verification.*Export another profile, or give --unverified"),
}


@pytest.mark.parametrize("kind", BUNDLES)
def test_bundles(exported_run: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = BUNDLES[kind]
    bundle = tmp_path / "fp32"
    shutil.copytree(exported_run / "bundles" / "fp32", bundle)
    damage(bundle)
    refused(["generate", str(bundle), "--chat", "a"], message, tmp_path, capsys)


def test_a_rejected_bundle_answers_where_that_is_asked(
    exported_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "fp32.rejected"
    shutil.copytree(exported_run / "bundles" / "fp32", bundle)
    reject(bundle)
    assert main(["generate", str(bundle), "--chat", "a", "--unverified", "--max-new-tokens", "2"]) == 0
    assert "did not pass verification" in capsys.readouterr().err


LONG = "word " * 200
OPTIONS: dict[str, tuple[list[str], str]] = {  # arguments, RUN and BUNDLE being folders, and the message
    "no recipe": (["train"], "needs a recipe, or --resume RUN"),
    "no such recipe": (["plan", "smollm3"], "no recipe smollm3.*smollm2-sentiment"),
    "no such run": (["eval", "runs/none"], r"is no run folder: recipe\.yaml is missing"),
    "no run at all": (["export"], "no run in runs/.*train first"),
    "no such form": (["eval", "RUN", "--forms", "tuned,bundle_int4"], "no such form .*bundle_int4.*Allowed: base"),
    "no such profile": (["export", "RUN", "--profiles", "fp64"], "no such profile .*fp64.*Allowed: fp32, int8"),
    "no names": (["export", "RUN", "--profiles", ","], "names none"),
    "no rows": (["eval", "RUN", "--rows", "0"], "--rows: 0 is out of range; allowed: at least 1"),
    "no model": (["generate", "./nowhere", "--prompt", "a"], "names no model"),
    "nothing to say": (["generate", "RUN", "--prompt", ""], r"length of the prompt in tokens \(got 0\)"),
    "too much to say": (["generate", "RUN", "--prompt", LONG], r"length of the prompt.*Allowed: 1 to 127"),
    "too much for a bundle": (["generate", "BUNDLE", "--prompt", LONG], "PromptTooLongError: .*holds 128.*Shorten"),
    "no tokens wanted": (["generate", "RUN", "--max-new-tokens", "0"], "out of range; allowed: at least 1"),
    "cold": (["generate", "RUN", "--temperature", "-1"], "out of range; allowed: at least 0"),
    "not a number": (["generate", "RUN", "--temperature", "nan"], "out of range"),
    "all of it and more": (["generate", "RUN", "--top-p", "1.5"], "allowed: 0.001 to 1"),
    "system without chat": (["generate", "RUN", "--system", "a", "--prompt", "b"], "--system goes with --chat"),
    "unknown option": (["generate", "RUN", "--colour"], "unrecognized arguments: --colour"),
    "unknown verb": (["tune"], "invalid choice: 'tune'"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_options(
    exported_run: Path,
    tmp_path: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, message = OPTIONS[kind]
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(exported_run), "BUNDLE": str(exported_run / "bundles" / "fp32")}
    refused([places.get(text, text) for text in arguments], message, exported_run, capsys)
    assert not list(tmp_path.iterdir())


def test_these_tables_are_as_long_as_they_say() -> None:
    assert len(ADAPTERS) + len(CHECKPOINTS) + len(BUNDLES) + len(OPTIONS) == 48
