"""The config of a base model, wherever it lies: a local folder, a GGUF file or a hub. Reads no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError
from qlora_kit.recipe import BaseSection

# GGUF architecture to transformers model_type, where the two differ.
_RENAMED = {"gemma3": "gemma3_text"}
_GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
_GPT2_KEYS = {
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
    "n_positions": "context_length",
}


def find_config(base: BaseSection) -> dict[str, Any]:
    """config.json of `base.model` as plain data.

    A hub id costs one small download, or none where the config is cached or the hub is set offline.

    Raises:
        ModelError: there is no such folder, file or hub model, or its config cannot be read.
    """
    path = Path(base.model).expanduser()
    if path.suffix.lower() == ".gguf":
        return _from_gguf(path)
    if path.is_dir():
        return _from_folder(path)
    if path.exists() or base.model.startswith((".", "/", "~")) or base.model.count("/") > 1 or "\\" in base.model:
        raise ModelError("base.model names no model", got=base.model, allowed="a hub id, a folder or a .gguf file")
    return _from_hub(base)


def _from_folder(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json", fix="Give the folder of a transformers model") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}", fix="Copy the model again") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path} holds no config", got=tree, fix="Copy the model again")
    return tree


def _from_gguf(path: Path) -> dict[str, Any]:
    import gguf

    if not path.is_file():
        raise ModelError("no such GGUF file", got=str(path), fix="Check the path")
    try:
        reader = gguf.GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
        keys = _GPT2_KEYS if architecture == "gpt2" else _GGUF_KEYS
        fields = {name: reader.fields.get(f"{architecture}.{key}") for name, key in keys.items()}
        shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
        # GGUF writes shapes innermost first, so that the vocabulary is the last number of the embedding's.
        vocab = int(shapes["token_embd.weight"][-1])
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ModelError(f"{path} is not a readable GGUF model: {error}", fix="Download it again") from error
    config = {name: field.contents() for name, field in fields.items() if field is not None}
    return config | {
        "model_type": _RENAMED.get(architecture, architecture),
        "vocab_size": vocab,
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
    }


def _from_hub(base: BaseSection) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            base.model, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(
            f"base.model {base.model}: no such folder here, and the hub did not give its config ({reason})",
            fix="Check the spelling, the network or the access token, or give a local folder",
        ) from None
    return config.to_dict()
