"""Prompt tuning against PEFT's, and what calls a model with virtual tokens: loss, generation with a cache, padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
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
from qlora_kit.export.reference import Question, reference_answers
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


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_left_and_right_padding_are_one(arch: str) -> None:
    """Without position ids: the padding lies between prompt and text, and must not move the text away."""
    model, _ = tuned(arch)
    ids, right, left = tiny_ids(rows=2), torch.ones(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
    right[1, 7:], left[1, :5] = 0, 0
    moved = torch.stack((ids[0], torch.cat((ids[1, 7:], ids[1, :7]))))
    wanted, found = model(ids, attention_mask=right).logits, model(moved, attention_mask=left).logits
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1, 5:], wanted[1, :7], rtol=0, atol=1e-5)


def test_left_padding_with_a_cache() -> None:
    model, _ = tuned()
    ids, left = tiny_ids(rows=2), torch.ones(2, 12, dtype=torch.long)
    left[1, :5] = 0
    whole = model(ids, attention_mask=left).logits
    cache = model(ids[:, :9], attention_mask=left[:, :9], use_cache=True).past_key_values
    rest = model(ids[:, 9:], attention_mask=left, past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 9:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_head_trained_in_full_in_peft_and_back(tmp_path: Path, arch: str) -> None:
    untied = {"tie_word_embeddings": False}
    model, method = tiny_model(arch, **untied), PromptTuning(FP32.model_copy(update={"modules_to_save": ["lm_head"]}))
    torch.manual_seed(1)
    method.inject(model)
    before = model(tiny_ids()).logits
    model.lm_head.weight.data.mul_(1.5)
    wanted = model(tiny_ids()).logits
    assert (wanted - before).abs().max() > 0.1
    save_adapter(model, method, tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_model(arch, **untied), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(input_ids=tiny_ids()).logits[:, COUNT:], wanted, rtol=0, atol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for folder in (tmp_path, tmp_path / "theirs", with_the_old_names(tmp_path)):
        again = tiny_model(arch, **untied)
        load_adapter(again, folder)
        torch.testing.assert_close(again(tiny_ids()).logits, wanted, rtol=0, atol=1e-5)


def with_the_old_names(folder: Path) -> Path:
    """A copy of the adapter with the names that modules trained in full had before they were PEFT's."""
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {key.replace("base_model.", "base_model.model.", 1): tensor for key, tensor in tensors.items()}
    (folder / "old").mkdir()
    save_file(renamed, folder / "old" / "adapter_model.safetensors")
    (folder / "old" / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    return folder / "old"


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_new_tokens_in_peft_and_back(tmp_path: Path, arch: str) -> None:
    """PEFT embeds the input with the base's own embedding (0.21), so that only what it holds can be compared."""
    model = tiny_model(arch, tie_word_embeddings=True)
    embedding = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}[arch]
    method = PromptTuning(FP32.model_copy(update={"modules_to_save": [embedding, "lm_head"]}))
    torch.manual_seed(1)
    model.resize_token_embeddings(324)
    method.inject(model)
    save_adapter(model, method, tmp_path, "tiny")
    grown = tiny_model(arch, tie_word_embeddings=True)
    grown.resize_token_embeddings(324)
    theirs = peft.PeftModel.from_pretrained(grown, str(tmp_path)).base_model
    weight = model.get_input_embeddings().weight
    for name in (embedding, "lm_head"):
        assert torch.equal(theirs.get_submodule(name).modules_to_save["default"].weight, weight)
    ids = torch.tensor([[321, 323, 5, 7]])
    for folder in (tmp_path, with_the_old_names(tmp_path)):
        again = tiny_model(arch, tie_word_embeddings=True)
        load_adapter(again, folder)
        assert torch.equal(again(ids).logits, model(ids).logits)


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
def test_greedy_with_a_cache_is_greedy_without(tmp_path: Path, arch: str) -> None:
    model, _ = tuned(arch)
    tokenizer, prompt = tiny_tokenizer(), tiny_ids(rows=1)[0].tolist()
    slow = list(prompt)
    with torch.no_grad():
        for _ in range(9):
            slow.append(int(model(torch.tensor([slow])).logits[0, -1].argmax()))
    fast = generate_ids(model, tokenizer, prompt, max_new_tokens=9)
    assert fast == slow[len(prompt) :][: len(fast)] and (len(fast) == 9 or fast[-1] == tokenizer.eos_token_id)
    (by_hand,) = reference_answers(model, tokenizer, [Question(slow, slow, len(prompt))], tmp_path)
    assert by_hand.greedy_ids[: len(fast)] == fast


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
