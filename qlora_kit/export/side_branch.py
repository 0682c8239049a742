"""An adapter as float nodes beside frozen codes, and several adapters of one input as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import torch

from qlora_kit.adapters.layer import SideBranch
from qlora_kit.export.linear import DataFile, Linear, node


def stacked(branches: Sequence[SideBranch | None], counts: Sequence[int]) -> SideBranch | None:
    """One branch for layers of one input whose outputs lie one behind another; None where none has any.

    Its A is theirs, one under another; its B has theirs along the diagonal, and zeros. Layers are adapted by one
    method, and so pool their inputs alike.

    Args:
        counts: features of each layer's output.
    """
    present = [branch for branch in branches if branch is not None]
    if len(branches) == 1 or not present:
        return branches[0]
    blocks = [branch.b if branch is not None else torch.zeros(count, 0) for branch, count in zip(branches, counts)]
    scale = None
    if any(branch.row_scale is not None for branch in present):
        scales = [branch.row_scale if branch else None for branch in branches]
        scale = torch.cat([torch.ones(count) if s is None else s for s, count in zip(scales, counts)])
    a = torch.cat([branch.a for branch in present])
    return SideBranch(a, torch.block_diag(*blocks), scale, present[0].group_size)


def branch_nodes(linear: Linear, frozen: str, branch: SideBranch, data: DataFile) -> list[onnx.NodeProto]:
    """y = row_scale · (frozen + (x Aᵀ) Bᵀ), of which the adapter has what it has. x is [batch, seq, in]."""
    x, y = linear.node.input[0], linear.node.output[0]
    nodes: list[onnx.NodeProto] = []
    if branch.group_size:
        shape = data.add(f"{linear.prefix}.groups", np.array([0, 0, -1, branch.group_size]))
        axis = data.add(f"{linear.prefix}.group_axis", np.array([3]))
        nodes += [
            node("Reshape", [x, shape], f"{y}/groups"),
            node("ReduceSum", [f"{y}/groups", axis], f"{y}/pooled", keepdims=0),
        ]
        x = f"{y}/pooled"
    a = data.add(f"{linear.prefix}.lora_A", branch.a.T.cpu().numpy())
    b = data.add(f"{linear.prefix}.lora_B", branch.b.T.cpu().numpy())
    summed = y if branch.row_scale is None else f"{y}/summed"
    nodes += [
        node("MatMul", [x, a], f"{y}/lora_A"),
        node("MatMul", [f"{y}/lora_A", b], f"{y}/lora_B"),
        node("Add", [frozen, f"{y}/lora_B"], summed),
    ]
    if branch.row_scale is not None:
        scale = data.add(f"{linear.prefix}.row_scale", branch.row_scale.cpu().numpy())
        nodes.append(node("Mul", [summed, scale], y))
    return nodes
