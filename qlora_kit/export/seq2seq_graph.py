"""The two graphs of an encoder-decoder, with a key-value cache: through torch's exporter, laid out as a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx
import torch
from qlora_runtime.manifest import DECODER_GRAPH, ENCODER_GRAPH
from qlora_runtime.seq2seq_graphs import cache_names, source_names
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from qlora_kit.export.task_graph import copy_configuration, exported, quantized, write_graph

_ROWS, _SOURCE, _PAST, _NEW = 2, 5, 7, 3  # of the examples: no size that a graph could take for a constant
_ANY = torch.export.Dim.DYNAMIC


class _Encoder(nn.Module):
    """The keys and values of the source in every layer of the decoder, as `source_names` orders them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        hidden = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # Any one token makes the decoder project the source; nothing else of this forward reaches an output.
        self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=attention_mask,
            decoder_input_ids=input_ids[:, :1],
            past_key_values=cache,
            use_cache=True,
        )
        return _tensors(cache.cross_attention_cache)


class _Decoder(nn.Module):
    """Logits of new tokens behind those read before, and keys and values of all of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, source: tuple[Tensor, ...], past: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        own = DynamicCache(list(zip(past[::2], past[1::2])))
        cache = EncoderDecoderCache(own, DynamicCache(list(zip(source[::2], source[1::2]))))
        unread = attention_mask[..., None].to(source[0].dtype)  # says that there is a source, which the cache holds
        found = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=unread),
            attention_mask=attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return found.logits, *_tensors(own)


def build_seq2seq_graphs(merged: Path, target: Path, profile: str) -> None:
    """Writes both graphs, weights and configuration of the merged model `merged` into the folder `target`.

    Encoder: input_ids, attention_mask, int64 [batch, source], to cross.N.key and .value [batch, heads, source, head].
    Decoder: input_ids [batch, new], attention_mask of the source, cross.N.*, past_key_values.N.key and .value
    [batch, heads, past, head], to logits [batch, new, vocab] and present.N.key and .value; all but ids float32.

    Args:
        profile: fp32, or int8 as `build_task_graph` has it.

    Raises:
        ExportError: torch cannot export this model.
    """
    model = AutoModelForSeq2SeqLM.from_pretrained(merged, dtype=torch.float32).eval()
    encoder, decoder = seq2seq_graphs(model)
    if profile == "int8":
        encoder, decoder = quantized(encoder, []), quantized(decoder, ["logits"])
    digests = {sha256(tensor.raw_data).digest(): tensor for tensor in encoder.graph.initializer}
    write_graph(encoder, target / ENCODER_GRAPH)
    _share(decoder, digests)
    write_graph(decoder, target / DECODER_GRAPH)
    copy_configuration(merged, target)


def _share(graph: onnx.ModelProto, written: Mapping[bytes, onnx.TensorProto]) -> None:
    """Lets weights of the graph that lie in another's file by now be read there: the embedding of both.

    Args:
        written: by the digest of their bytes, the other graph's.
    """
    for tensor in graph.graph.initializer:
        same = written.get(sha256(tensor.raw_data).digest())
        if same is not None and same.data_location == onnx.TensorProto.EXTERNAL and same.dims == tensor.dims:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.extend(same.external_data)


def seq2seq_graphs(model: PreTrainedModel) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Encoder and decoder; errors as for `build_seq2seq_graphs`."""
    ids = torch.full((_ROWS, _SOURCE), 3)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    with torch.no_grad():
        source = _Encoder(model)(ids, mask)
    layers, name, sides = len(source) // 2, type(model).__name__, ({0: _ANY, 1: _ANY},) * 2
    encoder = exported(_Encoder(model), (ids, mask), ["input_ids", "attention_mask"], source_names(layers), sides, name)
    past = tuple(torch.zeros(_ROWS, tensor.shape[1], _PAST, tensor.shape[3]) for tensor in source)
    pasts, presents = zip(*cache_names(layers))
    decoder = exported(
        _Decoder(model),
        (torch.full((_ROWS, _NEW), 3), mask, source, past),
        ["input_ids", "attention_mask", *source_names(layers), *pasts],
        ["logits", *presents],
        (*sides, *[tuple({0: _ANY, 2: _ANY} for _ in source)] * 2),
        name,
    )
    return encoder, decoder


def _tensors(cache: Any) -> tuple[Tensor, ...]:
    """Keys and values of each layer in turn."""
    return tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
