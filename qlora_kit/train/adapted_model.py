"""The model that is trained: tokenizer, quantized base, the adapter in it, and the adapter's optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.adapters.method import Method, SomeBatches
from qlora_kit.adapters.methods import METHODS, method_for
from qlora_kit.adapters.settings import AdapterSettings
from qlora_kit.data.template import resolve_template
from qlora_kit.errors import ModelError, TrainingError
from qlora_kit.kernels.offloaded_inputs import offload_inputs
from qlora_kit.kernels.tiled_mlp import tile_mlps
from qlora_kit.model.host_embedding import HostEmbedding
from qlora_kit.model.int4_blocks import Int4Grid
from qlora_kit.model.load import DTYPES, Architecture, head_modules, load_base, load_tokenizer
from qlora_kit.model.processor import load_processor
from qlora_kit.model.quantized_head import coded_head
from qlora_kit.model.source import BaseSource
from qlora_kit.recipe import BaseSection, Recipe
from qlora_kit.tasks.registry import task_class
from qlora_kit.tasks.task import Task
from qlora_kit.train.checkpoint import newest_checkpoint
from qlora_kit.train.determinism import seed_for
from qlora_kit.train.optim import AdapterOptimizer, optimizer_maker
from qlora_kit.train.run_folder import RunFolder


def prepared_tokenizer(recipe: Recipe, folder: Path) -> Any:
    """The base's tokenizer with the run's new tokens and chat template: what trains, generates and ships.

    Where the rows are images or sounds it is their processor instead.
    """
    if processor := task_class(recipe.task).processor:
        return load_processor(folder, processor, recipe.base.trust_remote_code)
    tokenizer = load_tokenizer(folder, recipe.base.trust_remote_code, recipe.task.answers_with_text)
    if recipe.adapter.new_tokens:
        tokenizer.add_tokens(recipe.adapter.new_tokens)
    template = resolve_template(tokenizer, recipe.data) if recipe.task.type == "causal_lm" else None
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def int4_grid(base: BaseSection) -> Int4Grid:
    """How the base's weights are brought into blocks where it is int4."""
    return Int4Grid(base.block_size, base.int4_algorithm)


def architecture_of(task: Task[Any]) -> Architecture:
    """What transformers makes of a base for a task."""
    return Architecture(task.auto_class, task.config(), task.fresh_head)


def load_for_training(
    recipe: Recipe,
    task: Task[Any],
    source: BaseSource,
    tokenizer: Any,
    device: torch.device,
    batches: SomeBatches,
    stored: Path | None = None,
) -> tuple[PreTrainedModel, Method[Any]]:
    """The quantized base with a fresh adapter in it, in training mode, and the adapter's method.

    Args:
        batches: for a method that looks at them first.
        stored: folder of an adapter, where the method replaces the base: the one that it was trained on is made again.
    """
    torch.manual_seed(seed_for(recipe.run.seed, "head"))
    model = load_base(
        source,
        recipe.base.quant,
        recipe.base.double_quant,
        DTYPES[recipe.base.compute_dtype],
        device,
        list(recipe.adapter.modules_to_save),
        recipe.base.trust_remote_code,
        quantize_later=METHODS[recipe.adapter.method].replaces_base,
        architecture=architecture_of(task),
        grid=int4_grid(recipe.base),
        cache=recipe.base.cache,
        head_quant=recipe.base.head_quant,
        host_embeddings=recipe.base.embeddings == "host",
    )
    torch.manual_seed(seed_for(recipe.run.seed, "init"))
    if not task.processor:
        _fit_tokenizer(model, tokenizer)
    settings = with_head(recipe.adapter, model) if task.fresh_head else recipe.adapter
    method = method_for(with_new_tokens(settings, model))
    method.prepare(tokenizer)
    if stored is not None:
        method.read_beside(stored)
    else:
        method.look_at_inputs(model, batches)
    method.inject(model)
    if recipe.train.gradient_checkpointing:
        _checkpoint_activations(model)
    if recipe.train.gradient_checkpointing == "offload" and device.type == "cuda":
        offload_inputs(model, device)
    if recipe.train.mlp_tiles > 1 and not tile_mlps(model, recipe.train.mlp_tiles):
        raise TrainingError(f"{type(model).__name__} has no MLP to tile", fix="Set train.mlp_tiles=1")
    return model.train(), method


