"""Gradients that are kept in coordinates only: the same training as with whole gradients, and less memory."""

import copy

import pytest
import torch
from torch import nn

from lightspan.core.errors import UserError
from lightspan.optim.low_rank.bases import DCTBasis, PowerBasis
from lightspan.optim.low_rank.gradients import ProjectedLinear, attach
from lightspan.optim.low_rank.inner import SGD
from lightspan.optim.low_rank.optimizer import LowRank

MODES = ("hooks", "projected")


class Net(nn.Module):
    """Tall, wide and square linear layers, a bias, a convolution and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.up, self.square = nn.Linear(24, 16, bias=True), nn.Linear(16, 16, bias=False)
        self.down, self.norm = nn.Linear(16, 40, bias=False), nn.LayerNorm(40)

    def forward(self, x):
        x = torch.tanh(self.conv(x)).flatten(1)
        return self.norm(self.down(torch.tanh(self.square(torch.tanh(self.up(x))))))


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(count)]


def make(backward, basis=None, model=None, **options):
    if model is None:
        torch.manual_seed(0)
        model = Net().double()
    optimizer = LowRank(
        model.named_parameters(), lr=0.05, rank=3, basis=basis or PowerBasis(), residual=None, refresh=3,
        backward=backward, weight_decay=0.1, **options,
    )  # fmt: skip
    if backward != "whole":
        attach(model, optimizer)
    return model, optimizer


def train(model, optimizer, steps, micro=1, data_seed=0):
    data = iter(batches(steps * micro, data_seed))
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(micro):
            (model(next(data)).square().mean() / micro).backward()
        optimizer.step()


def assert_equal_weights(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-11, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.sample(3)
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("basis", [PowerBasis(), DCTBasis()])
@pytest.mark.parametrize("backward", MODES)
def test_training_is_the_same_as_with_whole_gradients(backward, basis, micro):
    whole, kept = make("whole", copy.deepcopy(basis)), make(backward, copy.deepcopy(basis))
    for side in (whole, kept):
        train(*side, steps=9, micro=micro)
    assert_equal_weights(whole[0], kept[0])


@pytest.mark.parametrize("backward", MODES)
def test_away_from_a_refresh_no_projected_parameter_holds_a_gradient(backward):
    model, optimizer = make(backward)
    train(model, optimizer, 1)
    seen = []
    for batch in batches(6, seed=1):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        held = [n for n, p in model.named_parameters() if p.grad is not None and p.ndim > 1]
        seen.append(held)
        optimizer.step()
    names = [n for n, p in model.named_parameters() if p.ndim > 1]
    assert all(sum(name in held for held in seen) == 2 for name in names)  # one step in three is a refresh
    assert max(map(len, seen)) < len(names)


@pytest.mark.parametrize("backward", MODES)
def test_clipping_bounds_the_norm_of_the_accumulated_gradient_inside_the_frames(backward):
    """With plain SGD the step is lr times the clipped gradient, so its length shows the clipping."""
    lengths = []
    for micro in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 8, bias=False)).double()
        optimizer = LowRank(
            model.named_parameters(), lr=0.5, rank=3, residual=None, inner=SGD(0.0), refresh=3, max_norm=0.01,
            backward=backward,
        )  # fmt: skip
        attach(model, optimizer)
        for batch in torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            for part in batch.chunk(micro):
                (model(part).square().mean() / micro).backward()
            optimizer.step()
            moved = sum((p - q).square().sum() for p, q in zip(model.parameters(), before, strict=True)) ** 0.5
            torch.testing.assert_close(moved, torch.tensor(0.5 * 0.01, dtype=torch.float64), rtol=1e-3, atol=0)
        lengths.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(lengths[0], lengths[1])


def test_projected_backward_saves_no_input_of_tall_layers():
    model, optimizer = make("projected")
    train(model, optimizer, 1)
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    linear = nn.Linear(16, 40, bias=False).double()
    low = LowRank(linear.named_parameters(), rank=3, residual=None, backward="projected")
    attach(linear, low)
    x = torch.randn(7, 16, dtype=torch.float64)
    linear(x).sum().backward()
    low.step()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(x)
    assert (7, 16) not in saved
    assert (7, 3) in saved


def test_the_gradient_of_the_input_and_the_bias_are_untouched():
    torch.manual_seed(0)
    plain, twin = nn.Linear(6, 9).double(), nn.Linear(6, 9).double()
    twin.load_state_dict(plain.state_dict())
    low = LowRank(twin.named_parameters(), rank=2, residual=None, backward="projected")
    attach(twin, low)
    twin(torch.randn(4, 6, dtype=torch.float64)).sum().backward()
    low.step()
    twin.load_state_dict(plain.state_dict())
    low.zero_grad()
    a, b = (torch.arange(24.0, dtype=torch.float64).view(2, 2, 6).requires_grad_() for _ in range(2))
    plain(a).square().sum().backward()
    twin(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(plain.bias.grad, twin.bias.grad)
    assert twin.weight.grad is None


def test_a_weight_that_two_layers_share_keeps_its_hook_and_trains_the_same():
    def shared():
        torch.manual_seed(0)
        first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        second.weight = first.weight
        return nn.Sequential(first, nn.Tanh(), second).double()

    sides = []
    for backward in ("whole", "projected"):
        model = shared()
        optimizer = LowRank(model.named_parameters(), lr=0.05, rank=3, residual=None, refresh=3, backward=backward)
        if backward == "projected":
            attach(model, optimizer)
            assert not any(isinstance(m, ProjectedLinear) for m in model.modules())
        generator = torch.Generator().manual_seed(1)
        for _ in range(7):
            optimizer.zero_grad()
            model(torch.randn(4, 8, generator=generator, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        sides.append(model)
    assert_equal_weights(*sides)


def test_state_dicts_names_and_classes_are_those_of_linear_and_come_back():
    model, _ = make("whole")
    names = list(model.state_dict())
    model, _ = make("projected", model=model)
    assert list(model.state_dict()) == names
    assert isinstance(model.up, nn.Linear)


def test_detaching_gives_the_layers_back():
    model, _ = make("whole")
    optimizer = LowRank(model.named_parameters(), rank=3, residual=None, backward="projected")
    attachment = attach(model, optimizer)
    assert type(model.up) is ProjectedLinear
    attachment.detach()
    assert type(model.up) is nn.Linear
    model(batches(1)[0]).sum().backward()
    assert model.up.weight.grad is not None


@pytest.mark.parametrize("backward", MODES)
def test_evaluation_and_resume_across_a_refresh_are_unaffected(backward):
    straight, optimizer = make(backward)
    train(straight, optimizer, 5)
    weights, state = copy.deepcopy(straight.state_dict()), copy.deepcopy(optimizer.state_dict())
    resumed, second = make(backward)
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    for side in ((straight, optimizer), (resumed, second)):
        train(*side, steps=5, data_seed=7)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_under_autocast_projected_gradients_move_weights_as_whole_ones_do_up_to_bfloat16():
    x, y = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)).unbind()

    def moved(backward, autocast):
        torch.manual_seed(0)
        model = nn.Linear(16, 12)
        start = model.weight.detach().clone()
        low = LowRank(
            model.named_parameters(), lr=0.01, rank=3, residual=None, inner=SGD(0.9), refresh=5, backward=backward
        )
        if backward != "whole":
            attach(model, low)
        for _ in range(12):
            low.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(x)
                loss = (out.float() - y[:, :12]).square().mean()
            assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
            loss.backward()
            low.step()
        return model.weight.detach() - start

    exact = moved("whole", autocast=False)
    for autocast, error in ((False, 1e-5), (True, 2 * torch.finfo(torch.bfloat16).eps)):
        for backward in ("whole", "projected"):
            assert (moved(backward, autocast) - exact).norm() < error * exact.norm()


def test_settings_that_need_whole_gradients_are_refused():
    model = Net()
    with pytest.raises(UserError, match=r"backward='hooks' keeps only coordinates.*set residual=None"):
        LowRank(model.parameters(), rank=3, backward="hooks")


def test_an_optimiser_that_was_not_attached_says_how():
    model = Net()
    optimizer = LowRank(model.parameters(), rank=3, residual=None, backward="projected")
    model(torch.randn(1, 2, 2, 2)).sum().backward()
    with pytest.raises(UserError, match=r"attach\(model, optimizer\)"):
        optimizer.step()


def test_attaching_an_optimiser_of_whole_gradients_is_refused():
    model = Net()
    with pytest.raises(UserError, match="needs whole gradients"):
        attach(model, LowRank(model.parameters(), rank=3))
