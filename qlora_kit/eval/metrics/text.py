"""What several metrics of texts share: mteval's words, sacrebleu's streams of references, jiwer's edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qlora_kit.errors import EvalError
from qlora_kit.eval.metrics.inputs import reference_texts, texts


def mteval_words(text: str, lowercase: bool = True) -> list[str]:
    """The words of a text as mteval-v13a splits them (sacrebleu's `13a`)."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()(text.lower() if lowercase else text).split()


def reference_streams(metric: str, references: Sequence[Any]) -> list[list[Any]]:
    """[references][rows] of texts as sacrebleu wants them; None where a row has fewer than the row with most.

    Raises:
        EvalError: a row has no reference, or one that is no text.
    """
    rows = reference_texts(metric, references)
    return [[row[k] if k < len(row) else None for row in rows] for k in range(max(map(len, rows)))]


def edit_scores(
    metric: str,
    process: Callable[[list[str], list[str]], Any],
    predictions: Sequence[Any],
    references: Sequence[Any],
    normalize: bool,
) -> dict[str, Any]:
    """An error rate below the metric's name, its edits by kind, and `errors` and `lengths` a row.

    Args:
        process: jiwer's `process_words` or `process_characters`.
        normalize: apply Whisper's normalizer of any language to both sides.

    Raises:
        EvalError: a value that is no text, or nothing left of the references.
    """
    predicted, true = texts(metric, "predictions", predictions), texts(metric, "references", references)
    if normalize:
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer

        plain = BasicTextNormalizer()
        predicted, true = [plain(text) for text in predicted], [plain(text) for text in true]
    found = process(true, predicted)
    lengths = [len(row) for row in found.references]
    if not sum(lengths):
        raise EvalError(
            f"{metric}: the references are empty", got=list(references[:3]), allowed="at least one with text"
        )
    chunks = [[chunk for chunk in row if chunk.type != "equal"] for row in found.alignments]
    errors = [sum(max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx) for c in row) for row in chunks]
    kinds = {kind: getattr(found, kind) for kind in ("substitutions", "deletions", "insertions")}
    return {metric: sum(errors) / sum(lengths), **kinds, "errors": errors, "lengths": lengths}
