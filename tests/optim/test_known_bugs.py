"""Mistakes that low-rank optimisers have been published with, each as a property that ours keeps, from end to end."""

import inspect
import io
from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
import torch.distributed
from every_preset import of_rank
from optim.plain_bases import IdentityBasis
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.optim import muon
from lightspan.optim.low_rank import presets
from lightspan.optim.low_rank.bases import DCTBasis, PowerBasis, SVDBasis
from lightspan.optim.low_rank.carries import Gather, Keep, Rotate
from lightspan.optim.low_rank.inner import SGD
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.residuals import Apollo, ErrorFeedback, Fira
from lightspan.optim.matrices.moments import BFloat16Moments, Float32Moments, Int8Moments, MomentStorage
from lightspan.optim.matrices.stacks import Layout
from lightspan.optim.parameter_summary import parameter_summary

PRESETS = {
    "default": LowRank,
    "galore": presets.GaLore,
    "fira": presets.FiraAdam,
    "apollo": presets.APOLLO,
    "apollo_mini": presets.APOLLOMini,
    "ldadam": presets.LDAdam,
    "dct_adamw": presets.DCTAdamW,
    "trion": presets.Trion,
    "muon": muon.Muon,
    "normuon": muon.NorMuon,
    "factored_muon": muon.FactoredMuon,
    "dion2": muon.Dion2,
}
every_preset = pytest.mark.parametrize("preset", PRESETS)
STORAGES = [Float32Moments(), BFloat16Moments(), Int8Moments()]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices are small here; on a busy machine, threads would wait for each other for longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(draw(*shape, seed=number, dtype=dtype)) for number, shape in enumerate(shapes)]


def train(optimizer: LowRank, weights: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for number, weight in enumerate(weights):
            weight.grad = draw(*weight.shape, seed=100 + 31 * step + number, dtype=weight.dtype)
        optimizer.step()


def make(preset: str, weights: list, **options) -> LowRank:
    """Of rank 2, with a refresh every third step where the preset leaves a choice."""
    options = {"lr": 0.05, **of_rank(PRESETS[preset], 2), **options}
    refresh = options.pop("refresh", 3)
    leaves_a_choice = "refresh" in inspect.signature(PRESETS[preset]).parameters
    return PRESETS[preset](weights, **options, **({"refresh": refresh} if leaves_a_choice else {}))


class Net(nn.Module):
    """A convolution, matrices of two shapes, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.up, self.down = nn.GroupNorm(2, 8), nn.Linear(8, 12), nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(torch.relu(self.norm(self.conv(x))).mean((2, 3)))))


def network() -> Net:
    torch.manual_seed(0)
    return Net().double()


def images(seed: int = 0) -> Tensor:
    return draw(4, 3, 6, 5, seed=seed)


def stored_error(optimizer: LowRank) -> Tensor:
    """What a first bucket's error feedback would add to the next gradient."""
    bucket = optimizer.buckets()[0]
    zeros = [torch.zeros(bucket.layout.rows, bucket.layout.size) for _ in bucket.parameters]
    return torch.stack(optimizer.rule.residual.accumulate(zeros, bucket.state, torch.ones(())))


@pytest.mark.parametrize(("precision", "largest"), [("int4", 7), ("int8", 127)])
def test_each_number_of_a_quantised_error_comes_back_to_its_own_place(precision, largest):
    """A published optimiser packed two 4-bit numbers into a byte in one order and took them out in another."""
    (weight,) = parameters((140, 131), dtype=torch.float32)  # columns: odd, and more than a block of 128
    optimizer = presets.DCTAdamW([weight], rank=3, error_feedback=precision)
    train(optimizer, [weight], range(1))
    frame = optimizer.rule.basis.frame(optimizer.buckets()[0].state, optimizer.buckets()[0].layout)[0]
    expected = weight.grad - weight.grad @ frame @ frame.mT
    most = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in expected.split(128, dim=1)], 1)
    error = (stored_error(optimizer)[0] - expected).abs()
    assert (error <= (0.5 / largest + 1e-5) * most).all()


