"""Training that starts from a finished LoRA: its weights, at its rank or a larger one, and its optimizer states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from qlora_kit.adapters.files import CONFIG, WEIGHTS
from qlora_kit.adapters.inject import adapted_layers, expand_modules_to_save
from qlora_kit.adapters.lora import Lora
from qlora_kit.adapters.peft_format import StoredAdapter, fill_adapter, read_adapter, take_frozen
from qlora_kit.adapters.settings import LoraSettings
from qlora_kit.errors import AdapterError, RunError
from qlora_kit.model.source import sha256_file
from qlora_kit.train.checkpoint import Checkpoint, checkpoint_folder, read_checkpoint
from qlora_kit.train.determinism import seed_for
from qlora_kit.train.growth import take_parameters
from qlora_kit.train.run_folder import RunFolder
from qlora_kit.train.session import Session


@dataclass(frozen=True)
class Start:
    """Where a run takes its first weights from; `checkpoint` where it takes optimizer states too."""

    folder: Path
    adapter: StoredAdapter
    settings: LoraSettings
    checkpoint: Checkpoint | None


def start_from(session: Session) -> dict[str, Any] | None:
    """Fills the session's adapter from `adapter.init_from`; None where the recipe names nothing.

    Returns: for the manifest: path, rank and hash of what was read.

    Raises:
        AdapterError, RunError: nothing usable lies there, it belongs to another base, its rank is larger or its
            scaling another; each names both sides.
    """
    wanted = session.recipe.adapter
    if not isinstance(wanted, LoraSettings) or not wanted.init_from:
        return None
    start = _read(Path(wanted.init_from).expanduser(), wanted, session)
    method = cast(Lora, session.method)
    own = method.settings
    _check_fits(session, start, own)
    _check_optimizer_fits(start, own)
    torch.manual_seed(seed_for(session.recipe.run.seed, "init_from"))
    ranks = {"rank": start.settings.rank, "rank_pattern": start.settings.rank_pattern}
    take_parameters(session, method.change_rank(session.plain, own.model_copy(update=ranks)))
    stored = take_frozen(session.plain, start.adapter, start.folder)
    fill_adapter(session.plain, method, stored.tensors, str(start.folder))
    if start.checkpoint is not None:
        session.optimizer.load_state(start.checkpoint.optimizer_tensors, start.checkpoint.optimizer_numbers)
    take_parameters(session, method.change_rank(session.plain, own))
    return {
        "path": wanted.init_from,
        "rank": start.settings.rank,
        "sha256": sha256_file(start.folder / WEIGHTS),
        "optimizer": start.checkpoint is not None,
    }


def _read(path: Path, wanted: LoraSettings, session: Session) -> Start:
    """The adapter of a run or of an adapter's folder."""
    checkpoint, folder = None, path
    if (path / "recipe.yaml").is_file():
        run = RunFolder.open(path)
        _check_same_base(run, session)
        if not run.adapter.is_dir():
            raise RunError(f"adapter.init_from: {path} holds no adapter yet", fix=run.how_to_resume())
        folder = run.adapter
        if wanted.init_optimizer:
            checkpoint = read_checkpoint(checkpoint_folder(run.checkpoints, run.manifest()["adapter"]["step"]))
            folder = checkpoint.adapter
    elif wanted.init_optimizer:
        raise RunError(
            f"adapter.init_optimizer: {path} is no run", allowed="a run's folder", fix="Leave init_optimizer out"
        )
    stored = read_adapter(folder)
    if stored.method is not Lora:
        raise AdapterError(
            f"adapter.init_from: {folder} is of another method",
            got=stored.method.__name__,
            allowed="LoRA",
            fix="Merge it into the base, and train on that",
        )
    _check_same_name(stored, folder, session, known=(path / "recipe.yaml").is_file())
    settings = stored.method.read_config(stored.config, stored.tensors, folder / CONFIG)
    return Start(folder, stored, settings, checkpoint)


def _check_same_base(run: RunFolder, session: Session) -> None:
    base = run.manifest().get("base", {})
    if base.get("fingerprint") != session.source.fingerprint():
        raise RunError(
            f"adapter.init_from: {run.path} was trained on {base.get('model')}, this run's base.model is "
            f"{session.recipe.base.model}: their files differ",
            fix="Give the same base to both",
        )


def _check_same_name(stored: StoredAdapter, folder: Path, session: Session, known: bool) -> None:
    """An adapter alone tells its base's name only; a run's base is known by its files."""
    base, ours = stored.config.get("base_model_name_or_path"), session.recipe.base.model
    if known or not base or base == ours or Path(base).resolve() == Path(ours).resolve():
        return
    raise AdapterError(
        f"adapter.init_from: {folder} was trained on {base}, this run's base.model is {ours}",
        fix=f"Set base.model={base}; if both are one model, write its name into {folder / CONFIG}",
    )


def _check_optimizer_fits(start: Start, own: LoraSettings) -> None:
    """A bf16 weight keeps its low bits among the states, an fp32 one has none."""
    theirs = start.settings.dtype
    if start.checkpoint is not None and theirs != own.dtype:
        raise AdapterError(
            f"adapter.init_optimizer: {start.folder} was trained in {theirs}, and its states fit no other dtype; "
            "adapter.dtype",
            got=own.dtype,
            allowed=theirs,
            fix=f"Set adapter.dtype={theirs}, or leave init_optimizer out to take the weights alone",
        )


def _check_fits(session: Session, start: Start, own: LoraSettings) -> None:
    """The same layers, no smaller rank, the same scaling: else the function would not be the adapter's."""
    layers = [name for name, _ in adapted_layers(session.plain)]
    differing = sorted(set(layers) ^ set(start.adapter.layers()))
    if differing:
        raise AdapterError(
            f"adapter.init_from: {start.folder} adapts other layers, {differing[0]} in one of both alone",
            fix="Give adapter.target_modules as it was trained with",
        )
    in_full, stored = (
        expand_modules_to_save(session.plain, settings.modules_to_save) for settings in (own, start.settings)
    )
    if in_full != stored:
        raise AdapterError(
            f"adapter.init_from: {start.folder} holds other modules trained in full",
            got=in_full,
            allowed=str(stored),
            fix="Give adapter.modules_to_save and adapter.new_tokens as it was trained with",
        )
    for name in layers:
        theirs, ours = start.settings.for_layer(name), own.for_layer(name)
        if theirs.rank > ours.rank:
            raise AdapterError(
                f"adapter.init_from: {start.folder} has rank {theirs.rank} at {name}, adapter.rank is smaller",
                got=ours.rank,
                allowed=f"{theirs.rank} or more",
                fix=f"Set adapter.rank={theirs.rank}",
            )
        if not math.isclose(theirs.scaling, ours.scaling, rel_tol=1e-9):
            alpha = theirs.scaling * ours.alpha / ours.scaling
            raise AdapterError(
                f"adapter.init_from: {start.folder} scales {name} by {theirs.scaling:g}, this recipe by another factor",
                got=ours.scaling,
                fix=f"Set adapter.alpha={alpha:g}, which keeps the scaling",
            )
