"""Muon, NorMuon and Dion2: the published equations, torch's Muon, and what their momentum and choices must do."""

import copy
import weakref
from functools import partial

import pytest
import torch
from optim import published
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightspan.core.errors import UserError
from lightspan.optim import muon, reference
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.low_rank.bases import PowerBasis
from lightspan.optim.low_rank.inner import NewtonSchulz
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.presets import Trion
from lightspan.optim.matrices import newton_schulz
from lightspan.optim.matrices.moments import BFloat16Moments, Float32Moments, Int8Moments
from lightspan.optim.muon import Dion2, Muon, NorMuon
from lightspan.optim.parameter_summary import parameter_summary


def FactoredMuon(params, **options) -> LowRank:
    """In float64, where its own moments have 8 bits."""
    return muon.FactoredMuon(params, **{"moments": Float32Moments(), **options})


WHOLE = [Muon, NorMuon, FactoredMuon, Dion2]
every_rule = pytest.mark.parametrize("kind", WHOLE, ids=lambda kind: kind.__name__)
SHAPES = [(9, 5), (5, 9), (7, 7), (20, 3), (8, 1), (1, 6)]
EXACT = {"atol": 1e-12, "rtol": 0}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def given(shape: tuple[int, ...], steps: int = 6) -> list[Tensor]:
    return [draw(*shape, seed=100 + step) for step in range(steps)]


def trained(kind: type[LowRank], shape: tuple[int, ...], steps: int = 6, **options) -> tuple[Tensor, LowRank]:
    weight = nn.Parameter(draw(*shape))
    optimizer = kind([weight], lr=0.1, weight_decay=0.3, **options)
    for gradient in given(shape, steps):
        weight.grad = gradient
        optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kind", "options", "theirs"),
    [
        (Muon, {}, lambda: published.JordansMuon(0.1, 0.95, 0.3)),
        (Muon, {"nesterov": False}, lambda: published.JordansMuon(0.1, 0.95, 0.3, nesterov=False)),
        (Muon, {"convention": "kimi"}, lambda: published.Moonlight(0.1, 0.95, 0.3)),
        (NorMuon, {}, lambda: published.NorMuonCode(0.1, 0.95, 0.3)),
        (Dion2, {}, lambda: published.Dion2Code(0.1, 0.95, 0.3, 0.25)),
        (Dion2, {"fraction": 0.5}, lambda: published.Dion2Code(0.1, 0.95, 0.3, 0.5)),
    ],
    ids=["Muon", "Muon without Nesterov", "Moonlight", "NorMuon", "Dion2", "Dion2 of a half"],
)
def test_the_equations_of_published_code(kind, options, theirs, shape) -> None:
    rule, expected = theirs(), draw(*shape)
    for gradient in given(shape):
        expected = rule.step(expected, gradient)
    torch.testing.assert_close(trained(kind, shape, **options)[0], expected, **EXACT)


@pytest.mark.parametrize("shape", [*SHAPES, (6, 2, 2, 2)])
@every_rule
def test_the_reference(kind, shape) -> None:
    weight = nn.Parameter(draw(*shape))
    slow = getattr(reference, kind.__name__)([weight], lr=0.1, weight_decay=0.3)
    for gradient in given(shape):
        weight.grad = gradient
        slow.step()
    torch.testing.assert_close(trained(kind, shape)[0], weight.detach(), **EXACT)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("theirs", "convention"), [("original", "kj"), ("match_rms_adamw", "kimi")])
