"""A few answers of the trained model, for the report: RUN/samples.json."""

from __future__ import annotations

import torch

from qlora_kit.atomic import write_json
from qlora_kit.data.eval_rows import EvalRow, eval_rows
from qlora_kit.errors import DataError
from qlora_kit.generate import generate_ids
from qlora_kit.model.load import DTYPES
from qlora_kit.model.quantized import expanded
from qlora_kit.train.session import Session


def write_samples(session: Session) -> None:
    """Greedy answers to the first held-out prompts; nothing where the rows are plain text, which asks nothing."""
    session.watch.stop()  # it keeps expanded weights where there is room for them: not what training takes
    recipe, tokenizer = session.recipe, session.tokenizer
    if not recipe.eval.samples or recipe.task.type != "causal_lm":
        return
    try:
        rows = eval_rows(recipe.data, tokenizer, recipe.run.seed, recipe.eval.samples)
    except DataError as error:
        session.run.note(f"no samples: {error}")
        return
    session.plain.eval()
    try:
        with expanded(session.plain, DTYPES[recipe.base.compute_dtype]):
            samples = [_sample(session, row) for row in rows]
    except torch.OutOfMemoryError:  # the run is done: its report is no reason to lose it
        session.run.note("no samples: too little memory to generate")
        return
    finally:
        session.plain.train()
    write_json(session.run.path / "samples.json", samples)


def _sample(session: Session, row: EvalRow) -> dict[str, str]:
    tokenizer = session.tokenizer
    prompt = row.prompt_ids.tolist()
    answer = generate_ids(session.plain, tokenizer, prompt, session.recipe.eval.max_new_tokens)
    return {
        "prompt": str(tokenizer.decode(prompt, skip_special_tokens=True)),
        "expected": row.completion,
        "answer": str(tokenizer.decode(answer, skip_special_tokens=True)),
    }
