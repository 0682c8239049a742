"""Several adapters on one model, one of them in use at a time; the base is loaded once."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from qlora_kit.adapters.folders import adapter_folder
from qlora_kit.adapters.inject import adapted_layers
from qlora_kit.adapters.layer import AdaptedLayer
from qlora_kit.adapters.lora import LowRank
from qlora_kit.adapters.peft_format import load_adapter, read_adapter
from qlora_kit.errors import AdapterError


class AdapterSet:
    """Low-rank adapters beside one base, each with its own rank and targets.

    An adapter costs the memory of its own weights. What switches is the layers: those of the adapter in use stand
    in the model, around the same frozen layers, so that nothing is computed and no weight is written.

    Args:
        model: a base on its device, without an adapter.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if any(adapted_layers(model)):
            raise AdapterError("the model already holds an adapter", fix="Load the base again")
        self.model = model
        self.current: str | None = None
        self._adapters: dict[str, dict[str, AdaptedLayer]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._adapters)

    def load(self, name: str, path: Path) -> None:
        """Reads the adapter of a run or of an adapter's folder; it is used from `use(name)` on.

        Raises:
            AdapterError: the name is taken, the adapter does not fit the model, or it changes more than layers can
                hold side by side. The model is as before.
        """
        if name in self._adapters:
            raise AdapterError("an adapter of this name is loaded", got=name, fix="Take another name")
        folder, current = adapter_folder(path), self.current
        _check_switchable(folder)
        self.use(None)
        try:
            load_adapter(self.model, folder)
            self._adapters[name] = dict(adapted_layers(self.model))
        finally:
            for layer, module in list(adapted_layers(self.model)):
                self._put(layer, module.base_layer)
            self.use(current)

    def use(self, name: str | None) -> None:
        """Puts the adapter in, instead of the one before; None leaves the base alone.

        Raises:
            AdapterError: no adapter of this name is loaded.
        """
        if name is not None and name not in self._adapters:
            raise AdapterError("no adapter of this name", got=name, allowed=", ".join(self.names) or "none is loaded")
        if self.current is not None:
            for layer, module in self._adapters[self.current].items():
                self._put(layer, module.base_layer)
        if name is not None:
            for layer, module in self._adapters[name].items():
                self._put(layer, module.train(self.model.training))
        self.current = name

    def _put(self, layer: str, module: nn.Module) -> None:
        parent, _, child = layer.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)


def _check_switchable(folder: Path) -> None:
    stored = read_adapter(folder)
    if not issubclass(stored.method, LowRank) or stored.method.replaces_base:
        raise AdapterError(
            f"{folder} is a {stored.method.__name__} adapter",
            allowed="low-rank ones, which stand beside frozen layers",
            fix="PiSSA, LoftQ and QA-LoRA become such by: qlora-kit adapters convert",
        )
    other = next((key for key in stored.tensors if stored.method.layer_of(key) is None), None)
    if other:
        raise AdapterError(
            f"{folder}: {other} replaces a weight of the base: it cannot stand beside other adapters",
            fix="Load this adapter alone",
        )
