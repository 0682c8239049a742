"""What does an adapter beside int4 codes cost at one token? LoRA's branch and QA-LoRA's pooled one, in several forms.

    python scripts/bench_decode.py [--shape smollm2] [--layers 4] [--threads 2] [--repeats 60]

The linear layers of a few decoder layers as com.microsoft.MatMulNBits (4 bit, integer zero points, random codes: the
time does not depend on them), at accuracy levels 0 and 4. `packed`: q, k and v are one product, gate and up another,
with one A for each and a B that is zero off its blocks. Forms take turns within each repeat; a form's speed is compared
with that of packed int4 without adapter in the same repeat. Before, forms of one function are held to the same output.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

SHAPES = {"smollm2": (576, 192, 1536), "7b": (4096, 1024, 14336)}
"""Widths of the hidden state, of k and of v, and of the MLP."""
BLOCK_SIZE = 32
FORMS = {
    "int4": (None, False),
    "int4, packed": (None, True),
    "lora": ("lora", False),
    "lora, packed": ("lora", True),
    "qa_lora, not pooled": ("widened", False),
    "qa_lora": ("pooled", False),
    "qa_lora, packed": ("pooled", True),
}
SAME = (("int4", "int4, packed"), ("lora", "lora, packed"), *(("qa_lora, not pooled", n) for n in list(FORMS)[5:]))
PLAIN = "int4, packed"


@dataclass
class Graph:
    """Layers of one form; forms of one function draw the same weights."""

    branch: str | None
    packed: bool
    rank: int
    level: int
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, array: np.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(array, f"c{len(self.tensors)}"))
        return self.tensors[-1].name

    def node(self, kind: str, inputs: list[str], domain: str = "", outputs: int = 1, **attributes: Any) -> list[str]:
        names = [f"n{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names

    def linears(self, x: str, width: int, outs: list[int]) -> list[str]:
        """Products of x [1, 1, width] and a matrix for each of `outs`."""
        drawn = [self._drawn(width, out) for out in outs]
        seen = self._pooled(x, width) if self.branch == "pooled" else x
        if not self.packed:
            return [self._product(x, seen, width, *parts) for parts in drawn]
        codes, scales, zeros, a = (np.concatenate(parts) for parts in list(zip(*drawn))[:4])
        b = np.zeros((sum(outs), len(a)), np.float32)
        for index, (out, parts) in enumerate(zip(outs, drawn)):
            first, column = sum(outs[:index]), index * self.rank
            b[first : first + out, column : column + self.rank] = parts[4]
        y = self._product(x, seen, width, codes, scales, zeros, a, b)
        return self.node("Split", [y, self.constant(np.array(outs))], outputs=len(outs), axis=-1) if outs[1:] else [y]

    def _drawn(self, width: int, out: int) -> tuple[np.ndarray, ...]:
        """Codes, scales, zero points, A and B of a layer."""
        blocks, rank = width // BLOCK_SIZE, self.rank
        codes = self.rng.integers(0, 256, (out, blocks, BLOCK_SIZE // 2), np.uint8)
        scales = (self.rng.random((out, blocks), np.float32) + 0.5) / (5 * width**0.5)
        zeros = self.rng.integers(119, 137, (out, (blocks + 1) // 2), np.uint8)
        columns = width if self.branch == "lora" else blocks
        a = self.rng.standard_normal((rank, columns), np.float32) / width**0.5
        a = a.repeat(BLOCK_SIZE, 1) if self.branch == "widened" else a
        return codes, scales, zeros, a, self.rng.standard_normal((out, rank), np.float32) / rank**0.5

    def _pooled(self, x: str, width: int) -> str:
        (groups,) = self.node("Reshape", [x, self.constant(np.array([1, 1, width // BLOCK_SIZE, BLOCK_SIZE]))])
        return self.node("ReduceSum", [groups, self.constant(np.array([3]))], keepdims=0)[0]

    def _product(self, x: str, seen: str, width: int, *parts: np.ndarray) -> str:
        inputs, (out, *_) = [x, *map(self.constant, parts[:3])], parts[0].shape
        shape = {"K": width, "N": out, "bits": 4, "block_size": BLOCK_SIZE, "accuracy_level": self.level}
        (y,) = self.node("MatMulNBits", inputs, "com.microsoft", **shape)
        if self.branch is None:
            return y
        (h,) = self.node("MatMul", [seen, self.constant(np.ascontiguousarray(parts[3].T))])
        (added,) = self.node("MatMul", [h, self.constant(np.ascontiguousarray(parts[4].T))])
        return self.node("Add", [y, added])[0]

    def session(self, widths: tuple[int, int, int], layers: int, threads: int) -> ort.InferenceSession:
        hidden, kv, mlp = widths
        x, ends = "x", []
        for _ in range(layers):
            q, *others = self.linears(x, hidden, [hidden, kv, kv])
            ends += others  # asked for, or they would not be computed
            (x,) = self.linears(q, hidden, [hidden])
            gate, up = self.linears(x, hidden, [mlp, mlp])
            (x,) = self.linears(self.node("Add", [gate, up])[0], mlp, [hidden])
        first = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 1, hidden])
        last = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in [x, *ends]]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(self.nodes, "layers", [first], last, self.tensors)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    for level in (0, 4):
        _compare(options, level)


def _compare(options: argparse.Namespace, level: int) -> None:
    widths = SHAPES[options.shape]
    x = np.random.default_rng(1).standard_normal((1, 1, widths[0]), np.float32)
    graphs = {name: Graph(*form, options.rank, level) for name, form in FORMS.items()}
    sessions = {name: graph.session(widths, options.layers, options.threads) for name, graph in graphs.items()}
    answers = {name: session.run(None, {"x": x})[0] for name, session in sessions.items()}
    for one, other in SAME:
        apart = np.abs(answers[one] - answers[other]).max() / np.abs(answers[one]).max()
        print(f"level {level}: {other} is {apart:.1e} from {one}")
        if not apart < (1e-4 if level == 0 else 0.1):  # level 4 rounds activations, and a hair moves a code
            raise SystemExit(f"{other} computes something else than {one}")
    spent: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(options.repeats):
        for name in list(sessions)[:: 1 if turn % 2 else -1]:
            begin = time.perf_counter()
            sessions[name].run(None, {"x": x})
            spent[name].append(time.perf_counter() - begin)
    for name, seconds in spent.items():
        low, middle, high = np.percentile(np.array(spent[PLAIN]) / np.array(seconds), [25, 50, 75])
        ms = 1e3 * float(np.median(seconds)) / options.layers
        print(f"level {level}: {name:20} {ms:8.3f} ms a layer, speed {middle:.2f} ({low:.2f} to {high:.2f}) of {PLAIN}")


if __name__ == "__main__":
    main()
