"""A bundle through transformers.js: the node example answers as the runner does."""

import json
import shutil
import subprocess
from pathlib import Path

import onnx
import pytest
from qlora_runtime import Bundle, Sampling
from qlora_runtime.generate import generate

EXAMPLE = Path(__file__).parents[2] / "export" / "examples" / "node"
CHAT = [{"role": "user", "content": "Where does the road end?"}]
TOKENS = 12


def test_caches_have_a_fixed_head_size(exported_run: Path) -> None:
    """transformers.js makes its empty cache by the graph's shapes, and 0 of what has no number."""
    folder = exported_run / "bundles" / "fp32"
    graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False).graph
    heads = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    caches = [value for value in [*graph.input, *graph.output] if "key" in value.name or "value" in value.name]
    assert len(caches) == 4 * heads["num_hidden_layers"]
    for value in caches:
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert sizes == [0, heads["num_key_value_heads"], 0, heads["head_size"]]


def test_the_template_is_where_each_runtime_looks(exported_run: Path) -> None:
    folder = exported_run / "bundles" / "fp32"
    inside = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    assert inside == (folder / "chat_template.jinja").read_text(encoding="utf-8")


def test_the_node_example_answers_as_the_runner(exported_run: Path) -> None:
    node = shutil.which("node")
    if node is None or not (EXAMPLE / "node_modules" / "@huggingface" / "transformers").exists():
        pytest.skip(f"needs node, and `npm install` in {EXAMPLE}")
    folder = exported_run / "bundles" / "fp32"
    command = [node, str(EXAMPLE / "generate.mjs"), str(folder), CHAT[0]["content"], str(TOKENS)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == 0, said.stderr[-2000:]
    expected = generate(Bundle.open(folder, threads=1), CHAT, Sampling(max_new_tokens=TOKENS)).text
    assert said.stdout.strip() == expected.strip() != ""