def _fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the model, in place, the tokenizer's padding and an embedding of each of its tokens.

    Raises:
        ModelError: there are more tokens than words of a model whose embedding, or head, is held in a form of its own.
    """
    model.config.pad_token_id = tokenizer.pad_token_id  # a decoder's head reads the last token before padding
    embedding = model.get_input_embeddings()
    if len(tokenizer) > cast(Tensor, embedding.weight).shape[0]:
        if coded_head(model) is not None or isinstance(embedding, HostEmbedding):
            raise ModelError(
                "the tokenizer has more tokens than the model has words, and neither codes nor an embedding on the "
                "host can grow",
                got=len(tokenizer),
                fix="Set base.head_quant=none and base.embeddings=device",
            )
        model.resize_token_embeddings(len(tokenizer))


def _checkpoint_activations(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise TrainingError(
            f"{type(model).__name__} cannot recompute its activations", fix="Set train.gradient_checkpointing=false"
        )
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def without_effect(recipe: Recipe, device: torch.device) -> list[str]:
    """Notes on what a recipe would keep in the host's memory, where the device has no other."""
    if device.type == "cuda":
        return []
    wanted = {
        "base.embeddings=host": recipe.base.embeddings == "host",
        "train.gradient_checkpointing=offload": recipe.train.gradient_checkpointing == "offload",
    }
    reason = "needs CUDA; here all memory is the host's, and nothing is moved"
    return [f"{option} {reason}" for option, chosen in wanted.items() if chosen]


def stored_base(recipe: Recipe, run: RunFolder, resume: bool) -> Path | None:
    """The adapter of the newest whole checkpoint, for a run that goes on and whose method replaced the base."""
    if not resume or not METHODS[recipe.adapter.method].replaces_base:
        return None
    checkpoint, _ = newest_checkpoint(run.checkpoints)
    return checkpoint.adapter if checkpoint else None


def with_head(settings: AdapterSettings, model: PreTrainedModel) -> AdapterSettings:
    """The settings with the task's head among the modules to save."""
    if settings.trains_all:
        return settings
    saved = list(dict.fromkeys([*settings.modules_to_save, *head_modules(model)]))
    return settings.model_copy(update={"modules_to_save": saved})


def with_new_tokens(settings: AdapterSettings, model: PreTrainedModel) -> AdapterSettings:
    """The settings; where there are new tokens, embedding and head are among the modules to save."""
    if not settings.new_tokens:
        return settings
    vocabulary = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if module in vocabulary]
    saved = list(dict.fromkeys([*settings.modules_to_save, *names]))
    return settings.model_copy(update={"modules_to_save": saved})


def make_optimizer(
    recipe: Recipe,
    parameters: dict[str, torch.nn.Parameter],
    device: torch.device,
    lr_factor: Callable[[str], float] = lambda _: 1.0,
) -> tuple[AdapterOptimizer, list[str]]:
    """The optimizer, and notes on what had to be replaced on this machine.

    Raises:
        TrainingError: there are no parameters.
    """
    if not parameters:
        raise TrainingError("nothing is trained", fix="Give adapter.target_modules that the model has")
    train = recipe.train
    make, note = optimizer_maker(
        train.optimizer, (train.betas[0], train.betas[1]), train.eps, train.weight_decay, device
    )
    factors = {name: lr_factor(name) for name in parameters}
    return AdapterOptimizer(parameters, make, recipe.adapter.keep_precision, factors), [note] if note else []


def add_gradients_in_fp32(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Gradients of micro batches add up in fp32: a bf16 sum swallows what is below 1/256 of it.

    With several processes they stay in the weight's dtype: DistributedDataParallel takes no other.
    """
    for parameter in parameters.values():
        parameter.grad_dtype = torch.float32
