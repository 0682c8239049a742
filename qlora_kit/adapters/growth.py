"""Another rank for a layer that has learned already: the function stays where the rank grows."""

from __future__ import annotations

import torch
from torch import nn

from qlora_kit.adapters.layer import AdaptedLayer


@torch.no_grad()
def take_rank(layer: AdaptedLayer, fresh: AdaptedLayer, gain: float = 1.0) -> dict[str, nn.Parameter]:
    """Gives `layer` the weights of `fresh`, an untrained layer of another rank, with its own values kept in them.

    Rows of A and columns of B that both have keep `layer`'s values. An untrained layer adds nothing to its base, as A
    or B is zero; so neither do the rows and columns that come new, the random ones times `gain`. `layer.scaling` stays.

    Returns: the new parameters by their names in the layer.
    """
    changed = {}
    for name, parameter in list(fresh.named_parameters()):
        if name.startswith("base_layer."):
            continue
        old = layer.get_parameter(name)
        shared = tuple(slice(min(sizes)) for sizes in zip(old.shape, parameter.shape, strict=True))
        parameter.mul_(gain)
        parameter[shared] = old[shared]
        parameter.requires_grad_(old.requires_grad)
        parameter.grad_dtype = old.grad_dtype
        owner, _, own = name.rpartition(".")
        setattr(layer.get_submodule(owner), own, parameter)
        changed[name] = parameter
    layer.rank = fresh.rank
    return changed
