"""Loads a base's processor: what turns images, or sounds and their transcripts, into the model's input."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import transformers

from qlora_kit.errors import ModelError
from qlora_kit.model.weights import first_line


def load_processor(folder: Path, auto_class: str, trust_remote_code: bool = False) -> Any:
    """The processor in a model folder, working on the CPU through Pillow and numpy: the same bits everywhere.

    Args:
        auto_class: of transformers: AutoImageProcessor or AutoProcessor.

    Raises:
        ModelError: Pillow is missing where images are read, the folder holds no such processor, or one of sounds that
            does not make windows of fixed length, as Whisper's does.
    """
    options: dict[str, Any] = {}
    if auto_class == "AutoImageProcessor":
        if importlib.util.find_spec("PIL") is None:
            raise ModelError("images need Pillow, which is not installed", fix="pip install 'qlora-kit[vision]'")
        options["backend"] = "pil"  # torchvision's, where it is installed, resizes to other pixels
    try:
        found = getattr(transformers, auto_class).from_pretrained(
            folder, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder}: no processor for {auto_class}: {first_line(error)}",
            fix="Put preprocessor_config.json, and of speech the tokenizer's files, beside the model",
        ) from error
    if auto_class == "AutoProcessor" and not hasattr(getattr(found, "feature_extractor", None), "n_samples"):
        raise ModelError(
            f"{folder}: a processor without windows of fixed length",
            got=type(found).__name__,
            allowed="WhisperProcessor",
            fix="Take a base of Whisper's kind",
        )
    return found
