"""Prompt tuning against PEFT's, and what calls a model with virtual tokens: loss, generation with a cache, padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, CONTEXT_LENGTH, save_tiny_model, tiny_ids, tiny_model, tiny_tokenizer
from tiny_run import write_recipe
from tokenizers import normalizers
from transformers.cache_utils import StaticCache

from qlora_kit.adapters.inject import inject_layers, trainable_parameters
from qlora_kit.adapters.peft_format import load_adapter, save_adapter
from qlora_kit.adapters.prompt_tuning import PARAMETER, PromptTuning, virtual_tokens
from qlora_kit.adapters.settings import PromptTuningSettings
from qlora_kit.cli import main
from qlora_kit.errors import AdapterError
from qlora_kit.export.reference import answer
from qlora_kit.generate import context_length, generate_ids
from qlora_kit.tasks.loss import token_losses

COUNT = 5
FP32 = PromptTuningSettings(tokens=COUNT, dtype="fp32")


def tuned(arch: str = "llama", settings: PromptTuningSettings = FP32) -> tuple[Any, PromptTuning]:
    model, method = tiny_model(arch), PromptTuning(settings)
    torch.manual_seed(1)
    method.inject(model)
    prompt = model.get_parameter(PARAMETER)
    prompt.data.add_(0.3 * torch.randn(prompt.shape))
    return model, method


def theirs_of(model: Any, method: PromptTuning, arch: str, folder: Path) -> Any:
    save_adapter(model, method, folder, "tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_model(arch), str(folder))
    return theirs.requires_grad_(True).eval()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ours_in_peft_and_back(tmp_path: Path, arch: str) -> None:
    ours, method = tuned(arch)
    theirs, ids, mask = theirs_of(ours, method, arch, tmp_path), tiny_ids(), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    ours_logits = ours(ids, attention_mask=mask).logits
    theirs_logits = theirs(input_ids=ids, attention_mask=mask).logits[:, COUNT:]
    torch.testing.assert_close(ours_logits, theirs_logits, rtol=0, atol=1e-5)
    for found in (ours_logits, theirs_logits):
        found.square().mean().backward()
    (their_prompt,) = theirs.prompt_encoder.parameters()
    torch.testing.assert_close(ours.get_parameter(PARAMETER).grad, their_prompt.grad, rtol=1e-4, atol=1e-6)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {PARAMETER}
    again = tiny_model(arch)
    assert load_adapter(again, tmp_path).settings == FP32.model_copy(update={"init": "vocabulary"})
    assert torch.equal(again(ids, attention_mask=mask).logits, ours_logits)


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
def test_pefts_here(tmp_path: Path, init: str) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init=init, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_model("gpt2"), config).eval()
    theirs.save_pretrained(str(tmp_path))
    ours = tiny_model("gpt2")
    assert isinstance(load_adapter(ours, tmp_path), PromptTuning) and virtual_tokens(ours) == 3
    torch.testing.assert_close(ours(tiny_ids()).logits, theirs(tiny_ids()).logits[:, 3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_padding_changes_nothing(arch: str) -> None:
    model, _ = tuned(arch)
    ids, mask = tiny_ids(rows=2), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    padded = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[1, :7], model(ids[1:, :7]).logits[0], rtol=0, atol=1e-5)
    left = torch.cat((ids[1:, :3], ids[1:, :7]), 1)
    places = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4, 5, 6]])
    shifted = model(input_ids=left, attention_mask=(torch.arange(10) > 2).long()[None], position_ids=places).logits
    torch.testing.assert_close(shifted[0, 3:], padded[1, :7], rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_logits_to_keep_counts_the_callers_tokens(arch: str) -> None:
    model, _ = tuned(arch)
    ids = tiny_ids()
    whole = model(ids).logits
    for keep in (1, 3, 12, 99, torch.tensor([0, 4, 11])):
        part = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, part, rtol=0, atol=1e-6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    batch["labels"][:, :6] = -100
    losses, labels = token_losses(model, batch)
    wanted = torch.nn.functional.cross_entropy(whole[:, 5:-1].flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(ids, labels=batch["labels"]).loss, losses.mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_with_a_cache_is_greedy_without(arch: str) -> None:
    model, _ = tuned(arch)
    tokenizer, prompt = tiny_tokenizer(), tiny_ids(rows=1)[0].tolist()
    slow = list(prompt)
    with torch.no_grad():
        for _ in range(9):
            slow.append(int(model(torch.tensor([slow])).logits[0, -1].argmax()))
    fast = generate_ids(model, tokenizer, prompt, max_new_tokens=9)
    assert fast == slow[len(prompt) :][: len(fast)] and (len(fast) == 9 or fast[-1] == tokenizer.eos_token_id)
    by_hand = answer(model, slow, slow, len(prompt)).greedy_ids
    assert by_hand[: len(fast)] == fast


def test_left_padded_batches_generate_as_single_rows() -> None:
    model, _ = tuned()
    rows = [tiny_ids(rows=1)[0].tolist(), tiny_ids(seed=3, rows=1, length=7)[0].tolist()]
    ids = torch.tensor([rows[0], [2] * 5 + rows[1]])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    both = model.generate(input_ids=ids, attention_mask=torch.tensor([[1] * 12, [0] * 5 + [1] * 7]), **options)
    for row, found in zip(rows, both):
        single = model.generate(input_ids=torch.tensor([row]), **options)
        assert found[12:].tolist() == single[0, len(row) :].tolist()


def test_checkpointing_gives_the_same_gradient() -> None:
    grads = []
    for on in (False, True):
        model, _ = tuned()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(tiny_ids(), use_cache=False).logits.square().mean().backward()
        grads.append(model.get_parameter(PARAMETER).grad)
        assert trainable_parameters(model).keys() == {PARAMETER}
    torch.testing.assert_close(grads[0], grads[1])


def test_a_bf16_prompt_before_an_fp32_input_and_the_other_way() -> None:
    model, _ = tuned(settings=PromptTuningSettings(tokens=2))
    assert model.get_parameter(PARAMETER).dtype == torch.bfloat16 and model(tiny_ids()).logits.dtype == torch.float32
    model, _ = tuned()
    model.model.bfloat16()
    model.lm_head.bfloat16()
    assert model.get_parameter(PARAMETER).dtype == torch.float32 and model(tiny_ids()).logits.dtype == torch.bfloat16


def test_how_it_starts() -> None:
    def start(**fields: Any) -> torch.Tensor:
        model, method = tiny_model("gemma"), PromptTuning(PromptTuningSettings(dtype="fp32", **fields))
        method.prepare(tiny_tokenizer())
        torch.manual_seed(0)
        method.inject(model)
        return model.get_parameter(PARAMETER).data

    def vectors(ids: torch.Tensor) -> torch.Tensor:
        return tiny_model("gemma").get_input_embeddings()(ids).detach().bfloat16().float()

    uniform = start(init="random", tokens=400)
    assert -0.5 <= uniform.min() < -0.49 < 0.49 < uniform.max() <= 0.5
    known = vectors(torch.arange(320))
    drawn = [int((known == row).all(1).nonzero()[0]) for row in start(init="vocabulary", tokens=320)]
    assert sorted(drawn) == list(range(320))
    ids = torch.tensor(tiny_tokenizer()("the boats")["input_ids"])
    assert torch.equal(start(init="text", init_text="the boats", tokens=11), vectors(ids.repeat(11)[:11]))


def test_refusals(tmp_path: Path) -> None:
    text = PromptTuning(PromptTuningSettings(init="text", init_text="boats"))
    with pytest.raises(AdapterError, match=r"needs the tokenizer.*prepare before inject"):
        text.inject(tiny_model("llama"))
    model, method = tuned()
    with pytest.raises(AdapterError, match="already holds an adapter"):
        method.inject(model)
    with pytest.raises(AdapterError, match="Embedder takes no logits_to_keep"):
        PromptTuning(FP32).inject(type("Embedder", (torch.nn.Module,), {"forward": lambda self, x: x})())
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(AdapterError, match=r"attention mask \[batch, seq\]"):
        model(tiny_ids(), attention_mask=torch.ones(2, 1, 12, 12), past_key_values=cache)
    save_adapter(model, method, tmp_path, "tiny")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_transformer_submodules": 2}))
    with pytest.raises(AdapterError, match=r"num_transformer_submodules \(got 2\)\. Allowed: 1"):
        load_adapter(tiny_model("llama"), tmp_path)
    other = tiny_model("llama", hidden_size=32)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_transformer_submodules": 1}))
    with pytest.raises(AdapterError, match=r"shape of prompt_embeddings \(got \[5, 64\]\)"):
        load_adapter(other, tmp_path)


def test_an_init_text_without_tokens() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    method = PromptTuning(PromptTuningSettings(init="text", init_text=" "))
    with pytest.raises(AdapterError, match="init_text holds no token"):
        method.prepare(tokenizer)


@pytest.mark.parametrize(("room", "fix"), [(8, "data.max_seq_len=8"), (0, "Set fewer adapter.tokens")])
def test_virtual_tokens_count_into_the_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], room: int, fix: str
) -> None:
    model, _ = tuned()
    assert context_length(model) == CONTEXT_LENGTH - COUNT
    tokens = CONTEXT_LENGTH - room
    recipe = write_recipe(tmp_path / "run", save_tiny_model(tmp_path / "model"))
    adapter = {"method": "prompt_tuning", "tokens": tokens, "init": "text", "init_text": "good or bad"}
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"adapter": adapter}))
    assert main(["train", str(recipe), "--quiet"]) != 0
    said = capsys.readouterr().err
    assert f"holds {CONTEXT_LENGTH}, {tokens} of them virtual" in said and fix in said


def test_layers_are_not_adapted_beside_it() -> None:
    model, _ = tuned()
    assert inject_layers(tiny_model("llama"), FP32, None) == []
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [PARAMETER]
