"""LoRA on embeddings, convolutions and recurrent layers: against autograd, against PEFT, merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_ids, tiny_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from qlora_kit.adapter_tools.combining import combine_sources
from qlora_kit.adapter_tools.converting import convert
from qlora_kit.adapter_tools.sources import open_source
from qlora_kit.adapters.combine import Combination
from qlora_kit.adapters.files import WEIGHTS
from qlora_kit.adapters.inject import adapted_layers, trainable_parameters
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.lora_conv import LoraConv
from qlora_kit.adapters.lora_embedding import LoraEmbedding
from qlora_kit.adapters.lora_recurrent import LoraRecurrent
from qlora_kit.adapters.peft_format import load_adapter, save_adapter
from qlora_kit.adapters.settings import LoraSettings
from qlora_kit.errors import AdapterError
from qlora_kit.export.merge import merge_adapter

SETTINGS = LoraSettings(rank=3, alpha=7.0, dtype="fp32")


class Tagger(nn.Module):
    """Embedding, two convolutions, a recurrent layer and a head: a model that is none of transformers'."""

    def __init__(self, recurrent: type[nn.LSTM] | type[nn.GRU] = nn.LSTM) -> None:
        super().__init__()
        self.words = nn.Embedding(23, 6, padding_idx=0)
        self.narrow = nn.Conv1d(6, 5, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(1, 4, (3, 2), padding=(1, 0), bias=False)
        self.memory = recurrent(16, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(14, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.narrow(self.words(ids).mT)  # [batch, 5, length]
        x = self.wide(x[:, None]).flatten(1, 2)[:, :16]  # [batch, 16, length]
        return self.head(self.memory(x.mT)[0])


def tagger(**options: Any) -> Tagger:
    torch.manual_seed(3)
    return Tagger(**options).eval()


IDS = torch.tensor([[4, 9, 0, 22, 1, 7, 7, 0, 3], [0, 5, 5, 12, 18, 2, 20, 6, 0]])
TARGETS = ["words", "narrow", "wide", "head"]


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for _, parameter in sorted(trainable_parameters(model).items()):
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def out(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found = model.eval()(ids)
    return getattr(found, "logits", found)


def adapted(layer: nn.Module, changes: dict[str, Any] | None = None) -> Any:
    """The layer with a LoRA that shows, alone in a model."""
    torch.manual_seed(1)
    model = nn.ModuleDict({"it": layer})
    Lora(SETTINGS.model_copy(update={"target_modules": ["it"]} | (changes or {}))).inject(model)
    randomize(model)
    return model["it"]


def assert_close_to_reference(layer: Any, reference: Any, *inputs: Tensor, call: Any = None) -> None:
    """Values and gradients of a layer (called by `call`), and of a plain function of its parameters."""
    ways = []
    for way in (call or layer, reference):
        given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        layer.zero_grad()
        y = way(*given)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        grads = [p.grad.clone() for p in layer.parameters() if p.requires_grad]
        ways.append([y, *grads, *(x.grad for x in given if x.grad is not None)])
    assert len(ways[0]) > 2
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_is_that_of_the_summed_table(padding_idx: int | None) -> None:
    layer = adapted(nn.Embedding(11, 5, padding_idx))

    def reference(ids: Tensor) -> Tensor:
        a = layer.lora_embedding_A
        kept = torch.ones(11, 1)
        if padding_idx is not None:  # the padding row of A takes no gradient
            kept[padding_idx] = 0
        rows = kept * a.T + (1 - kept) * a.T.detach()
        return (layer.base_layer.weight + layer.scaling * rows @ layer.lora_embedding_B.T)[ids]

    assert isinstance(layer, LoraEmbedding)
    assert_close_to_reference(layer, reference, torch.tensor([[0, 2, 2], [10, 4, 1]]))


CONVS: list[tuple[type[nn.Conv1d] | type[nn.Conv2d], dict[str, Any], tuple[int, ...]]] = [
    (nn.Conv1d, {"kernel_size": 3}, (2, 5, 11)),
    (nn.Conv1d, {"kernel_size": 4, "stride": 3, "padding": 2, "dilation": 2}, (3, 5, 17)),
    (nn.Conv1d, {"kernel_size": 3, "padding": "same", "bias": False}, (5, 9)),
    (nn.Conv1d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (2, 5, 9)),
    (nn.Conv2d, {"kernel_size": 1}, (2, 5, 4, 3)),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 3)}, (2, 5, 9, 8)),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (5, 6, 7)),
]


