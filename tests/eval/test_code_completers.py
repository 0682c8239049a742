"""Completions by torch and by a bundle, and HumanEval from a form to its JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_runtime import Bundle
from tiny_models import CONTEXT_LENGTH, tiny_model, tiny_tokenizer

from qlora_kit.data.template import render_chat
from qlora_kit.errors import EvalError
from qlora_kit.eval.code.completers import completer_of
from qlora_kit.eval.code.run import Settings, run_humaneval
from qlora_kit.eval.code.sandbox import require_sandbox
from qlora_kit.eval.run import find_forms
from qlora_kit.eval.scorers import BundleScorer, TorchScorer
from qlora_kit.generate import decode, generate_ids
from qlora_kit.train.restore import load_run_tokenizer
from qlora_kit.train.run_folder import RunFolder

PROMPT = "In the morning the ferryman"


@pytest.fixture
def form() -> TorchScorer:
    return TorchScorer(tiny_model("llama"), tiny_tokenizer(), 1)


def test_greedy_is_what_generate_gives(form: TorchScorer) -> None:
    ids = generate_ids(form.model, form.tokenizer, form.tokenizer(PROMPT)["input_ids"], 24)
    [[text]] = completer_of(form)([PROMPT], 1, 0.0, 24, ())
    assert text == decode(form.tokenizer, ids) != ""
    rendered = render_chat(form.tokenizer, [{"role": "user", "content": PROMPT}], generation_prompt=True)
    ids = generate_ids(form.model, form.tokenizer, form.tokenizer(rendered, add_special_tokens=False)["input_ids"], 24)
    assert completer_of(form, chat=True)([PROMPT], 1, 0.0, 24, ()) == [[decode(form.tokenizer, ids)]]


def test_a_stop_string_ends_text_and_work(form: TorchScorer) -> None:
    [[text]] = completer_of(form)([PROMPT], 1, 0.0, 40, ())
    stop = next(text[at : at + 3] for at in range(len(text) // 3, len(text)) if "\ufffd" not in text[at : at + 3])
    steps: list[Any] = []
    form.model.register_forward_hook(lambda *arguments: steps.append(None))
    assert completer_of(form)([PROMPT], 1, 0.0, 40, ("never there", stop)) == [[text[: text.index(stop)]]]
    assert 0 < len(steps) < 30


def test_samples_depend_on_seed_prompt_and_place_alone(form: TorchScorer) -> None:
    state = torch.get_rng_state()
    first, second = completer_of(form)([PROMPT, "Bread, salt"], 3, 1.0, 12, ())
    assert torch.equal(state, torch.get_rng_state())
    assert len(set(first)) == 3 and len(set(second)) == 3
    torch.manual_seed(5)
    assert completer_of(form)(["Bread, salt", PROMPT], 2, 1.0, 12, ()) == [second[:2], first[:2]]
    assert completer_of(form, seed=1)([PROMPT], 3, 1.0, 12, ()) != [first]


def test_a_prompt_that_fills_the_context(form: TorchScorer) -> None:
    with pytest.raises(EvalError, match=rf"length of a prompt in tokens .*Allowed: 1 to {CONTEXT_LENGTH - 1}"):
        completer_of(form)(["why? " * 100], 1, 0.0, 4, ())


def test_a_bundle_completes_as_its_model_does(exported_run: Path) -> None:
    run = RunFolder.open(exported_run)
    tokenizer = load_run_tokenizer(run)
    forms: Any = find_forms(run, tokenizer)
    by_torch, by_bundle = (completer_of(forms[name]()) for name in ("merged", "bundle_fp32"))
    [[text]] = by_torch([PROMPT], 1, 0.0, 12, ())
    assert by_bundle([PROMPT], 1, 0.0, 12, ()) == [[text]] != [[""]]
    [drawn] = by_bundle([PROMPT], 2, 1.0, 12, ())
    assert by_bundle([PROMPT], 2, 1.0, 12, ()) == [drawn] and drawn[0] != drawn[1]
    bundle = BundleScorer(Bundle.open(run.bundles / "fp32"), tokenizer, 1)
    with pytest.raises(EvalError, match=r"bundles/fp32: the input has \d+ tokens"):
        completer_of(bundle)(["why? " * 100], 1, 0.0, 4, ())


@pytest.mark.parametrize("name", ["tuned", "bundle_fp32"])
def test_humaneval_from_a_form_to_its_json(exported_run: Path, tmp_path: Path, name: str) -> None:
    try:
        require_sandbox()
    except EvalError as error:
        pytest.skip(str(error))
    file, out = tmp_path / "problems.jsonl", tmp_path / "made" / "humaneval.json"
    easy = {"task_id": "Own/0", "prompt": "def f(n):\n    return n\n\n\n# the river ", "entry_point": "f"}
    hard = {"task_id": "Own/1", "prompt": "def f(n):\n", "entry_point": "f"}
    rows = [{**row, "canonical_solution": "", "test": "def check(f): assert f(2) == 2"} for row in (easy, hard, hard)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = RunFolder.open(exported_run)
    form: Any = find_forms(run, load_run_tokenizer(run))[name]()
    settings = Settings(samples=2, ks=(1, 2), temperature=0.7, max_new_tokens=2)
    result = run_humaneval(form, file, settings, out=out, max_problems=2)
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["file_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert written["pass_at_k"]["2"]["value"] == result.pass_at_k[2].value
    assert [*written["per_problem"]] == ["Own/0", "Own/1"] and written["settings"]["limits"]["cpu_s"] == 5
    assert [len(drawn) for drawn in result.samples.values()] == [2, 2]
    assert not any(sample.outcome == "passed" for sample in result.samples["Own/1"])
