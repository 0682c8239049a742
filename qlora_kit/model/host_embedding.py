"""An embedding that stays in the host's memory, mapped to its file where that holds it as it is used.

A device gets the rows of the tokens at hand: of a 7B model's 128,256 rows a micro batch uses some hundreds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.errors import ModelError
from qlora_kit.kernels.host_memory import host_tensor

FIX = "set base.embeddings=device"


def rows_in_use(weight: Tensor, ids: Tensor, pin: bool) -> Tensor:
    """F.embedding(ids, weight), which is the plain path, of a weight [vocab, width] that is not on the ids' device.

    Args:
        ids: int64 [...]; they are asked for, so that the host waits for the device.
        pin: whether rows go through pinned memory, beside what the device computes.

    Returns: [..., width] on the ids' device, in the weight's dtype.
    """
    used, places = ids.cpu().unique(return_inverse=True)
    rows = host_tensor((len(used), weight.shape[1]), weight.dtype, pin, FIX)
    torch.index_select(weight, 0, used, out=rows)
    # The allocator of pinned memory gives none of it anew before the copy that it knows of has ended.
    return F.embedding(places.to(ids.device), rows.to(ids.device, non_blocking=pin))


class HostEmbedding(nn.Module):
    """Takes the place of a frozen nn.Embedding. Its weight [vocab, width] is a buffer that never leaves the host."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("weight", weight.detach().cpu())

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] to [..., width], on the ids' device."""
        return rows_in_use(self.weight, ids, ids.device.type == "cuda")

    def _apply(self, fn: Any, recurse: bool = True) -> HostEmbedding:
        """The weight follows the model to another dtype, never to a device."""
        self.weight = self.weight.to(fn(self.weight.new_empty(0)).dtype)
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, on the host"


def embedding_for_host(model: Any, reference: str, trained: list[str]) -> str:
    """Full name of the embedding, where it can stay on the host; `model` may be without weights.

    Args:
        reference: base.model as the recipe has it.
        trained: names of modules, or their endings, that are to be trained.

    Raises:
        ModelError: it cannot, because others use its weight on the device, because it is trained, or because it is of
            a kind of its own.
    """
    embedding = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    of_all = [weight for _, weight in model.named_parameters(remove_duplicate=False)]
    if type(embedding) is not nn.Embedding:
        why = f"it has none of the plain kind, but a {type(embedding).__name__}"
    elif sum(weight is embedding.weight for weight in of_all) > 1:
        why = "its output head is tied to it, and needs it on the device"
    elif any(f".{name}.".find(f".{entry}.") >= 0 for entry in trained):
        why = "adapter.modules_to_save trains it"
    else:
        return name
    what = f"base.embeddings=host: the embedding of {reference} cannot stay on the host: {why}"
    raise ModelError(what, fix="Set base.embeddings=device")


def device_map(device: torch.device, on_host: str | None) -> dict[str, str]:
    """Module to device, as transformers' loader takes it: all to `device`, but `on_host` where that is another."""
    elsewhere = {} if on_host is None or device.type == "cpu" else {on_host: "cpu"}
    return elsewhere | {"": str(device)}


def put_on_host(model: Any, name: str) -> None:
    """Puts a HostEmbedding in the place of the embedding `name`, in place."""
    model.set_submodule(name, HostEmbedding(model.get_submodule(name).weight))
