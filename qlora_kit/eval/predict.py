"""`qlora-kit predict`: a file's rows, answered one after the other into another file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from qlora_kit.data.examples import RowError
from qlora_kit.data.sources import fingerprint, read_rows
from qlora_kit.data.task_columns import check_characters
from qlora_kit.errors import EvalError
from qlora_kit.eval.prediction_file import PredictionFile
from qlora_kit.eval.predictors import Predictor, predictor_of
from qlora_kit.model.source import sha256_file
from qlora_kit.recipe import DataSource, Recipe
from qlora_kit.train.run_folder import RunFolder

Overlong = Literal["error", "skip", "truncate"]
BATCHES_AT_ONCE = 16
"""Rows of so many batches are read, sorted by length, answered and written together."""


@dataclass
class Predicted:
    """What became of the input's rows.

    Attributes:
        rows: answered by this call.
        kept: answered by an earlier one.
        skipped: reason to number of rows left out.
    """

    rows: int = 0
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def predict(
    run: RunFolder,
    input_path: str,
    output: Path,
    console: Console,
    *,
    form: str = "tuned",
    batch_size: int | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    overlong: Overlong | None = None,
    columns: dict[str, str] | None = None,
    overwrite: bool = False,
) -> Predicted:
    """Answers every row of `input_path` and writes it with its own columns to `output`, in the input's order.

    Rows are answered in groups whose bounds do not depend on where a killed call stopped, so that its second half
    has the same bytes as without a kill.

    Args:
        input_path: a file that the run's task reads; it needs no column for the answer.
        output: .csv or .jsonl; an existing one is gone on with.
        form: name of a form as `eval` has them.
        batch_size: instead of the recipe's eval.batch_size.
        bad_rows: stop at a row that cannot be used, or leave it out and count it. `skip` goes on with a file that
            stopped at such a row.
        overlong: of a row that is longer than the recipe's data.max_seq_len; None cuts it where the recipe does, and
            otherwise takes it as a bad row.
        columns: {expected: actual}, of this input; before what the recipe's data.columns says.
        overwrite: begin again.

    Raises:
        EvalError: no such form, prompts that should be cut, or an output of another input, run or form, or that holds
            the columns to write.
        RunError: the run is not finished.
        DataError: the input cannot be read, or a row of it cannot be used.
    """
    source = DataSource.model_validate({"path": input_path})
    if output.exists() and Path(input_path).exists() and output.samefile(input_path):
        raise EvalError(f"{output} is the input", fix="Give another --output")
    too_long = overlong or _as_trained(run.recipe(), bad_rows)
    leaves_out: dict[str, str] = {"bad_rows": bad_rows, "overlong": too_long}
    made_by = {
        "input": fingerprint(source),
        "run": _trained(run),
        "form": form,
        "columns": columns or None,
        **leaves_out,
    }
    predictor = predictor_of(run, form, source, batch_size, too_long, columns or {})
    done, group_rows = Predicted(), BATCHES_AT_ONCE * (batch_size or run.recipe().eval.batch_size)
    # What stopped before its first bad row has left nothing out, and cut nothing.
    stopped = {name: "error" for name, asked in leaves_out.items() if asked != "error"}
    with PredictionFile(output, made_by, overwrite, stopped) as file, predictor.ready():
        done.kept = file.rows
        seen = 0
        for group in _groups(_usable(source, predictor, leaves_out, done), group_rows):
            new = max(0, file.rows - seen)  # rows of this group that are there already
            seen += len(group)
            if new >= len(group):
                continue
            answers = predictor.answer([row for _, row in group])
            file.append([raw | answer for (raw, _), answer in zip(group[new:], answers[new:])])
    done.rows = seen - done.kept
    if done.rows < 0:
        raise EvalError(f"{output} has {done.kept} rows, the input {seen}", fix="Begin it again: --overwrite")
    _say(done, output, console)
    return done


def _as_trained(recipe: Recipe, bad_rows: Literal["error", "skip"]) -> Overlong:
    """Cut where training cuts; a prompt is never cut, as its answer would be to something else."""
    cuts = recipe.data.overlong == "truncate" and recipe.task.type != "causal_lm"
    return "truncate" if cuts else bad_rows


def _usable(
    source: DataSource, predictor: Predictor, leaves_out: dict[str, str], done: Predicted
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each row as it stands in the input, and as the model needs it."""
    for raw in read_rows(source):
        try:
            if isinstance(raw.value, RowError):
                raise raw.value
            if taken := [column for column in predictor.columns if column in raw.value]:
                raise EvalError(
                    f"{source.path} row {raw.number} has a column of the predictions already",
                    got=taken,
                    fix="Rename it in the input",
                )
            for column, value in raw.value.items():
                check_characters(json.dumps({column: value}, ensure_ascii=False, default=str), ascii(column))
            row = predictor.read(raw.number, raw.value)
        except RowError as error:
            cuts = leaves_out["overlong"] == "truncate"  # what is too long even so cannot be cut: questions
            if leaves_out["overlong" if error.reason == "overlong" and not cuts else "bad_rows"] == "error":
                raise _told(error, f"{source.path} row {raw.number}") from None
            done.skipped[error.reason] += 1
            continue
        yield raw.value, row


def _told(error: RowError, place: str) -> RowError:
    """The error with its place; in place of a recipe's fields, which `predict` takes none of, its own option."""
    fix = error.details.get("fix", "")
    if "truncate" in fix:
        fix = "Cut such rows: --overlong truncate; or leave them out: --overlong skip"
    elif "data." in fix:
        fix = "Mend the row, or leave out such rows: --bad-rows skip"
    return RowError(error.problem, reason=error.reason, **(error.details | {"fix": fix})).at(place)


def _groups(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    waiting = iter(rows)
    while group := list(islice(waiting, size)):
        yield group


def _trained(run: RunFolder) -> str:
    """What tells a run's weights from another's."""
    weights = run.adapter / "adapter_model.safetensors"
    return f"sha256:{sha256_file(weights)}" if weights.is_file() else str(run.manifest().get("base"))


def _say(done: Predicted, output: Path, console: Console) -> None:
    kept = f", {done.kept} were there already" if done.kept else ""
    console.print(f"{output}: {done.rows} rows{kept}", markup=False, highlight=False)
    for reason, count in done.skipped.items():
        console.print(f"{count} rows left out ({reason})", markup=False, highlight=False)
