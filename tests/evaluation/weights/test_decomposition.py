"""Singular values and directions in pieces, against LAPACK and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from lightspan.evaluation.geometry.spectra import energy_rank
from lightspan.evaluation.weights import decomposition
from lightspan.evaluation.weights.decomposition import Decomposition
from lightspan.evaluation.weights.matrices import as_matrix, faults_of, kind_of, matrix_shape
from lightspan.subspaces.grassmann import principal_angles


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (1, 5), (5, 1), (30, 30)])
@pytest.mark.parametrize("size", [1.0, 1e-150, 1e150, 1e-290, 1e300])
def test_values_directions_and_cosines_are_those_of_lapack(
    shape: tuple[int, int], size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decomposition, "_CHUNK", 200)  # several pieces
    matrix = size * drawn(*shape)
    left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    found = Decomposition(matrix)
    assert found.exact
    assert np.allclose(found.values_S, values, rtol=1e-9)
    assert found.norm == pytest.approx(size * float((matrix / size).norm()))
    for frame, expected in zip(found.frames(3), (left, right.T), strict=True):
        assert np.allclose(np.abs((frame.numpy() * expected[:, : frame.shape[1]]).sum(axis=0)), 1)
    other = torch.linalg.qr(drawn(shape[0], min(3, shape[0]), 1)).Q
    assert np.allclose(found.cosines(other), np.abs(left.T @ other.numpy()).max(axis=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_read_as_the_numbers_that_it_holds(dtype: torch.dtype) -> None:
    matrix = drawn(20, 30).to(dtype)
    assert torch.allclose(Decomposition(matrix).values_S, torch.linalg.svdvals(matrix.double()), rtol=1e-9)


def test_large_matrices_have_their_strongest_values_within_the_bound() -> None:
    decay = torch.logspace(0, -2, 150, dtype=torch.float64)
    for matrix in (drawn(150, 200) * decay[:, None], (drawn(150, 200) * decay[:, None]).T, drawn(150, 170)):
        exact, found = torch.linalg.svdvals(matrix), Decomposition(matrix, largest=100)
        assert not found.exact
        assert len(found.values_S) == 64
        # Each is near some value, and none exceeds the true one of its place.
        assert (found.values_S - exact[:64]).abs().max() <= found.error * exact[0]
        assert (found.values_S <= exact[:64] * (1 + 1e-9)).all()
        assert found.norm == pytest.approx(float(matrix.norm()))
    planted = drawn(150, 3, 1) @ drawn(3, 200, 2)
    found = Decomposition(planted, largest=100)
    assert found.rank == 3
    assert found.error < 1e-6
    assert torch.allclose(found.values_S[:3], torch.linalg.svdvals(planted)[:3])


def test_nothing_and_zeros_have_no_direction() -> None:
    zeros = Decomposition(torch.zeros(4, 3, dtype=torch.bfloat16))
    assert (zeros.rank, zeros.norm) == (0, 0)
    assert [frame.shape[1] for frame in zeros.frames(2)] == [0, 0]
    assert zeros.cosines(torch.eye(4, dtype=torch.float64)[:, :2]).tolist() == [0, 0]
    assert len(Decomposition(torch.zeros(4, 0)).values_S) == 0
    one = Decomposition(torch.outer(drawn(5, 1)[:, 0], drawn(6, 1)[:, 0]))
    assert one.rank == 1


def test_frames_have_the_angles_of_scipy() -> None:
    a, b = drawn(60, 40), drawn(60, 40) + 0.5 * drawn(60, 40, 1)
    ours = principal_angles(Decomposition(a).frames(5)[0][None], Decomposition(b).frames(5)[0][None])[0]
    left = [np.linalg.svd(x.numpy())[0][:, :5] for x in (a, b)]
    assert np.allclose(ours.numpy()[::-1], subspace_angles(*left))


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.8, 1), (0.81, 2), (0.9, 2), (0.99, 3), (1.0, 3)])
def test_the_rank_for_an_energy_by_hand(share: float, rank: int) -> None:
    values = torch.tensor([math.sqrt(8), 1.0, 1.0, 0.0], dtype=torch.float64)  # 80, 10 and 10 %
    assert energy_rank(values, share) == rank
    assert energy_rank(torch.zeros(4), share) == 0
    assert energy_rank(torch.zeros(0), share) == 0


@pytest.mark.parametrize(
    ("name", "shape", "kind", "sides"),
    [
        ("layer.weight", (8, 4), "matrix", (8, 4)),
        ("layer.bias", (8,), "vector", (1, 8)),
        ("scale", (), "vector", (1, 1)),
        ("gate.weight", (1, 8), "vector", (1, 8)),
        ("conv.weight", (8, 4, 3, 3), "kernel", (8, 36)),
        ("conv1d.weight", (8, 4, 3), "kernel", (8, 12)),
        ("model.embed_tokens.weight", (100, 8), "embedding", (100, 8)),
        ("transformer.wte.weight", (100, 8), "embedding", (100, 8)),
        ("pos_embed", (1, 17, 8), "embedding", (17, 8)),
        ("queries", (1, 17, 8), "matrix", (17, 8)),
    ],
)
def test_tensors_are_read_as_matrices(name: str, shape: tuple[int, ...], kind: str, sides: tuple[int, int]) -> None:
    assert kind_of(name, shape) == kind
    assert matrix_shape(shape) == tuple(as_matrix(torch.zeros(shape)).shape) == sides


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_faults_are_named(dtype: torch.dtype) -> None:
    sound = drawn(4, 3).to(dtype)
    assert faults_of(sound) == []
    assert faults_of(torch.zeros(4, 0, dtype=dtype)) == ["empty"]
    assert faults_of(torch.zeros(4, 3, dtype=dtype)) == ["zero"]
    assert faults_of(torch.full((4, 3), 0.5, dtype=dtype)) == ["constant"]
    assert faults_of(torch.ones(1, dtype=dtype)) == []
    broken = sound.clone()
    broken[0, 0], broken[1, 1] = torch.nan, torch.inf
    assert faults_of(broken) == ["2 of 12 numbers NaN or infinite"]
    dead = sound.clone()
    dead[:2] = 0
    dead[:, 1] = 0
    assert faults_of(dead) == ["2 rows of zeros", "1 column of zeros"]
