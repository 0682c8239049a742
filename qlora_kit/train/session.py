"""All that a training step needs, made from a recipe: accelerator, model, adapter, optimizer, data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.adapters.inject import trainable_parameters
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.methods import method_for
from qlora_kit.adapters.settings import AdapterSettings
from qlora_kit.data.batches import TrainBatches
from qlora_kit.data.collate import collate
from qlora_kit.data.dataset import PreparedData, prepare
from qlora_kit.data.masking import Encoded
from qlora_kit.data.template import resolve_template
from qlora_kit.errors import DataError, TrainingError
from qlora_kit.model.load import DTYPES, load_base, load_tokenizer
from qlora_kit.model.source import BaseSource, find_base
from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import recipe_to_tree
from qlora_kit.train.determinism import make_deterministic, seed_for
from qlora_kit.train.devices import make_accelerator, spread
from qlora_kit.train.loss_scale import LossScale
from qlora_kit.train.optim import AdapterOptimizer, optimizer_maker
from qlora_kit.train.run_folder import RunFolder


@dataclass
class Session:
    """A run in memory. `model` is what the step calls (wrapped where several processes train), `plain` the model."""

    recipe: Recipe
    run: RunFolder
    accelerator: Accelerator
    source: BaseSource
    tokenizer: PreTrainedTokenizerBase
    plain: PreTrainedModel
    model: Any
    method: Method[Any]
    optimizer: AdapterOptimizer
    scaler: LossScale
    data: PreparedData
    batches: TrainBatches
    total_steps: int
    threads: int
    notes: list[str]
    clock: float = field(default_factory=time.perf_counter)

    def lap(self) -> float:
        """Seconds since the last lap, or since the session began."""
        before, self.clock = self.clock, time.perf_counter()
        return self.clock - before

    def start_trackers(self) -> None:
        """TensorBoard and Weights & Biases, through accelerate; the recipe is their configuration."""
        if self.recipe.train.trackers:
            tree = recipe_to_tree(self.recipe)
            flat = {f"{section}.{key}": str(value) for section, part in tree.items() for key, value in part.items()}
            self.accelerator.init_trackers("qlora-kit", config=flat)

    def collate(self, rows: list[Encoded]) -> dict[str, Tensor]:
        """int64 [batch, seq] tensors on the training device."""
        batch = collate(rows, pad_id=self.tokenizer.pad_token_id)
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}


def start_session(recipe: Recipe, run: RunFolder) -> Session:
    """Loads and prepares everything, data first: a wrong row is found before a model is loaded.

    Raises:
        DataError, ModelError, AdapterError, RunError, TrainingError: each names what is wrong and what to do.
    """
    accelerator = make_accelerator(recipe, run)
    threads = make_deterministic(accelerator.device, recipe.train.threads)
    with accelerator.main_process_first():  # it fills the caches that the others read
        source = find_base(recipe.base.model, recipe.base.revision, recipe.base.trust_remote_code)
        tokenizer = prepared_tokenizer(recipe, source.folder)
        data = prepare(recipe.data, tokenizer, recipe.run.seed)
    total_steps = count_steps(recipe, data, accelerator.num_processes)
    model, method = load_for_training(recipe, source, tokenizer, accelerator.device)
    _check_rows_fit(recipe, data, model)
    optimizer, notes = make_optimizer(recipe, trainable_parameters(model), accelerator.device, method.lr_factor)
    if recipe.train.grad_accum_steps > 1 and accelerator.num_processes == 1:
        add_gradients_in_fp32(optimizer.parameters)
    return Session(
        recipe=recipe,
        run=run,
        accelerator=accelerator,
        source=source,
        tokenizer=tokenizer,
        plain=model,
        model=spread(model, accelerator),
        method=method,
        optimizer=optimizer,
        scaler=LossScale(recipe.base.compute_dtype == "fp16"),
        data=data,
        batches=_make_batches(recipe, data, tokenizer, accelerator),
        total_steps=total_steps,
        threads=threads,
        notes=[*notes, *data.report.warnings()],
    )


def _make_batches(
    recipe: Recipe, data: PreparedData, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> TrainBatches:
    return TrainBatches(
        data,
        recipe.data,
        tokenizer,
        recipe.train.micro_batch_size,
        recipe.run.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )


def _check_rows_fit(recipe: Recipe, data: PreparedData, model: PreTrainedModel) -> None:
    """Positions past a model's context are noise to it, or (GPT-2) not there at all."""
    context = getattr(model.config, "max_position_embeddings", None)
    lengths = [rows.lengths().max() for rows in (data.train, data.eval) if len(rows)]
    longest = recipe.data.max_seq_len if recipe.data.streaming else int(max(lengths))
    if context and longest > context:
        raise DataError(
            f"rows of up to {longest} tokens, where the context of {recipe.base.model} holds {context}",
            fix=f"Set data.max_seq_len={context}",
        )


def prepared_tokenizer(recipe: Recipe, folder: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer with the run's new tokens and chat template: what trains, generates and ships."""
    tokenizer = load_tokenizer(folder, recipe.base.trust_remote_code)
    if recipe.adapter.new_tokens:
        tokenizer.add_tokens(recipe.adapter.new_tokens)
    template = resolve_template(tokenizer, recipe.data)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def load_for_training(
    recipe: Recipe,
    source: BaseSource,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> tuple[PreTrainedModel, Method[Any]]:
    """The quantized base with a fresh adapter in it, in training mode, and the adapter's method."""
    model = load_base(
        source,
        recipe.base.quant,
        recipe.base.double_quant,
        DTYPES[recipe.base.compute_dtype],
        device,
        list(recipe.adapter.modules_to_save),
        recipe.base.trust_remote_code,
    )
    torch.manual_seed(seed_for(recipe.run.seed, "init"))
    if len(tokenizer) > cast(Tensor, model.get_input_embeddings().weight).shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    method = method_for(with_new_tokens(recipe.adapter, model))
    method.inject(model)
    if recipe.train.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.train(), method


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


def count_steps(recipe: Recipe, data: PreparedData, processes: int) -> int:
    """Optimizer steps of the whole run.

    Raises:
        TrainingError: the warm-up would not end in them.
    """
    if recipe.train.max_steps is not None:
        return recipe.train.max_steps
    assert recipe.train.epochs is not None  # the recipe has one of both
    rows = recipe.train.micro_batch_size * recipe.train.grad_accum_steps * processes
    steps = max(1, math.ceil(recipe.train.epochs * len(data.train) / rows))
    if recipe.train.warmup_steps > steps:
        raise TrainingError(
            f"train.warmup_steps {recipe.train.warmup_steps} is more than the {steps} steps of the whole run",
            fix=f"Set train.warmup_steps to {steps} at most, or train for more epochs",
        )
    return steps
