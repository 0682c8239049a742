"""`qlora-kit eval`: every form of a run's model on the same held-out rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from qlora_runtime import Bundle, BundleError
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.data.dataset import prepare, prepare_eval
from qlora_kit.data.eval_rows import EvalRow, completions_in, encode_choice, eval_rows, sample_of
from qlora_kit.data.examples import row_hash
from qlora_kit.data.masking import Encoded
from qlora_kit.data.report import DataReport
from qlora_kit.errors import EvalError
from qlora_kit.eval.forms import FormResult, PairResult, PerRow, compare_forms, score_form
from qlora_kit.eval.metrics import compute_metric
from qlora_kit.eval.results import EvalResults, plot_results, print_table, write_results
from qlora_kit.eval.scored_forms import pairs_of, score_pairs, text_scored
from qlora_kit.eval.scorers import BundleScorer, Scorer, TorchScorer
from qlora_kit.eval.task_run import evaluate_task_run
from qlora_kit.eval.task_score import TaskScores
from qlora_kit.export.bundle import REJECTED
from qlora_kit.model.load import to_reference
from qlora_kit.recipe import Recipe
from qlora_kit.train.determinism import seed_for
from qlora_kit.train.restore import best_device, load_run_base, load_run_tokenizer, load_tuned
from qlora_kit.train.run_folder import RunFolder

Questions = Sequence[EvalRow] | Sequence[Encoded]


def evaluate_run(
    run: RunFolder, console: Console, only: list[str] | None = None, max_rows: int | None = None
) -> EvalResults:
    """Scores the forms of `run` and writes RUN/eval/results.json and results.png.

    Args:
        only: names of forms; all that exist when left out.
        max_rows: instead of the recipe's eval.max_rows.

    Raises:
        EvalError: a form is not there; RunError, DataError: the run or its data is not.
    """
    if run.recipe().task.type != "causal_lm":
        return evaluate_task_run(run, console, only, max_rows)
    recipe, tokenizer = run.recipe(), load_run_tokenizer(run)
    forms = find_forms(run, tokenizer)
    for name in only or []:
        if name not in forms:
            raise EvalError("no such form", got=name, allowed=", ".join(forms), fix="Export first for bundles")
    max_rows = max_rows or recipe.eval.max_rows
    report = DataReport([])
    questions = held_out_rows(recipe, tokenizer, max_rows, report)
    for path, reasons in report.left_out().items():
        for reason, count in reasons.items():
            console.print(f"{path}: {count} rows left out ({reason})", markup=False, highlight=False)
    choices = _choices(recipe)
    written = [list(row.references) for row in questions if isinstance(row, EvalRow)]
    results: dict[str, FormResult] = {}
    scored: dict[str, TaskScores] = {}
    for name in only or forms:
        console.print(f"scoring {name} on {len(questions)} rows", highlight=False)
        started = time.perf_counter()
        try:
            per_row = score_rows(forms[name](), questions, recipe, tokenizer, choices)
        except torch.OutOfMemoryError:
            console.print(f"{name} does not fit into this device's memory and is left out", highlight=False)
            continue
        results[name] = score_form(per_row, time.perf_counter() - started, seed=recipe.run.seed)
        if recipe.eval.answer == "text":
            results[name], scored[name] = text_scored(results[name], written, recipe.run.seed)
    metrics: dict[str, Any] = {
        "answer": recipe.eval.answer,
        "choices": choices,
        "dtype": recipe.eval.dtype,
        "confidence": 0.95,
        "left_out": report.left_out(),
    }
    if scored:
        metrics |= {"labels": [], "references": written, "row_hashes": _hashes(questions)}
    pairs = score_pairs(results, scored, recipe.run.seed) if scored else _pairs(results)
    found = EvalResults(len(questions), results, pairs, metrics)
    write_results(run.path, found)
    plot_results(found, run.path / "eval" / "results.png")
    print_table(found, console)
    return found


def find_forms(run: RunFolder, tokenizer: PreTrainedTokenizerBase) -> dict[str, Callable[[], Scorer]]:
    """Name of each form that `run` has now, and a function that loads it."""
    recipe, device = run.recipe(), best_device()
    size = recipe.eval.batch_size

    def torch_form(load: Callable[[], PreTrainedModel]) -> Callable[[], Scorer]:
        def scorer() -> Scorer:
            model = load()
            return TorchScorer(to_reference(model) if recipe.eval.dtype == "fp32" else model, tokenizer, size)

        return scorer

    def base_form(quant: str) -> Callable[[], Scorer]:
        return torch_form(lambda: _with_new_tokens(load_run_base(run, quant, device), tokenizer, recipe.run.seed))

    forms = {"base": base_form("none")}
    if recipe.base.quant != "none":
        forms[f"base_{recipe.base.quant}"] = base_form(recipe.base.quant)
    if run.adapter.is_dir():
        forms["tuned"] = torch_form(lambda: load_tuned(run, device))
    if run.merged.is_dir():
        forms["merged"] = torch_form(lambda: AutoModelForCausalLM.from_pretrained(run.merged, device_map={"": device}))
    for bundle in sorted(run.bundles.glob("[a-z]*/manifest.json")):
        if bundle.parent.suffix == REJECTED:
            continue
        forms[f"bundle_{bundle.parent.name}"] = _bundle_form(bundle.parent, tokenizer, size)
    return forms


def held_out_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_rows: int | None, report: DataReport | None = None
) -> Questions:
    """EvalRows where rows ask something; encoded rows of plain text otherwise. Of more than `max_rows`, a sample.

    Where texts are scored rows with one prompt are one row, with the completions of all as references.

    Args:
        report: gets the counts of the sources that are read.
    """
    report, seed = report or DataReport([]), recipe.run.seed
    if recipe.eval.answer != "none":
        return eval_rows(recipe.data, tokenizer, seed, max_rows, report, one_a_prompt=recipe.eval.answer == "text")
    if recipe.data.eval is not None:
        rows = prepare_eval(recipe.data, tokenizer, report)
    else:
        data = prepare(recipe.data, tokenizer, seed)
        rows, report.train = data.eval, data.report.train
    return [rows[k] for k in sample_of(list(rows), max_rows, seed)]


def score_rows(
    scorer: Scorer, questions: Questions, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, choices: list[str]
) -> PerRow:
    """Losses of the expected completions, and where answers are checked, each row's answer and whether it is right."""
    rows = [q for q in questions if isinstance(q, EvalRow)]
    if not rows:
        losses = scorer.losses([q for q in questions if isinstance(q, Encoded)])
        return PerRow([loss for loss, _ in losses], [tokens for _, tokens in losses])
    if recipe.eval.answer == "choices":
        return _score_choices(scorer, rows, tokenizer, choices)
    losses = scorer.losses([encode_choice(row, row.completion, tokenizer) for row in rows])
    answers = scorer.answers([row.prompt_ids.tolist() for row in rows], recipe.eval.max_new_tokens)
    correct = None  # a written text is neither right nor wrong
    if recipe.eval.answer == "number":
        expected = [row.completion for row in rows]
        correct = compute_metric("last_number", predictions=answers, references=expected)["correct"]
    elif recipe.eval.answer == "exact":
        accepted = [list(row.references) for row in rows]
        correct = compute_metric("exact_match", predictions=answers, references=accepted)["correct"]
    return PerRow([loss for loss, _ in losses], [tokens for _, tokens in losses], correct, answers)


