"""Degenerate gradients are ordinary gradients: rows that die, come back or leave the frame, in every optimiser.

What is tried is discovered: every class of bases, residuals, inner rules, moment formats and triggers with each choice
of its options, every preset, every kind of backward pass. A new one is tried without an edit here. One run steps all
gradient streams at once, as matrices of one shape are stepped together, and looks after every step.

The property: weights and every tensor of the state are finite, and no row of a matrix moves farther than AdamW could
move it at the same rate, times 1 + `bound` of the residual. AdamW's farthest follows from Cauchy-Schwarz: m = sum of
a_k g_k and v = sum of b_k g_k^2 give m^2 <= v sum(a_k^2 / b_k), so |m| / sqrt(v) <= (1 - b1) / sqrt((1 - b2) (1 - b1^2
/ b2)), 7.3 at (0.9, 0.999), in every coordinate and whatever the gradients.
"""

import inspect
import itertools
import typing
from collections.abc import Callable, Iterator
from functools import partial
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from every_preset import PRESETS
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.optim.lars import LARS
from lightspan.optim.low_rank import bases, carries, inner, residuals
from lightspan.optim.low_rank.gradients import attach
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices import moments
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.optim.random_subspace import RandomSubspace
from lightspan.subspaces.projections import Projection

ROWS, COLUMNS, RANK, STEPS, LR = 12, 8, 3, 18, 0.125
PARTS = {
    "basis": bases.Basis,
    "residual": residuals.Residual,
    "inner": inner.Inner,
    "moments": moments.MomentStorage,
    "refresh": bases.Trigger,
}


def concrete(base: type) -> list[type]:
    """All classes below `base` that can be made, in the order in which they stand in the package."""
    below = [found for child in base.__subclasses__() for found in (child, *concrete(child))]
    return [
        c for c in below if c.__module__.startswith("lightspan.") and not inspect.isabstract(c) and c.__name__[0] != "_"
    ]


def choices(kind: type) -> Iterator[dict[str, Any]]:
    """No argument at all, and then each other value of each argument that names its values."""
    yield {}
    defaults = inspect.signature(kind).parameters
    for name, hint in typing.get_type_hints(kind.__init__).items():
        options = (True, False) if hint is bool else _options(hint)
        yield from ({name: value} for value in options if name in defaults and value != defaults[name].default)


def _options(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    elif get_origin(hint) in (UnionType, typing.Union):
        yield from (option for part in get_args(hint) for option in _options(part))
    elif hint is type(None):
        yield None
    elif hint in get_args(carries.Carry):
        yield hint()


def label(kind: type, options: dict[str, Any]) -> str:
    return f"{kind.__name__}({', '.join(f'{name}={value}' for name, value in options.items())})"


FOUND: list[tuple[str, type, dict[str, Any]]] = [
    (switch, kind, options) for switch, base in PARTS.items() for kind in concrete(base) for options in choices(kind)
]
"""(switch of LowRank, class, options): each class as it comes and with every option. Looked up once, since whoever
imports `lightspan.experiments` later adds classes that fit nothing here."""


Make = Callable[..., LowRank]


def optimisers() -> dict[str, Make]:
    """Every preset with each of its options, LowRank with each part beside fitting neighbours, every backward pass."""
    found: dict[str, Make] = {}
    for kind in PRESETS:
        known = inspect.signature(kind).parameters
        settings = {"refresh": 3} if "refresh" in known else {}
        settings |= {"rank": min(RANK, known["rank"].default)} if "rank" in known else {}
        found |= {label(kind, options): partial(kind, **settings, **options) for options in choices(kind)}
    default = {"rank": RANK, "refresh": 3}
    for switch, kind, options in FOUND:
        neighbours = [{}] if options else [{}, {"residual": None}, {"residual": residuals.Apollo(), "refresh": 2}]
        for beside in neighbours:
            make = partial(LowRank, **{**default, **beside, switch: kind(**options)})
            if switch not in beside and fits(make):
                name = label(kind, options) + (f" beside {type(beside['residual']).__name__}" if beside else "")
                found[name] = make
    for mode in get_args(typing.get_type_hints(LowRank.__init__)["backward"]):
        found[f"backward={mode}"] = partial(LowRank, **default, backward=mode, residual=None)
    found["max_norm"] = partial(LowRank, **default, max_norm=1.0)
    return found


def fits(make: Make) -> bool:
    """Parts that do not go together are refused, which other tests look at."""
    try:
        make([nn.Parameter(torch.zeros(ROWS, COLUMNS))])
    except UserError:
        return False
    return True


OPTIMISERS = optimisers()


def normal(step: int, seed: int = 0) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1000 * seed + step))


