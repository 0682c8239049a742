"""Runs onnxruntime-genai's model builder: `python -m qlora_kit.export.builder MERGED TARGET PRECISION [KEY=VALUE …]`.

A process of its own, because the builder prints every layer and holds whole copies of the model until it ends.
"""

import sys

from onnxruntime_genai.models.builder import create_model, parse_extra_options


def main(merged: str, target: str, precision: str, *options: str) -> None:
    """Writes graph, weights and configuration of the Hugging Face folder `merged` into `target`."""
    place = ("", merged, target, precision, "cpu", f"{target}/.cache")
    create_model(*place, **parse_extra_options(*place, list(options)))


if __name__ == "__main__":
    main(*sys.argv[1:])