def test_torchs_muon(theirs, convention, nesterov) -> None:
    """Momentum and decay bit for bit. Its Newton-Schulz is in bfloat16, whose numbers err by 2^-9: all of its five
    steps err by 8 to 9 times that.
    """
    shapes = [(64, 32), (32, 64), (48, 48)]
    ours, others = ([nn.Parameter(draw(*shape, dtype=torch.float32)) for shape in shapes] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.5, "momentum": 0.9, "nesterov": nesterov}
    optimizer = Muon(ours, convention=convention, **settings)
    peer = torch.optim.Muon(others, adjust_lr_fn=theirs, **settings)
    for step in range(4):
        before = [pair[0].detach().clone() * (1 - 0.02 * 0.5) for pair in zip(ours, others, strict=True)]
        for seed, (one, other) in enumerate(zip(ours, others, strict=True)):
            other.data.copy_(one)
            one.grad = draw(*one.shape, seed=10 * step + seed, dtype=torch.float32)
            other.grad = one.grad.clone()
        optimizer.step()
        peer.step()
        for one, other, start in zip(ours, others, before, strict=True):
            momentum, theirs_too = optimizer.state[one]["exp_avg"], peer.state[other]["momentum_buffer"]
            assert torch.equal(momentum, theirs_too if one.shape[0] >= one.shape[1] else theirs_too.mT)
            moved, expected = one.detach() - start, other.detach() - start
            assert (moved - expected).norm() < 12 * 2**-9 * expected.norm()
            assert moved.norm() == pytest.approx(float(expected.norm()), rel=0.01)


@every_rule
def test_in_bfloat16_directions_err_no_more_than_torchs(kind) -> None:
    """Apart from the momentum, which stays in float32."""
    shapes = [(64, 32), (32, 64), (48, 48)]
    moved = []
    for precision, dtype in (("float32", torch.float64), ("bfloat16", torch.float32)):
        weights = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
        optimizer = kind(weights, lr=1.0, precision=precision)
        for weight in weights:
            weight.grad = draw(*weight.shape, seed=5).to(dtype)
        optimizer.step()
        moved.append([weight.detach().double() for weight in weights])
    errors = [float((ours - exact).norm() / exact.norm()) for exact, ours in zip(*moved, strict=True)]
    assert 0.001 < max(errors) < 12 * 2**-9  # the bound that torch's are held to above


def ill_conditioned(rows: int, columns: int, decades: float) -> Tensor:
    """Singular values from 1 down to 10^-decades."""
    left, right = torch.linalg.qr(draw(rows, columns)).Q, torch.linalg.qr(draw(columns, columns, seed=1)).Q
    return (left * torch.logspace(0, -decades, columns, dtype=torch.float64)) @ right.mT


POLYNOMIALS = pytest.mark.parametrize("name", newton_schulz.COEFFICIENTS)


def spectral(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x.double(), 2))


@POLYNOMIALS
@pytest.mark.parametrize("shape", [(128, 48), (300, 130)])
@pytest.mark.parametrize("decades", [0, 2, 4, 8, 12])
def test_one_gram_matrix_in_float32_is_within_its_bound_of_the_iteration_in_float64(decades, shape, name) -> None:
    """Of 128 columns and more, through oneDNN."""
    x, steps = ill_conditioned(*shape, decades).float()[None], newton_schulz.COEFFICIENTS[name]
    exact = newton_schulz.by_iterating(x.double(), steps)
    assert spectral(newton_schulz.by_one_gram(x, steps).double() - exact) < 2e-3
    assert spectral(newton_schulz.by_iterating(x, steps).double() - exact) < 2e-5
    torch.testing.assert_close(newton_schulz.by_one_gram(x.double(), steps), exact, atol=1e-11, rtol=0)


@pytest.mark.parametrize("columns", [48, 130])
def test_views_with_gaps_and_copies_of_one_matrix_and_matrices_without_rows_are_ordinary(columns: int) -> None:
    """Of 128 columns and more, through oneDNN."""
    steps, whole = newton_schulz.COEFFICIENTS["jordan"], draw(2, 300, 2 * columns).float()
    for x in (whole[:, ::2, ::2], whole[:1, :, :columns].expand(2, -1, -1), whole[:, : 2 * columns, :columns].mT):
        exact = newton_schulz.orthogonalised(x.double(), None, steps)
        found = newton_schulz.orthogonalised(x, None, steps)
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)
    for method in (newton_schulz.by_iterating, newton_schulz.by_one_gram):  # a rank without rows has all others' sums
        assert method(whole[:, :0, :columns], steps, lambda gram: gram + torch.eye(columns)).shape == (2, 0, columns)


