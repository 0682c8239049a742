"""Low-rank layers with a gate on each rank, and how they ship: as plain LoRA adapters without the closed ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from qlora_kit.adapters.files import PREFIX, read_files, write_adapter
from qlora_kit.adapters.layer import SideBranch
from qlora_kit.adapters.lora import LoraLinear
from qlora_kit.adapters.peft_config import unscaled_config
from qlora_kit.errors import AdapterError
from qlora_kit.kernels.gated_linear import gated_linear, gated_linear_reference


class GatedLinear(LoraLinear):
    """y = base(x) + scaling · B (g ⊙ A dropout(x)); subclasses own the gates g.

    Gates are float32 whatever the adapter's dtype: they are few, and what prunes them writes them directly.
    """

    @property
    def gates(self) -> Tensor:
        """float32 [rank]; a rank whose gate is zero adds nothing."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        weights = (self.lora_A, self.gates, self.lora_B)
        if self.training and self.dropout > 0:
            return gated_linear_reference(x, self.expand, self.bias, *weights, self.scaling, self.dropout)
        return gated_linear(x, self.expand, self.bias, *weights, self.scaling)

    def delta(self) -> Tensor:
        """scaling · B diag(g) A, float32 [out, in]."""
        a = self.gates.detach()[:, None] * self.lora_A.detach().float()
        return self.scaling * (self.lora_B.detach().float() @ a)

    def branch(self) -> SideBranch:
        branch = super().branch()
        return branch._replace(b=branch.b * self.gates.detach())


def publish_open_ranks(
    checkpoint: Path, target: Path, names: tuple[str, str, str], scaling: Callable[[str], float], fix: str
) -> None:
    """Writes the adapter in `checkpoint` into `target` as a LoRA adapter that computes the same.

    Gates and scaling are multiplied into B, in float32, and rounded once to its dtype: "the same" is exact in fp32, and
    within a rounding of B in bf16. Ranks whose gate is zero are left out; a layer that keeps none is left out whole.
    A stays as it was trained.

    Args:
        names: of A [rank, in], the gates [rank] or [rank, 1] and B [out, rank] on disk, relative to their layer.
        scaling: gives that of a layer's product, from the layer's full name.
        fix: what to do where no rank is left.

    Raises:
        AdapterError: no rank of any layer is left.
    """
    config, tensors = read_files(checkpoint)
    ending = f".{names[1]}"
    layers = [key.removeprefix(PREFIX).removesuffix(ending) for key in tensors if key.endswith(ending)]
    open_ranks, ranks = 0, {}
    for layer in layers:
        a, gates, b = (tensors.pop(f"{PREFIX}{layer}.{name}") for name in names)
        gates = gates.flatten().float()
        kept = gates != 0
        open_ranks += int(kept.sum())
        if not kept.any():
            if not any(key.startswith(f"{PREFIX}{layer}.") for key in tensors):
                continue
            kept[0] = True  # its bias is trained: PEFT looks for one in adapted layers only
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = a[kept].contiguous()
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = _gated(b, scaling(layer) * gates)[:, kept].contiguous()
        ranks[layer] = int(kept.sum())
    if not open_ranks:
        raise AdapterError(f"{checkpoint}: every rank of every layer was pruned, nothing is left to ship", fix=fix)
    if len(ranks) < len(layers):
        config["target_modules"] = list(ranks)
    write_adapter(target, unscaled_config(ranks, config), dict(sorted(tensors.items())))


def _gated(b: Tensor, factors: Tensor) -> Tensor:
    """B with each column multiplied, in its dtype."""
    return (b.float() * factors).to(b.dtype)
