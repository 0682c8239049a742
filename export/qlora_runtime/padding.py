"""Checking token ids and attention masks before they reach the graph.

GroupQueryAttention does not look at where an attention mask has its ones, only at how many there are: it
reads the first `sum(mask)` tokens of a row. A left-padded mask, or one with holes, would give wrong logits
silently.
"""

import numpy as np
import numpy.typing as npt

from qlora_runtime.decoder import Int64Array
from qlora_runtime.errors import ArgumentError, PaddingError, PromptTooLongError
from qlora_runtime.schema import ModelInfo


def checked_ids(input_ids: npt.ArrayLike, model: ModelInfo, dimensions: int) -> Int64Array:
    """`input_ids` as int64, contiguous, of `dimensions` dimensions and at least one token in each.

    Raises:
        ArgumentError: another shape, no integers, or ids outside the vocabulary.
        PromptTooLongError: rows longer than the context.
    """
    ids = np.asarray(input_ids)
    layout = "[batch, seq]" if dimensions == 2 else "[seq]"
    if ids.ndim != dimensions or ids.size == 0:
        raise ArgumentError(
            f"input_ids has shape {list(ids.shape)}, expected {layout} with at least one token."
        )
    if not np.issubdtype(ids.dtype, np.integer):
        raise ArgumentError(f"input_ids has dtype {ids.dtype}, expected int64 token ids.")
    if ids.min() < 0 or ids.max() >= model.vocab_size:
        raise ArgumentError(
            f"input_ids holds values from {ids.min()} to {ids.max()}; this model's token ids go from 0 to "
            f"{model.vocab_size - 1}. Encode the text with the bundle's own tokenizer."
        )
    if ids.shape[-1] > model.context_length:
        raise PromptTooLongError(
            f"the input has {ids.shape[-1]} tokens, the model's context holds {model.context_length}. "
            "Shorten it."
        )
    return np.ascontiguousarray(ids, dtype=np.int64)


def checked_mask(attention_mask: npt.ArrayLike | None, input_ids: Int64Array) -> Int64Array:
    """`attention_mask` as int64 of input_ids' shape; None means that every token counts.

    Raises:
        ArgumentError: another shape, or values other than 0 and 1.
        PaddingError: a row is not ones followed by zeros, or has no token at all.
    """
    if attention_mask is None:
        return np.ones_like(input_ids)
    mask = np.asarray(attention_mask)
    if mask.shape != input_ids.shape or not np.isin(mask, (0, 1)).all():
        raise ArgumentError(
            f"attention_mask has shape {list(mask.shape)} and values {np.unique(mask)[:5].tolist()}, "
            f"expected {list(input_ids.shape)} like input_ids, of 0 and 1."
        )
    mask = mask.astype(np.int64)
    rising = (np.diff(mask, axis=1) > 0).any(axis=1)  # [batch]: a one after a zero
    if (bad := np.flatnonzero(rising | (mask[:, 0] == 0))).size:
        row = mask[bad[0]]
        raise PaddingError(
            f"attention_mask row {bad[0]} starts {row[:8].tolist()} with {row.sum()} of {row.size} "
            "tokens real. Only right padding is allowed (ones, then zeros, at least one 1): the graph "
            "counts the ones and ignores where they are, so left padding would give wrong logits. Pad "
            "on the right."
        )
    return mask