@pytest.mark.parametrize(("kind", "options", "shape"), CONVS)
def test_convolution_is_that_of_the_summed_kernel(kind: Any, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    layer = adapted(kind(5, 7, **options))

    def reference(x: Tensor) -> Tensor:
        b, a, base = layer.lora_B, layer.lora_A, layer.base_layer
        kernel = base.weight + layer.scaling * torch.einsum("or,ri...->oi...", b.flatten(1), a)
        return base._conv_forward(x, kernel, base.bias)

    assert isinstance(layer, LoraConv)
    assert_close_to_reference(layer, reference, torch.randn(shape))


def test_bf16_convolution_is_within_its_rounding() -> None:
    layer = adapted(nn.Conv1d(5, 7, 3), {"dtype": "bf16"})
    x = torch.randn(2, 5, 11)
    exact = layer(x)
    layer.base_layer.bfloat16()
    low = layer(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=0.03, atol=0.05)


RECURRENT: list[tuple[type[nn.LSTM] | type[nn.GRU], dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.LSTM, {"num_layers": 2, "proj_size": 3}),
    (nn.GRU, {"bias": False}),
    (nn.GRU, {"num_layers": 3, "bidirectional": True}),
]


@pytest.mark.parametrize(("kind", "options"), RECURRENT)
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_is_that_of_the_summed_weights(kind: Any, options: dict[str, Any], packed: bool) -> None:
    layer = adapted(kind(5, 7, **options))
    first = options.get("batch_first", False)

    def run(recurrent: Any, x: Tensor, state: Tensor) -> Tensor:
        data: Any = pack_padded_sequence(x, torch.tensor([6, 4, 1]), batch_first=first) if packed else x
        size = getattr(layer.base_layer, "proj_size", 0) or 7
        hidden = state[..., :size].contiguous()
        y, left = recurrent(data, hidden if kind is nn.GRU else (hidden, state))
        whole = pad_packed_sequence(y)[0] if packed else y
        return torch.cat([whole.flatten(), *(part.flatten() for part in left)])

    def reference(x: Tensor, state: Tensor) -> Tensor:
        base = layer.base_layer
        weights = dict(base.named_parameters())
        for name in layer.lora_A:
            weights[name] = weights[name] + layer.scaling * layer.lora_B[name] @ layer.lora_A[name]
        return run(lambda *given: torch.func.functional_call(base, weights, given), x, state)

    assert isinstance(layer, LoraRecurrent)
    x = torch.randn((3, 6, 5) if first else (6, 3, 5))
    state = torch.randn(options.get("num_layers", 1) * (1 + options.get("bidirectional", False)), 3, 7)
    assert_close_to_reference(layer, reference, x, state, call=lambda *given: run(layer, *given))
    assert layer(x)[0].shape == layer.base_layer(x)[0].shape  # without states to start from


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU])
def test_a_model_of_torch_alone_trains_stores_and_merges(tmp_path: Path, recurrent: Any) -> None:
    model = tagger(recurrent=recurrent)
    before = out(model)
    method = Lora(SETTINGS.model_copy(update={"target_modules": [*TARGETS, "memory"], "bias": "lora_only"}))
    assert len(method.inject(model)) == 5
    torch.testing.assert_close(out(model), before, rtol=1e-6, atol=1e-6)  # some CPUs' kernels take packed weights
    assert {"memory.base_layer.bias_hh_l1_reverse", "narrow.base_layer.bias"} <= trainable_parameters(model).keys()
    randomize(model)
    tuned = out(model)
    save_adapter(model, method, tmp_path, "tagger")
    again = tagger(recurrent=recurrent)
    load_adapter(again, tmp_path)
    assert torch.equal(out(again), tuned)
    report = merge_adapter(model)
    assert {type(module) for module in model.children()} == {
        type(module) for module in tagger(recurrent=recurrent).children()
    }
    assert not list(adapted_layers(model))
    torch.testing.assert_close(out(model), tuned, rtol=1e-5, atol=1e-5)
    assert len(report) == 4 + 8 and all(layer.delta_norm > 0 for layer in report)


