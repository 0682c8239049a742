"""AdaLoRA: ranks move to the layers that need them while the budget falls (Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.adapters.files import PREFIX
from qlora_kit.adapters.gated import GatedLinear, publish_open_ranks
from qlora_kit.adapters.inject import adapted_layers, inject_layers
from qlora_kit.adapters.layer import LinearLayer
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.peft_config import check_low_rank_config, factor_config, factor_fields, wrong_fields_named
from qlora_kit.adapters.pruned_settings import AdaLoraSettings
from qlora_kit.adapters.rank_budget import BudgetSchedule, Importance, most_important
from qlora_kit.errors import AdapterError

FIELDS = {
    "rank": "target_r",
    "init_rank": "init_r",
    "alpha": "lora_alpha",
    "warmup_share": "tinit",
    "final_share": "tfinal",
    "prune_every": "deltaT",
    "orth_weight": "orth_reg_weight",
}
"""Our names of settings to PEFT's."""
NOMINAL_STEPS = 1000  # PEFT's configuration counts phases in steps: of an adapter not trained yet, in this many


class AdaLoraLinear(GatedLinear):
    """y = base(x) + s P Λ Q dropout(x), equation 3; P is lora_B [out, rank], Q lora_A [rank, in], Λ lora_E [rank, 1].

    P and Q start at N(0, 0.02²), Λ at zero, as in the authors' code and PEFT.
    """

    def __init__(self, base: LinearLayer, settings: AdaLoraSettings) -> None:
        wide = {"rank": settings.start_rank, "init_rank": settings.start_rank}
        super().__init__(base, settings.model_copy(update=wide))
        self.lora_E = nn.Parameter(torch.zeros(self.rank, 1, device=self.device))
        for weight in (self.lora_A, self.lora_B):  # drawn on the CPU, rounded to bf16: as lora_A of LoRA
            weight.data.copy_((0.02 * torch.randn(weight.shape)).bfloat16())

    @property
    def gates(self) -> Tensor:
        return self.lora_E[:, 0]


