"""SoRA: sparse gates choose how many ranks each layer keeps (Ding et al. 2023, arXiv:2311.11696)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.adapters.gated import GatedLinear, publish_open_ranks
from qlora_kit.adapters.inject import adapted_layers
from qlora_kit.adapters.layer import LinearLayer
from qlora_kit.adapters.lora import LowRank
from qlora_kit.adapters.low_rank_settings import LowRankSettings
from qlora_kit.adapters.peft_config import read_low_rank_config
from qlora_kit.adapters.pruned_settings import SoraSettings
from qlora_kit.errors import AdapterError


class SoraLinear(GatedLinear):
    """y = base(x) + s B (g ⊙ A dropout(x)), equation 4.

    lora_gate, float32 [rank], starts at N(0, 1), as in the authors' code: so that gates reach zero one after the
    other. From one common value those that the loss is indifferent to would all do so at the same step.
    """

    def __init__(self, base: LinearLayer, settings: LowRankSettings) -> None:
        super().__init__(base, settings)
        self.lora_gate = nn.Parameter(torch.randn(self.rank).to(self.device))  # drawn on the CPU, the same everywhere

    @property
    def gates(self) -> Tensor:
        return self.lora_gate


class Sora(LowRank[SoraSettings]):
    """SoRA. A checkpoint holds gates and all ranks; what ships is a LoRA adapter of the ranks whose gate is open."""

    peft_type = "QLORA_KIT_SORA"
    stored_as: ClassVar[dict[str, str]] = {**LowRank.stored_as, "lora_gate": "lora_gate"}
    layer_class = SoraLinear

    def after_step(
        self, model: PreTrainedModel, step: int, total_steps: int, lr: float, clip_factor: float = 1.0
    ) -> None:
        """The proximal step, equations 5 to 8: what the optimizer made of g, soft-thresholded by η λ.

        Raises:
            AdapterError: no gate of any layer is open any more.
        """
        gates = [layer.lora_gate.data for _, layer in adapted_layers(model) if isinstance(layer, SoraLinear)]
        for gate in gates:
            gate.copy_(soft_threshold(gate, lr * self.settings.sparse_lambda))
        if not torch.stack([gate.any() for gate in gates]).any():
            raise AdapterError(
                f"adapter.sparse_lambda pruned every rank of every layer by step {step} of {total_steps}: "
                "nothing is left to train",
                got=self.settings.sparse_lambda,
                fix="Lower it: at each step a gate moves towards zero by sparse_lambda times train.lr",
            )

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        return super().config(model) | {"sparse_lambda": self.settings.sparse_lambda}

    @classmethod
    def read_config(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> SoraSettings:
        weight = config.get("sparse_lambda")
        return read_low_rank_config(SoraSettings, config, tensors, origin, sparse_lambda=weight)

    def publish(self, checkpoint: Path, target: Path) -> None:
        def scaling(layer: str) -> float:
            return self.settings.for_layer(layer).scaling

        names = ("lora_A.weight", "lora_gate", "lora_B.weight")
        publish_open_ranks(checkpoint, target, names, scaling, "Lower adapter.sparse_lambda")


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """sign(v) · max(|v| - threshold, 0), the proximal operator of threshold · ‖v‖₁."""
    return values.sign() * (values.abs() - threshold).clamp_min(0)
