"""The ONNX graph: a decoder with a key-value cache, run by onnxruntime on the CPU.

The cache is one buffer per layer, as long as the whole answer can become. It is bound both as the graph's
past and as its present, so that GroupQueryAttention writes each new token in place and copies nothing. Graphs
of architectures without that operator give the whole cache anew with each run.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from qlora_runtime.errors import ModelLoadError
from qlora_runtime.session import open_session, read_adapter
from qlora_runtime.strict_json import JsonObject, is_count

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

# Long prompts are read in pieces of this many tokens: the graph returns logits for every token it reads,
# which for a prompt of 8k tokens and a vocabulary of 128k would be 4 GB at once.
PREFILL_TOKENS = 256

_CACHE_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class CacheShape:
    """The key-value cache's dimensions, as genai_config.json gives them; whether the graph gives it anew."""

    layers: int
    kv_heads: int
    head_dim: int
    grows: bool = False


def read_cache_shape(genai_config: JsonObject) -> CacheShape:
    """The cache's shape. Raises ModelLoadError where genai_config.json does not say it."""
    model = genai_config.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    sizes: JsonObject = {
        key: decoder.get(key) if isinstance(decoder, dict) else None
        for key in ("num_hidden_layers", "num_key_value_heads", "head_size")
    }
    if wrong := {key: size for key, size in sizes.items() if not is_count(size) or size == 0}:
        raise ModelLoadError(
            f"genai_config.json: model.decoder has {wrong}, positive integers are expected. Export again."
        )
    search = genai_config.get("search")
    grows = isinstance(search, dict) and search.get("past_present_share_buffer") is False
    return CacheShape(sizes["num_hidden_layers"], sizes["num_key_value_heads"], sizes["head_size"], grows)


class Decoder:
    """A loaded graph. It holds no state of its own: each `Decoding` has its own cache."""

    def __init__(self, graph: Path, shape: CacheShape, threads: int | None) -> None:
        """Load `graph`, to run on `threads` threads (None: as many as onnxruntime finds best).

        Raises:
            ModelLoadError: onnxruntime refuses the file, or its inputs and outputs are not those of the
                format.
        """
        self.session = open_session(graph, threads)
        self.shape = shape
        # One (past, present) pair of names for each layer's keys and for its values.
        self.cache_names = [
            (f"past_key_values.{layer}.{part}", f"present.{layer}.{part}")
            for layer in range(shape.layers)
            for part in ("key", "value")
        ]
        self.adapter: Mapping[str, ort.OrtValue] = {}  # inputs that stand beside the frozen layers
        self._check_interface()
        self._cache_dtype = _CACHE_DTYPES[self.session.get_inputs()[-1].type]

    def with_adapter(self, file: Path | None) -> "Decoder":
        """The same loaded graph with an adapter's weights as inputs; with None it is the base alone.

        Raises:
            ModelLoadError: the file is no adapter, or one of another graph.
        """
        other = copy.copy(self)
        other.adapter = {} if file is None else read_adapter(file)
        inputs = {value.name for value in self.session.get_overridable_initializers()}
        if odd := sorted(other.adapter.keys() - inputs):
            raise ModelLoadError(
                f"{file}: the graph has no input {odd[0]}: the adapter is of another bundle."
            )
        return other

    def start(self, capacity: int) -> "Decoding":
        """A new sequence, with room for `capacity` tokens, prompt and answer together."""
        return (GrowingDecoding if self.shape.grows else Decoding)(self, capacity)

    def empty_cache(self, batch: int, capacity: int) -> list[ort.OrtValue]:
        """Zeroed keys and values: 2 * layers tensors of [batch, kv_heads, capacity, head_dim]."""
        shape = (batch, self.shape.kv_heads, capacity, self.shape.head_dim)
        return [
            ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._cache_dtype)) for _ in self.cache_names
        ]

    def logits(self, input_ids: Int64Array, attention_mask: Int64Array) -> FloatArray:
        """One forward without a past.

        input_ids, attention_mask: [batch, seq] -> [batch, seq, vocab] float32.
        """
        past = self.empty_cache(len(input_ids), 0)
        feeds = {
            "input_ids": ort.OrtValue.ortvalue_from_numpy(input_ids),
            "attention_mask": ort.OrtValue.ortvalue_from_numpy(attention_mask),
        } | {name: value for (name, _), value in zip(self.cache_names, past, strict=True)}
        feeds |= self.adapter
        (logits,) = self.session.run_with_ort_values(["logits"], feeds)
        return np.asarray(logits.numpy(), dtype=np.float32)

    def _check_interface(self) -> None:
        """The graph must take and give exactly the format's names, with a cache of a known dtype."""
        inputs = {value.name for value in self.session.get_inputs()}
        outputs = {value.name for value in self.session.get_outputs()}
        expected_inputs = {"input_ids", "attention_mask"} | {past for past, _ in self.cache_names}
        expected_outputs = {"logits"} | {present for _, present in self.cache_names}
        if odd := sorted((inputs ^ expected_inputs) | (outputs ^ expected_outputs)):
            raise ModelLoadError(
                f"the graph and the format disagree on these inputs or outputs: {odd}. Allowed are "
                f"input_ids, attention_mask, logits and the cache of {self.shape.layers} layers; "
                "export with a decoder profile."
            )
        cache_inputs = [
            value for value in self.session.get_inputs() if value.name.startswith("past_key_values.")
        ]
        if odd := sorted({value.type for value in cache_inputs} - _CACHE_DTYPES.keys()):
            raise ModelLoadError(
                f"the cache's type is {odd}; allowed are {sorted(_CACHE_DTYPES)}. Export again."
            )


