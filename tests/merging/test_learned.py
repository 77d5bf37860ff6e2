"""What learned merges rest on: the span of a network, coefficients, the Concrete mask, and models from files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightspan.adapters.inject import adapt, fold
from lightspan.adapters.lora import LoRA
from lightspan.adapters.peft import save_peft
from lightspan.core.errors import UserError
from lightspan.merging.coefficients import LayerWise, Partitioned, TaskWise
from lightspan.merging.concrete import ConcreteMask, rescaled
from lightspan.merging.learned import NetworkSpan
from lightspan.merging.models import BASE, GaussianModels, Held, Models, StoredModels
from lightspan.merging.weights import Weights


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)).to(dtype)


class InMemory(Models):
    def __init__(self, base: nn.Module, **tasks: nn.Module) -> None:
        self.all, self.tasks = {BASE: base, **tasks}, list(tasks)

    def open(self, own: Weights) -> dict[str, Weights]:
        states = {name: module.state_dict() for name, module in self.all.items()}
        return {n: Held({f"backbone.{key}": t.clone() for key, t in s.items()}, n) for n, s in states.items()}


def span(dtype: torch.dtype = torch.float64) -> NetworkSpan:
    models = InMemory(network(0, dtype), one=network(1, dtype), two=network(2, dtype), three=network(3, dtype))
    return NetworkSpan(network(9, dtype), models, "backbone.")


def same(x: Tensor, y: Tensor, within: float = 1e-6) -> bool:
    return bool((x - y).abs().max() <= within)


def test_a_row_of_one_is_the_task_itself_and_equal_rows_are_task_arithmetic() -> None:
    s = span(torch.float32)
    parameters = [dict(network(seed, torch.float32).named_parameters()) for seed in range(4)]
    learned = LayerWise(s.shapes, 3, 0.0)
    with torch.no_grad():
        learned.weight[:, 1] = 1
        merged = s.merged({name: learned.of(name) for name in s.shapes})
        assert all(same(merged[name], parameters[2][name]) for name in s.shapes)
        learned.weight.fill_(0.3)
        merged = s.merged({name: learned.of(name) for name in s.shapes})
    for name in s.shapes:
        base = parameters[0][name]
        assert same(merged[name], base + 0.3 * sum(task[name] - base for task in parameters[1:]))


def test_a_model_with_two_tensors_where_the_network_has_one_is_refused() -> None:
    def tied() -> nn.Sequential:
        made = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        made[1].weight = made[0].weight
        return made

    untied = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    NetworkSpan(tied(), InMemory(tied(), one=tied()), "backbone.")
    with pytest.raises(UserError, match=r"0\.weight and 1\.weight are tied in Sequential, .* the checkpoint one"):
        NetworkSpan(tied(), InMemory(tied(), one=untied), "backbone.")


def test_the_network_is_called_at_the_merged_weights_and_keeps_its_own() -> None:
    s, x = span(), torch.randn(5, 9, dtype=torch.float64)
    task = network(2).eval()
    task[2].load_state_dict(network(0)[2].state_dict())  # running statistics stay the base's
    theta = s.merged({name: torch.tensor([0.0, 1, 0]).double() for name in s.shapes})
    theta |= {name: value for name, value in network(0).named_parameters() if name.startswith("2.")}
    assert same(s(theta, x), task(x), 1e-12)
    assert same(s.network(x), network(0).eval()(x), 0)
    assert not s.train().training
    assert not s.network.training
    assert s.state_dict().keys() == {f"network.{name}" for name in network().state_dict()}


def test_the_gradient_of_a_coefficient_is_that_of_the_tensor_on_the_vector() -> None:
    s, learned, x = span(), LayerWise(span().shapes, 3, 0.2).double(), torch.randn(5, 9, dtype=torch.float64)
    theta = s.merged({name: learned.of(name) for name in s.shapes})
    for tensor in theta.values():
        tensor.retain_grad()
    s(theta, x).square().sum().backward()
    wanted = torch.stack([torch.stack([(theta[n].grad * tau).sum() for tau in s.vectors(n)]) for n in s.shapes])
    torch.testing.assert_close(learned.weight.grad, wanted)


def test_one_group_is_blockwise_and_groups_part_every_tensor_in_a_way_of_its_own() -> None:
    s = span()
    whole, one = LayerWise(s.shapes, 3, 0.0).double(), Partitioned(s.shapes, 3, 0.0, 1).double()
    with torch.no_grad():
        whole.weight.copy_(torch.randn_like(whole.weight))
        one.weight.copy_(whole.weight[:, None])
    for name in s.shapes:
        assert torch.equal(whole.of(name), one.of(name))
    many = Partitioned(s.shapes, 3, 0.0, 4, seed=1).double()
    with torch.no_grad():
        many.weight.copy_(whole.weight[:, None].expand(-1, 4, -1))
    merged, blockwise = (s.merged({n: c.of(n) for n in s.shapes}) for c in (many, whole))
    assert all(same(merged[name], blockwise[name], 1e-12) for name in s.shapes)
    shapes = {"a": torch.Size([200, 30]), "b": torch.Size([200, 30]), "bias": torch.Size([400]), "one": torch.Size([])}
    parted = Partitioned(shapes, 2, 0.0, 4)
    assert not torch.equal(parted.group_of("a"), parted.group_of("b"))
    assert torch.equal(parted.group_of("a"), Partitioned(shapes, 2, 0.0, 4).group_of("a"))
    for name in ("a", "b", "bias"):
        share = torch.bincount(parted.group_of(name).flatten(), minlength=4) / shapes[name].numel()
        assert same(share, torch.full((4,), 0.25), 4 * (0.25 * 0.75 / shapes[name].numel()) ** 0.5)
    assert parted.of("one").shape == (2,)


def test_merged_weights_stay_in_the_span() -> None:
    s = span()
    learned = LayerWise(s.shapes, 3, 0.0).double()
    with torch.no_grad():
        learned.weight.normal_()
        merged = s.merged({name: learned.of(name) for name in s.shapes})
    for name in s.shapes:
        change = (merged[name] - s.network.get_parameter(name)).flatten()
        basis = s.vectors(name).flatten(1).T
        rest = change - basis @ torch.linalg.lstsq(basis, change[:, None]).solution[:, 0]
        assert rest.abs().max() < 1e-12


def test_a_quadratic_loss_has_its_minimum_where_the_normal_equations_say() -> None:
    s = span()
    learned = LayerWise(s.shapes, 3, 0.0).double()
    targets = {name: torch.randn(shape, dtype=torch.float64) for name, shape in s.shapes.items()}
    optimizer = torch.optim.LBFGS(
        [learned.weight], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        merged = s.merged({name: learned.of(name) for name in s.shapes})
        found = torch.stack([(merged[name] - targets[name]).square().sum() for name in s.shapes]).sum()
        found.backward()
        return found

    optimizer.step(loss)
    for row, name in enumerate(s.shapes):
        tau = s.vectors(name).flatten(1)
        away = (targets[name] - s.network.get_parameter(name)).flatten()
        best = torch.linalg.pinv(tau @ tau.T) @ tau @ away  # a norm's weight is 1 in every network: no vector
        moved = learned.weight[row] if tau.any() else best
        torch.testing.assert_close(moved, best, rtol=1e-8, atol=1e-8)


SHAPES = {"w": torch.Size([300, 40]), "b": torch.Size([7]), "one": torch.Size([1]), "empty": torch.Size([0, 3])}


def mask(start: float = 0.0, **settings: object) -> ConcreteMask:
    return ConcreteMask(SHAPES, start=start, **settings)  # type: ignore[arg-type]


def test_open_masks_are_task_arithmetic() -> None:
    s = span(torch.float32)
    open_mask = ConcreteMask(s.shapes, start=40.0)
    c = dict.fromkeys(s.shapes, torch.full((3,), 0.3))
    masked, plain = s.merged(c, open_mask.drawn(0)), s.merged(c)
    assert all(same(masked[name], plain[name]) for name in s.shapes)


@pytest.mark.parametrize("x", [-2.0, 0.0, 0.7])
@pytest.mark.parametrize("temperature", [1e-3, 0.5, 2.0])
def test_a_mask_is_above_one_half_as_often_as_the_sigmoid_of_its_logit(x: float, temperature: float) -> None:
    concrete = mask(x, temperature=temperature)
    p, n = torch.tensor(x).sigmoid(), 20 * 12_000
    shares = torch.stack([(concrete._sample("w", step) > 0.5).double().mean() for step in range(20)])
    assert abs(shares.mean() - p) < 4 * (p * (1 - p) / n).sqrt()
    assert abs(concrete.density() - p) < 1e-6


def test_a_rescaled_mask_has_the_mean_one_whatever_it_is_multiplied_by() -> None:
    for drawn in (
        mask().drawn(3),
        mask(-3.0).settled(),
        mask(final="mean").settled(),
        mask(final="threshold").settled(),
    ):
        for name, m in drawn.items():
            assert m.shape == SHAPES[name]
            if m.numel() and bool(m.any()):
                assert abs(float(m.detach().mean()) - 1) < 1e-6
                assert same(rescaled(3.7 * m), m)
    assert mask().drawn(0)["one"].tolist() == [1]
    assert not mask(-1.0, final="threshold").settled()["w"].any()
    assert rescaled(torch.zeros(3)).tolist() == [0, 0, 0]


def test_the_gradient_of_a_mask_in_its_logits_is_m_times_one_minus_m_over_t_through_the_mean() -> None:
    concrete = mask(0.3, temperature=0.5)
    m = concrete._sample("b", 2)
    (gradient,) = torch.autograd.grad(m.sum(), concrete.logits[1])
    torch.testing.assert_close(gradient, m * (1 - m) / 0.5)
    g = torch.randn(7)
    (gradient,) = torch.autograd.grad((concrete.drawn(2)["b"] * g).sum(), concrete.logits[1])
    through = (g / m.mean() - (g * m).sum() / (7 * m.mean() ** 2)) * m * (1 - m) / 0.5
    torch.testing.assert_close(gradient, through.detach(), rtol=1e-4, atol=1e-6)


def test_draws_are_a_function_of_seed_step_and_name() -> None:
    first, again, other = mask().drawn(5), mask().drawn(5), mask(seed=1).drawn(5)
    assert torch.equal(first["w"], again["w"])
    assert not torch.equal(first["w"], other["w"])
    assert not torch.equal(first["w"], mask().drawn(6)["w"])
    assert torch.equal(mask().settled()["w"], mask().settled()["w"])
    assert not torch.equal(first["w"], mask().settled()["w"])


def test_models_come_from_files_and_their_parts(tmp_path: Path) -> None:
    for seed, name in enumerate((BASE, "one", "two")):
        state = {f"backbone.{key}": tensor for key, tensor in network(seed, torch.float32).state_dict().items()}
        save_file({**state, "head.weight": torch.zeros(2 + seed, 4)}, tmp_path / f"{name}.safetensors")
    stored = StoredModels(
        str(tmp_path / "base.safetensors"), {n: str(tmp_path / f"{n}.safetensors") for n in ("one", "two")}
    )
    s = NetworkSpan(network(9, torch.float32), stored, "backbone.")
    want = network(1, torch.float32)[1].weight - network(0, torch.float32)[1].weight
    assert same(s.vectors("1.weight")[0], want.detach())
    assert same(s.network[1].weight, network(0, torch.float32)[1].weight, 0)

    state = load_file(tmp_path / "two.safetensors")
    for spoil, message in (
        (lambda t: t.pop("backbone.1.bias"), "backbone.1.bias is in the network but not in two"),
        (lambda t: t.update({"backbone.1.bias": torch.zeros(5)}), r"backbone.1.bias is \[6\] in the network but \[5\]"),
        (lambda t: t["backbone.1.bias"].fill_(torch.nan), "backbone.1.bias of the checkpoint two holds NaN"),
    ):
        spoilt = {name: tensor.clone() for name, tensor in state.items()}
        spoil(spoilt)
        save_file(spoilt, tmp_path / "two.safetensors")
        with pytest.raises(UserError, match=message):
            NetworkSpan(network(9, torch.float32), stored, "backbone.")


def test_adapters_are_task_vectors_of_low_rank(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 5))
    save_file({f"backbone.{key}": t for key, t in model.state_dict().items()}, tmp_path / "base.safetensors")
    fresh = nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 5))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapt(model, ["*"], LoRA(2), show=False)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_()
    save_peft(model, tmp_path / "lora")
    fold(model)
    s = NetworkSpan(fresh, StoredModels(str(tmp_path / "base.safetensors"), {"a": str(tmp_path / "lora")}), "backbone.")
    for name, parameter in model.named_parameters():
        tau = s.vectors(name)[0]
        torch.testing.assert_close(tau, parameter.detach() - start[name], rtol=1e-4, atol=1e-5)
        assert tau.ndim < 2 or torch.linalg.matrix_rank(tau) == 2


def test_noise_has_the_moments_of_each_tensor_and_is_the_same_again() -> None:
    big = nn.Sequential(nn.Linear(300, 200))
    models = GaussianModels(["a", "b"], seed=3)
    one, two = (NetworkSpan(big, models, "backbone.") for _ in range(2))
    vectors, weight = one.vectors("0.weight"), big[0].weight
    assert torch.equal(vectors, two.vectors("0.weight"))
    assert not torch.equal(vectors[0], vectors[1])
    assert abs(vectors.std() / weight.std() - 1) < 0.02
    assert abs(vectors.mean() - weight.mean()) < 4 * weight.std() / vectors.numel() ** 0.5


@pytest.mark.parametrize("names", [[], ["a", "a"], ["a.b"], ["base"], [""]])
def test_names_that_tasks_cannot_have_are_refused(names: list[str]) -> None:
    with pytest.raises(UserError, match="give one or more names, each once"):
        GaussianModels(names)


def test_settings_out_of_range_are_refused() -> None:
    for make, message in (
        (lambda: Partitioned(SHAPES, 2, 0.0, 0), "groups=0 must be at least 1"),
        (lambda: mask(temperature=0.0), "temperature=0.0"),
        (lambda: mask(final="last"), "final='last' must be sample, mean or threshold"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    assert TaskWise(SHAPES, 2, 0.3).of("w").tolist() == pytest.approx([0.3, 0.3])