def rows_that_die(step: int, gradient: Tensor, frame: Tensor) -> Tensor:
    """Each row has a gradient in some steps only; row 0 just once."""
    gradient[(torch.arange(ROWS) * 7 + step) % 5 < 3] = 0
    gradient[0] *= step == 0
    return gradient


def a_row_that_dies_for_good(step: int, gradient: Tensor, frame: Tensor) -> Tensor:
    gradient[:6] *= step < 9
    return gradient


def tiny_rows(step: int, gradient: Tensor, frame: Tensor) -> Tensor:
    """Down to denormal numbers, whose squares are zero."""
    return gradient * 10.0 ** -((torch.arange(ROWS)[:, None] + step) % 12 * 4.0)


def huge_rows(step: int, gradient: Tensor, frame: Tensor) -> Tensor:
    """Spikes of 1e15, whose squares float32 still holds, between ordinary steps."""
    gradient[3] *= 1e15 if step % 4 == 1 else 1.0
    return gradient * (1e12 if step == 6 else 1.0)


def zeros(step: int, gradient: Tensor, frame: Tensor) -> Tensor:
    return gradient * 0


def zeros_now_and_then(step: int, gradient: Tensor, frame: Tensor) -> Tensor:
    return gradient * (step % 3 != 1)


def one_entry(step: int, gradient: Tensor, frame: Tensor) -> Tensor:
    alone = gradient * 0
    alone[step % ROWS, step * 3 % COLUMNS] = gradient[0, 0]
    return alone


def rank_one(step: int, gradient: Tensor, frame: Tensor) -> Tensor:
    return gradient[:, :1] * gradient[:1]


def constant(step: int, gradient: Tensor, frame: Tensor) -> Tensor:
    return gradient * 0 + 1e-2


def one_hot_rows(step: int, gradient: Tensor, frame: Tensor) -> Tensor:
    """As an embedding has it: two tokens a batch, most never seen."""
    kept = torch.tensor([step % 3, 5 + step % 2])
    return torch.zeros_like(gradient).index_copy_(0, kept, gradient[kept])


def alternating(step: int, gradient: Tensor, frame: Tensor) -> Tensor:
    return normal(0, seed=3) * (-1) ** step


def beside_the_frame(step: int, gradient: Tensor, frame: Tensor) -> Tensor:
    """After some ordinary steps, rows that the frame does not see at all."""
    if step < 5 or step % 4 == 0:
        return gradient
    span = torch.linalg.qr(frame.double()).Q
    return gradient - (gradient.double() @ span @ span.mT).to(gradient.dtype)


def lost_in_part(step: int, gradient: Tensor, frame: Tensor) -> Tensor:
    """Half the rows leave the frame when they come back from nothing, the others stay."""
    gradient[::2] = zeros_now_and_then(step, beside_the_frame(step, gradient, frame), frame)[::2]
    return gradient


def not_there(step: int, gradient: Tensor, frame: Tensor) -> Tensor | None:
    return None if step % 3 == 2 or step < 2 else gradient


STREAMS = [
    rows_that_die, a_row_that_dies_for_good, tiny_rows, huge_rows, zeros, zeros_now_and_then, one_entry, rank_one,
    constant, one_hot_rows, alternating, beside_the_frame, lost_in_part, not_there,
]  # fmt: skip