@pytest.mark.parametrize("shape", [(300, 48), (64, 48), (300, 130)])
def test_a_step_inside_autocast_is_the_one_outside(shape: tuple[int, int]) -> None:
    """As in a module that steps its optimisers by hand."""
    stepped = []
    for inside in (False, True):
        weight = nn.Parameter(draw(*shape).float())
        weight.grad = draw(*shape, seed=1).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            muon.FactoredMuon([weight], lr=0.1).step()
        stepped.append(weight.detach())
    assert torch.equal(*stepped)


@POLYNOMIALS
@pytest.mark.parametrize("shape", [(130, 8), (8, 130), (9, 8)])
def test_singular_values_go_through_the_scalar_polynomials(name, shape) -> None:
    values = torch.logspace(0, -3, 8, dtype=torch.float64)
    x = torch.zeros(shape, dtype=torch.float64)
    x.diagonal().copy_(values)
    expected = values / (values.norm() + 1e-7)
    for a, b, c in newton_schulz.COEFFICIENTS[name]:
        expected = a * expected + b * expected**3 + c * expected**5
    found = newton_schulz.orthogonalised(x[None], None, newton_schulz.COEFFICIENTS[name])[0]
    torch.testing.assert_close(found.diagonal(), expected, atol=1e-12, rtol=0)
    assert found.count_nonzero() == 8


def test_polar_express_is_as_published() -> None:
    """Its code divides by 1.01 |X|, and then x^k of each step by 1.01^k (arXiv 2505.16932, implementation 1)."""
    theirs = [
        (8.2872120, -23.5958865, 17.3003873), (4.1070591, -2.9478499, 0.5448431),
        (3.9486909, -2.9089021, 0.5518191), (3.3184197, -2.4884880, 0.5100489),
    ]  # fmt: skip
    value = torch.linspace(0, 1, 101, dtype=torch.float64)
    found, expected = value, value / 1.01
    for (a, b, c), own in zip(newton_schulz.COEFFICIENTS["polar_express"], theirs, strict=True):
        found = a * found + b * found**3 + c * found**5
        expected = sum(k * (expected / 1.01) ** power for k, power in zip(own, (1, 3, 5), strict=True))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert ((found[1:] > 0.43) & (found[1:] < 1.57)).all()


def test_one_gram_matrix_is_made_only_where_products_are_exact_and_it_is_less_work(monkeypatch) -> None:
    """Of operands with the 10 bits of TF32 it would be of no use."""
    asked: list[str] = []
    for name in ("by_iterating", "by_one_gram"):
        method = getattr(newton_schulz, name)
        watched = lambda *args, name=name, method=method, **kw: asked.append(name) or method(*args, **kw)  # noqa: E731
        monkeypatch.setattr(newton_schulz, name, watched)
    for precision, dtype, rows, expected in (
        ("highest", torch.float32, 8, "by_one_gram"),
        ("highest", torch.float32, 7, "by_iterating"),
        ("highest", torch.bfloat16, 8, "by_iterating"),
        ("high", torch.float32, 8, "by_iterating"),
        ("high", torch.float64, 8, "by_one_gram"),
    ):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        newton_schulz.orthogonalised(draw(1, rows, 4, dtype=dtype), None, newton_schulz.COEFFICIENTS["jordan"])
        assert asked.pop() == expected
    x = ill_conditioned(64, 16, 4).float()[None]
    exact = newton_schulz.by_iterating(x.double(), newton_schulz.COEFFICIENTS["jordan"])

    def of_rounded(part: Tensor) -> Tensor:
        rounded = (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
        return rounded.mT @ rounded

    found = newton_schulz.by_one_gram(x, newton_schulz.COEFFICIENTS["jordan"], of_rounded)
    assert torch.linalg.matrix_norm(found - exact, 2) > 0.01


def test_off_the_processor_two_of_the_three_products_of_a_step_are_symmetric_ones() -> None:
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name().partition("::")[2].partition(".")[0])
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Products():
        x = torch.empty(2, 8, 4, dtype=torch.bfloat16, device="meta")
        newton_schulz.orthogonalised(x, None, newton_schulz.COEFFICIENTS["jordan"])
    assert (names.count("symmetric_product"), names.count("baddbmm"), names.count("bmm")) == (10, 5, 0)