class AdaLora(Method[AdaLoraSettings]):
    """AdaLoRA. A checkpoint is PEFT's ADALORA adapter; what ships is a LoRA adapter of the ranks that were kept.

    Values Λ that are pruned are set to zero and may come back until the final phase, in which they stay so.
    """

    peft_type = "ADALORA"
    stored_as: ClassVar[dict[str, str]] = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"}

    def __init__(self, settings: AdaLoraSettings) -> None:
        super().__init__(settings)
        self.importance = Importance(settings.beta1, settings.beta2)
        self.kept: dict[str, Tensor] = {}
        """Ranks of each layer that the final phase trains, bool [rank]; empty before it."""
        self.total_steps = NOMINAL_STEPS

    def inject(self, model: PreTrainedModel, targets: list[str] | None = None) -> list[str]:
        return inject_layers(model, self.settings, lambda layer, _: AdaLoraLinear(layer, self.settings), targets)

    def lr_factor(self, name: str) -> float:
        return self.settings.lr_ratio if name.endswith("lora_B") else 1.0

    def penalty(self, model: PreTrainedModel) -> Tensor | None:
        """orth_weight times the mean of ‖PᵀP - I‖ and ‖Q Qᵀ - I‖ over all layers, Frobenius norms.

        Equation 4 sums their squares; the authors' code, and PEFT, take the mean of the norms.
        """
        if not self.settings.orth_weight:
            return None
        norms = []
        for _, layer in _layers(model):
            norms += [_from_orthogonal(layer.lora_A.float()), _from_orthogonal(layer.lora_B.float().T)]
        return self.settings.orth_weight * torch.stack(norms).mean()

    def schedule(self, layers: int) -> BudgetSchedule:
        """The budget of so many layers over a run of `total_steps`: the final phase leaves at least one step before."""
        final = min(round(self.settings.final_share * self.total_steps), self.total_steps - 1)
        fixed_from = self.total_steps - final
        return BudgetSchedule(
            start=layers * self.settings.start_rank,
            target=layers * self.settings.rank,
            warmup_steps=min(round(self.settings.warmup_share * self.total_steps), fixed_from - 1),
            fixed_from=fixed_from,
            prune_every=self.settings.prune_every,
        )

    def ships_from(self, total_steps: int) -> int:
        """Where the budget is reached: an earlier adapter would ship more ranks than were asked for."""
        self.total_steps = total_steps
        return self.schedule(1).fixed_from

    def after_step(
        self, model: PreTrainedModel, step: int, total_steps: int, lr: float, clip_factor: float = 1.0
    ) -> None:
        self.total_steps = total_steps
        layers = dict(_layers(model))
        if self.kept:
            _close(layers, self.kept)
        else:
            self._choose(layers, step, clip_factor)

    def _choose(self, layers: dict[str, AdaLoraLinear], step: int, clip_factor: float) -> None:
        """Takes in the step's gradients, and prunes where the schedule says so; for good where it ends."""
        schedule = self.schedule(len(layers))
        ends = step >= schedule.fixed_from  # later than planned where fp16 overflowed and steps were skipped
        if not ends or not self.importance.sensitivity:
            for name, layer in layers.items():
                for own in self.stored_as:
                    self.importance.update(f"{name}.{own}", layer.get_parameter(own), clip_factor)
        if not schedule.prunes(step):
            return
        kept = most_important(self._scores(layers), schedule.ranks(step))
        _close(layers, kept)
        if ends:
            self.kept = kept
            self.importance.clear()

    def _scores(self, layers: dict[str, AdaLoraLinear]) -> dict[str, Tensor]:
        """Equation 7: a rank counts with its value and the means of its two vectors."""
        score = self.importance.score
        return {
            name: score(f"{name}.lora_E")[:, 0] + score(f"{name}.lora_A").mean(1) + score(f"{name}.lora_B").mean(0)
            for name in layers
        }

    @property
    def _state_parts(self) -> dict[str, dict[str, Tensor]]:
        importance = self.importance
        return {"sensitivity": importance.sensitivity, "uncertainty": importance.uncertainty, "kept": self.kept}

    def state(self) -> dict[str, Tensor]:
        return {f"{part}/{name}": value for part, named in self._state_parts.items() for name, value in named.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            self._state_parts[part][name] = value

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        settings, schedule = self.settings, self.schedule(1)
        return {
            "target_r": settings.rank,
            "init_r": settings.start_rank,
            "tinit": schedule.warmup_steps,
            "tfinal": self.total_steps - schedule.fixed_from,
            "deltaT": settings.prune_every,
            "beta1": settings.beta1,
            "beta2": settings.beta2,
            "orth_reg_weight": settings.orth_weight,
            "total_step": self.total_steps,
            "rank_pattern": None,  # PEFT's way to say which ranks are left out; here all are stored
            **factor_config(model, settings),
        }

    @classmethod
    def check_config(cls, config: dict[str, Any], origin: Path) -> None:
        check_low_rank_config(config, origin)

    @classmethod
    def read_config(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> AdaLoraSettings:
        with wrong_fields_named(origin, FIELDS):
            steps = max(1, int(config["total_step"]))
            return AdaLoraSettings(
                rank=config["target_r"],
                init_rank=config["init_r"],
                warmup_share=config["tinit"] / steps,
                final_share=config["tfinal"] / steps,
                prune_every=config["deltaT"],
                beta1=config["beta1"],
                beta2=config["beta2"],
                orth_weight=config["orth_reg_weight"],
                **factor_fields(config, tensors),
            )

    @classmethod
    def read_tensors(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> dict[str, Tensor]:
        """PEFT leaves out the ranks that its rank_pattern calls pruned: they come back as zeros."""
        for key, flags in (config.get("rank_pattern") or {}).items():
            kept, layer = torch.tensor(flags, dtype=torch.bool), PREFIX + key.removesuffix(".lora_E")
            for own, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
                short = tensors.get(f"{layer}.{own}")
                if short is None or short.shape[dim] != kept.sum():
                    raise AdapterError(f"{origin}: rank_pattern of {key} does not fit the tensors", fix="Save it again")
                whole = short.new_zeros([len(kept) if at == dim else size for at, size in enumerate(short.shape)])
                tensors[f"{layer}.{own}"] = whole.index_copy(dim, kept.nonzero()[:, 0], short)
        return tensors

    def publish(self, checkpoint: Path, target: Path) -> None:
        names = ("lora_A", "lora_E", "lora_B")
        publish_open_ranks(checkpoint, target, names, lambda _: self.settings.scaling, "Raise adapter.rank")


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, AdaLoraLinear]]:
    return ((name, layer) for name, layer in adapted_layers(model) if isinstance(layer, AdaLoraLinear))


def _close(layers: dict[str, AdaLoraLinear], kept: dict[str, Tensor]) -> None:
    """Sets the values of all ranks to zero but those kept."""
    for name, layer in layers.items():
        layer.lora_E.data.masked_fill_(~kept[name].to(layer.lora_E.device)[:, None], 0.0)


def _from_orthogonal(rows: Tensor) -> Tensor:
    """‖M Mᵀ - I‖ of M [rank, n]."""
    gram = rows @ rows.T
    return (gram - torch.eye(len(gram), device=gram.device)).norm()
