"""The optimizer, which updates bf16 weights in fp32, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.errors import CheckpointError
from qlora_kit.kernels.split_fp32 import join_into, split_into
from qlora_kit.train.resize_states import resized, resized_states

TORCH_STATES = ("exp_avg", "exp_avg_sq")
BNB_STATES = ("state1", "state2")  # bitsandbytes' names of the same two; 8-bit ones come with qmap and absmax
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class AdapterOptimizer:
    """Steps each trained weight in fp32 through an optimizer of its own, so that fp32 copies live one at a time.

    Beside each bf16 weight lie the low 16 bits of its fp32 value (2 bytes a weight), see `kernels.split_fp32`.

    Args:
        parameters: name to trained parameter, bf16 or fp32.
        make: builds the inner optimizer (torch's or bitsandbytes') for a list of one fp32 parameter.
        keep_precision: keep the low 16 bits of bf16 weights; without it they are rounded after each step.
        lr_factors: what the learning rate of single weights is multiplied with.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        make: MakeOptimizer,
        keep_precision: bool = True,
        lr_factors: dict[str, float] | None = None,
    ) -> None:
        self.parameters, self.lr_factors = parameters, lr_factors or {}
        self.low_bits: dict[str, Tensor] = {}
        self._masters: dict[str, nn.Parameter] = {}
        self._inner: dict[str, torch.optim.Optimizer] = {}
        for name, parameter in parameters.items():
            master = parameter
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.contiguous()  # it is written through a flat view
                master = nn.Parameter(parameter.detach().new_empty(0, dtype=torch.float32))
                self._masters[name] = master
                if keep_precision:
                    self.low_bits[name] = torch.zeros_like(parameter, dtype=torch.int16)
            self._inner[name] = make([master])

    def step(self, scale: float = 1.0) -> None:
        """One update from the gradients times `scale`, at the rate given to `set_lr`. Gradients stay as they are."""
        scratch = self._scratch()
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            if name in self._masters:
                self._step_split(name, parameter, scale, scratch)
                continue
            whole = parameter.grad
            parameter.grad = whole * scale
            self._inner[name].step()
            parameter.grad = whole  # as of bf16 weights: methods look at gradients after the step

    def _step_split(self, name: str, parameter: nn.Parameter, scale: float, scratch: Tensor) -> None:
        weight, low, master = parameter.detach(), self.low_bits.get(name), self._masters[name]
        value, grad = (part[: weight.numel()].view(weight.shape) for part in scratch)
        if low is None:
            value.copy_(weight)
        else:
            join_into(value, weight, low)
        master.data, master.grad = value, grad.copy_(parameter.grad).mul_(scale)  # in fp32: bf16 would round once more
        self._inner[name].step()
        if low is None:
            weight.copy_(value)
        else:
            split_into(value, weight, low)
        master.grad, master.data = None, value.new_empty(0)

    def _scratch(self) -> Tensor:
        """Room for the largest bf16 weight and its gradient in fp32. [2, weights]"""
        largest = max((self.parameters[name] for name in self._masters), key=Tensor.numel, default=None)
        return torch.empty(0) if largest is None else largest.new_empty(2, largest.numel(), dtype=torch.float32)

    def set_lr(self, lr: float) -> None:
        for name, inner in self._inner.items():
            for group in inner.param_groups:
                group["lr"] = lr * self.lr_factors.get(name, 1.0)

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def replace(self, parameters: dict[str, nn.Parameter]) -> None:
        """Takes parameters of another shape in the place of those of the same names; their states are resized."""
        for name, parameter in parameters.items():
            inner, shape = self._inner[name], self.parameters[name].shape
            (group,) = inner.param_groups
            state = resized_states(inner.state.pop(group["params"][0], {}), shape, parameter.shape)
            for entry in BNB_STATES if state.keys() >= set(BNB_STATES) else ():
                state[entry] = _state_buffer(inner, parameter, state[entry])
            if name not in self._masters:
                group["params"][0] = parameter
            if state:
                inner.state[group["params"][0]] = state
            if name in self.low_bits:
                self.low_bits[name] = resized(self.low_bits[name], parameter.shape)
            self.parameters[name] = parameter

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(tensors, numbers) by `WEIGHT/ENTRY`: all that the next step depends on beside the weights."""
        tensors = {f"{name}/low_bits": low for name, low in self.low_bits.items()}
        numbers: dict[str, float] = {}
        for name, inner in self._inner.items():
            for entry, value in next(iter(inner.state.values()), {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{entry}"] = value
                else:
                    numbers[f"{name}/{entry}"] = value
        return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, numbers

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Restores what `state` gave.

        Raises:
            CheckpointError: the state belongs to other weights or to another optimizer.
        """
        entries: dict[str, dict[str, Any]] = {name: {} for name in self.parameters}
        for key, value in (*tensors.items(), *numbers.items()):
            name, _, entry = key.rpartition("/")
            if name not in entries:
                raise CheckpointError(
                    f"optimizer state of {name}, which this run does not train", fix="Start a new run"
                )
            entries[name][entry] = value
        for name, found in entries.items():
            self._load_one(name, found)

    def _load_one(self, name: str, found: dict[str, Any]) -> None:
        parameter, low = self.parameters[name], found.pop("low_bits", None)
        if (low is None) != (name not in self.low_bits):
            raise CheckpointError(f"kept low bits of {name} do not match adapter.keep_precision", fix="Start a new run")
        inner = self._inner[name]
        names = TORCH_STATES if isinstance(inner, torch.optim.AdamW) else BNB_STATES
        if found and not {"step", *names} <= found.keys():
            raise CheckpointError(
                f"optimizer state of {name} is not that of {type(inner).__name__}",
                got=sorted(found),
                allowed=", ".join(("step", *names)),
                fix="Go on with the optimizer and the device that the run began with, or start a new run",
            )
        moments = {"low_bits": low} | {entry: found[entry] for entry in names if found}
        for entry, value in moments.items():
            if isinstance(value, Tensor) and value.shape != parameter.shape:
                raise CheckpointError(
                    f"shape of {name}/{entry}", got=list(value.shape), allowed=str(list(parameter.shape))
                )
        if low is not None:
            self.low_bits[name].copy_(low)
        (group,) = inner.param_groups
        keep_cpu = {"step"}  # torch holds the step count on the CPU unless the optimizer is fused or capturable
        loaded = {
            entry: value.to(parameter.device) if isinstance(value, Tensor) and entry not in keep_cpu else value
            for entry, value in found.items()
            if entry not in BNB_STATES
        }
        for entry in BNB_STATES if found.keys() >= set(BNB_STATES) else ():
            loaded[entry] = _state_buffer(inner, parameter, found[entry])
        inner.state[group["params"][0]] = loaded