def test_large_matrices_of_a_stack_step_as_they_do_alone() -> None:
    """A processor takes them one after the other, so that owners of some find the same bits."""
    for dtype in (torch.float32, torch.bfloat16):
        x = draw(3, 300, 130).to(dtype)
        steps = newton_schulz.COEFFICIENTS["jordan"]
        together = newton_schulz.orthogonalised(x, None, steps)
        assert torch.equal(together, torch.cat([newton_schulz.orthogonalised(one[None], None, steps) for one in x]))


@pytest.mark.sample(3)
@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum_in_any_format_goes_the_same_way(dtype, kind) -> None:
    """Down |W - T|^2, from zero, at rates that fall to zero."""
    target = [draw(*shape, seed=9) for shape in ((48, 32), (32, 48))]
    left: dict[torch.dtype, Tensor] = {}
    for moments in (Float32Moments(), BFloat16Moments(), Int8Moments()):
        weights = [nn.Parameter(torch.zeros(each.shape, dtype=dtype)) for each in target]
        optimizer = kind(weights, moments=moments, convention="none")
        for step in range(30):
            optimizer.param_groups[0]["lr"] = 0.4 * (1 - step / 30)
            for weight, goal in zip(weights, target, strict=True):
                weight.grad = (weight.detach().double() - goal).to(dtype)
            optimizer.step()
        kept = optimizer.state[weights[0]]["exp_avg"]
        assert kept.shape == (48, 32)
        assert kept.any()
        shares = [(w.detach().double() - goal).norm() / goal.norm() for w, goal in zip(weights, target, strict=True)]
        left[kept.dtype] = torch.stack(shares)
    assert left.keys() == {torch.float32, torch.bfloat16, torch.int8}
    assert (left[torch.float32] < (0.8 if kind is Dion2 else 0.45)).all()
    for of_format in left.values():
        torch.testing.assert_close(of_format, left[torch.float32], atol=0.02, rtol=0)


@every_rule
def test_what_is_stored_is_the_momentum_of_float32_up_to_the_format(kind) -> None:
    found = []
    for moments in (Float32Moments(), BFloat16Moments(), Int8Moments()):
        weight = nn.Parameter(torch.zeros(48, 32))
        optimizer = kind([weight], lr=0.0, moments=moments)
        for step in range(3):
            weight.grad = draw(48, 32, seed=step, dtype=torch.float32)
            optimizer.step()
        found.append(moments.load(optimizer.state[weight], "exp_avg"))
    for other, bound in zip(found[1:], (2**-7, 2**-5), strict=True):
        assert 0 < (other - found[0]).norm() < bound * found[0].norm()


def test_muon_keeps_one_momentum_normuon_a_number_a_neuron_more_and_no_frame() -> None:
    tall, wide = nn.Parameter(torch.ones(30, 20)), nn.Parameter(torch.ones(20, 30))
    for kind, more in ((Muon, []), (Dion2, []), (NorMuon, ["neuron_sq"])):
        optimizer = kind([tall, wide])
        for weight in (tall, wide):
            state = optimizer.initial_state(weight, optimizer.param_groups[0])
            assert state.keys() == {"exp_avg", "step", *more}
            assert state["exp_avg"].shape == (30, 20)
            assert not more or state["neuron_sq"].shape == (len(weight),)
    kept = Muon([tall], moments=Int8Moments()).initial_state(tall, optimizer.param_groups[0])
    assert sum(value.nbytes for value in kept.values()) == 30 * 20 + 4 * 30 + 4


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_normuon_gives_every_neuron_the_same_share_at_muons_norm(shape) -> None:
    """With a steady gradient: what it divides by is then what it divides."""
    weights = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(2)]
    moved = []
    for kind, weight in zip((Muon, NorMuon), weights, strict=True):
        optimizer = kind([weight], lr=1.0)
        for _ in range(3):
            weight.grad = draw(*shape, seed=3)
            before = weight.detach().clone()
            optimizer.step()
        moved.append(weight.detach() - before)
    torch.testing.assert_close(moved[1].norm(), moved[0].norm())
    rows = moved[1].norm(dim=1)
    torch.testing.assert_close(rows, rows.mean().expand_as(rows))
    if shape[0] >= shape[1]:  # rows of a wide orthogonal matrix are even by themselves
        assert moved[0].norm(dim=1).std() > 0.05 * rows.mean()


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0])
def test_a_number_that_is_alone_in_its_row_and_column_takes_no_others_step(size) -> None:
    """It is divided by its own size twice, and would be 250 times as far from zero as the rest is on average."""
    weight = nn.Parameter(torch.zeros(256, 256))
    optimizer = FactoredMuon([weight], lr=1.0, convention="kimi")
    for step in range(3):
        gradient = draw(256, 256, seed=step).float()
        gradient[0], gradient[:, 0] = 0, 0
        gradient[0, 0] = size
        weight.grad, before = gradient, weight.detach().clone()
        optimizer.step()
        moved = weight.detach() - before
        assert moved[0, 0].abs() <= 0.2 * 256**0.5 * 1.01  # Muon's longest, by a running mean
        assert moved[1:, 1:].square().mean().sqrt() > 0.99 * 0.2 * 0.9


