"""Inner rules against torch's own optimisers and against the definition of orthogonalisation."""

import pytest
import torch
from torch import nn

from lightspan.core.errors import UserError
from lightspan.optim.low_rank.inner import SGD, Adam, AdamSettings, InnerContext, NewtonSchulz
from lightspan.optim.matrices.moments import Float32Moments
from lightspan.optim.matrices.newton_schulz import COEFFICIENTS, orthogonalised
from lightspan.optim.matrices.stacks import Layout

STORAGE = Float32Moments()
NUMBERS = AdamSettings((0.9, 0.99), 1e-8, torch.tensor(0))


def layout(rows=6, rank=4, wide=False, size=5):
    return Layout(rows, size, rank, wide, torch.float64, torch.device("cpu"), (0, 1))


def directions(inner, steps=8):
    generator, like = torch.Generator().manual_seed(0), layout()
    state = inner.initial(like, STORAGE)
    given = [torch.randn(2, 6, 4, generator=generator, dtype=torch.float64) for _ in range(steps)]
    return given, [inner.direction(g.clone(), state, InnerContext(like, STORAGE, NUMBERS)).clone() for g in given]


@pytest.mark.parametrize(
    ("inner", "theirs"),
    [
        (Adam(), lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.9, 0.99))),
        (SGD(0.9), lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9)),
        (SGD(0.0), lambda p: torch.optim.SGD(p, lr=1.0)),
    ],
)
def test_in_coordinates_it_is_torchs_optimiser(inner, theirs):
    given, got = directions(inner)
    weight = nn.Parameter(torch.zeros(2, 6, 4, dtype=torch.float64))
    optimizer = theirs([weight])
    for g, u in zip(given, got, strict=True):
        before = weight.detach().clone()
        weight.grad = g
        optimizer.step()
        torch.testing.assert_close(before - weight, u, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (1, 5)])
def test_newton_schulz_keeps_singular_vectors_and_brings_values_near_one(shape):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    found = u.mT @ orthogonalised(x, None, COEFFICIENTS["jordan"]) @ vh.mT
    values = found.diagonal(dim1=1, dim2=2)
    assert (found - torch.diag_embed(values)).abs().max() < 1e-10
    assert ((values > 0.65) & (values < 1.25)).all()


@pytest.mark.parametrize(("scale", "factor"), [("kj", 2.0), ("kimi", 0.2 * 20**0.5), ("dion", 2.0), ("none", 1.0)])
def test_conventions_scale_by_the_parameters_own_shape(scale, factor):
    x = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tall, wide = layout(20, 3, size=5), layout(20, 3, wide=True, size=5)
    plain = orthogonalised(x, None, COEFFICIENTS["jordan"])
    u = NewtonSchulz(convention=scale).direction(x, {}, InnerContext(tall, STORAGE, NUMBERS))
    torch.testing.assert_close(u, factor * plain)
    inverse = {"kj": 1.0, "dion": 0.5}.get(scale, factor)
    u = NewtonSchulz(convention=scale).direction(x, {}, InnerContext(wide, STORAGE, NUMBERS))
    torch.testing.assert_close(u, inverse * plain)


@pytest.mark.parametrize("inner", [Adam(), SGD(), NewtonSchulz()], ids=lambda inner: type(inner).__name__)
def test_coordinates_stay_as_they_are_for_what_is_made_of_them_later(inner):
    """Residuals read them after the rule."""
    like = layout()
    x, state = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).double(), inner.initial(like, STORAGE)
    before = x.clone()
    for _ in range(2):
        inner.direction(x, state, InnerContext(like, STORAGE, NUMBERS)).zero_()
        assert torch.equal(x, before)


def test_a_zero_gradient_gives_a_zero_direction():
    for inner in (Adam(), SGD(), NewtonSchulz()):
        state = inner.initial(layout(), STORAGE)
        u = inner.direction(torch.zeros(2, 6, 4, dtype=torch.float64), state, InnerContext(layout(), STORAGE, NUMBERS))
        assert torch.equal(u, torch.zeros_like(u))


def test_momentum_follows_its_column_and_a_column_from_nowhere_has_none():
    like, rule = layout(), SGD(0.5)
    before = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state, source_BR = {"exp_avg": before.clone()}, torch.tensor([[1, -1, 0, 3], [2, 3, -1, -1]])
    moved = rule.direction(torch.zeros_like(before), state, InnerContext(like, STORAGE, NUMBERS, source_BR))
    nowhere = torch.zeros(6, dtype=torch.float64)
    for b, sources in enumerate(source_BR.tolist()):
        columns = [nowhere if source < 0 else before[b, :, source] for source in sources]
        assert torch.equal(moved[b], 0.5 * torch.stack(columns, dim=1))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: SGD(1.0), r"SGD momentum=1.0 must be in \[0, 1\)"),
    (lambda: NewtonSchulz(0), "steps=0 must be at least 1"),
    (lambda: NewtonSchulz(2.5), "steps=2.5 must be at least 1, a whole number"),
    (lambda: NewtonSchulz(convention="original"), "convention='original' must be one of adamw, kj, kimi, dion, none"),
    (lambda: NewtonSchulz(precision=torch.bfloat16), r"precision=torch.bfloat16 must be one of float32, bfloat16"),
])  # fmt: skip
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
