"""An adapter beside a run's base, data and tokenizer: a run folder that every verb takes."""

from __future__ import annotations

import shutil
from pathlib import Path

from qlora_kit.adapter_tools.sources import Source, check_same_base, new_folder, open_source
from qlora_kit.adapters.files import CONFIG
from qlora_kit.errors import RunError
from qlora_kit.train.run_folder import RunFolder

KEPT = ("task", "base", "data", "tokenizer_sha256", "chat_template", "tools", "machine")
"""Of the run's manifest."""


def attach(source: Source, run: RunFolder, target: Path, force: bool = False) -> RunFolder:
    """Writes the new run folder `target`, whole or not at all: that of the finished `run`, with another adapter.

    Args:
        force: although the adapter names another base than the run.

    Raises:
        RunError: the run is not finished, or the disk is full.
        AdapterError: something is at `target`, or the adapter is of another base.
    """
    if "adapter" not in run.manifest():
        raise RunError(f"{run.path} is not finished", fix=run.how_to_resume())
    if not force:
        check_same_base([open_source(run.path), source])
    with new_folder(target) as folder:
        partial = RunFolder(folder)
        shutil.copytree(source.folder, partial.adapter)
        shutil.copytree(run.tokenizer, partial.tokenizer)
        _describe(partial, source, run, target)
    return RunFolder.open(target)


def _describe(partial: RunFolder, source: Source, run: RunFolder, target: Path) -> None:
    """recipe.yaml with the adapter's own settings, and a manifest that says where both come from."""
    recipe, stored = run.recipe(), source.stored
    place = recipe.run.model_copy(update={"name": target.name, "out_dir": str(target.parent)})
    settings = stored.method.read_config(stored.config, stored.tensors, source.folder / CONFIG)
    partial.write_recipe(recipe.model_copy(update={"run": place, "adapter": settings}))
    known = run.manifest()
    partial.update_manifest(
        name=target.name,
        status="finished",
        step=0,
        **{key: known[key] for key in KEPT if key in known},
        adapter={"step": 0, "sha256": source.sha256},
        attached={"adapter": str(source.folder), "sha256": source.sha256, "run": str(run.path)},
    )
