"""The bundle's logits are the torch model's; right padding changes nothing, left padding is refused."""

import numpy as np
import pytest
import torch
from qlora_runtime.errors import ArgumentError, PaddingError, PromptTooLongError

from .tiny import CONTEXT_LENGTH, PAD, random_ids


def test_logits_equal_torch(bundle, tiny):
    ids = random_ids(0, 3, 17)
    with torch.no_grad():
        expected = tiny.model(torch.from_numpy(ids)).logits.numpy()
    logits = bundle.logits(ids)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_right_padded_batch_equals_single_rows(bundle):
    rows = [random_ids(seed, length) for seed, length in enumerate((11, 4, 1))]
    ids = np.full((3, 11), PAD)
    mask = np.zeros((3, 11), dtype=np.int64)
    for row, values in enumerate(rows):
        ids[row, : len(values)] = values
        mask[row, : len(values)] = 1
    logits = bundle.logits(ids, mask)
    for row, values in enumerate(rows):
        np.testing.assert_allclose(logits[row, : len(values)], bundle.logits(values[None])[0], atol=1e-5)


@pytest.mark.parametrize("row", [[0, 0, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]])
def test_masks_that_are_not_right_padded_are_refused(bundle, row):
    with pytest.raises(PaddingError, match=r"row 1 .*Only right padding"):
        bundle.logits(random_ids(0, 2, 4), np.array([[1, 1, 1, 1], row]))


def test_left_padding_would_have_been_wrong(bundle):
    """Why the mask is refused: the graph itself takes it and gives other logits without a word."""
    ids = random_ids(0, 1, 4)
    padded = np.concatenate([np.full((1, 2), PAD), ids], axis=1)
    mask = np.array([[0, 0, 1, 1, 1, 1]])
    wrong = bundle._decoder.logits(padded, mask)[0, 2:]
    assert np.abs(wrong - bundle.logits(ids)[0]).max() > 0.1


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([1, 2, 3], None, r"shape \[3\], expected \[batch, seq\]"),
        ([[]], None, "at least one token"),
        ([[0.5, 1.0]], None, "dtype float64"),
        ([[5, -1]], None, "from -1 to 5"),
        ([[5, 320]], None, "go from 0 to 319"),
        ([[5, 6]], [[1]], r"shape \[1, 1\]"),
        ([[5, 6]], [[1, 2]], "of 0 and 1"),
    ],
)
def test_arguments_of_another_shape_or_range_are_refused(bundle, ids, mask, message):
    with pytest.raises(ArgumentError, match=message):
        bundle.logits(ids, mask)


def test_rows_longer_than_the_context_are_refused(bundle):
    with pytest.raises(PromptTooLongError, match=f"{CONTEXT_LENGTH + 1} tokens, .* holds {CONTEXT_LENGTH}"):
        bundle.logits(random_ids(0, 1, CONTEXT_LENGTH + 1))
