"""Effective rank, energy and overlap of subspaces, on cases whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from qlora_kit.adapters.deltas import Delta
from qlora_kit.adapters.spectrum import amplification, directions, effective_rank, energy_rank, overlap


def orthonormal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed))).Q


def test_effective_rank() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) + 0.25 * math.log(4))
    )
    assert effective_rank(torch.zeros(3)) == 0


def test_energy_rank() -> None:
    values = torch.tensor([3.0, 2.0, 1.0])  # squares 9, 4, 1 of 14
    assert [energy_rank(values, share) for share in (0.5, 0.9, 0.95)] == [1, 2, 3]
    assert energy_rank(torch.ones(10)) == 9 and energy_rank(torch.zeros(3)) == 0


def test_overlap_of_known_subspaces() -> None:
    basis = orthonormal(12, 0)
    whole = overlap(basis[:, :4], basis[:, :4])
    torch.testing.assert_close(whole, torch.ones(4, 4))
    torch.testing.assert_close(overlap(basis[:, :4], basis[:, 4:7]), torch.zeros(4, 3))
    swapped = overlap(basis[:, [0, 1]], basis[:, [1, 0, 2]])
    torch.testing.assert_close(swapped, torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]))


def test_overlap_is_the_papers_formula_and_chance_is_max_over_d() -> None:
    one, other = orthonormal(300, 1)[:, :8], orthonormal(300, 2)[:, :20]
    found = overlap(one, other)
    for i, j in ((1, 1), (3, 8), (8, 20)):
        by_hand = (one[:, :i].T @ other[:, :j]).norm() ** 2 / min(i, j)
        assert found[i - 1, j - 1].item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert found[7, 19].item() == pytest.approx(20 / 300, rel=0.5)


def test_directions_and_amplification() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(9, 3, generator=generator), torch.randn(3, 6, generator=generator)
    b[:, 2] = b[:, 1]  # a product of rank 3 at most, 2 here once a's rows agree
    a[2] = a[1]
    vectors = Delta(a, b).svd()
    assert directions(vectors[0], vectors[1]).shape == (9, 2)
    weight = torch.randn(9, 6, generator=generator)
    u, s, vh = torch.linalg.svd(b @ a)
    by_hand = s.norm() / (u[:, :2].T @ weight @ vh[:2].T).norm()
    assert amplification(vectors, weight) == pytest.approx(by_hand.item(), rel=1e-4)
    assert amplification(vectors, b @ a) == pytest.approx(1, rel=1e-4)
