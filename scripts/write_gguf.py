"""A merged Llama model in one of llama.cpp's quantizations: the peer of our bundles.

    python scripts/write_gguf.py MERGED TARGET.gguf Q4_0      # needs gguf and llama-cpp-python

Prints the bits that a weight of the layers' linears takes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(merged: Path, target: Path) -> None:
    """The merged folder of a Llama as GGUF, fp32.

    Raises:
        ValueError: it is no Llama.
    """
    from gguf import GGUFWriter

    config: dict[str, Any] = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        raise ValueError(f"{merged} holds a {config['model_type']} model; only llama is written as GGUF")
    writer = GGUFWriter(str(target), "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(float(config["rope_parameters"]["rope_theta"]))
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, merged, config["vocab_size"])
    for file in sorted(merged.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            names = tensors.keys()
            for name in names:
                value = tensors.get_tensor(name).astype(np.float32)
                rotated = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
                writer.add_tensor(gguf_name(name), value if rotated is None else interleaved(value, rotated))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(source: Path, target: Path, kind: str) -> None:
    """`source` in one of llama.cpp's quantizations, such as Q4_0."""
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not write {target}")


def linear_bits(file: Path) -> float:
    """Bits that the weights of the layers' linears take, scales included; embeddings and head aside."""
    from gguf import GGUFReader

    tensors = [tensor for tensor in GGUFReader(file).tensors if ".attn_" in tensor.name or ".ffn_" in tensor.name]
    linears = [tensor for tensor in tensors if not tensor.name.endswith("norm.weight")]
    return float(8 * sum(t.n_bytes for t in linears) / sum(t.n_elements for t in linears))


def gguf_name(name: str) -> str:
    """A Llama parameter's name in GGUF."""
    own = name.removesuffix(".weight")
    if own in WHOLE:
        return f"{WHOLE[own]}.weight"
    _, _, layer, rest = own.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}.weight"


def interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head so that the two that rotate together are neighbours; transformers keeps them half a head apart.

    weight: [heads * head_dim, in].
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def _add_tokenizer(writer: Any, merged: Path, size: int) -> None:
    """The byte-level BPE of the folder; only ids are compared, so llama.cpp need not split text as it does."""
    from gguf import TokenType

    tree = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))
    by_id = {place: token for token, place in tree["model"]["vocab"].items()}
    added = {entry["id"]: entry["content"] for entry in tree["added_tokens"]}
    tokens = [(by_id | added).get(place, f"[unused {place}]") for place in range(size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tree["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if place in added else TokenType.NORMAL for place in range(size)])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(next((place for place, text in added.items() if text == "<|im_end|>"), 0))


def main(merged: str, target: str, kind: str) -> None:
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as scratch:
        whole = Path(scratch) / "whole.gguf"
        write_gguf(Path(merged), whole)
        quantize_gguf(whole, Path(target), kind)
    print(linear_bits(Path(target)))


if __name__ == "__main__":
    main(*sys.argv[1:])