def _score_choices(
    scorer: Scorer, rows: Sequence[EvalRow], tokenizer: PreTrainedTokenizerBase, choices: list[str]
) -> PerRow:
    """Every choice is scored as the row's completion; the likeliest is the answer."""
    for row in rows:
        if row.completion not in choices:
            raise EvalError(
                f"{row.place}: the completion is none of eval.choices", got=row.completion, allowed=", ".join(choices)
            )
    losses = scorer.losses([encode_choice(row, choice, tokenizer) for row in rows for choice in choices])
    by_row = [losses[start : start + len(choices)] for start in range(0, len(losses), len(choices))]
    answers = [choices[min(range(len(choices)), key=lambda k: scores[k][0])] for scores in by_row]
    expected = [choices.index(row.completion) for row in rows]
    correct = compute_metric("accuracy", predictions=answers, references=[row.completion for row in rows])["correct"]
    return PerRow(
        [scores[k][0] for scores, k in zip(by_row, expected)],
        [scores[k][1] for scores, k in zip(by_row, expected)],
        correct,
        answers,
    )


def _choices(recipe: Recipe) -> list[str]:
    if recipe.eval.answer != "choices":
        return []
    return list(recipe.eval.choices) or completions_in(recipe.data)


def _pairs(results: dict[str, FormResult]) -> list[PairResult]:
    checked = any(form.accuracy for form in results.values())
    return [compare_forms(results, a, b, "accuracy" if checked else "perplexity") for a, b in pairs_of(results)]


def _hashes(questions: Questions) -> list[str]:
    return [row_hash(row.example) for row in questions if isinstance(row, EvalRow)]


def _with_new_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A base with room for the tokens that the run added: as it was before training, not as it was shipped."""
    embedding: Any = model.get_input_embeddings()
    if len(tokenizer) > embedding.weight.shape[0]:
        torch.manual_seed(seed_for(seed, "init"))
        model.resize_token_embeddings(len(tokenizer))
    return model


def _bundle_form(folder: Path, tokenizer: PreTrainedTokenizerBase, size: int) -> Callable[[], Scorer]:
    def scorer() -> Scorer:
        try:
            return BundleScorer(Bundle.open(folder), tokenizer, size)
        except BundleError as error:
            raise EvalError(f"{folder}: {error}", fix="Export again") from error

    return scorer
