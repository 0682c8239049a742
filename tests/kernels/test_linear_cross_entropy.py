"""Cross-entropy at the head: chunks against whole logits, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qlora_kit.kernels.linear_cross_entropy import (
    head_cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

SHAPES = [(1, 3, 5), (7, 6, 33), (64, 17, 101), (29, 64, 1003)]  # tokens, width, vocab
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def head_of(width: int, vocab: int, dtype: torch.dtype, bias: bool = False) -> nn.Linear:
    head = nn.Linear(width, vocab, bias=bias, dtype=dtype)
    head.weight = nn.Parameter(drawn(vocab, width, seed=4).to(dtype))
    if bias:
        head.bias = nn.Parameter(drawn(vocab, seed=5).to(dtype))
    return head


def close(one: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    scale = max(1e-3, other.abs().max().item())
    torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_frozen_head_in_chunks_gives_the_plain_losses_and_gradients(
    shape: tuple[int, int, int], dtype: torch.dtype, bias: bool
) -> None:
    tokens, width, vocab = shape
    labels = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(1))
    head = head_of(width, vocab, dtype, bias).requires_grad_(False)
    weights = drawn(tokens, seed=7)  # of losses: not only their sum is differentiated
    found = []
    for chunked in (False, True):
        hidden = drawn(tokens, width, seed=3).to(dtype).requires_grad_()
        if chunked:
            losses = linear_cross_entropy(hidden, head.weight.to, head.bias, labels, chunk_logits=3 * vocab + 1)
        else:
            losses = linear_cross_entropy_reference(hidden, head, labels)
        assert losses.dtype == torch.float32 and losses.shape == (tokens,)
        (losses * weights).sum().backward()
        assert hidden.grad is not None and hidden.grad.dtype == dtype
        found.append((losses.detach(), hidden.grad))
    for one, other in zip(found[1], found[0]):
        close(one, other, dtype)
    assert torch.isfinite(found[1][0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_trained_head_gets_its_gradient(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, width, vocab = shape
    labels = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(1))
    found = []
    for chunked in (False, True):
        head = head_of(width, vocab, dtype, bias=True)
        hidden = drawn(tokens, width, seed=3).to(dtype).requires_grad_()
        if chunked:
            losses = head_cross_entropy(hidden, head, labels, vocab, chunk_logits=20 * vocab)
        else:
            losses = linear_cross_entropy_reference(hidden, head, labels)
        losses.mean().backward()
        found.append([losses.detach(), hidden.grad, head.weight.grad, head.bias.grad])
    for one, other in zip(found[1], found[0]):
        assert one is not None and other is not None
        close(one, other, dtype)


def test_the_gradient_is_that_of_finite_differences() -> None:
    head = head_of(5, 23, torch.float64).requires_grad_(False)
    labels, hidden = torch.arange(4) * 5, drawn(4, 5, seed=3).double().requires_grad_()
    linear_cross_entropy(hidden, head.weight.to, None, labels).sum().backward()
    assert hidden.grad is not None
    for place in ((0, 0), (2, 3), (3, 4)):
        nudge = torch.zeros(4, 5, dtype=torch.float64)
        nudge[place] = 1e-2
        ahead, behind = (
            linear_cross_entropy_reference(hidden.detach() + sign * nudge, head, labels).double().sum()
            for sign in (1, -1)
        )
        assert (ahead - behind).item() / 2e-2 == pytest.approx(hidden.grad[place].item(), rel=1e-3, abs=1e-4)


def test_very_large_logits_stay_finite() -> None:
    head = nn.Linear(4, 9, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    head.weight.mul_(1e4)
    hidden = (1e3 * drawn(6, 4, seed=1)).bfloat16().requires_grad_()
    losses = linear_cross_entropy(hidden, head.weight.to, None, torch.arange(6))
    losses.sum().backward()
    assert losses.isfinite().all() and hidden.grad is not None and hidden.grad.isfinite().all()


def test_no_token_is_no_loss_and_no_error() -> None:
    head = head_of(4, 9, torch.bfloat16).requires_grad_(False)
    labels = torch.zeros(0, dtype=torch.long)
    for losses_of in (
        lambda hidden: linear_cross_entropy(hidden, head.weight.to, None, labels),
        lambda hidden: head_cross_entropy(hidden, head, labels, 9),
    ):
        hidden = torch.zeros(0, 4, dtype=torch.bfloat16, requires_grad=True)
        losses = losses_of(hidden)
        assert losses.shape == (0,) and losses.dtype == torch.float32
        losses.sum().backward()
        assert hidden.grad is not None


def test_chunks_hold_no_more_logits_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    linear = torch.nn.functional.linear

    def watched(*arguments: Tensor) -> Tensor:
        made.append(linear(*arguments).numel())
        return linear(*arguments)

    monkeypatch.setattr("qlora_kit.kernels.linear_cross_entropy.F.linear", watched)
    head = head_of(4, 50, torch.float32).requires_grad_(False)
    hidden = drawn(23, 4, seed=1).requires_grad_()
    linear_cross_entropy(hidden, head.weight.to, None, torch.zeros(23, dtype=torch.long), 250).sum().backward()
    assert made == [250] * 4 + [150]  # once: nothing is computed again


def test_without_gradients_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kit.kernels.linear_cross_entropy.torch.mm", None)
    head = head_of(4, 50, torch.float32)
    labels = torch.zeros(3, dtype=torch.long)
    with torch.no_grad():
        hidden = drawn(3, 4, seed=1).requires_grad_()
        found = linear_cross_entropy(hidden, head.weight.to, None, labels)
        torch.testing.assert_close(found, linear_cross_entropy_reference(hidden, head, labels))


def test_a_label_outside_of_the_vocabulary_is_an_error() -> None:
    head = head_of(4, 9, torch.float32).requires_grad_(False)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(drawn(1, 4, seed=1), head.weight.to, None, torch.tensor([9]))