def test_eight_bits_of_error_are_used_as_eight_bits():
    """A published optimiser rounded its 8-bit error to 15 levels."""
    (weight,) = parameters((40, 30), dtype=torch.float32)
    optimizer = presets.DCTAdamW([weight], rank=3, error_feedback="int8")
    train(optimizer, [weight], range(3))
    assert len(optimizer.state[weight]["error"].unique()) > 200


def adam_by_column(first: Tensor, gradients: list[Tensor], rank: int, lr: float, betas=(0.9, 0.999)) -> Tensor:
    """Adam on the `rank` largest columns of each gradient; a column's moments and age live as long as it is chosen."""
    weight, alive = first.clone(), {}
    for gradient in gradients:
        chosen = gradient.square().sum(0).topk(rank).indices.tolist()
        alive = {j: alive.get(j, (0.0, 0.0, 0)) for j in chosen}
        for j, (m, v, age) in alive.items():
            g = gradient[:, j]
            m, v, age = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2, age + 1
            weight[:, j] -= lr * (m / (1 - betas[0] ** age)) / ((v / (1 - betas[1] ** age)).sqrt() + 1e-8)
            alive[j] = m, v, age
    return weight


def test_moments_whose_columns_trade_slots_are_read_before_they_are_overwritten():
    """A published optimiser rotated moments in place, reading numbers that the same product had already replaced."""
    (weight,) = parameters((12, 9))
    first = weight.detach().clone()
    optimizer = LowRank([weight], lr=0.1, rank=4, basis=IdentityBasis(), residual=None, refresh=1)
    gradients, slots = [], []
    for step in range(15):
        loudness = 1 + torch.randperm(9, generator=torch.Generator().manual_seed(step))
        gradients.append(draw(12, 9, seed=step) * loudness)
        weight.grad = gradients[-1].clone()
        optimizer.step()
        slots.append(optimizer.state[weight]["columns"].tolist())
    moves = {b.index(j) - a.index(j) for a, b in pairwise(slots) for j in a if j in b}
    assert min(moves) < 0 < max(moves)
    torch.testing.assert_close(weight.data, adam_by_column(first, gradients, 4, lr=0.1), atol=1e-11, rtol=0)


