"""However a parameter, its gradient or its state lies in memory, a step is the same, and so is what is saved."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from lightspan.optim.low_rank import presets
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices.moments import Int8Moments
from lightspan.optim.matrices.shapes import canonical, canonical_gradient, is_wide
from lightspan.optim.matrices.stacks import put


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)


def inside_a_larger_one(tensor: Tensor) -> Tensor:
    """The same numbers as a slice of the last axis."""
    larger = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype)
    larger[..., : tensor.shape[-1]] = tensor
    return larger[..., : tensor.shape[-1]]


def in_order(*axes: int) -> Callable[[Tensor], Tensor]:
    """The same numbers with axes in another order in memory."""

    def lay(tensor: Tensor) -> Tensor:
        back = [axes.index(axis) for axis in range(len(axes))]
        return tensor.permute(axes).contiguous().permute(back)

    return lay


LAYOUTS = {
    "matrix, transposed": ((9, 6), in_order(1, 0)),
    "matrix, sliced": ((9, 6), inside_a_larger_one),
    "wide matrix, transposed and sliced": ((5, 9), lambda t: inside_a_larger_one(t.mT).mT),
    "three axes, sliced": ((7, 5, 3), inside_a_larger_one),
    "three axes, first two swapped": ((7, 5, 3), in_order(1, 0, 2)),
    "three axes, last two swapped": ((7, 5, 3), in_order(0, 2, 1)),
    "wide kernel, channels last": ((5, 4, 3, 2), channels_last),
    "tall kernel, channels last": ((30, 3, 2, 2), channels_last),
    "transposed convolution": ((5, 4, 3, 2), in_order(1, 0, 2, 3)),
    "reversed": ((5, 4, 3, 2), in_order(3, 2, 1, 0)),
    "volume, channels last": ((5, 4, 2, 2, 2), channels_last),
    "one by one": ((9, 6, 1, 1), channels_last),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
OPTIMISERS = {
    "default": lambda w: LowRank([w], lr=0.05, rank=2, refresh=3, max_norm=0.5, weight_decay=0.1),
    "dct": lambda w: presets.DCTAdamW([w], lr=0.05, rank=2, error_feedback="float32", max_norm=0.5),
    "adamw": lambda w: LowRank([{"params": [w], "project": False}], lr=0.05, max_norm=0.5, weight_decay=0.1),
}


@every_layout
def test_a_matrix_of_a_parameter_is_its_numbers_in_logical_order_and_can_be_put_back(layout) -> None:
    shape, lay = LAYOUTS[layout]
    plain = draw(*shape)
    weight, gradient = lay(plain.clone()), draw(*shape, seed=1)
    matrix = canonical(weight)
    wanted = plain.flatten(1)
    assert torch.equal(matrix, wanted if wanted.shape[0] >= wanted.shape[1] else wanted.mT)
    for laid in (gradient, lay(gradient)):
        assert torch.equal(canonical_gradient(laid, weight), canonical_gradient(gradient, plain))
        assert canonical_gradient(laid, weight).stride() == matrix.stride()
    matrix.mul_(2)
    put(matrix, weight, is_wide(weight), None)
    assert torch.equal(weight, 2 * plain)


@pytest.mark.sample(24)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_layout
def test_a_parameter_trains_in_every_layout_as_it_does_when_contiguous(layout, optimiser, dtype) -> None:
    shape, lay = LAYOUTS[layout]
    plain = nn.Parameter(draw(*shape, dtype=dtype))
    laid = nn.Parameter(lay(plain.detach().clone()))
    strides, around = laid.stride(), laid.untyped_storage()
    before = torch.empty(0, dtype=dtype).set_(around).clone()
    sides = [OPTIMISERS[optimiser](weight) for weight in (plain, laid)]
    start = plain.detach().clone()
    for step in range(5):
        plain.grad = draw(*shape, seed=10 + step, dtype=dtype)
        laid.grad = lay(plain.grad.clone()) if step % 2 else plain.grad.clone()
        for optimizer in sides:
            optimizer.step()
    if dtype == torch.float32:  # sums run in another order where rows are not adjacent
        torch.testing.assert_close(laid, plain, atol=1e-5, rtol=0)
        assert (plain != start).all()
    else:  # so does the noise of roundings
        moved, wanted = (weight.detach().float() - start.float() for weight in (laid, plain))
        assert (moved - wanted).norm() < 0.3 * wanted.norm()
    assert laid.stride() == strides
    after = torch.empty(0, dtype=dtype).set_(around)
    assert torch.equal(after.isnan(), before.isnan())  # nothing outside the parameter was touched


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 30, 2), nn.Conv2d(30, 4, 2)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wide(self.narrow(x).tanh()).tanh())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = model(draw(4, 3, 6, 5, seed=step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("way", ["changed while training", "changed by a resume"])
@pytest.mark.parametrize(
    "formats", [(torch.contiguous_format, torch.channels_last), (torch.channels_last, torch.contiguous_format)]
)
def test_state_survives_a_change_of_memory_format(formats, way) -> None:
    def make(model):
        return LowRank(model.parameters(), lr=0.02, rank=2, refresh=4)

    torch.manual_seed(0)
    straight = Net().double().to(memory_format=formats[0])
    changed = deepcopy(straight)
    first, second = make(straight), make(changed)
    train(straight, first, range(5))
    train(changed, second, range(5))
    changed = changed.to(memory_format=formats[1])
    if way == "changed by a resume":
        saved = second.state_dict()
        second = make(changed)
        second.load_state_dict(saved)
    wanted, found = train(straight, first, range(5, 8)), train(changed, second, range(5, 8))
    assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("moments", [None, Int8Moments()])
def test_a_model_may_change_its_dtype_after_steps(to, moments) -> None:
    model = nn.Linear(80, 60)
    groups = [
        {"params": [model.weight]},
        {"params": [model.bias]},
        {"params": [nn.Parameter(torch.ones(70, 60))], "project": False},
    ]
    optimizer = LowRank(groups, lr=0.01, rank=3, **({"moments": moments} if moments else {}))
    table = groups[2]["params"][0]

    def step(x):
        optimizer.zero_grad()
        (model(x).square().mean() + (table * x[:, :60].sum(0)).square().mean()).backward()
        optimizer.step()

    step(torch.randn(8, 80))
    model.to(to)
    table.data = table.data.to(to)
    before = [p.detach().clone() for p in (model.weight, model.bias, table)]
    step(torch.randn(8, 80).to(to))
    for parameter, old in zip((model.weight, model.bias, table), before, strict=True):
        assert parameter.dtype == to
        assert (parameter != old).any()
        if to == torch.float64:  # nothing was rounded to float32 on the way
            assert (parameter.detach().float().double() != parameter.detach()).any()
