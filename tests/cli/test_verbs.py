"""The verbs as a user types them: help at once, exit codes, output for people and for programs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import changed_copy, write_recipe

from qlora_kit.cli import VERBS, last_run, main
from qlora_kit.errors import RunError
from qlora_kit.options import parse_options

HEAVY = ("torch", "pydantic", "transformers", "numpy", "onnxruntime", "yaml", "rich")


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS)], ids=lambda verb: verb[0] if verb else "all")
def test_help_imports_nothing_heavy(verb: list[str]) -> None:
    code = (
        "import sys, qlora_kit.cli as cli\n"
        f"try: cli.main({[*verb, '--help']!r})\n"
        "except SystemExit as end: assert not end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]" and result.stdout.startswith("usage: qlora-kit")


def test_every_verb_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {verb} " in text for verb in VERBS)


def test_overrides_may_stand_after_options() -> None:
    options = parse_options(["train", "a.yaml", "x.y=1", "--quiet", "train.lr=1e-4", "run.name=b"])
    assert (options.recipe, options.mode) == ("a.yaml", "quiet")
    assert options.overrides == ["x.y=1", "train.lr=1e-4", "run.name=b"]


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["doctor", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_plan(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path, tiny_llama))
    assert main(["plan", recipe, "--device", "cpu"]) == 0
    assert "total" in capsys.readouterr().out
    peaks = []
    for rank in (4, 64):
        assert main(["plan", recipe, "--json", f"adapter.rank={rank}"]) == 0
        peaks.append(json.dumps(json.loads(capsys.readouterr().out)))
    assert peaks[0] != peaks[1]


def test_plan_is_for_this_machine(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path, tiny_llama))
    assert main(["plan", recipe]) == 0
    assert capsys.readouterr().out.startswith("For this machine: ")
    assert main(["plan", recipe, "--device", "cuda"]) == 0
    assert not capsys.readouterr().out.startswith("For this machine: ")
    assert main(["plan", recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_quantize_and_cache(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stored base and a cached one train what the model itself does, to the byte."""
    stored = tmp_path / "stored"
    assert main(["quantize", str(tiny_llama), "--output", str(stored)]) == 0
    assert "nf4, 0.00 GiB" in capsys.readouterr().out
    assert main(["quantize", str(tiny_llama), "--output", str(stored)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["quantize", str(stored), "--output", str(tmp_path / "again")]) == 2
    assert "quantized already" in capsys.readouterr().err
    assert main(["quantize", str(tiny_llama), "--output", str(tmp_path / "head"), "--head-quant", "int8"]) == 0
    layers = json.loads((tmp_path / "head" / "quantized.json").read_text(encoding="utf-8"))["layers"]
    assert layers["lm_head"]["quant"] == "int8" and len(layers) == 15
    cases = {
        "plain": (tiny_llama, False),
        "kept": (tiny_llama, True),
        "found": (tiny_llama, True),
        "own": (stored, False),
    }
    adapters = []
    for name, (model, cache) in cases.items():
        base = {"model": str(model), "cache": cache}
        recipe = write_recipe(tmp_path, model, run={"name": name}, base=base, train={"max_steps": 2})
        assert main(["train", str(recipe), "--quiet"]) == 0
        adapters.append((tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert len(set(adapters)) == 1
    assert main(["cache", "list"]) == 0
    listed = capsys.readouterr().out
    assert "llama, nf4, bfloat16" in listed and "GiB free" in listed
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out.startswith("removed ")
    assert main(["cache", "list"]) == 0
    assert " in 0 models" in capsys.readouterr().out


def test_data_show_is_what_trains(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path, tiny_llama))
    assert main(["data", "show", recipe, "-n", "2", "data.system_prompt=Be kind."]) == 0
    text = capsys.readouterr().out
    assert text.count("⟦good<|im_end|>⟧") + text.count("⟦bad<|im_end|>⟧") == 2
    assert text.count("<|im_start|>system\nBe kind.<|im_end|>") == 2, "the recipe's template, not the tokenizer's own"


def test_train_modes(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path, tiny_llama, train={"max_steps": 2}))
    assert main(["train", recipe, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.out == "" and quiet.err == ""
    assert main(["train", recipe, "--json", "--overwrite"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [event["kind"] for event in events if event["kind"] != "eval"]
    assert kinds == ["start", "train", "train", "note", "finish"]
    assert events[-2]["text"].startswith("memory: planned ")
    assert main(["train", recipe, "--json"]) == 2
    failed = capsys.readouterr()
    event = json.loads(failed.out)
    assert (event["kind"], event["error"]) == ("error", "RunError") and event["message"] in failed.err


def test_report_is_written_again(trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = changed_copy(trained_run, tmp_path / "run")
    page = run / "report.html"
    page.unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(page) and "<html" in page.read_text(encoding="utf-8")


def test_the_last_run_is_the_one_that_changed_last(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for age, name in ((300, "a"), (100, "b"), (200, "c")):
        manifest = changed_copy(trained_run, tmp_path / "runs" / name) / "manifest.json"
        os.utime(manifest, (10_000 - age, 10_000 - age))
    assert last_run() == Path("runs/b")
    assert main(["report"]) == 0
    assert capsys.readouterr().out.strip() == "runs/b/report.html"
    with pytest.raises(RunError, match="no run in elsewhere/"):
        last_run("elsewhere")


@pytest.fixture
def say(exported_run: Path, trained_run: Path, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """What `generate` prints for a run, a bundle or a base."""
    places = {
        "run": exported_run,
        "bundle": exported_run / "bundles" / "fp32",
        "base": trained_run.parents[1] / "model",
    }

    def run(place: str, *arguments: str) -> str:
        capsys.readouterr()
        assert main(["generate", str(places[place]), *arguments, "--max-new-tokens", "12"]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("place", ["run", "bundle", "base"])
def test_generate(say, place: str) -> None:  # type: ignore[no-untyped-def]
    greedy = say(place, "--chat", "an iron bridge 4?")
    assert greedy.strip() and greedy == say(place, "--chat", "an iron bridge 4?", "--seed", "7")
    assert say(place, "--prompt", "-- The bridge was") == say(place, "--prompt", "-- The bridge was")
    hot = ("--chat", "a", "--temperature", "3", "--top-k", "50", "--top-p", "0.99", "--seed")
    assert say(place, *hot, "1") == say(place, *hot, "1") != say(place, *hot, "2")
    assert say(place, "--chat", "a", "--system", "Be kind.") is not None


@pytest.mark.parametrize("place", ["run", "bundle"])
def test_a_conversation_remembers(say, place: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a film\nand why?\n\n"))
    both = say(place, "--chat")
    first = say(place, "--chat", "a film").strip()
    assert first in both and len(both) > len(first)


def test_several_adapters_answer_and_are_switched(  # type: ignore[no-untyped-def]
    say, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["adapters", "combine", str(trained_run), "--method", "cat", "--weights=0", "-o", str(tmp_path / "none")]
    assert main(command) == 0
    both = ("--adapter", f"tuned={trained_run}", "--adapter", str(tmp_path / "none"))
    own, plain = (say("run", "--adapter", str(place), "--chat", "a film") for place in (trained_run, tmp_path / "none"))
    assert own != plain and say("run", *both, "--chat", "a film") == f"tuned:\n{own}none:\n{plain}"
    turns = "a film\n/adapter\n/adapter none\n/adapter tuned\nand why?\n\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(turns))
    told = say("run", *both, "--chat")
    assert told.startswith("tuned answers; /adapter NAME switches to another: tuned, none\n") and own.strip() in told
    assert "no adapter of this name (got ''). Allowed: tuned, none" in told


def test_off_a_terminal_no_bar_and_no_warning_of_a_library(trained_run: Path, tmp_path: Path) -> None:
    run = changed_copy(trained_run, tmp_path / "run")
    command = [sys.executable, "-m", "qlora_kit.cli", "export", str(run)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "verified on 4 rows" in told.stderr and told.stdout == ""
    for noise in ("Writing model shards", "%|", "Warning"):
        assert noise not in told.stderr


def test_a_reader_that_leaves_is_no_error(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    command = f"{sys.executable} -m qlora_kit.cli plan {recipe} --json | true; echo code ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("code 0\n", "")
