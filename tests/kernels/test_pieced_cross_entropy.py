"""Cross-entropy through a head of codes: pieces of the vocabulary against the dequantized head and whole logits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from qlora_kit.kernels.linear_cross_entropy import linear_cross_entropy_reference
from qlora_kit.kernels.pieced_cross_entropy import pieced_cross_entropy
from qlora_kit.model.quantized_head import expand_piece, quantize_head, vocabulary_pieces

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
SHAPES = [(1, 96, 33), (7, 96, 1003), (61, 64, 320), (29, 17, 101)]  # tokens, width, vocab


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both_ways(
    hidden: Tensor, weight: Tensor, pieces: list[slice], bias: Tensor | None, labels: Tensor, size: int = 2**24
) -> list[tuple[Tensor, Tensor]]:
    """(losses, gradient of `hidden`) of the plain path through `weight`, and of the pieces."""
    weights = drawn(len(labels), seed=7)  # of losses: not only their sum is differentiated
    found = []
    for pieced in (False, True):
        taken = hidden.clone().requires_grad_()
        if pieced:
            losses = pieced_cross_entropy(taken, lambda at, dtype: weight[at].to(dtype), pieces, bias, labels, size)
        else:
            head = partial(nn.functional.linear, weight=weight, bias=bias)
            losses = linear_cross_entropy_reference(taken, head, labels)
        (losses * weights).sum().backward()
        assert taken.grad is not None and taken.grad.dtype == hidden.dtype and losses.dtype == torch.float32
        found.append((losses.detach(), taken.grad))
    return found


def close(one: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    scale = max(1e-3, other.abs().max().item())
    torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_give_the_losses_and_gradients_of_the_dequantized_head(
    shape: tuple[int, int, int], dtype: torch.dtype, biased: bool, kind: str
) -> None:
    tokens, width, vocab = shape
    layer = quantize_head(drawn(vocab, width, seed=4), kind, True, None)
    bias = drawn(vocab, seed=5).to(dtype) if biased else None
    labels = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(1))
    hidden, pieces = drawn(tokens, width, seed=3).to(dtype), vocabulary_pieces(layer, 13 * width)
    if vocab != 101:  # whose blocks of 64 weights end with a row only after 64 rows
        assert len(pieces) > 2 and vocab % pieces[0].stop
    plain, pieced = both_ways(hidden, layer.dequantize(dtype), pieces, bias, labels, 5 * pieces[0].stop)
    for one, other in zip(pieced, plain):
        close(one, other, dtype)
    again = pieced_cross_entropy(hidden, partial(expand_piece, layer), pieces, bias, labels)
    close(again, plain[0], dtype)


def test_the_gradient_of_a_sure_token_is_not_lost_in_its_own_row() -> None:
    """In bf16 it is as near to the plain path's as for any other token, however small beside the label's row."""
    weight = 0.3 * drawn(50, 32, seed=1).bfloat16()
    hidden = weight[7:8] * 8  # the label's logit leads by far
    pieces, labels = [slice(0, 20), slice(20, 40), slice(40, 50)], torch.tensor([7])
    (_, plain), (_, pieced) = both_ways(hidden, weight, pieces, None, labels)
    assert 0 < plain.abs().max() < 1e-5 * weight[7].abs().max()
    close(pieced.float() * 1e6, plain.float() * 1e6, torch.bfloat16)


def test_very_large_logits_that_rise_from_piece_to_piece_stay_finite() -> None:
    weight = 1e4 * torch.arange(9.0)[:, None] * drawn(9, 4, seed=2).abs()
    pieces = [slice(k, k + 1) for k in range(9)]
    plain, pieced = both_ways(drawn(6, 4, seed=1).abs() + 1, weight, pieces, None, torch.arange(6))
    for one, other in zip(pieced, plain):
        assert one.isfinite().all()
        close(one, other, torch.float32)


def test_pieces_are_expanded_once_for_the_tokens_of_a_chunk_and_nothing_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    linear = nn.functional.linear

    def watched(*arguments: Tensor) -> Tensor:
        seen.append(linear(*arguments).numel())
        return linear(*arguments)

    monkeypatch.setattr("qlora_kit.kernels.pieced_cross_entropy.F.linear", watched)
    asked: list[slice] = []

    def expand(place: slice, dtype: torch.dtype) -> Tensor:
        asked.append(place)
        return drawn(50, 4, seed=1)[place].to(dtype)

    hidden, pieces = drawn(23, 4, seed=2).requires_grad_(), [slice(0, 20), slice(20, 40), slice(40, 50)]
    pieced_cross_entropy(hidden, expand, pieces, None, torch.zeros(23, dtype=torch.long), 400).sum().backward()
    assert asked == pieces * 2 and seen == [400, 400, 200, 60, 60, 30]


def test_no_token_is_no_loss_and_no_error() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long)
    losses = pieced_cross_entropy(hidden, lambda at, dtype: torch.ones(9, 4), [slice(0, 9)], None, labels)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("label", [-1, 9])
def test_a_label_outside_of_the_vocabulary_is_an_error(label: int) -> None:
    with pytest.raises(IndexError, match=f"a label is out of bounds: {label} to {label} of 9 words"):
        pieced_cross_entropy(
            torch.ones(1, 4), lambda at, dtype: torch.ones(9, 4), [slice(0, 9)], None, torch.tensor([label])
        )