def test_dion2_steps_the_columns_with_the_most_and_only_their_momentum_decays() -> None:
    weight = nn.Parameter(torch.zeros(10, 8, dtype=torch.float64))
    optimizer = Dion2([weight], lr=1.0, momentum=0.5)
    total = torch.zeros(10, 8, dtype=torch.float64)
    seen = set()
    for gradient in given((10, 8), 8):
        weight.grad, before = gradient, weight.detach().clone()
        optimizer.step()
        total += gradient
        chosen = (weight.detach() != before).any(dim=0).nonzero().flatten().tolist()
        assert sorted(chosen) == sorted(total.abs().sum(dim=0).topk(2).indices.tolist())
        total[:, chosen] *= 0.5
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"], total, **EXACT)
        seen |= set(chosen)
    assert len(seen) == 8  # what is not chosen waits, and is not forgotten


def test_dion2_of_all_columns_is_muon_with_the_sum_of_gradients() -> None:
    """Whose direction is that of their moving average."""
    options = {"convention": "dion", "momentum": 0.9}
    all_columns = trained(Dion2, (9, 5), steps=3, fraction=1.0, **options)[0]
    muon = trained(Muon, (9, 5), steps=3, nesterov=False, **options)[0]
    torch.testing.assert_close(all_columns, muon, atol=1e-6, rtol=0)  # Muon's is a tenth of it, beside an epsilon


WITH_HEADS = [(12, 5, [4, 4, 4]), (12, 5, [2, 2, 2, 6]), (5, 12, [2, 2, 1]), (8, 8, [1, 3, 3, 1]), (6, 40, [3, 3])]


@pytest.mark.parametrize("kind", [Muon, NorMuon, FactoredMuon], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("out", "width", "heads"), WITH_HEADS)
def test_the_reference_by_heads(kind, out, width, heads) -> None:
    weights = {}
    for at, made in (("fast", kind), ("slow", getattr(reference, kind.__name__))):
        weight = weights[at] = nn.Parameter(draw(out, width))
        known = heads if at == "slow" else {"q": heads}
        optimizer = made(
            [{"params": [("q", weight)], "heads": known}], lr=0.1, weight_decay=0.3, convention="dion", by_heads=True
        )
        for gradient in given((out, width)):
            weight.grad = gradient
            optimizer.step()
    torch.testing.assert_close(weights["fast"].detach(), weights["slow"].detach(), **EXACT)


@pytest.mark.parametrize(("out", "width", "heads"), WITH_HEADS)
def test_a_head_steps_as_a_matrix_of_its_own(out, width, heads) -> None:
    weight = nn.Parameter(draw(out, width))
    parts = [nn.Parameter(part.clone()) for part in weight.detach().split(heads)]
    together = Muon([{"params": [("q", weight)], "heads": {"q": heads}}], convention="none", by_heads=True)
    apart = Muon(parts, convention="none")
    for gradient in given((out, width)):
        weight.grad = gradient
        for part, its in zip(parts, gradient.split(heads), strict=True):
            part.grad = its
        together.step(), apart.step()
    torch.testing.assert_close(weight.detach(), torch.cat([part.detach() for part in parts]), **EXACT)