def test_matrices_of_two_widths_train_together_as_they_train_alone():
    """A published optimiser held one basis, of its first layer's size, and failed at the next size."""
    together, alone = (parameters((384, 256), (390, 384), (256, 300), dtype=torch.float32) for _ in range(2))

    def build(weights):
        return LowRank(weights, lr=0.05, rank=3, basis=DCTBasis(), residual=ErrorFeedback("int8"), refresh=1)

    train(build(together), together, range(2))
    for number, weight in enumerate(alone):
        optimizer = build([weight])
        for step in range(2):
            weight.grad = draw(*weight.shape, seed=100 + 31 * step + number, dtype=torch.float32)
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.sample(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_preset
def test_a_step_only_reads_gradients(preset, dtype):
    """A published optimiser kept its own numbers in `p.grad`, where the next micro-batch was added to them."""
    weights = parameters((9, 6), (6, 9), (5, 3, 2, 2), (7,), dtype=dtype)
    optimizer = make(preset, weights, max_norm=0.1, weight_decay=0.1)
    train(optimizer, weights, range(4))
    held = [(weight.grad, weight.grad.clone(), weight.grad.data_ptr()) for weight in weights]
    optimizer.step()
    for weight, (gradient, before, address) in zip(weights, held, strict=True):
        assert weight.grad is gradient
        assert gradient.data_ptr() == address
        assert torch.equal(gradient, before)


@every_preset
def test_one_process_needs_no_process_group(preset, monkeypatch):
    """A published optimiser called collectives in every step, so that it failed in a plain script."""

    def refused(*_, **__):
        raise AssertionError("a collective was called")

    for name in ("all_reduce", "all_gather", "broadcast", "barrier", "get_rank", "get_world_size"):
        monkeypatch.setattr(torch.distributed, name, refused)
    assert not torch.distributed.is_initialized()
    weights = parameters((9, 6), (6, 9), (7,))
    before = [weight.detach().clone() for weight in weights]
    train(make(preset, weights), weights, range(4))
    assert all((weight != old).any() for weight, old in zip(weights, before, strict=True))


@pytest.mark.sample(4)
@pytest.mark.parametrize("basis", [DCTBasis(), IdentityBasis(), PowerBasis(), SVDBasis(Rotate())])
@pytest.mark.parametrize("storage", STORAGES)
def test_directions_that_come_in_late_take_no_longer_steps_than_old_ones(basis, storage):
    """Published optimisers corrected the bias of new directions by the global step, so that their first step was
    (1 - b1) / sqrt(1 - b2) times too long: 3.2 at (0.9, 0.999), here 5.
    """
    rows, size, lr = 20, 12, 0.1
    (weight,) = parameters((rows, size), dtype=torch.float32)
    optimizer = LowRank(
        [weight], lr=lr, rank=2, basis=basis, residual=None, moments=storage, refresh=1, betas=(0.5, 0.99)
    )
    directions = DCTBasis().matrix(Layout(rows, size, 2, False, torch.float32, torch.device("cpu"), (0,))).mT
    longest = 0.0
    for step in range(160):
        left, right = draw(rows, 1, seed=step, dtype=torch.float32).sign(), directions[[1] if step < 150 else [7]]
        before = weight.detach().clone()
        weight.grad = left @ (right if not isinstance(basis, IdentityBasis) else torch.eye(size)[[3 + step // 150]])
        optimizer.step()
        if step >= 150:
            longest = max(longest, float((weight.detach() - before).norm()) / (lr * rows**0.5))
    # 1 is a step of one direction with Adam's quotient at 1; beside it the old one goes on by its momentum, at a half.
    assert 0 < longest < 1.5


@every_preset
def test_a_convolution_trains_exactly_as_its_flattened_matrix(preset):
    """A published optimiser had a path for four axes whose constructor refused the argument that the step gave it."""
    (conv,) = parameters((10, 3, 2, 2))
    start = conv.detach().clone()
    matrix = nn.Parameter(start.flatten(1).clone())
    sides = [make(preset, [weight], weight_decay=0.1) for weight in (conv, matrix)]
    for step in range(8):
        conv.grad = draw(*conv.shape, seed=step)
        matrix.grad = conv.grad.flatten(1)
        for optimizer in sides:
            optimizer.step()
    assert (conv != start).all()
    assert torch.equal(conv.flatten(1), matrix)


@pytest.mark.parametrize("preset", ["default", "galore", "fira", "apollo", "dct_adamw"])
def test_the_frame_of_a_convolution_is_chosen_anew_when_it_is_due(preset):
    """A published optimiser never refreshed the basis of parameters with four axes."""
    (conv,) = parameters((10, 3, 2, 2))
    optimizer = make(preset, [conv], refresh=5)
    bucket = optimizer.buckets()[0]
    changed, before = [], None
    for step in range(16):
        train(optimizer, [conv], range(step, step + 1))
        frame = optimizer.rule.basis.frame(bucket.state, bucket.layout).clone()
        if before is not None and not torch.equal(frame, before):
            changed.append(step)
        before = frame
    assert changed == [5, 10, 15]


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_convolutions_first_update_has_adams_length_whatever_the_size_of_its_gradient(size):
    """A published optimiser lifted the gradient itself instead of Adam's direction back to four axes."""
    (conv,) = parameters((16, 3, 2, 2))
    before = conv.detach().clone()
    optimizer = LowRank([conv], lr=0.1, rank=3, residual=None, eps=1e-30)
    conv.grad = size * draw(*conv.shape, seed=5)
    optimizer.step()
    # Adam's first direction has 16 x 3 coordinates of magnitude one, and an orthonormal frame keeps lengths.
    assert float((conv.detach() - before).norm()) == pytest.approx(0.1 * (16 * 3) ** 0.5, rel=1e-9)


def test_channels_last_memory_changes_no_result_and_stays():
    """A published optimiser failed on convolutions; where their numbers lie in memory may not change results."""
    sides = {}
    for memory in (torch.contiguous_format, torch.channels_last):
        model = network().to(memory_format=memory)
        optimizer = LowRank(model.parameters(), lr=0.02, rank=3, refresh=2, max_norm=0.5, weight_decay=0.1)
        for step in range(6):
            optimizer.zero_grad()
            model(images(step).to(memory_format=memory)).square().mean().backward()
            if step % 2:  # a gradient in the other memory order
                model.conv.weight.grad = model.conv.weight.grad.contiguous()
            optimizer.step()
        assert model.conv.weight.is_contiguous(memory_format=memory)
        sides[memory] = [p.detach().clone() for p in model.parameters()]
    for plain, last in zip(*sides.values(), strict=True):
        torch.testing.assert_close(plain, last, atol=1e-9, rtol=0)


@every_preset
def test_a_closure_can_run_the_model_forwards_and_backwards(preset):
    """Published optimisers ran the closure without gradients enabled, so that its backward pass failed."""
    model, calls = network(), []
    optimizer = make(preset, list(model.parameters()))

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(images()).square().mean()
        loss.backward()
        calls.append(loss.item())
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        returned = optimizer.step(closure)
    assert [returned.item()] == calls
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))
    assert not any(p.requires_grad and p.grad_fn for p in model.parameters())


def second_moments(optimizer: LowRank, weight: nn.Parameter, storage: MomentStorage) -> float:
    state = {key: value[None] for key, value in optimizer.state[weight].items() if key.startswith("exp_avg_sq")}
    if state["exp_avg_sq"].dtype == torch.float32:
        storage = Float32Moments()
    return float(storage.load(state, "exp_avg_sq").sum())


def decay_without_gradient(optimizer: LowRank, weights: list[nn.Parameter], storage: MomentStorage) -> list[float]:
    """Share of each parameter's second moments that 250 steps without gradient leave."""
    train(optimizer, weights, range(1))
    before = [second_moments(optimizer, weight, storage) for weight in weights]
    for weight in weights:
        weight.grad.zero_()
        if "error_scale" in optimizer.state[weight]:  # what error feedback kept would come back as a gradient
            optimizer.state[weight]["error_scale"].zero_()
    for _ in range(250):
        optimizer.step()
    return [second_moments(optimizer, weight, storage) / old for weight, old in zip(weights, before, strict=True)]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("preset", "storage"),
    [*(("default", storage) for storage in STORAGES), ("galore", STORAGES[2]), ("dct_adamw", STORAGES[1])],
)
def test_second_moments_of_bfloat16_weights_fall_when_gradients_vanish(preset, storage):
    """Published optimisers kept moments in the gradients' bfloat16, where a decay by 0.999 rounds back to no decay."""
    weights = parameters((12, 8), (5, 4, 3, 1), (7,), dtype=torch.bfloat16)
    optimizer = PRESETS[preset](weights, lr=0.0, rank=3, refresh=10**6, moments=storage)
    decays = decay_without_gradient(optimizer, weights, storage)
    assert decays == pytest.approx([0.999**250] * 3, rel=0.1)


@pytest.mark.sample(1)
@pytest.mark.parametrize("storage", STORAGES)
def test_second_moments_of_bfloat16_embeddings_fall_when_gradients_vanish(storage):
    """Published optimisers kept moments in the gradients' bfloat16, where a decay by 0.999 rounds back to no decay."""
    weights = parameters((12, 8), (64, 64), dtype=torch.bfloat16)
    groups = [{"params": weights[:1]}, {"params": weights[1:], "project": False}]
    decays = decay_without_gradient(LowRank(groups, lr=0.0, rank=3, moments=storage), weights, storage)
    assert decays == pytest.approx([0.999**250] * 2, rel=0.1)


SAVED = {
    **{name: lambda weights, name=name: make(name, weights) for name in PRESETS},
    **{
        f"{name}-{type(storage).__name__}": lambda weights, name=name, storage=storage: make(
            name, weights, moments=storage
        )
        for name in ("default", "apollo", "ldadam", "dct_adamw")
        for storage in STORAGES[1:]
    },
    "bfloat16 frame": lambda weights: make("default", weights, basis=PowerBasis(precision="bfloat16")),
    "momentum": lambda weights: make("default", weights, inner=SGD(), moments=Int8Moments()),
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("kind", SAVED)
def test_a_checkpoint_holds_plain_tensors_and_training_goes_on_from_it(kind):
    """Published optimisers kept projector objects in their state, so that `torch.load` with weights_only failed."""
    straight = parameters((9, 6), (6, 9), (64, 64), (5, 3, 2, 2), (7,), dtype=torch.bfloat16)
    optimizer = SAVED[kind](straight)
    train(optimizer, straight, range(4))
    saved = io.BytesIO()
    torch.save((optimizer.state_dict(), [weight.detach() for weight in straight]), saved)
    train(optimizer, straight, range(4, 8))
    saved.seek(0)
    state, values = torch.load(saved, weights_only=True)
    assert all(type(value) is Tensor for held in state["state"].values() for value in held.values())
    resumed = [nn.Parameter(value) for value in values]
    second = SAVED[kind](resumed)
    second.load_state_dict(state)
    train(second, resumed, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("residual", [Fira(), Apollo(), Apollo("tensor")], ids=["fira", "apollo", "apollo-mini"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_growth_limiter_asks_the_host_for_nothing(residual, dtype):
    """Published optimisers limited growth with Python's `max`, one wait for the device per matrix and step.

    A meta tensor has no value, so reading one raises.
    """
    weights = [
        nn.Parameter(torch.empty(shape, device="meta", dtype=dtype)) for shape in ((32, 16), (16, 32), (8, 4, 3))
    ]
    optimizer = LowRank(weights, rank=2, basis=SVDBasis(), residual=residual, refresh=2, check_finite=False)
    for _ in range(5):
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
    assert all(optimizer.state[weight]["limiter"].is_meta for weight in weights)


def lifted_mean(carry: Rotate | Keep) -> tuple[Tensor, Tensor, int]:
    """The first moment after 24 steps of gradients from one plane, lifted; the exact one; and how often frames changed.

    The gradients' strong direction wanders inside the plane, so the frame turns inside its span.
    """
    (weight,), plane = parameters((10, 7)), torch.linalg.qr(draw(7, 2, seed=9)).Q
    optimizer = LowRank([weight], lr=0.01, rank=2, basis=PowerBasis(carry=carry), residual=None, refresh=1)
    exact, turns, before = torch.zeros(10, 7, dtype=torch.float64), 0, None
    for step in range(24):
        weight.grad = draw(10, 2, seed=step) @ plane.mT
        exact = 0.9 * exact + 0.1 * weight.grad
        optimizer.step()
        frame = optimizer.state[weight]["frame"].clone()
        turns += before is not None and not torch.allclose(frame, before, atol=1e-3)
        before = frame
    return optimizer.state[weight]["exp_avg"] @ before.mT, exact, turns


def test_moments_follow_a_frame_that_turns_inside_its_span():
    """Published optimisers changed the frame and left moments in coordinates of the old one."""
    moved, exact, turns = lifted_mean(Rotate())
    assert turns > 5
    # A power step mixes a millionth of the old frame into the new one.
    torch.testing.assert_close(moved, exact, atol=1e-5, rtol=0)
    kept, _, _ = lifted_mean(Keep())
    assert (kept - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("carry", [Gather(), Keep()])
def test_columns_whose_order_of_strength_changes_keep_slots_and_moments(carry):
    """A published optimiser took columns in order of strength, so that the same columns got each other's moments."""
    (weight,) = parameters((12, 9))
    first, gradients = weight.detach().clone(), []
    optimizer = LowRank([weight], lr=0.1, rank=3, basis=IdentityBasis(carry=carry), residual=None, refresh=1)
    for step in range(10):
        loudness = torch.full((9,), 0.01, dtype=torch.float64)
        loudness[[2, 4, 7]] = 1.0 + torch.randperm(3, generator=torch.Generator().manual_seed(step)).double() * 4
        gradients.append(draw(12, 9, seed=step) * loudness)
        weight.grad = gradients[-1].clone()
        optimizer.step()
        assert optimizer.state[weight]["columns"].tolist() == [2, 4, 7]
    orders = {tuple(g.square().sum(0).topk(3).indices.tolist()) for g in gradients}
    assert len(orders) > 2
    torch.testing.assert_close(weight.data, adam_by_column(first, gradients, 3, lr=0.1), atol=1e-11, rtol=0)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rows_of_one_value_and_of_zeros_are_quantised_without_a_division_by_zero(precision):
    """A published optimiser scaled each row by its largest minus its smallest number: 0 / 0 in rows of one value."""
    (weight,) = parameters((9, 6), dtype=torch.float32)
    optimizer = LowRank(
        [weight], lr=0.1, rank=1, basis=IdentityBasis(), residual=ErrorFeedback(precision), moments=Int8Moments(),
        refresh=10**6,
    )  # fmt: skip
    value = torch.tensor([0.0, 1.0, -3.0, 1e-30, 1e15, 0.0, 7.0, -1e-7, 2.0])[:, None]
    weight.grad = value.expand(9, 6).clone()
    optimizer.step()
    column = int(optimizer.state[weight]["columns"])
    expected = value.expand(9, 6).clone()
    expected[:, column] = 0
    torch.testing.assert_close(stored_error(optimizer)[0], expected, rtol=1e-6, atol=0)
    for gradient in (torch.zeros(9, 6), torch.ones(9, 6), torch.zeros(9, 6)):
        weight.grad = gradient
        optimizer.step()
    assert weight.isfinite().all()
    assert all(value.isfinite().all() for value in optimizer.state[weight].values())


def test_the_dct_of_4096_columns_is_orthonormal_to_a_millionth():
    """A published optimiser built its cosines in float32, where thousands of columns are no longer orthogonal."""
    layout = Layout(4096, 4096, 4096, False, torch.float32, torch.device("cpu"), (0,))
    matrix = DCTBasis().matrix(layout)
    assert matrix.dtype == torch.float32
    some = torch.tensor([0, 1, 2, 63, 64, 1000, 2047, 2048, 2049, 3333, 4094, 4095])
    overlap = matrix[:, some].double().mT @ matrix.double()
    overlap[torch.arange(len(some)), some] -= 1
    assert overlap.abs().max() < 1e-6


@pytest.mark.sample(6)
@every_preset
def test_a_zero_gradient_in_any_step_leaves_everything_finite_and_later_steps_train(preset):
    """Published optimisers stopped in the SVD of a gradient without a direction."""
    for zeros_at in (0, 3):
        weights = parameters((9, 6), (6, 9), (7,))
        optimizer = make(preset, weights)
        for step in range(8):
            train(optimizer, weights, range(step, step + 1)) if step != zeros_at else None
            if step == zeros_at:
                for weight in weights:
                    weight.grad = torch.zeros_like(weight)
                optimizer.step()
            assert all(weight.isfinite().all() for weight in weights)
            assert all(value.isfinite().all() for weight in weights for value in optimizer.state[weight].values())
        before = [weight.detach().clone() for weight in weights]
        train(optimizer, weights, range(8, 9))
        assert all((weight != old).any() for weight, old in zip(weights, before, strict=True))


@pytest.mark.sample(6)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("wrong", ["up.weight", "norm.bias"])
@pytest.mark.parametrize("preset", ["default", "galore", "dct_adamw", "ldadam"])
def test_a_gradient_that_is_not_finite_is_refused_by_name_and_changes_nothing(preset, wrong, value):
    """Published optimisers stopped in the SVD of a NaN, or trained on it, with some of the weights already changed."""
    model = network()
    optimizer = make(preset, list(model.named_parameters()), refresh=2)
    twin = deepcopy(model)
    other = make(preset, list(twin.named_parameters()), refresh=2)
    for step in range(7):  # refreshes are staggered: each matrix is refused in steps with and without one
        if step >= 3:
            weights, state = deepcopy(model.state_dict()), deepcopy(optimizer.state_dict())
            optimizer.zero_grad()
            model(images(step)).square().mean().backward()
            dict(model.named_parameters())[wrong].grad.view(-1)[3] = value
            with pytest.raises(UserError, match=rf"the gradient of {wrong} is not finite"):
                optimizer.step()
            assert_equal(model.state_dict(), weights)
            for number, held in optimizer.state_dict()["state"].items():
                assert_equal(held, state["state"][number])
        for net, its in ((model, optimizer), (twin, other)):
            its.zero_grad()
            net(images(step)).square().mean().backward()
            its.step()
    assert_equal(model.state_dict(), twin.state_dict())  # nothing outside the state, such as a counter, went on either


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def how(optimizer: LowRank, weight: Tensor) -> str:
    (group,) = (g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
    return parameter_summary(optimizer, weight, group).how


@every_preset
def test_frozen_parameters_and_those_without_a_gradient_stand_still_beside_others(preset):
    """A published optimiser counted on a gradient of every parameter in every step."""
    shapes = (9, 6), (9, 6), (9, 6), (7,)
    weights, alone = parameters(*shapes), parameters(*shapes)
    weights[1].requires_grad_(False)
    optimizer, reference = make(preset, weights), make(preset, alone)
    for step in range(9):
        absent = {1} | ({2, 3} if step % 3 == 1 else set())
        for number, (weight, other) in enumerate(zip(weights, alone, strict=True)):
            weight.grad = None if number in absent else draw(*weight.shape, seed=40 + 9 * step + number)
            other.grad = None if weight.grad is None else weight.grad.clone()
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        reference.step()
        for number, (weight, old) in enumerate(zip(weights, before, strict=True)):
            assert torch.equal(weight, old) == (number in absent)
    assert all(torch.equal(weight, other) for weight, other in zip(weights, alone, strict=True))
    steps = [int(optimizer.state[weight].get("step", 0)) for weight in weights]
    assert steps == [9, 0, 6, 6]


class Tied(nn.Module):
    """An embedding whose matrix is the output head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(11, 8), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


@every_preset
def test_tied_weights_are_one_parameter_with_one_state_and_the_sum_of_their_gradients(preset):
    """A published optimiser built its list of matrices from modules, so that a shared one took two steps for one."""
    torch.manual_seed(0)
    model = Tied().double()
    free = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer, reference = make(preset, list(model.named_parameters())), make(preset, free)
    for step in range(5):
        optimizer.zero_grad()
        tokens = torch.randint(11, (6,), generator=torch.Generator().manual_seed(step))
        model(tokens).square().mean().backward()
        for ours, theirs in zip(model.parameters(), free, strict=True):
            theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    assert model.head.weight is model.embedding.weight
    assert len(optimizer.state) == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), free, strict=True))


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (6, 1, 1, 1), (1, 1, 9), (3, 9), (9, 3), (2, 9), (3, 1, 2, 2)])
def test_matrices_of_one_row_and_those_not_above_the_rank_get_adamw_and_the_report_says_so(shape):
    """Published optimisers projected such matrices, to a frame of more columns than the matrix has."""
    (small, large), (twin,) = parameters(shape, (9, 6)), parameters(shape)
    optimizer = LowRank([small, large], lr=0.1, rank=3, weight_decay=0.1)
    adamw = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.1, fused=True)
    for step in range(6):
        train(optimizer, [small, large], range(step, step + 1))
        twin.grad = small.grad.clone()
        adamw.step()
    assert torch.equal(small, twin)
    assert how(optimizer, small) == "AdamW: rank 3 is not below its shorter side"
    assert how(optimizer, large) == "rank 3 of 6"


@pytest.mark.parametrize("max_norm", [0.01, 1e3], ids=["clips", "lets pass"])
def test_clipping_inside_the_step_is_torchs_clipping_before_it(max_norm):
    """Published optimisers clipped projected gradients, or layer by layer: another norm than the one asked for."""
    sides = network(), network()
    inside, outside = (
        LowRank(model.named_parameters(), lr=0.05, rank=3, refresh=3, weight_decay=0.1, max_norm=limit)
        for model, limit in zip(sides, (max_norm, None), strict=True)
    )
    for step in range(9):
        norms = []
        for model, optimizer in zip(sides, (inside, outside), strict=True):
            optimizer.zero_grad()
            (10 ** (step % 3) * model(images(step)).square().mean()).backward()
            norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        assert (norms[0] > max_norm) == (max_norm == 0.01)
        nn.utils.clip_grad_norm_(sides[1].parameters(), max_norm)
        inside.step()
        outside.step()
    for clipped, plain in zip(*(model.parameters() for model in sides), strict=True):
        torch.testing.assert_close(clipped, plain, atol=1e-10, rtol=0)
