"""What onnxruntime-genai answers with a bundle's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime_genai as genai


def greedy_by_genai(folder: Path, prompt: Sequence[int], count: int) -> list[int]:
    """Its greedy answer of at most `count` tokens; an end token is not among them."""
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found: list[int] = generator.get_sequence(0).tolist()[len(prompt) :]
    return found
