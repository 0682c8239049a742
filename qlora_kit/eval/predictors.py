"""What predicts a file's rows: a task's form, or a language model that answers prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from qlora_kit.data.examples import RowError
from qlora_kit.data.kinds import Parser
from qlora_kit.data.task_schemas import TaskRowParser
from qlora_kit.errors import EvalError, RunError
from qlora_kit.eval.prompts import PromptReader
from qlora_kit.eval.run import find_forms
from qlora_kit.eval.scorers import BundleScorer, Scorer, TorchScorer
from qlora_kit.eval.task_form import TaskForm
from qlora_kit.eval.task_forms import find_task_forms
from qlora_kit.eval.task_readers import fitted
from qlora_kit.eval.task_rows import TaskRow
from qlora_kit.eval.task_run import check_forms
from qlora_kit.generate import context_length
from qlora_kit.recipe import DataSection, DataSource
from qlora_kit.train.restore import load_run_tokenizer, run_task
from qlora_kit.train.run_folder import RunFolder


class Predictor(Protocol):
    """Answers rows that need have no answer of their own."""

    columns: Sequence[str]
    """What it adds to a row."""

    def ready(self) -> Any:
        """A context in which many rows are answered."""
        ...

    def read(self, number: int, row: dict[str, Any]) -> Any:
        """The row as the model needs it.

        Raises:
            RowError: it cannot be used.
        """
        ...

    def answer(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """The columns of each row that `read` gave."""
        ...


def predictor_of(
    run: RunFolder, form: str, source: DataSource, batch_size: int | None, overlong: str, columns: dict[str, str]
) -> Predictor:
    """Loads a form of the run.

    Args:
        overlong: truncate, to cut texts that are longer than the recipe's data.max_seq_len.
        columns: {expected: actual} of the source, before what the recipe says.

    Raises:
        EvalError: the run has no such form, or it generates and prompts should be cut.
        RunError: the run is not finished.
    """
    recipe, task = run.recipe(), run_task(run)
    named = recipe.data.columns | columns
    section = recipe.data.model_copy(update={"streaming": False, "overlong": overlong, "columns": named})
    tokenizer = load_run_tokenizer(run)
    if form == "tuned" and not run.adapter.is_dir():
        raise RunError(f"{run.path} holds no adapter yet", fix=f"Finish it: qlora-kit train --resume {run.path}")
    if task.settings.type != "causal_lm":
        forms = find_task_forms(run, batch_size)
        check_forms([form], list(forms))
        return TaskPredictor(forms[form](), section, source)
    if overlong == "truncate":
        raise EvalError("a prompt is not cut: its answer would be to something else", allowed="error, skip")
    scorers = find_forms(run, tokenizer)
    check_forms([form], list(scorers))
    return TextPredictor(scorers[form](), run, section, source, tokenizer)


class TaskPredictor:
    """Any task but causal language modelling."""

    def __init__(self, form: TaskForm, section: DataSection, source: DataSource) -> None:
        self.form, self.section, self.path = form, fitted(section, form.model), source.path
        self.columns = form.reader.columns
        self.parser: Parser = TaskRowParser(form.task.settings, section, source, labelled=False)

    def ready(self) -> Any:
        return self.form.ready()

    def read(self, number: int, row: dict[str, Any]) -> TaskRow:
        example = self.parser.parse(number, row)
        windows = self.form.task.encode_whole(self.form.reader.blank(example), self.form.tokenizer, self.section)
        return TaskRow(example, windows, f"{self.path} row {number}")

    def answer(self, rows: Sequence[TaskRow]) -> list[dict[str, Any]]:
        return [answer.columns for answer in self.form.answers(rows)]


class TextPredictor:
    """A causal language model: greedy answers to prompts, as `eval` generates them."""

    columns: Sequence[str] = ("generated_text",)

    def __init__(
        self,
        scorer: Scorer,
        run: RunFolder,
        section: DataSection,
        source: DataSource,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        trained = run.manifest().get("data", {}).get("train", [{}])
        self.scorer, self.max_new_tokens = scorer, run.recipe().eval.max_new_tokens
        self.prompts = PromptReader(section, source, trained[0].get("schema") if trained else None, tokenizer)
        self.context = _context_of(scorer)

    @contextmanager
    def ready(self) -> Iterator[None]:
        yield

    def read(self, number: int, row: dict[str, Any]) -> list[int]:
        ids = self.prompts.ids(number, row)
        if not 0 < len(ids) < self.context:
            raise RowError(
                f"the prompt has {len(ids)} tokens", reason="overlong", allowed=f"1 to {self.context - 1}", fix="Cut it"
            )
        return ids

    def answer(self, rows: Sequence[list[int]]) -> list[dict[str, Any]]:
        return [{"generated_text": text} for text in self.scorer.answers(rows, self.max_new_tokens)]


def _context_of(scorer: Scorer) -> int:
    if isinstance(scorer, TorchScorer):
        return context_length(scorer.model)
    if isinstance(scorer, BundleScorer):
        return scorer.bundle.manifest.model.context_length
    raise EvalError(f"{type(scorer).__name__} does not say how much it can read")
