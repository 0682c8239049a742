"""PiSSA and LoftQ: LoRA that starts from a singular value decomposition, beside a base that is changed to fit.

PiSSA: Meng et al. 2024, arXiv:2404.02948. LoftQ: Li et al. 2023, arXiv:2310.08659. Both subtract a product
s B A from a weight W before W is quantized. What was subtracted is stored beside the adapter, because the base
that was trained on cannot be made again without it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.factors import Factors, best_factors, residual
from qlora_kit.adapters.files import read_tensors
from qlora_kit.adapters.inject import wanted_targets
from qlora_kit.adapters.input_moments import Weighing, input_moments, weighing
from qlora_kit.adapters.layer import AdaptedLinear, LinearLayer, weight_expander
from qlora_kit.adapters.lora import LowRank
from qlora_kit.adapters.method import SomeBatches
from qlora_kit.adapters.peft_config import check_low_rank_config, read_low_rank_config
from qlora_kit.adapters.svd_settings import LoftqSettings, PissaSettings, SvdSettings
from qlora_kit.errors import AdapterError
from qlora_kit.model.quantize import Quantization, planned_quantization, quantize_planned

SUBTRACTED = "subtracted.safetensors"
"""File beside the adapter: NAME.lora_A [rank, in] and NAME.lora_B [out, rank] of what each layer's weight lacks."""
S = TypeVar("S", bound=SvdSettings)
Rebase = Callable[[Factors | None], LinearLayer]
"""The frozen layer of W - s B A, quantized where the base is; of W itself where there are no factors."""


class SvdStart(LowRank[S]):
    """A method that gives each target layer another base, and an adapter that starts from it."""

    replaces_base = True
    writes: ClassVar[str]

    def __init__(self, settings: S) -> None:
        super().__init__(settings)
        self.subtracted: dict[str, Tensor] = {}
        self.stored_in: Path | None = None
        self.plan = Quantization()

    def start(self, name: str, weight: Tensor, quantized: bool, settings: S, rebase: Rebase) -> Start:
        """What a layer begins with.

        Args:
            name: the layer's.
            weight: W, float32 [out, in].
            quantized: whether the layer is stored quantized.
            rebase: makes the layer's new base.
        """
        raise NotImplementedError

    def inject(self, model: PreTrainedModel, targets: list[str] | None = None) -> list[str]:
        """Changes and quantizes the base, and puts the adapter in.

        Raises:
            AdapterError: a layer holds less than its rank, or what was subtracted does not fit this model.
            ModelError: the base is quantized already.
        """
        self.plan = planned_quantization(model)
        self.check_base(self.plan)
        if targets is None:
            targets = wanted_targets(model, self.settings)
        if self.stored_in is not None:
            self._check_stored(targets)
        quantize_planned(model, targets)
        with torch.no_grad():
            return super().inject(model, targets)

    def check_base(self, plan: Quantization) -> None:
        """Refuses, with an AdapterError, a base on which the method would be plain LoRA."""

    def make_layer(self, base: Any, name: str) -> AdaptedLinear:
        """The adapted layer of the whole layer `base`, which is called `name`, around its new base."""
        settings, quantized = self.settings.for_layer(name), name in self.plan.names
        weight = weight_expander(base)(base.weight.dtype)

        def rebase(product: Factors | None) -> LinearLayer:
            rest = weight if product is None else residual(weight, product, settings.scaling)
            if quantized:
                return self.plan.quantize(rest, base.bias)
            return base if product is None else _with_weight(base, rest)

        if self.stored_in is not None:  # the adapter's weights are filled in later
            return self.layer_class(rebase(self._stored(name, weight, settings)), settings)
        if settings.rank > min(weight.shape):
            raise AdapterError(
                f"{name}: rank", got=settings.rank, allowed=f"1 to {min(weight.shape)}, its smaller side",
                fix="Set a lower adapter.rank, or one for this layer in adapter.rank_pattern",
            )  # fmt: skip
        start = self.start(name, weight.float(), quantized, settings, rebase)
        adapted = self.layer_class(start.base, settings)
        if start.adapter is not None:
            adapted.lora_A.data.copy_(start.adapter.a)
            adapted.lora_B.data.copy_(start.adapter.b)
        if start.subtracted is not None:
            for own, tensor in zip(("lora_A", "lora_B"), start.subtracted):
                self.subtracted[f"{name}.{own}"] = tensor.cpu()
        return adapted

    def changes(self, targets: list[str]) -> list[str]:
        """Those of `targets` from whose weight something is subtracted."""
        return targets

    def _check_stored(self, targets: list[str]) -> None:
        names = {key.rpartition(".")[0] for key in self.subtracted}
        if strange := names ^ set(self.changes(targets)):
            raise AdapterError(
                f"{self.stored_in} and the adapter beside it differ in {min(strange)}",
                fix="Copy the whole adapter folder again",
            )

    def _stored(self, name: str, weight: Tensor, settings: SvdSettings) -> Factors | None:
        if f"{name}.lora_A" not in self.subtracted:
            return None
        a, b = (self.subtracted[f"{name}.{own}"].to(weight.device) for own in ("lora_A", "lora_B"))
        out_features, in_features = weight.shape
        wanted = [[settings.rank, in_features], [out_features, settings.rank]]
        if [list(a.shape), list(b.shape)] != wanted:
            raise AdapterError(
                f"{self.stored_in}: shapes of {name}",
                got=[list(a.shape), list(b.shape)],
                allowed=str(wanted),
                fix="Load it on the base model it was trained on",
            )
        return Factors(a, b)

    def write_beside(self, folder: Path) -> None:
        save_file(dict(sorted(self.subtracted.items())), folder / SUBTRACTED, metadata={"format": "pt"})

    def read_beside(self, folder: Path) -> None:
        self.subtracted, self.stored_in = read_subtracted(folder), folder / SUBTRACTED

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        start = str(config.get("init_lora_weights")).lower()
        return super().reads(config) and start.startswith(cls.writes) and not config.get("use_dora")

    @classmethod
    def check_config(cls, config: dict[str, Any], origin: Path) -> None:
        """Refuses one whose base nobody knows, as PEFT writes it when it is not converted."""
        known = (origin.parent / SUBTRACTED).is_file()
        check_low_rank_config(config | {"init_lora_weights": True} if known else config, origin)


