"""All that a training step needs, made from a recipe: accelerator, model, adapter, optimizer, data."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.adapters.inject import trainable_parameters
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.prompt_tuning import virtual_tokens
from qlora_kit.data.batches import TrainBatches
from qlora_kit.data.collate import on_device
from qlora_kit.data.dataset import PreparedData, prepare
from qlora_kit.data.masking import Encoded
from qlora_kit.errors import DataError, TrainingError
from qlora_kit.model.source import BaseSource, find_base
from qlora_kit.recipe import Recipe
from qlora_kit.recipe_file import recipe_to_tree
from qlora_kit.tasks.registry import prepare_task, task_of
from qlora_kit.tasks.task import Task
from qlora_kit.train.adapted_model import (
    add_gradients_in_fp32,
    load_for_training,
    make_optimizer,
    prepared_tokenizer,
    stored_base,
    without_effect,
)
from qlora_kit.train.determinism import make_deterministic
from qlora_kit.train.devices import make_accelerator, spread
from qlora_kit.train.distill import Distillation
from qlora_kit.train.growth import check_growth
from qlora_kit.train.loss_scale import LossScale
from qlora_kit.train.memory_limit import MemoryLimit
from qlora_kit.train.micro_batches import MicroBatches
from qlora_kit.train.optim import AdapterOptimizer
from qlora_kit.train.peak import PeakWatch, use_allocator
from qlora_kit.train.run_folder import RunFolder, is_first_process
from qlora_kit.train.teacher import start_distillation


@dataclass
class Session:
    """A run in memory. `model` is what the step calls (wrapped where several processes train), `plain` the model."""

    recipe: Recipe
    run: RunFolder
    accelerator: Accelerator
    task: Task[Any]
    source: BaseSource
    tokenizer: PreTrainedTokenizerBase
    plain: PreTrainedModel
    model: Any
    method: Method[Any]
    optimizer: AdapterOptimizer
    scaler: LossScale
    data: PreparedData
    batches: TrainBatches
    distillation: Distillation | None
    total_steps: int
    threads: int
    notes: list[str]
    micro_batches: MicroBatches
    memory: MemoryLimit
    watch: PeakWatch
    say: Callable[[str], None] = lambda _: None
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
            folder = self.run.path / "trackers"  # TensorBoard's is make_accelerator's project_dir
            folder.mkdir(exist_ok=True)
            self.accelerator.init_trackers("qlora-kit", config=flat, init_kwargs={"wandb": {"dir": str(folder)}})

    def end(self) -> None:
        """Ends the trackers and the group of processes.

        The wrapper that averages gradients goes first: were it the last to hold the group, it would wait for the
        group's thread with Python's lock in hand, and that thread may want the lock (pytorch #56297).
        """
        if self.model is not self.plain:
            self.model = self.plain
            self.accelerator.free_memory()
            gc.collect()
        self.accelerator.end_training()

    def losses(self, batch: dict[str, Tensor], rows: list[Encoded]) -> Tensor:
        """The losses of a micro batch (of tokens, rows, tags: what the task counts), fp32; `rows` are its rows."""
        if self.distillation is None:
            return self.task.losses(self.model, batch)[0]
        return self.distillation.losses(self.model, batch, rows)

    def ask_teacher(self) -> None:
        """Gets a teacher ready whose words are kept; the first process writes them, the others read."""
        if self.distillation is not None:
            with self.accelerator.main_process_first():
                warning = self.distillation.teacher.prepare(self.data.train, self.collate)
            if warning and is_first_process():
                self.run.note(warning)

    def collate(self, rows: list[Encoded]) -> dict[str, Tensor]:
        """The task's batch, on the training device."""
        return on_device(self.task.collate(rows, self.tokenizer), self.accelerator.device)


def start_session(recipe: Recipe, run: RunFolder, watch: PeakWatch | None = None, resume: bool = False) -> Session:
    """Loads and prepares everything, data first: a wrong row is found before a model is loaded.

    Raises:
        DataError, ModelError, AdapterError, RunError, TrainingError: each names what is wrong and what to do.
    """
    accelerator = make_accelerator(recipe, run)
    use_allocator(recipe.train.allocator)
    threads = make_deterministic(accelerator.device, recipe.train.threads)
    with accelerator.main_process_first():  # it fills the caches that the others read
        source = find_base(recipe.base.model, recipe.base.revision, recipe.base.trust_remote_code)
        task_of(recipe.task).check_base(PretrainedConfig.get_config_dict(source.folder)[0])
        tokenizer = prepared_tokenizer(recipe, source.folder)
        task = prepare_task(recipe.task, recipe.data)
        data = prepare(recipe.data, tokenizer, recipe.run.seed, task)
    total_steps = count_steps(recipe, data, accelerator.num_processes)
    check_growth(recipe.adapter, total_steps)
    stored = stored_base(recipe, run, resume)

    def some_batches(count: int) -> Iterator[dict[str, Tensor]]:
        step, size = max(1, len(data.train) // count), recipe.train.micro_batch_size
        rows = data.train[::step][:count]  # from the whole of it: of all sources, of sorted files
        for start in range(0, len(rows), size):
            yield on_device(task.collate(rows[start : start + size], tokenizer), accelerator.device)

    model, method = load_for_training(recipe, task, source, tokenizer, accelerator.device, some_batches, stored)
    _check_rows_fit(recipe, data, model)
    task.check_model(model)
    optimizer, notes = make_optimizer(recipe, trainable_parameters(model), accelerator.device, method.lr_factor)
    if recipe.train.grad_accum_steps > 1 and accelerator.num_processes == 1:
        add_gradients_in_fp32(optimizer.parameters)
    return Session(
        recipe=recipe,
        run=run,
        accelerator=accelerator,
        task=task,
        source=source,
        tokenizer=tokenizer,
        plain=model,
        model=spread(model, accelerator),
        method=method,
        optimizer=optimizer,
        scaler=LossScale(recipe.base.compute_dtype == "fp16"),
        data=data,
        batches=_make_batches(recipe, data, tokenizer, accelerator),
        distillation=start_distillation(recipe, run, source, tokenizer, model, data.sha256),
        total_steps=total_steps,
        threads=threads,
        notes=[*notes, *without_effect(recipe, accelerator.device), *data.report.warnings()],
        micro_batches=MicroBatches(recipe.train.micro_batch_size),
        memory=MemoryLimit(accelerator.device, recipe.train.memory_limit_bytes),
        watch=watch or PeakWatch(),
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
    context = context_of(model)
    lengths = [rows.lengths().max() for rows in (data.train, data.eval) if len(rows)]
    longest = recipe.data.max_seq_len if recipe.data.streaming else int(max(lengths))
    virtual = virtual_tokens(model)
    room = context - virtual
    if longest > room:
        beside = f", {virtual} of them virtual" if virtual else ""
        raise DataError(
            f"rows of up to {longest} tokens, where the context of {recipe.base.model} holds {context}{beside}",
            fix=f"Set data.max_seq_len={room}" if room >= 8 else "Set fewer adapter.tokens",
        )


def context_of(model: PreTrainedModel) -> int:
    """Tokens that the model takes at once. RoBERTa and its kin begin to count positions after the padding's."""
    config = model.config.get_text_config()
    context: int = getattr(config, "max_position_embeddings", None) or 1 << 30
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)
    return context if padding is None else context - padding - 1


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
