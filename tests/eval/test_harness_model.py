"""Our models give lm-eval the numbers that its own `hf` back-end gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_models import CONTEXT_LENGTH, tiny_model, tiny_tokenizer

from qlora_kit.errors import EvalError
from qlora_kit.eval.harness.engines import engine_of
from qlora_kit.eval.harness.language_model import HarnessModel
from qlora_kit.eval.run import find_forms
from qlora_kit.eval.scorers import TorchScorer
from qlora_kit.train.restore import load_run_tokenizer
from qlora_kit.train.run_folder import RunFolder

PAIRS = [
    ("Where does the road end?", " At the water"),
    ("Where does the road end?", " at the sky"),
    ("Where does the road end?", " o"),
    ("Where does the road end? ", "At the water"),  # the space belongs to the continuation
    ("", "The bridge was built of stone"),
    ("A", " b"),
    ("The shop was short. " * 40, " a boat"),  # longer than the context
]
TEXTS = ["The bridge was built of stone and iron.", "Bread, salt, lamp oil, rope. " * 60, "a"]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, argument, place) for place, argument in enumerate(arguments)]  # type: ignore[arg-type]


def both(arch: str, **overrides: Any) -> tuple[HFLM, HarnessModel]:
    model: Any = tiny_model(arch, **overrides)
    tokenizer = tiny_tokenizer()
    hf = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    return hf, HarnessModel(engine_of(TorchScorer(model, tokenizer, 3)))


def close(found: list[Any], expected: list[Any]) -> bool:
    return found == [pytest.approx(value, rel=1e-5, abs=1e-5) for value in expected]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_loglikelihoods_are_those_of_hf(arch: str) -> None:
    hf, ours = both(arch)
    assert ours.max_length == hf.max_length == CONTEXT_LENGTH
    expected = hf.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert close([value for value, _ in found], [value for value, _ in expected])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert min(value for value, _ in found) < -5, "nothing was scored"


def test_the_greedy_continuation_is_known_as_such() -> None:
    hf, ours = both("llama")
    wish = {"until": [], "max_gen_toks": 3, "do_sample": False}
    [answer] = ours.generate_until(requests("generate_until", [("The bridge", wish)]), disable_tqdm=True)
    asked = requests("loglikelihood", [("The bridge", answer), ("The bridge", answer + " x")])
    flags = [greedy for _, greedy in ours.loglikelihood(asked, disable_tqdm=True)]
    assert flags == [greedy for _, greedy in hf.loglikelihood(asked, disable_tqdm=True)]
    assert flags[1] is False


def test_rolling_loglikelihoods_are_those_of_hf() -> None:
    hf, ours = both("llama")
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert len(ours.tok_encode(TEXTS[1])) > 3 * CONTEXT_LENGTH, "no more than one window"
    found = ours.loglikelihood_rolling(asked, disable_tqdm=True)
    assert close(found, hf.loglikelihood_rolling(asked, disable_tqdm=True))


def test_answers_are_those_of_hf() -> None:
    hf, ours = both("llama", max_position_embeddings=256)
    open_end = {"until": [], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    prompts = ["The bridge was", "Bread, salt,", "Where does the road end?", "The shop was short. " * 40]
    free = ours.generate_until(requests("generate_until", [(p, open_end) for p in prompts]), disable_tqdm=True)
    assert free == hf.generate_until(requests("generate_until", [(p, open_end) for p in prompts]), disable_tqdm=True)
    stop = free[0][4:6]
    ended = {**open_end, "until": [stop, "zzz"]}
    asked = [(prompts[0], ended), (prompts[1], open_end), (prompts[0], ended)]
    found = ours.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert found == hf.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert found[0] == found[2] == free[0].split(stop)[0] and found[1] == free[1]


def test_each_repeat_of_a_sampled_prompt_is_drawn() -> None:
    _, ours = both("llama", max_position_embeddings=256)
    drawn = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", [("The bridge", drawn)] * 3)
    found = ours.generate_until(asked, disable_tqdm=True)
    assert len(set(found)) == 3 and found == ours.generate_until(asked, disable_tqdm=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"until": [], "num_beams": 4}, r"generation_kwargs of a task \(got 'num_beams'\)\. Allowed: do_sample, "),
        ({"until": [], "max_gen_toks": 128}, r"max_gen_toks of a task \(got 128\)\. Allowed: up to 127"),
    ],
)
def test_settings_that_cannot_be_met(settings: dict[str, Any], message: str) -> None:
    _, ours = both("llama")
    with pytest.raises(EvalError, match=message):
        ours.generate_until(requests("generate_until", [("a", settings)]), disable_tqdm=True)


def test_a_continuation_without_tokens_is_refused() -> None:
    _, ours = both("llama")
    with pytest.raises(EvalError, match=r"tokens of a continuation \(got 0\)\. Allowed: 1 to 128"):
        ours.loglikelihood(requests("loglikelihood", [("a", "")]), disable_tqdm=True)


def test_an_fp32_bundle_gives_the_same(exported_run: Path) -> None:
    run = RunFolder.open(exported_run)
    tokenizer: Any = load_run_tokenizer(run)
    forms: Any = find_forms(run, tokenizer)
    merged = forms["merged"]()
    hf = HFLM(pretrained=merged.model, tokenizer=tokenizer, batch_size=1, device="cpu")
    bundle = HarnessModel(engine_of(forms["bundle_fp32"]()))
    wish = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = requests("generate_until", [("The bridge was", wish), ("a film by the sea", wish)])
    pairs, texts = requests("loglikelihood", PAIRS), requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = [value for value, _ in hf.loglikelihood(pairs, disable_tqdm=True)]
    assert close([value for value, _ in bundle.loglikelihood(pairs, disable_tqdm=True)], expected)
    assert close(bundle.loglikelihood_rolling(texts, disable_tqdm=True), hf.loglikelihood_rolling(texts, True))
    assert bundle.generate_until(prompts, disable_tqdm=True) == hf.generate_until(prompts, disable_tqdm=True)