class Start(NamedTuple):
    """A layer's new base, the adapter's first weights (None: as LoRA starts), and what its base lacks of W."""

    base: LinearLayer
    adapter: Factors | None
    subtracted: Factors | None


class Pissa(SvdStart[PissaSettings]):
    """PiSSA: the adapter is the principal part of W, the base what is left of it."""

    writes = "pissa"

    def start(self, name: str, weight: Tensor, quantized: bool, settings: PissaSettings, rebase: Rebase) -> Start:
        principal = best_factors(weight, settings)
        return Start(rebase(principal), principal, principal)

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        niter = self.settings.niter
        return super().config(model) | {"init_lora_weights": f"pissa_niter_{niter}" if niter else "pissa"}

    @classmethod
    def read_config(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> PissaSettings:
        niter = str(config["init_lora_weights"]).lower().removeprefix("pissa").removeprefix("_niter_")
        return read_low_rank_config(PissaSettings, config, tensors, origin, niter=int(niter or 0))


class Loftq(SvdStart[LoftqSettings]):
    """LoftQ: the adapter is the best that its rank can do for what quantization lost."""

    writes = "loftq"  # without PEFT's loftq_config, so that PEFT refuses it rather than invents a base

    def __init__(self, settings: LoftqSettings) -> None:
        super().__init__(settings)
        self.moments: dict[str, Tensor] = {}
        """What goes into layers, by `input_moments`: where a layer's is there, the adapter makes up for what moves
        the layer's output, not for what moves its weight. To be given before `inject`."""
        self._moment: Tensor | None = None
        self._weighed: Weighing | None = None

    def look_at_inputs(self, model: PreTrainedModel, batches: SomeBatches) -> None:
        if rows := self.settings.calibration_rows:
            quantized = planned_quantization(model).names
            names = [name for name in wanted_targets(model, self.settings) if name in quantized]
            self.moments = input_moments(model, names, batches(rows), full=self.settings.calibration == "full")

    def check_base(self, plan: Quantization) -> None:
        if plan.kind == "none":
            raise AdapterError(
                "adapter.method loftq makes up for what quantization loses, and base.quant none loses nothing",
                fix="Set base.quant to nf4, fp4, int8 or int4, or take adapter.method pissa or lora",
            )

    def changes(self, targets: list[str]) -> list[str]:
        return [name for name in targets if name in self.plan.names] if self.subtracted else []

    def start(self, name: str, weight: Tensor, quantized: bool, settings: LoftqSettings, rebase: Rebase) -> Start:
        if not quantized:  # the head: nothing was lost
            return Start(rebase(None), None, None)
        subtracted, base = None, rebase(None)
        moment = self.moments.pop(name, None)
        if moment is not self._moment:  # layers of one input follow one another
            self._moment, self._weighed = moment, None if moment is None else weighing(moment)
        weighed = self._weighed
        adapter = best_factors(weight - weight_expander(base)(torch.float32), settings, weighed)
        for _ in range(settings.iterations - 1):
            subtracted, base = adapter, rebase(adapter)
            adapter = best_factors(weight - weight_expander(base)(torch.float32), settings, weighed)
        return Start(base, adapter, subtracted)

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        return super().config(model) | {"init_lora_weights": "loftq"}

    @classmethod
    def read_config(cls, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path) -> LoftqSettings:
        return read_low_rank_config(LoftqSettings, config, tensors, origin)


def read_subtracted(folder: Path) -> dict[str, Tensor]:
    """What the base of the adapter in `folder` lacks: NAME.lora_A [rank, in] and NAME.lora_B [out, rank].

    Raises:
        AdapterError: the file is missing or damaged.
    """
    file = folder / SUBTRACTED
    if not file.is_file():
        raise AdapterError(f"{folder} lacks {SUBTRACTED}", fix="Copy the whole adapter folder")
    return read_tensors(file)


def _with_weight(layer: Any, weight: Tensor) -> LinearLayer:
    """`layer` with another weight [out, in], rounded to its dtype; a weight that others share stays as it is."""
    stored = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
    layer.weight = nn.Parameter(stored.to(layer.weight.dtype), requires_grad=False)
    return layer
