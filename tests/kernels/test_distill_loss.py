"""The distillation loss: its chunked path against the plain one and against definitions, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.kernels.distill_loss import TeacherSays, chunked_distill_losses, distill_losses, divergence

SHAPES = [(1, 3, 5), (7, 6, 33), (64, 17, 101)]  # tokens, width, vocab
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(logits: Tensor, temperature: float) -> TeacherSays:
    return TeacherSays((logits / temperature).log_softmax(1))


def likeliest(logits: Tensor, temperature: float, k: int) -> TeacherSays:
    found = (logits / temperature).log_softmax(1).topk(k, dim=1)
    return TeacherSays(found.values, found.indices)


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_equal_the_plain_path(shape: tuple[int, int, int], dtype: torch.dtype, k: int | None) -> None:
    tokens, width, vocab = shape
    labels = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(1))
    theirs = drawn(tokens, vocab, seed=2, scale=3)
    says = whole(theirs, 2.0) if k is None else likeliest(theirs, 2.0, k)

    def teacher(place: slice) -> TeacherSays:
        return TeacherSays(says.log_probs[place], None if says.ids is None else says.ids[place])

    results = []
    for chunked in (False, True):
        hidden = drawn(tokens, width, seed=3).to(dtype).requires_grad_()
        head = nn.Linear(width, vocab, bias=False)
        head.weight = nn.Parameter(drawn(vocab, width, seed=4).to(dtype))
        if chunked:
            losses = chunked_distill_losses(hidden, head, labels, teacher, 2.0, 0.7, vocab, chunk_logits=3 * vocab + 1)
        else:
            losses = distill_losses(head(hidden), labels, says, 2.0, 0.7)
        assert losses.dtype == torch.float32
        losses.sum().backward()
        results.append((losses, hidden.grad, head.weight.grad))
    for one, other in zip(*results):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_plain_path_is_the_definition(temperature: float) -> None:
    ours, theirs = drawn(9, 21, seed=1).double(), drawn(9, 21, seed=2).double()
    labels = torch.arange(9)
    found = distill_losses(ours, labels, whole(theirs, temperature), temperature, 0.3)
    kl = F.kl_div((ours / temperature).log_softmax(1), (theirs / temperature).softmax(1), reduction="none").sum(1)
    expected = 0.7 * F.cross_entropy(ours, labels, reduction="none") + 0.3 * temperature**2 * kl
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6, check_dtype=False)


def test_a_student_that_is_its_teacher_loses_nothing() -> None:
    logits = drawn(5, 40, scale=4).requires_grad_()
    for says in (whole(logits.detach(), 1.0), likeliest(logits.detach(), 1.0, 6)):
        loss = divergence(logits, says)
        assert loss.abs().max() < 1e-6
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.abs().max() < 1e-6


def test_few_ids_say_less_than_all_and_all_ids_say_all() -> None:
    ours, theirs = drawn(6, 30, seed=5), drawn(6, 30, seed=6, scale=2)
    full = divergence(ours, whole(theirs, 1.0))
    by_count = [divergence(ours, likeliest(theirs, 1.0, k)) for k in (1, 4, 12, 29)]
    for few, more in zip(by_count, [*by_count[1:], full]):
        assert (few <= more + 1e-5).all()
        assert (few >= -1e-6).all()
    torch.testing.assert_close(divergence(ours, likeliest(theirs, 1.0, 30)), full, rtol=1e-4, atol=1e-5)


def test_no_token_is_no_loss_and_no_error() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    head = nn.Linear(4, 9, bias=False)
    losses = chunked_distill_losses(
        hidden, head, torch.zeros(0, dtype=torch.long), lambda _: whole(torch.zeros(0, 9), 1.0), 1.0, 0.5, 9
    )
    assert losses.shape == (0,)
    losses.sum().backward()


def test_logits_of_all_tokens_never_exist() -> None:
    sizes: list[int] = []

    def head(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return part @ torch.ones(4, 50)

    hidden = drawn(23, 4).requires_grad_()
    teacher = lambda place: whole(torch.zeros(len(range(23)[place]), 50), 1.0)  # noqa: E731
    losses = chunked_distill_losses(hidden, head, torch.zeros(23, dtype=torch.long), teacher, 1.0, 0.5, 50, 250)
    losses.sum().backward()
    assert max(sizes) == 5 and sum(sizes) == 2 * 23  # once forward, once again in the backward pass