def test_weights_of_one_shape_have_their_own_heads() -> None:
    """Queries, keys and outputs of an attention layer often have one shape."""
    heads = {"q": [4, 4, 4], "k": [6, 6]}
    weights = {name: nn.Parameter(draw(12, 5)) for name in ("q", "o", "k")}
    alone = {name: nn.Parameter(draw(12, 5)) for name in weights}
    own = {name: {"heads": {name: rows}} for name, rows in heads.items()}
    groups = [{"params": [(name, weight)], **own.get(name, {})} for name, weight in alone.items()]
    optimizers = [Muon([{"params": list(weights.items()), "heads": heads}], by_heads=True)]
    optimizers += [Muon([group], by_heads=True) for group in groups]
    for weight in (*weights.values(), *alone.values()):
        weight.grad = draw(12, 5, seed=1)
    for optimizer in optimizers:
        optimizer.step()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach(), alone[name].detach(), **EXACT)
    assert not torch.equal(weights["q"], weights["o"])
    assert not torch.equal(weights["q"], weights["k"])


def test_heads_are_left_together_unless_the_rule_wants_them_apart() -> None:
    def stepped(groups, **options):
        weight = nn.Parameter(draw(12, 5))
        weight.grad = draw(12, 5, seed=1)
        Muon([{"params": [("q", weight)], **groups}], **options).step()
        return weight.detach()

    heads = {"heads": {"q": [4, 4, 4]}}
    assert torch.equal(stepped(heads), stepped({}))
    assert torch.equal(stepped({}, by_heads=True), stepped({}))
    assert not torch.equal(stepped(heads, by_heads=True), stepped({}))


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        *((rows, (12, 5)) for rows in ([4, 4], [4, 4, 8], [0, 12], [12.0], [True] * 12, "4 4 4", 12)),
        ([4, 4, 4], (12, 5, 1, 1)),
        ([1, 1], (2, 7, 8)),
    ],
)
def test_heads_that_are_not_the_rows_of_a_weight_are_refused(rows, shape) -> None:
    weight = nn.Parameter(draw(*shape))
    weight.grad = draw(*shape)
    before = weight.detach().clone()
    with pytest.raises(UserError, match="heads"):
        Muon([{"params": [("q", weight)], "heads": {"q": rows}}], by_heads=True).step()
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("params", [[("k", nn.Parameter(torch.zeros(4, 3)))], [nn.Parameter(torch.zeros(4, 3))]])
def test_heads_of_a_name_that_the_group_has_not_are_refused(params) -> None:
    with pytest.raises(UserError, match="heads names q, which the group has not"):
        Muon([{"params": params, "heads": {"q": [2, 2]}}])


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_what_is_orthogonalised_has_a_share_nu_of_the_momentum(share) -> None:
    weight, (first, second) = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64)), given((6, 4), 2)
    optimizer = FactoredMuon([weight], lr=1.0, momentum=0.9, nu=share, beta2=0.0)
    for gradient in (first, second):
        before = weight.detach().clone()
        weight.grad = gradient
        optimizer.step()
    expected = nn.Parameter(before)
    expected.grad = share * (0.09 * first + 0.1 * second) + (1 - share) * second
    FactoredMuon([expected], lr=1.0, nu=0.0, beta2=0.0).step()  # along the gradient alone
    torch.testing.assert_close(weight.detach(), expected.detach(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("nu", [-0.1, 1.1, float("nan")])
def test_a_share_outside_its_range_is_refused(nu) -> None:
    with pytest.raises(UserError, match=r"nu=.*must be in \[0, 1\]"):
        FactoredMuon([nn.Parameter(torch.zeros(3, 3))], nu=nu)


@every_rule
def test_every_matrix_is_taken_at_any_rank_and_the_rest_gets_adamw_at_its_own_rate(kind) -> None:
    model = nn.ModuleDict({
        "linear": nn.Linear(5, 7), "convolution": nn.Conv2d(2, 3, 3), "one": nn.Linear(4, 1, bias=False),
        "kernels": nn.Conv1d(9, 8, 3, bias=False), "norm": nn.LayerNorm(5),
    })  # fmt: skip
    model.experts, model.empty = nn.Parameter(torch.ones(3, 70, 80)), nn.Parameter(torch.ones(0, 4))
    groups = [{"params": list(model.named_parameters()), "stacks": ["experts"]}]
    optimizer = kind(groups, lr=0.1, other_lr=0.01)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    taken = {"linear.weight", "convolution.weight", "one.weight", "kernels.weight", "experts"}
    assert {name for name, rate in rates.items() if rate == 0.1} == taken
    shown = {
        name: parameter_summary(optimizer, parameter, group).how
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    assert shown["linear.weight"] == "whole"
    assert shown["kernels.weight"] == "whole"  # [8 27], not 8 matrices [9 3]
    assert shown["experts"] == "whole, each of 3"
    assert shown["norm.weight"].startswith("AdamW")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_factored_second_moment_changes_nothing_where_rows_and_columns_are_even() -> None:
    """As in a Hadamard matrix, of which each number has the same size."""
    signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    steps = []
    for kind in (partial(FactoredMuon, nu=0.9), Muon):
        weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
        weight.grad = signs
        kind([weight], lr=1.0, momentum=0.9, convention="none").step()
        steps.append(weight.detach())
    torch.testing.assert_close(steps[0], steps[1], **EXACT)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (7, 7)])
def test_a_factored_second_moment_evens_rows_and_columns_out(shape) -> None:
    """From one gradient O, N_ij = O_ij / sqrt(mean of row i x mean of column j) up to the norm, which is that of O."""
    steps = []
    for kind in (partial(FactoredMuon, nu=0.9), Muon):
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        weight.grad = draw(*shape) * torch.arange(1.0, 1 + shape[0], dtype=torch.float64)[:, None]
        kind([weight], lr=1.0, momentum=0.9, convention="none").step()
        steps.append(weight.detach())
    even, plain = steps
    expected = plain / (plain.square().mean(1, keepdim=True) * plain.square().mean(0, keepdim=True)).sqrt()
    torch.testing.assert_close(even, expected * (plain.norm() / expected.norm()), atol=1e-9, rtol=0)


def test_a_factored_muon_keeps_a_byte_a_weight_and_a_number_a_row_and_column() -> None:
    weight = nn.Parameter(torch.zeros(64, 32))
    state = muon.FactoredMuon([weight]).initial_state(weight, {"project": True, "stacks": False})
    sizes = {name: value.numel() * value.element_size() for name, value in state.items() if value.ndim}
    assert sizes == {"exp_avg": 64 * 32, "exp_avg_scale": 4 * 64, "row_sq": 4 * 64, "column_sq": 4 * 32}


@every_rule
def test_groups_leave_embeddings_and_the_output_head_to_adamw(kind) -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(9, 6), "layer": nn.Linear(6, 6), "lm_head": nn.Linear(6, 9, bias=False)})
    optimizer = ParameterGroups().optimizer(net, lambda params: kind(params, lr=0.1, other_lr=0.01))
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rates == {"embed.weight": 0.01, "layer.weight": 0.1, "layer.bias": 0.01, "lm_head.weight": 0.01}


