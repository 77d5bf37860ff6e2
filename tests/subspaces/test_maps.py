"""One adjoint suite for every map there is: <push(z), g> = <z, pull(g)>.

Maps are found, not listed: every class of lightspan that has `push` and `pull`, private or not, and every basis of the
optimiser. One without a case in CASES or BASES fails.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lightspan
from lightspan.merging.span import TaskSpan
from lightspan.optim.low_rank.bases import Basis, DCTBasis, GaussianBasis, PowerBasis, SVDBasis
from lightspan.optim.matrices.stacks import Layout
from lightspan.subspaces.frames import Frames
from lightspan.subspaces.grassmann import Horizontal
from lightspan.subspaces.maps import SubspaceMap
from lightspan.subspaces.masks.maps import Selected, SoftMask
from lightspan.subspaces.projections import Dense, Fastfood, PerTensor, Projection, Sparse
from lightspan.subspaces.singular import SingularFrame
from lightspan.subspaces.tucker import TuckerFrame

Case = tuple[SubspaceMap, tuple[int, ...], tuple[int, ...]]  # the map, shapes of coordinates and of numbers
Sizes = tuple[int, int, int]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tucker(sizes: Sizes, seed: int) -> Case:
    axes = (*sizes, 2)
    ranks = tuple(max(1, size // 2) for size in sizes)
    factors = [normal(size, rank, seed=seed + i) for i, (size, rank) in enumerate(zip(sizes, ranks, strict=True))]
    return TuckerFrame([*factors, None]), (*ranks, 2), axes


def selected(sizes: Sizes, seed: int) -> Case:
    open_S = normal(*sizes, seed=seed) > 0  # now and then none, or all
    return Selected(open_S), (int(open_S.sum()),), sizes


def all_weights(kind: type[Projection]) -> Callable[[Sizes, int], Case]:
    return lambda sizes, seed: (kind(sizes[0] * sizes[1], sizes[2], seed), (sizes[2],), (sizes[0] * sizes[1],))


CASES: dict[type, Callable[[Sizes, int], Case]] = {
    Frames: lambda s, seed: (Frames(normal(2, s[0], s[2], seed=seed)), (2, s[1], s[2]), (2, s[1], s[0])),
    Horizontal: lambda s, seed: (Horizontal(normal(2, s[0], s[2], seed=seed)), (2, s[0], s[2]), (2, s[0], s[2])),
    Dense: all_weights(Dense),
    Sparse: all_weights(Sparse),
    Fastfood: all_weights(Fastfood),
    PerTensor: lambda s, seed: (PerTensor(s, 4, seed), (4,), (sum(s),)),
    SingularFrame: lambda s, seed: (
        SingularFrame(normal(s[0], s[2], seed=seed), normal(s[2], s[1], seed=seed + 1)),
        (s[2],),
        s[:2],
    ),
    TuckerFrame: tucker,
    TaskSpan: lambda s, seed: (TaskSpan(list(normal(s[2], *s[:2], seed=seed))), (s[2],), s[:2]),
    Selected: selected,
    SoftMask: lambda s, seed: (SoftMask(normal(s[0], 1, seed=seed)), s[:2], s[:2]),
}
BASES: dict[type[Basis], Basis] = {
    PowerBasis: PowerBasis(),
    SVDBasis: SVDBasis(),
    GaussianBasis: GaussianBasis(),
    DCTBasis: DCTBasis(),
}


@cache
def classes() -> set[type]:
    """All classes that lightspan defines, but for modules that need an extra which is not installed."""
    found: set[type] = set()
    for module in pkgutil.walk_packages(lightspan.__path__, "lightspan."):
        if module.name == "lightspan.__main__":
            continue
        try:
            members = vars(importlib.import_module(module.name)).values()
        except ImportError:
            continue
        found |= {kind for kind in members if isinstance(kind, type) and kind.__module__ == module.name}
    return found


def concrete(kinds: set[type]) -> Iterator[type]:
    return (kind for kind in kinds if not inspect.isabstract(kind))


def test_every_map_and_every_basis_has_a_case() -> None:
    maps = {kind for kind in concrete(classes()) if hasattr(kind, "push") and hasattr(kind, "pull")} - {SubspaceMap}
    bases = {kind for kind in concrete(classes()) if issubclass(kind, Basis)}
    assert len(maps) >= 7
    assert len(bases) >= 4
    assert maps == CASES.keys()
    assert bases == BASES.keys()


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


@settings(derandomize=True, max_examples=20, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**20))
@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_pull_is_the_adjoint_of_push(kind: type, sizes: Sizes, seed: int) -> None:
    subspace, coordinates, numbers = CASES[kind](sizes, seed)
    assert isinstance(subspace, SubspaceMap)
    z, g = normal(*coordinates, seed=seed + 10), normal(*numbers, seed=seed + 11)
    pushed, pulled = subspace.push(z), subspace.pull(g)
    assert pushed.shape == numbers
    assert pulled.shape == coordinates
    allowed = 1e-12 * (1 + z.norm() * g.norm() + pushed.norm() * g.norm())
    assert abs((pushed * g).sum() - (z * pulled).sum()) <= allowed
    torch.testing.assert_close(subspace.push(2 * z), 2 * pushed)


@settings(derandomize=True, max_examples=8, deadline=None)
@given(rows=st.integers(1, 9), size=st.sampled_from([2, 3, 6, 8]), seed=st.integers(0, 2**20), data=st.data())
@pytest.mark.parametrize("kind", BASES, ids=lambda kind: kind.__name__)
def test_what_a_basis_projects_and_updates_is_the_pull_and_push_of_its_frames(
    kind: type[Basis], rows: int, size: int, seed: int, data: st.DataObject
) -> None:
    """The fused forms that a step uses, in float64, after a refresh from a gradient."""
    basis, rows = BASES[kind], max(rows, size)
    rank = data.draw(st.integers(1, size))
    layout = Layout(rows, size, rank, False, torch.float64, torch.device("cpu"), (seed, seed + 1))
    gradients = list(normal(2, rows, size, seed=seed))
    state = basis.refresh(gradients, basis.initial(layout), layout, first=True)
    subspace = Frames(basis.frame(state, layout))
    coordinates, _ = basis.project(gradients, state, layout, energy=False)
    torch.testing.assert_close(coordinates, subspace.pull(torch.stack(gradients)), rtol=0, atol=1e-12)
    z, weights = normal(2, rows, rank, seed=seed + 1), [torch.zeros(rows, size, dtype=torch.float64) for _ in range(2)]
    rate, keep = torch.tensor(0.5, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    basis.update(weights, z.clone(), state, layout, [], z.new_empty(0, rows), rate, keep, None)
    torch.testing.assert_close(torch.stack(weights), -0.5 * subspace.push(z), rtol=0, atol=1e-12)
    inner = (subspace.push(z) * torch.stack(gradients)).sum()
    torch.testing.assert_close((z * coordinates).sum(), inner, rtol=1e-10, atol=1e-10)
