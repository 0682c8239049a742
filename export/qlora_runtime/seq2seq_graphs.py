"""The two ONNX graphs of an encoder-decoder, run by onnxruntime on the CPU.

The encoder's graph gives the keys and values of the source for each layer of the decoder: they are made once.
The decoder's graph reads new tokens behind a key-value cache of those before, which is empty at first.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from qlora_runtime.decoder import FloatArray, Int64Array
from qlora_runtime.errors import ModelLoadError
from qlora_runtime.session import open_session

_IDS, _MASK = "input_ids", "attention_mask"


def source_names(layers: int) -> list[str]:
    """What the encoder gives and the decoder takes: [batch, heads, source, head_dim] each."""
    return [f"cross.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def cache_names(layers: int) -> list[tuple[str, str]]:
    """(past, present) of each layer's keys and values: [batch, heads, tokens read, head_dim]."""
    return [
        (f"past_key_values.{layer}.{part}", f"present.{layer}.{part}")
        for layer in range(layers)
        for part in ("key", "value")
    ]


@dataclass(frozen=True)
class Source:
    """Sources that have been read: the mask and what each layer of the decoder attends to, by input."""

    feeds: dict[str, ort.OrtValue]
    rows: int


class Seq2SeqGraphs:
    """Both graphs, loaded. They hold no state of their own."""

    def __init__(self, encoder: Path, decoder: Path, threads: int | None) -> None:
        """Load them, to run on `threads` threads (None: as many as onnxruntime finds best).

        Raises:
            ModelLoadError: onnxruntime refuses a file, or inputs and outputs are not those of the format.
        """
        self.encoder, self.decoder = open_session(encoder, threads), open_session(decoder, threads)
        given = {value.name: value for value in self.decoder.get_inputs()}
        layers = sum(name.startswith("past_key_values.") for name in given) // 2
        self.source_names, self.cache_names = source_names(layers), cache_names(layers)
        pasts, presents = [past for past, _ in self.cache_names], [present for _, present in self.cache_names]
        _check(self.encoder, "encoder", {_IDS, _MASK}, set(self.source_names))
        _check(self.decoder, "decoder", {_IDS, _MASK, *self.source_names, *pasts}, {"logits", *presents})
        self.cache_shapes = [_cache_shape(given[past]) for past in pasts]

    def read_source(self, input_ids: Int64Array, attention_mask: Int64Array) -> Source:
        """The encoder's forward; input_ids, attention_mask: [batch, source], padded on the right."""
        mask = ort.OrtValue.ortvalue_from_numpy(attention_mask)
        feeds = {_IDS: ort.OrtValue.ortvalue_from_numpy(input_ids), _MASK: mask}
        found = self.encoder.run_with_ort_values(self.source_names, feeds)
        return Source(dict(zip(self.source_names, found, strict=True)) | {_MASK: mask}, len(input_ids))


class TargetDecoding:
    """Answers to some sources, as far as they have been read."""

    def __init__(self, graphs: Seq2SeqGraphs, source: Source) -> None:
        self._graphs, self._source = graphs, source
        self._cache = [
            ort.OrtValue.ortvalue_from_numpy(np.zeros((source.rows, heads, 0, size), np.float32))
            for heads, size in graphs.cache_shapes
        ]

    def read(self, token_ids: Int64Array) -> FloatArray:
        """Read the next tokens of each answer, [batch, n] with n > 0; logits float32 [batch, n, vocab]."""
        names = self._graphs.cache_names
        feeds = {
            _IDS: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(token_ids)),
            **self._source.feeds,
        }
        feeds |= {past: value for (past, _), value in zip(names, self._cache, strict=True)}
        wanted = ["logits", *(present for _, present in names)]
        logits, *self._cache = self._graphs.decoder.run_with_ort_values(wanted, feeds)
        return np.asarray(logits.numpy(), dtype=np.float32)


def _check(session: ort.InferenceSession, name: str, inputs: set[str], outputs: set[str]) -> None:
    found = {value.name for value in session.get_inputs()}, {value.name for value in session.get_outputs()}
    if odd := sorted((found[0] ^ inputs) | (found[1] ^ outputs)):
        raise ModelLoadError(
            f"the {name}'s graph and the format disagree on these inputs or outputs: {odd}. Allowed are "
            "input_ids, attention_mask, cross, past_key_values, present and logits, of as many layers in "
            "both graphs. Export again."
        )


def _cache_shape(value: ort.NodeArg) -> tuple[int, int]:
    """(heads, head_dim) of a past."""
    shape = list(value.shape)
    if len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        raise ModelLoadError(
            f"{value.name} has the shape {shape}; allowed is [batch, heads, past, head_dim] with heads and "
            "head_dim as numbers. Export again."
        )
    return shape[1], shape[3]