def _state_buffer(inner: Any, parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of a state where bitsandbytes itself would hold it: in paged memory, if the optimizer is a paged one."""
    buffer = inner.get_state_buffer(parameter.detach(), dtype=value.dtype)
    if parameter.is_cuda:
        torch.cuda.synchronize(parameter.device)  # the buffer is being filled with zeros
    return buffer.copy_(value)


def optimizer_maker(
    kind: str, betas: tuple[float, float], eps: float, weight_decay: float, device: torch.device
) -> tuple[MakeOptimizer, str | None]:
    """The inner optimizer's constructor, and a note where another had to take its place.

    bitsandbytes' 8-bit (Dettmers et al. 2022) and paged AdamW need CUDA. On a CPU torch's AdamW with fp32
    states takes their place: adapters are small, and host memory needs no paging.
    """
    options: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if kind == "adamw" or device.type != "cuda":
        note = None if kind == "adamw" else f"optimizer {kind} needs CUDA; torch AdamW with fp32 states takes its place"
        fused = device.type == "cpu"  # one pass over the weights instead of ten
        return lambda parameters: torch.optim.AdamW(parameters, fused=fused, foreach=False, **options), note
    from qlora_kit.model.quantized import bnb

    classes = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw": bnb.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    }
    return lambda parameters: classes[kind](parameters, **options), None


def lr_at(step: int, peak: float, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of step 1 to `total_steps`: linear warm-up, then constant, linear or cosine to 0."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)  # 0 at the first step after the warm-up
    return peak * (1 - done) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * done))


def gradient_norm(parameters: list[nn.Parameter]) -> float:
    """Global gradient norm, summed in fp32 whatever the gradients' dtype."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return 0.0
    return torch.stack([grad.float().square().sum() for grad in grads]).sum().sqrt().item()


def clip_factor(norm: float, max_norm: float | None) -> float:
    """What gradients of this global norm are multiplied with to have at most `max_norm` (Pascanu et al. 2013)."""
    return max_norm / norm if max_norm is not None and norm > max_norm else 1.0
