"""`qlora-kit data show` for a recipe: its rows as training would see them."""

from __future__ import annotations

from rich.console import Console

from qlora_kit.data.show import show
from qlora_kit.model.source import find_base
from qlora_kit.recipe import Recipe
from qlora_kit.tasks.registry import prepare_task
from qlora_kit.train.adapted_model import prepared_tokenizer


def show_rows(recipe: Recipe, rows: int, console: Console) -> None:
    """Prints the first `rows` training rows with what is learned of them; loads no weights.

    Raises:
        DataError, ModelError: as training would.
    """
    source = find_base(recipe.base.model, recipe.base.revision, recipe.base.trust_remote_code, weights=False)
    tokenizer, task = prepared_tokenizer(recipe, source.folder), prepare_task(recipe.task, recipe.data)
    show(recipe.data, tokenizer, rows, console, recipe.run.seed, task)