def same_gradients(ours: nn.Module, theirs: nn.Module, ids: Tensor) -> None:
    for model in (ours, theirs):
        found = model(ids)
        getattr(found, "logits", found).square().mean().backward()
    grads = {name.replace(".default", "").removesuffix(".weight"): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in trainable_parameters(ours).items():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_convolutions_and_embedding_in_peft_and_back(tmp_path: Path) -> None:
    ours = tagger()
    method = Lora(SETTINGS.model_copy(update={"target_modules": TARGETS}))
    method.inject(ours)
    randomize(ours)
    save_adapter(ours, method, tmp_path / "ours", "tagger")
    theirs: Any = peft.PeftModel.from_pretrained(tagger(), str(tmp_path / "ours"), is_trainable=True)
    torch.testing.assert_close(out(theirs), out(ours), rtol=0, atol=1e-5)
    same_gradients(ours, theirs.base_model.model, IDS)

    theirs = peft.get_peft_model(tagger(), peft.LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS, use_rslora=True))
    randomize(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = tagger()
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(out(again), out(theirs), rtol=0, atol=1e-5)


def saved(folder: Path, recurrent: type[nn.LSTM] | type[nn.GRU], rank: int, seed: int) -> dict[str, Tensor]:
    """Writes an adapter of all its layers; returns what it adds to each weight."""
    model = tagger(recurrent=recurrent)
    method = Lora(SETTINGS.model_copy(update={"target_modules": [*TARGETS, "memory"], "rank": rank}))
    method.inject(model)
    torch.manual_seed(seed)
    for parameter in trainable_parameters(model).values():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    save_adapter(model, method, folder, "tagger")
    return added(model)


def added(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": delta
        for name, layer in adapted_layers(model)
        for key, (_, delta) in layer.merged_weights().items()
    }


def loaded(folder: Path, recurrent: type[nn.LSTM] | type[nn.GRU]) -> dict[str, Tensor]:
    model = tagger(recurrent=recurrent)
    load_adapter(model, folder)
    return added(model)


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU])
def test_deltas_of_all_layers_are_combined_and_cut(tmp_path: Path, recurrent: type[nn.LSTM] | type[nn.GRU]) -> None:
    parts = [saved(tmp_path / name, recurrent, rank, seed) for name, rank, seed in (("a", 3, 1), ("b", 2, 2))]
    sources = [open_source(tmp_path / name) for name in "ab"]
    combine_sources(sources, [0.7, -0.4], tmp_path / "both", Combination("cat"))
    whole = loaded(tmp_path / "both", recurrent)
    assert whole.keys() == parts[0].keys() and len(whole) == 4 + 8
    for name, delta in whole.items():
        torch.testing.assert_close(delta, 0.7 * parts[0][name] - 0.4 * parts[1][name], rtol=0, atol=1e-5)

    combine_sources(sources, [0.7, -0.4], tmp_path / "cut", Combination("ties_svd", rank=4, density=1.0))
    convert(open_source(tmp_path / "both"), tmp_path / "small", rank=2)
    assert {len(tensor) for tensor in load_file(tmp_path / "small" / WEIGHTS).values() if tensor.shape[1] == 23} == {2}
    for name, delta in loaded(tmp_path / "small", recurrent).items():
        flat = whole[name].flatten(1)
        u, s, vh = torch.linalg.svd(flat, full_matrices=False)
        torch.testing.assert_close(delta.flatten(1), u[:, :2] * s[:2] @ vh[:2], rtol=0, atol=1e-4)
    assert loaded(tmp_path / "cut", recurrent).keys() == whole.keys()  # of layers with fewer rows than ranks, too
    convert(open_source(tmp_path / "both"), tmp_path / "rounded", dtype="bf16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "rounded" / WEIGHTS).values()} == {torch.bfloat16}


EMBEDDINGS = {
    "tied": ("llama", True, ["q_proj", "embed_tokens"]),
    "untied": ("llama", False, ["embed_tokens"]),
    "both of a tied pair": ("llama", True, ["embed_tokens", "lm_head"]),
    "scaled by its width": ("gemma3_text", True, ["embed_tokens", "v_proj"]),
    "two, beside Conv1D": ("gpt2", True, ["wte", "wpe", "c_attn"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", EMBEDDINGS)
def test_embedding_of_a_language_model_in_peft_and_back(tmp_path: Path, case: str) -> None:
    arch, tie, targets = EMBEDDINGS[case]

    def base() -> Any:
        return tiny_model(arch, tie_word_embeddings=tie)

    ours, method = base(), Lora(SETTINGS.model_copy(update={"target_modules": targets}))
    method.inject(ours)
    assert torch.equal(out(ours, tiny_ids()), out(base(), tiny_ids()))
    randomize(ours)
    tuned = out(ours, tiny_ids())
    save_adapter(ours, method, tmp_path / "ours", "tiny")
    theirs: Any = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours"), is_trainable=True)
    torch.testing.assert_close(out(theirs, tiny_ids()), tuned, rtol=0, atol=1e-5)
    same_gradients(ours, theirs.base_model.model, tiny_ids())

    theirs.save_pretrained(str(tmp_path / "theirs"))  # with the frozen table, as PEFT does
    again = base()
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(out(again, tiny_ids()), tuned, rtol=0, atol=1e-5)


def test_merging_an_embedding_leaves_its_tied_head_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    head = model.get_output_embeddings().weight.detach().clone()
    Lora(SETTINGS.model_copy(update={"target_modules": ["embed_tokens"]})).inject(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    randomize(model)
    tuned = out(model, tiny_ids())
    merge_adapter(model)
    assert torch.equal(model.get_output_embeddings().weight, head)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(out(again, tiny_ids()), tuned, rtol=0, atol=1e-5)
    assert again.config.tie_word_embeddings is False


def test_all_linear_leaves_them_out() -> None:
    assert Lora(SETTINGS).inject(tagger()) == ["head"]
    assert Lora(SETTINGS.model_copy(update={"target_modules": r"w.*"})).inject(tagger()) == ["words", "wide"]


@pytest.mark.parametrize(
    ("layer", "changes", "match"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), {}, r"convolution with groups cannot be adapted \(got 2\)\. Allowed: groups=1"),
        (nn.Embedding(5, 3, max_norm=1.0), {}, "embedding with a max_norm cannot be adapted"),
        (nn.GRU(3, 2), {"dropout": 0.5}, r"dropout on GRU \(got 0\.5\)\. Allowed: 0"),
        (nn.Bilinear(2, 2, 2), {}, "matches no layer that can be adapted .got 'it'"),
    ],
)
def test_layers_that_cannot_be_adapted(layer: nn.Module, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        adapted(copy.deepcopy(layer), changes)


def test_a_frozen_table_of_another_size_is_refused(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tagger(), peft.LoraConfig(r=2, target_modules=["words"]))
    theirs.save_pretrained(str(tmp_path))
    change_tensors(tmp_path, {"base_model.model.words.base_layer.weight": torch.zeros(3, 2)})
    with pytest.raises(AdapterError, match=r"shape of base_model.model.words.base_layer.weight .got \[3, 2\]"):
        load_adapter(tagger(), tmp_path)


def change_tensors(folder: Path, changes: dict[str, Tensor]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | changes, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_of_an_embedding_falls_in_training_alone(dropout: float) -> None:
    layer = adapted(nn.Embedding(11, 5), {"dropout": dropout})
    ids = torch.arange(11)
    assert torch.equal(layer.eval()(ids), layer(ids))
    assert torch.equal(layer.train()(ids), layer.eval()(ids)) == (dropout == 0)