def test_stacks_of_one_shape_exist_at_a_time_and_gradients_stay_as_they_are(monkeypatch) -> None:
    weights = [nn.Parameter(draw(*shape)) for shape in ((9, 5), (9, 5), (8, 6))]
    optimizer = Muon(weights, max_norm=0.1)
    for weight in weights:
        weight.grad = draw(*weight.shape, seed=5)
    kept = copy.deepcopy([weight.grad for weight in weights])
    direction, alive = Muon.direction, []

    def watched(self, gradient_BMN, step):
        assert not any(reference() is not None for reference in alive)
        alive.append(weakref.ref(gradient_BMN))
        return direction(self, gradient_BMN, step)

    monkeypatch.setattr(Muon, "direction", watched)
    optimizer.step()
    assert len(alive) == 2
    assert all(torch.equal(weight.grad, before) for weight, before in zip(weights, kept, strict=True))
    norm = torch.stack([gradient.norm() for gradient in kept]).norm()
    torch.testing.assert_close(optimizer.gradient_norm, norm)
    torch.testing.assert_close(optimizer.state[weights[2]]["exp_avg"], 0.05 * kept[2] * 0.1 / (norm + 1e-6))


@pytest.mark.sample(8)
@every_rule
@pytest.mark.parametrize("moments", [Float32Moments(), BFloat16Moments(), Int8Moments()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_moves_without_a_gradient_and_what_comes_and_goes_stays_finite(dtype, moments, kind) -> None:
    shapes = [(8, 6), (6, 8), (1, 7), (4, 2, 2, 2)]
    weights = [nn.Parameter(draw(*shape, dtype=dtype)) for shape in shapes]
    before = [weight.detach().clone() for weight in weights]
    optimizer = kind(weights, lr=0.1, moments=moments)
    for step in range(8):
        for weight in weights:
            weight.grad = draw(*weight.shape, seed=step, dtype=dtype) * (step > 1)
            weight.grad[: len(weight) // 2] *= step % 2  # dead rows that come back
            weight.grad[..., -1] *= 10.0 ** -(4 * step)
        weights[0].grad = None if step in (4, 5) else weights[0].grad
        optimizer.step()
        assert (step > 1) or all(torch.equal(*pair) for pair in zip(weights, before, strict=True))
        assert all(value.isfinite().all() for w in weights for value in (w, *optimizer.state[w].values()))
    assert all((weight != old).any() for weight, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("kind", [*WHOLE, Trion], ids=lambda kind: kind.__name__)
def test_unchecked_a_matrix_whose_squares_overflow_stands_still_and_others_go_on(kind) -> None:
    weights = [nn.Parameter(torch.ones(8, 6)) for _ in range(2)]
    optimizer = kind(weights, lr=0.1, check_finite=False, **({"rank": 2} if kind is Trion else {}))
    for step in range(3):
        for weight in weights:
            weight.grad = draw(8, 6, seed=step, dtype=torch.float32)
        weights[0].grad[2, 1] = 1e30
        optimizer.step()
    assert torch.equal(weights[0], torch.ones(8, 6))
    assert (weights[1] != 1).any()
    assert all(value.isfinite().all() for weight in weights for value in (weight, *optimizer.state[weight].values()))


@pytest.mark.parametrize(("make", "message"), [
    (lambda p: Muon(p, momentum=1.0), r"Muon momentum=1.0 must be in \[0, 1\)"),
    (lambda p: NorMuon(p, beta2=1.0), r"NorMuon beta2=1.0 must be in \[0, 1\)"),
    (lambda p: Dion2(p, fraction=0.0), r"Dion2 fraction=0.0 must be in \(0, 1\]"),
    (lambda p: Dion2(p, fraction=1.5), r"fraction=1.5 must be in \(0, 1\]"),
    (lambda p: Dion2(p, momentum=-0.1), r"momentum=-0.1 must be in \[0, 1\)"),
    (lambda p: FactoredMuon(p, lr=-1.0), r"FactoredMuon lr=-1.0 must be at least 0"),
    (lambda p: Muon(p, other_lr=-1.0), r"Muon other_lr=-1.0 must be at least 0"),
    (lambda p: Muon(p, backward="hooks"), r"Muon has no setting backward"),
    (lambda p: Muon(p, rank=4), r"Muon has no setting rank"),
    (lambda p: Muon(p, moments="int8"), r"moments='int8' must be an object of a class in \S*moments"),
    (lambda p: Muon(p, precision="half"), r"precision='half' must be one of float32, bfloat16"),
    (lambda p: LowRank(p, basis=PowerBasis(momentum=0.5), inner=NewtonSchulz()), "leave inner=Adam"),
    (lambda p: Muon([nn.Parameter(torch.ones(4))]), "Muon got no matrix to project"),
])  # fmt: skip
def test_bad_settings_are_refused(make, message) -> None:
    with pytest.raises(UserError, match=message):
        make([nn.Parameter(torch.ones(9, 6))])