class Net(nn.Module):
    """A linear layer a stream, tall and wide by turns, a vector, and a matrix below any rank; all zero, so that the
    rounding of bfloat16 weights is as small as what they have moved.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for stream, wide in zip(STREAMS, itertools.cycle((False, True))):
            shape = (ROWS, COLUMNS) if wide else (COLUMNS, ROWS)
            self.layers[stream.__name__] = nn.Linear(*shape, bias=False, dtype=dtype)
        self.vector, self.small = (nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((ROWS,), (2, 2)))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def backward(self, step: int, optimizer: LowRank) -> None:
        """Gives every parameter its gradient, through a backward pass: hooks and projected products see no other."""
        loss = (normal(step)[0, :2] * (step % 2) * self.small).sum()
        loss = loss + (normal(step)[:, 0] * (step % 3 != 1) * self.vector).sum()
        for number, stream in enumerate(STREAMS):
            layer = self.layers[stream.__name__]
            gradient = stream(step, normal(step, number), frame_of(optimizer, layer.weight))
            if gradient is not None:
                gradient_MN = gradient if is_tall(layer.weight) else gradient.mT
                eye_NN = torch.eye(layer.weight.shape[1], dtype=layer.weight.dtype)
                loss = loss + (layer(eye_NN) * gradient_MN.mT.to(eye_NN.dtype)).sum()
        loss.backward()


def is_tall(weight: Tensor) -> bool:
    return weight.shape[0] >= weight.shape[1]


def frame_of(optimizer: MatrixOptimizer, weight: Tensor) -> Tensor:
    """The present frame [N R]; before there is one, some columns, and of a rule without frames all."""
    if not isinstance(optimizer, LowRank):
        return torch.eye(COLUMNS)
    if weight not in optimizer.state or not any(weight is p for b in optimizer.buckets() for p in b.parameters):
        return torch.eye(COLUMNS)[:, :RANK]
    bucket, position = optimizer.place(weight)
    state = {key: value[position : position + 1] for key, value in bucket.state.items()}
    return optimizer.rule.basis.frame(state, bucket.layout.part([position]))[0]


def farthest(betas: tuple[float, float]) -> float:
    return (1 - betas[0]) / ((1 - betas[1]) * (1 - betas[0] ** 2 / betas[1])) ** 0.5


def run(make: Make, dtype: torch.dtype, strict: bool = False) -> None:
    """All streams at once, looked at after every step."""
    model = Net(dtype)
    optimizer = make(model.named_parameters(), lr=LR)
    if optimizer.backward != "whole":
        attach(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        model.backward(step, optimizer)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            assert p.isfinite().all(), f"{name} at step {step}"
            for key, value in optimizer.state[p].items():
                assert not value.is_floating_point() or value.isfinite().all(), f"{key} of {name} at step {step}"
            moved, longest = movement(optimizer, p.detach(), before[name], strict)
            assert moved <= longest, f"{name} at step {step} moved {moved / LR:.3g} lr, more than {longest / LR:.3g} lr"


def movement(optimizer: MatrixOptimizer, weight: Tensor, before: Tensor, strict: bool) -> tuple[float, float]:
    """How far a row moved a number, root mean square, and how far it may. Nothing bounds SGD, as long as its gradients,
    nor, unless `strict`, a residual without a bound. Rules that look at whole matrices are held to whole matrices.
    """
    whole, (beta1, beta2) = not isinstance(optimizer, LowRank), optimizer.param_groups[0]["betas"]
    residual, rule = (None, None) if whole else (optimizer.rule.residual, optimizer.rule.inner)
    longest = (
        LR
        * optimizer.param_groups[0]["scale"]
        * farthest((beta1, beta2))
        * (1 + (getattr(residual, "bound", 0) or 0))
        * 1.001
    )
    if isinstance(optimizer.moments, moments.Int8Moments):
        longest *= 2  # its levels lie up to that far apart
    if weight.dtype == torch.bfloat16:
        longest += 2**-7 * float(weight.abs().max())
    if isinstance(rule, inner.SGD) or (getattr(residual, "bound", 0) is None and not strict):
        longest = torch.inf
    moved = (weight.double() - before.double()).square()
    matrices = whole or isinstance(rule, inner.NewtonSchulz) or getattr(residual, "per", "") == "tensor"
    if weight.ndim < 2 or matrices:
        return float(moved.mean().sqrt()), longest
    return float(moved.mean(dim=1 if is_tall(weight) else 0).max().sqrt()), longest


def test_something_of_everything_is_found():
    for switch in PARTS:
        kinds = {kind for found, kind, _ in FOUND if found == switch}
        assert kinds
        for kind in kinds:
            assert any(name.startswith(f"{kind.__name__}(") for name in OPTIMISERS), f"{kind.__name__} fits nothing"
    assert {"GaLore()", "Trion()", "backward=whole", "backward=hooks", "backward=projected"} <= OPTIMISERS.keys()


def is_default(name: str) -> bool:
    """Whether it is a class as it comes, or a kind of backward pass."""
    return ("=" not in name or name.startswith("backward")) and " beside " not in name


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if is_default(name) else pytest.mark.sweep) for name in OPTIMISERS]
)
def test_weights_and_state_stay_finite_and_steps_within_adamws_reach(name):
    run(OPTIMISERS[name], torch.float32)


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", filter(is_default, OPTIMISERS))
def test_bfloat16_stays_finite(name):
    run(OPTIMISERS[name], torch.bfloat16)


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", PRESETS)
def test_so_they_do_for_float64_weights(kind):
    run(OPTIMISERS[label(kind, {})], torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [residuals.Fira, residuals.Apollo])
def test_without_bound_and_limiter_the_papers_rules_jump(residual, dtype):
    """So that what the tests above see is not that nothing happens."""
    make = partial(LowRank, rank=RANK, refresh=3, residual=residual(limit=None, bound=None))
    with pytest.raises(AssertionError, match=r"moved [0-9.e+]+ lr, more than"):
        run(make, dtype, strict=True)


def spiked(value: float, dtype: torch.dtype = torch.float32) -> Net:
    """A net whose last gradient of one matrix holds one huge number."""
    model = Net(dtype)
    for number, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number), dtype=dtype)
    model.layers["constant"].weight.grad[2, 1] = value
    return model


@pytest.mark.parametrize("kind", PRESETS)
def test_a_gradient_whose_square_overflows_is_refused_by_name_and_changes_nothing(kind):
    """AdamW takes it, and from then on holds an infinite second moment: that weight never moves again."""
    model = spiked(1e30)
    optimizer = OPTIMISERS[label(kind, {})](model.named_parameters(), lr=LR)
    for where in ("layers.constant.weight", "vector"):
        with pytest.raises(UserError, match=rf"the gradient of {where} is not finite .*above 1.8e19"):
            optimizer.step()
        assert not any(p.any() for p in model.parameters())
        model.layers["constant"].weight.grad[2, 1] = 0
        model.vector.grad[1] = 1e30
    wide = spiked(1e30, torch.float64)
    OPTIMISERS[label(kind, {})](wide.named_parameters(), lr=LR).step()
    assert all(p.isfinite().all() for p in wide.parameters())


@pytest.mark.parametrize("residual", [None, residuals.Fira(), residuals.Apollo(), residuals.Apollo("tensor")], ids=repr)
def test_unchecked_such_rows_stand_still_as_adamws_numbers_do_and_others_go_on(residual):
    model = spiked(1.0)
    weight = model.layers["constant"].weight
    optimizer = LowRank(model.named_parameters(), lr=LR, rank=RANK, residual=residual, check_finite=False)
    optimizer.step()
    weight.grad[2] = 1e30
    before = weight.detach().clone()
    optimizer.step()
    assert weight.isfinite().all()
    assert torch.equal(weight[2], before[2])
    if residual != residuals.Apollo("tensor"):  # one scale for all: all stand still
        assert (weight != before).any(dim=1).sum() == ROWS - 1


@pytest.mark.parametrize("basis", [bases.PowerBasis, bases.SVDBasis, bases.DCTBasis])
def test_unchecked_a_gradient_that_is_not_finite_gets_a_frame_and_stops_no_other_matrix(basis):
    weights = [nn.Parameter(torch.zeros(6, 4)) for _ in range(2)]
    optimizer = LowRank(weights, rank=2, basis=basis(), residual=None, check_finite=False)
    for weight, value in zip(weights, (torch.nan, 1.0), strict=True):
        weight.grad = torch.full_like(weight, value)
    optimizer.step()
    assert weights[1].any()
    assert weights[1].isfinite().all()


def test_weights_that_are_not_finite_are_blamed_and_not_the_gradient():
    model = spiked(1.0)
    optimizer = LowRank(model.named_parameters(), rank=RANK)
    with torch.no_grad():
        model.layers["rank_one"].weight[0, 0] = torch.nan
    model.vector.grad[0] = torch.nan
    with pytest.raises(UserError, match=r"the weights of layers.rank_one.weight are not finite"):
        optimizer.step()


@pytest.mark.parametrize("projection", [p for p in concrete(Projection) if "size" in inspect.signature(p).parameters])
def test_a_random_subspace_stays_finite(projection):
    model = Net(torch.float32)
    optimizer = RandomSubspace(model.named_parameters(), partial(torch.optim.AdamW, lr=LR), 8, projection)
    for step in range(STEPS):
        for (name, p), number in zip(model.named_parameters(), itertools.count()):
            stream = next((s for s in STREAMS if s.__name__ in name.split(".")), not_there)
            gradient = stream(step, normal(step, number), torch.eye(COLUMNS)[:, :RANK])
            p.grad = None if gradient is None else gradient.flatten()[: p.numel()].view(p.shape)
        before = optimizer.z_d.detach().clone()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
        assert (optimizer.z_d - before).abs().max() <= LR * farthest((0.9, 0.999)) * 1.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_lars_stays_finite(dtype):
    model = Net(dtype)
    for number, p in enumerate(model.parameters()):
        nn.init.constant_(p, 0.5 * (number % 2))  # every other weight is zero, and has no length to take a share of
    optimizer = LARS(model.parameters(), lr=LR)
    for step in range(STEPS):
        for (name, p), number in zip(model.named_parameters(), itertools.count()):
            stream = next((s for s in STREAMS if s.__name__ in name.split(".")), not_there)
            gradient = stream(step, normal(step, number), torch.eye(COLUMNS)[:, :RANK])
            p.grad = None if gradient is None else gradient.flatten()[: p.numel()].view(p.shape).to(dtype)
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
        assert all(state["momentum_buffer"].isfinite().all() for state in optimizer.state.values())
