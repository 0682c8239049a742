"""A frozen output head held as codes, and the embedding that is tied to it: a part of it expanded at a time.

The head of a 7B model is a gigabyte in 16 bit. As codes it is a half or a quarter of that, which an expanded copy
would undo: so the loss asks for pieces of the vocabulary, and the embedding for the rows of the tokens at hand.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from qlora_kit.errors import AdapterError
from qlora_kit.model.quantize import Quantization
from qlora_kit.model.quantized import QuantizedLinear, bnb

HEAD_KINDS = ("int8", "nf4")
PIECE_WEIGHTS = 2**24  # of a piece: 32 MiB in 16 bit
_AT_ONCE = 2**20  # weights whose intermediates are there together: some numbers a weight


@torch.no_grad()
def quantize_head(weight: Tensor, kind: str, double_quant: bool, bias: nn.Parameter | None) -> QuantizedLinear:
    """The codes of a head's weight [vocab, width], of any float dtype, on its device; `bias` [vocab] stays as it is.

    int8 has one scale a row, of which none looks at another: some rows at a time are copied, as bitsandbytes' 8-bit
    kernels take fp16 alone. Its 4-bit ones copy nothing.
    """
    if kind != "int8":
        return Quantization(kind, double_quant).quantize(weight, bias)
    vocab, width = weight.shape
    layer = QuantizedLinear(width, vocab, "int8", bias)
    layer.register_buffer("codes", torch.empty(vocab, width, dtype=torch.int8, device=weight.device))
    layer.register_buffer("absmax", torch.empty(vocab, device=weight.device))
    for place in _slices(vocab, _AT_ONCE // width):
        rows = weight[place].to(torch.float16).contiguous()
        layer.codes[place], layer.absmax[place], _ = bnb.functional.int8_vectorwise_quant(rows)
    return layer


def vocabulary_pieces(layer: QuantizedLinear, weights: int = PIECE_WEIGHTS) -> list[slice]:
    """Rows of the layer, at most `weights` numbers a piece where rows allow it; no block of codes lies in two."""
    whole = math.lcm(layer.in_features, max(2, layer.block_size)) // layer.in_features  # rows that fill their blocks
    return _slices(layer.out_features, max(1, weights // layer.in_features // whole) * whole)


def expand_piece(layer: QuantizedLinear, place: slice, dtype: torch.dtype) -> Tensor:
    """Rows [n, width] of the layer's weight, one of `vocabulary_pieces`: the bits of `layer.dequantize(dtype)`."""
    if layer.kept is not None and layer.kept.dtype == dtype:
        return layer.kept[place]
    if layer.quant == "int8":
        return _expand_int8(layer.codes[place], layer.absmax[place], dtype)
    width, rows = layer.in_features, place.stop - place.start
    first, last = place.start * width, place.stop * width
    part = QuantizedLinear(width, rows, layer.quant, None)
    part.block_size = layer.block_size
    part.register_buffer("codes", layer.codes.view(torch.uint8).view(-1)[first // 2 : (last + 1) // 2, None])
    blocks = torch.arange(first // layer.block_size, -(-last // layer.block_size), device=layer.codes.device)
    part.register_buffer("absmax", _block_scales(layer, blocks))
    part.register_buffer("code", layer.code)
    return part.dequantize(dtype)


def expand_rows(layer: QuantizedLinear, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [n] of the layer's weight, [n, width]: the bits of `layer.dequantize(dtype)`."""
    if layer.kept is not None and layer.kept.dtype == dtype:
        return layer.kept[ids]
    if layer.quant == "int8":
        return _expand_int8(layer.codes[ids], layer.absmax[ids], dtype)
    found = torch.empty(len(ids), layer.in_features, dtype=dtype, device=layer.codes.device)
    codes = layer.codes.view(torch.uint8).view(-1)
    for place in _slices(len(ids), _AT_ONCE // layer.in_features):
        # [n, width]: where each weight lies among all
        at = ids[place, None] * layer.in_features + torch.arange(layer.in_features, device=ids.device)
        pairs = codes[at // 2]
        levels = layer.code[torch.where(at % 2 == 0, pairs >> 4, pairs & 15).int()]
        found[place] = levels.mul_(_block_scales(layer, at // layer.block_size))
    return found


def _expand_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [n, width], some at a time: bitsandbytes makes two copies in fp32 on the way."""
    found = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for place in _slices(len(codes), _AT_ONCE // codes.shape[1]):
        found[place] = bnb.functional.int8_vectorwise_dequant(codes[place], absmax[place])
    return found


def _block_scales(layer: QuantizedLinear, blocks: Tensor) -> Tensor:
    """What the codes of some blocks are multiplied by, float32, of the shape of `blocks`: `expanded_absmax` of them."""
    absmax = layer.absmax[blocks]
    if not layer.nested_block_size:
        return absmax
    return layer.nested_code[absmax.int()] * layer.nested_absmax[blocks // layer.nested_block_size] + layer.offset


def _slices(count: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


class CodedEmbedding(nn.Module):
    """An embedding that has no weight of its own: it reads the codes of the head that it is tied to.

    The head is referred to, not held: its codes belong to one module, and follow it wherever it goes.

    Args:
        plain: the embedding whose place it takes; what its class does to the rows (Gemma 3 scales them) stays.
    """

    def __init__(self, plain: Any, head: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self._plain, self._head = [plain], [head]  # in lists, which nn.Module does not look into
        self._padding_idx, plain.padding_idx = plain.padding_idx, None  # of all words, not of those in use
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features
        self.register_buffer("of_dtype", torch.empty(0, dtype=dtype, device=head.codes.device), persistent=False)

    of_dtype: Tensor  # what comes out has its dtype: it follows `model.float()`

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device of the weight [vocab, width], which models and others ask for, without its values."""
        return self.of_dtype.new_full((1, 1), torch.nan).expand(self.num_embeddings, self.embedding_dim)

    @property
    def head(self) -> QuantizedLinear:
        """Whose codes it reads."""
        return self._head[0]

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] to [..., width]: only the rows in use are expanded, each once."""
        used, places = ids.unique(return_inverse=True)
        rows = expand_rows(self.head, used, self.of_dtype.dtype)
        found: Tensor = functional_call(self._plain[0], {"weight": rows}, (places,))
        return found

    def expanded(self, weight: nn.Parameter) -> nn.Module:
        """The plain embedding again, with a weight [vocab, width]."""
        plain: nn.Embedding = self._plain[0]
        plain.weight, plain.padding_idx = weight, self._padding_idx
        return plain


def coded_head(model: Any) -> QuantizedLinear | None:
    """The model's output head where it is held as codes."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return head if isinstance(head, QuantizedLinear) else None


def refuse_coded_head(model: nn.Module, name: str, field: str) -> None:
    """Raises an AdapterError where the module `name`, which the recipe's adapter.`field` asks for, holds the codes of
    the head, or reads them."""
    head = coded_head(model)
    if any(part is head or isinstance(part, CodedEmbedding) for part in model.get_submodule(name).modules()):
        what = "the output head, or the embedding that is tied to it, is held as codes"
        raise AdapterError(f"adapter.{field}: {name}: {what}", fix="Set base.head_quant=none")


def quantized_body(model: nn.Module) -> list[QuantizedLinear]:
    """The quantized layers but the head."""
    head = coded_head(model)
    return [module for module in model.modules() if isinstance(module, QuantizedLinear) and module is not head]


def head_weights(model: Any) -> list[str]:
    """Full names of the weight that is the head's: two where it is tied to the embedding, the head's first."""
    modules = {module: name for name, module in model.named_modules()}
    head = f"{modules[model.get_output_embeddings()]}.weight"
    if head not in model.all_tied_weights_keys:
        return [head]
    return [head, f"{modules[model.get_input_embeddings()]}.weight"]


def put_coded_head(model: Any, head: QuantizedLinear, dtype: torch.dtype) -> None:
    """Puts the codes into the place of the head and, where that is tied to it, of the embedding, which then gives
    rows in `dtype`."""
    names = head_weights(model)
    for name in names[1:]:
        place = name.removesuffix(".weight")
        embedding: Any = model.get_submodule(place)
        embedding.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        model.set_submodule(place, CodedEmbedding(embedding, head, dtype))
    model.set_submodule(names[0].removesuffix(".weight"), head)
