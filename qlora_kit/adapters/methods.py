"""All methods by name. A new one is a class of settings, a file beside this one, and its line here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_kit.adapters.adalora import AdaLora
from qlora_kit.adapters.bitfit import BitFit
from qlora_kit.adapters.bottleneck import Bottleneck
from qlora_kit.adapters.dora import Dora
from qlora_kit.adapters.full import Full
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.prompt_tuning import PromptTuning
from qlora_kit.adapters.qa_lora import QaLora
from qlora_kit.adapters.settings import AdapterSettings
from qlora_kit.adapters.sora import Sora
from qlora_kit.adapters.svd_init import Loftq, Pissa
from qlora_kit.errors import AdapterError

METHODS: dict[str, type[Method[Any]]] = {
    "lora": Lora,
    "dora": Dora,
    "pissa": Pissa,
    "loftq": Loftq,
    "adalora": AdaLora,
    "sora": Sora,
    "qa_lora": QaLora,
    "bottleneck": Bottleneck,
    "prompt_tuning": PromptTuning,
    "bitfit": BitFit,
    "full": Full,
}


def method_for(settings: AdapterSettings) -> Method[Any]:
    """The method that the settings are those of."""
    return METHODS[settings.method](settings)


def stored_method(config: Any, origin: Path) -> type[Method[Any]]:
    """The method of a stored adapter, by its adapter_config.json.

    Raises:
        AdapterError: it is none of ours, or a field says something that this toolkit cannot compute.
    """
    if not isinstance(config, dict):
        raise AdapterError(f"{origin} is not a JSON object", fix="Save the adapter again")
    for method in METHODS.values():
        if method.reads(config):
            method.check_config(config, origin)
            return method
    known = sorted({method.peft_type for method in METHODS.values()})
    raise AdapterError(f"{origin}: peft_type", got=config.get("peft_type"), allowed=", ".join(known))