def in_pieces(token_ids: Int64Array) -> list[Int64Array]:
    """[seq] cut into pieces of PREFILL_TOKENS and a rest."""
    return [token_ids[start : start + PREFILL_TOKENS] for start in range(0, len(token_ids), PREFILL_TOKENS)]


class Decoding:
    """One sequence being decoded: the tokens read so far live in a cache that is written in place."""

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        """Room for `capacity` tokens, prompt and answer together."""
        self._session = decoder.session
        self._binding = decoder.session.io_binding()
        self._length = 0
        self._capacity = capacity
        # Older onnxruntime (1.23) neither copies nor keeps what is bound: it must live as long as this.
        self._cache = decoder.empty_cache(1, capacity)
        self._inputs: tuple[Int64Array, ...] = ()
        self._bind_logits()  # bound first, so that logits stay the first of the outputs
        for (past, present), value in zip(decoder.cache_names, self._cache, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
        self._adapter = decoder.adapter
        for name, value in self._adapter.items():
            self._binding.bind_ortvalue_input(name, value)

    def read(self, token_ids: Int64Array) -> FloatArray:
        """Read the next tokens ([seq], at least one) and return the logits after the last: [vocab] float32.

        Raises:
            ValueError: more tokens than the cache has room for, or none.
        """
        if not 0 < len(token_ids) <= self._capacity - self._length:
            room = self._capacity - self._length
            raise ValueError(f"{len(token_ids)} tokens to read, the cache has room for {room}")
        for piece in in_pieces(token_ids):
            logits = self._read_piece(piece)
        return logits

    def _read_piece(self, token_ids: Int64Array) -> FloatArray:
        self._length += len(token_ids)
        self._inputs = (np.ascontiguousarray(token_ids[None, :]), np.ones((1, self._length), np.int64))
        self._binding.bind_cpu_input("input_ids", self._inputs[0])
        self._binding.bind_cpu_input("attention_mask", self._inputs[1])
        self._bind_logits()
        self._session.run_with_iobinding(self._binding)
        logits = self._binding.get_outputs()[0]
        return np.array(logits.numpy()[0, -1], dtype=np.float32)  # of [1, seq, vocab]

    def _bind_logits(self) -> None:
        """Ask for the logits in a new tensor: their shape changes with the number of tokens read."""
        self._binding.bind_output("logits", "cpu")


class GrowingDecoding(Decoding):
    """The same for graphs whose present is another tensor than their past, longer by what was read."""

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        self._decoder = decoder
        self._length = 0
        self._capacity = capacity
        self._past = decoder.empty_cache(1, 0)

    def _read_piece(self, token_ids: Int64Array) -> FloatArray:
        self._length += len(token_ids)
        names = self._decoder.cache_names
        feeds = {
            "input_ids": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(token_ids[None, :])),
            "attention_mask": ort.OrtValue.ortvalue_from_numpy(np.ones((1, self._length), np.int64)),
        } | {name: value for (name, _), value in zip(names, self._past, strict=True)}
        wanted = ["logits", *(present for _, present in names)]
        logits, *self._past = self._decoder.session.run_with_ort_values(wanted, feeds)
        return np.array(logits.numpy()[0, -1], dtype=np.float32)  # of [1, seq, vocab]
