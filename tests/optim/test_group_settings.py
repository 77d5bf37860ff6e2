"""What changes the trajectory belongs to the parameter groups: it can differ between them, follow a schedule, and is
saved. A state goes on as the saved run did, whatever the settings of the optimiser that loads it, or is refused. Hooks
of a step fire once.
"""

import copy
import inspect
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from every_preset import PRESETS, of_rank, optimizers
from masked_net import WEIGHTS, Plain, fit
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import Optimizer

from lightspan.callbacks.training.mask_learning import MaskLearning
from lightspan.callbacks.training.subspace_projection import SubspaceProjection
from lightspan.core.errors import UserError
from lightspan.optim import reference
from lightspan.optim.convert import to_low_rank
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.low_rank.bases import SVDBasis
from lightspan.optim.low_rank.inner import SGD
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.presets import Trion
from lightspan.optim.low_rank.residuals import ErrorFeedback
from lightspan.optim.masks.by_score import ByScore
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.optim.matrices.moments import BFloat16Moments, Float32Moments
from lightspan.optim.muon import FactoredMuon, Muon
from lightspan.optim.parameter_summary import parameter_summary
from lightspan.optim.steps import steps_taken
from lightspan.optim.two_rates import TwoRates
from lightspan.subspaces.projections import Dense, Sparse

SHAPES = [(12, 7), (6, 10), (5,)]
OTHERS: dict[str, Any] = {
    "lr": 0.3, "rank": 4, "refresh": 1, "scale": 0.7, "betas": (0.5, 0.6), "eps": 1e-2, "weight_decay": 0.5,
    "max_norm": 0.1, "seed": 7, "moments": BFloat16Moments(), "basis": SVDBasis(), "residual": ErrorFeedback(),
    "inner": SGD(), "momentum": 0.3, "nu": 0.1, "beta2": 0.2, "nesterov": False, "by_heads": True, "convention": "none",
    "precision": "bfloat16", "other_lr": 0.2, "fraction": 0.9, "limit": 1.5, "bound": 2.0, "scale_residual": False,
    "coefficients": "polar_express",
    "rho": 0.2, "error_feedback": "int4", "rotate": False, "norm": 1, "trust": 0.5, "retraction": "qr",
    "orthonormalise_every": 1, "rest": torch.optim.SGD, "dim": 9, "projection": Dense, "per_tensor": True,
    "layer_scales": True,
}  # fmt: skip
"""A value of each argument that is no default."""
SAME_EQUATIONS = {
    "params": "what is stepped",
    "check_finite": "refuses a step, changes none",
    "offload": "where state lives between steps",
    "owners": "which rank takes which part of a step",
    "backward": "when gradients are projected, and what becomes of them",
    "start": "known by its sha256, which a state has",
}


CANNOT_BE_LOADED = {
    "basis", "residual", "inner", "moments", "refresh", "by_heads", "limit", "bound", "scale_residual", "rho", "norm",
    "error_feedback", "rotate", "rest", "dim", "projection", "per_tensor", "layer_scales",
    "seed",  # of a RandomSubspace, whose map it draws; of others it is loaded
    "scale",  # of FiraAdam(scale_residual=False)
}  # fmt: skip
"""What decides which state there is, or what it means."""


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def made(kind: type[Optimizer], parameters: list[nn.Parameter], **options: Any) -> Optimizer:
    if kind.__name__ == "RandomSubspace":
        options = {"inner": partial(torch.optim.SGD, lr=0.1, momentum=0.9), "dim": 8, **options}
        if options["inner"] is OTHERS["inner"]:
            options["inner"] = partial(torch.optim.Adam, lr=0.1)
    elif kind.__name__ == "RiemannianSGD":
        groups = [{"params": parameters[:1], "frames": True}, {"params": parameters[1:]}]
        return kind(groups, **{"rest": partial(torch.optim.AdamW, lr=0.01), **options})
    elif kind.__name__ == "LARS":
        options = {"lr": 0.1, **options}
    else:
        options = {**of_rank(kind, 2), **options}
    names = (f"w{i}" for i in range(len(parameters)))
    return kind([{"params": list(zip(names, parameters, strict=True))}], **options)


def train(optimizer: Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def arguments(kind: type[Optimizer]) -> set[str]:
    """Of the constructor, and of those that it passes the rest to."""
    found = set()
    for base in kind.__mro__:
        own = inspect.signature(base.__init__).parameters.values()
        found |= {each.name for each in own if each.kind is not inspect.Parameter.VAR_KEYWORD} - {"self"}
        if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in own):
            break
    return found


@pytest.mark.sample(5)
@pytest.mark.parametrize("kind", optimizers().values(), ids=optimizers())
def test_a_state_goes_on_as_the_saved_run_whatever_the_settings_of_the_optimiser_it_is_loaded_into(kind) -> None:
    straight = weights()
    optimizer = made(kind, straight)
    train(optimizer, straight, range(3))
    saved, held = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in straight]
    train(optimizer, straight, range(3, 6))
    refused = set()
    for name in arguments(kind) - SAME_EQUATIONS.keys():
        parameters = weights()
        try:
            other = made(kind, parameters, **{name: OTHERS[name]})
        except (TypeError, UserError):  # what a preset sets itself, or has no other value for
            continue
        try:
            other.load_state_dict(copy.deepcopy(saved))
        except UserError:
            refused.add(name)
            continue
        for parameter, value in zip(parameters, held, strict=True):
            parameter.data.copy_(value)
        train(other, parameters, range(3, 6))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(parameters, straight, strict=True)), name
    assert refused <= CANNOT_BE_LOADED


def test_what_cannot_be_loaded_is_refused_with_its_name_and_both_values() -> None:
    for name, saved, other, said in (
        (
            "moments",
            Float32Moments(),
            BFloat16Moments(),
            r"moments=Float32Moments\(\).* has moments=BFloat16Moments\(\)",
        ),
        ("refresh", 5, 6, r"refresh=Every\(steps=5, staggered=True\).* has refresh=Every\(steps=6"),
    ):
        parameters = weights()
        optimizer = LowRank(parameters, rank=2, **{name: saved})
        train(optimizer, parameters, range(1))
        with pytest.raises(UserError, match=said):
            LowRank(weights(), rank=2, **{name: other}).load_state_dict(optimizer.state_dict())
    damaged = FactoredMuon(weights()).state_dict()
    damaged["param_groups"][0]["momentum"] = 1.5
    with pytest.raises(UserError, match=r"momentum=1\.5"):
        FactoredMuon(weights()).load_state_dict(damaged)


def test_momentum_follows_a_schedule() -> None:
    """As Muon's is warmed up."""
    ours, slow = (nn.Parameter(torch.randn(9, 6, dtype=torch.float64)) for _ in range(2))
    slow.data.copy_(ours)
    fast = FactoredMuon([ours], lr=0.1, moments=Float32Moments())
    plain = reference.FactoredMuon([slow], lr=0.1)
    for step in range(6):
        ours.grad = torch.randn(9, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        slow.grad = ours.grad.clone()
        for optimizer in (fast, plain):
            optimizer.param_groups[0]["momentum"] = 0.85 + 0.02 * step
            optimizer.step()
    torch.testing.assert_close(ours, slow, atol=1e-12, rtol=0)


def test_a_schedule_that_takes_momentum_out_of_its_range_is_refused_before_anything_changes() -> None:
    for kind in (Muon, SGD):
        weight, vector = (nn.Parameter(torch.ones(shape)) for shape in ((8, 6), (8,)))
        optimizer = Muon([weight, vector]) if kind is Muon else LowRank([weight, vector], rank=2, inner=SGD())
        optimizer.param_groups[0]["momentum"] = 1.5
        with pytest.raises(UserError, match=r"momentum=1\.5"):
            train(optimizer, [weight, vector], range(1))
        assert torch.equal(weight, torch.ones(8, 6))
        assert torch.equal(vector, torch.ones(8))


def test_each_group_is_stepped_with_its_own_settings() -> None:
    settings: list[dict[str, Any]] = [{"momentum": 0.5, "convention": "none"}, {"nu": 1.0, "scale": 0.3}]
    together = weights()[:2]
    groups = [{"params": [p], **own} for p, own in zip(together, settings, strict=True)]
    train(Muon(groups, lr=0.1), together, range(3))
    for number, own in enumerate(settings):
        alone = weights()[:2]
        train(Muon([{"params": [p], **own} for p in alone], lr=0.1), alone, range(3))
        assert torch.equal(alone[number], together[number])


def test_max_norm_and_seed_are_those_of_all_groups() -> None:
    first, second, third = weights()
    optimizer = Muon([{"params": [first]}, {"params": [second]}], max_norm=1.0, seed=3)
    optimizer.max_norm = 0.5
    optimizer.add_param_group({"params": [third]})
    assert [(group["max_norm"], group["seed"]) for group in optimizer.param_groups] == [(0.5, 3)] * 3
    optimizer.param_groups[0]["max_norm"] = 2.0
    with pytest.raises(UserError, match="max_norm"):
        train(optimizer, [first], range(1))
    with pytest.raises(UserError, match="max_norm=-1"):
        Muon([first]).max_norm = -1.0


@pytest.mark.parametrize("key", ["momentums", "nesterov", "maximize", "rule"])
def test_a_setting_that_no_group_has_is_refused_and_changes_nothing(key) -> None:
    first, second, _ = weights()
    with pytest.raises(UserError, match=f"Muon group 'hot': {key} .* momentum"):
        Muon([{"params": [first], "name": "hot", key: 1}])
    optimizer = Muon([first])
    with pytest.raises(UserError, match=key):
        optimizer.add_param_group({"params": [second], key: 1})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(UserError, match="momentum=1"):
        optimizer.add_param_group({"params": [second], "momentum": 1.0})


@pytest.fixture
def unhooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes as they are before the first optimiser is built: torch then wraps `step` of its class in hooks."""
    for kind in (*PRESETS, TwoRates, LowRank, MatrixOptimizer):
        step = vars(kind).get("step")
        if step is None or not getattr(step, "hooked", False):
            continue
        if step.__qualname__ == f"{kind.__name__}.step":
            monkeypatch.setattr(kind, "step", step.__wrapped__)
        else:
            monkeypatch.delattr(kind, "step")


@pytest.mark.parametrize("first", [LowRank, *PRESETS], ids=lambda kind: kind.__name__)
@pytest.mark.usefixtures("unhooked")
def test_hooks_of_a_step_fire_once_whatever_was_built_before(first) -> None:
    def built(kind: type[LowRank]) -> tuple[LowRank, list[str]]:
        weight, fired = nn.Parameter(torch.ones(8, 6)), list[str]()
        weight.grad = torch.ones(8, 6)
        optimizer = kind([weight], **of_rank(kind, 2))
        optimizer.register_step_pre_hook(lambda *_: fired.append("before"))
        optimizer.register_step_post_hook(lambda *_: fired.append("after"))
        return optimizer, fired

    for kind in (first, LowRank, *PRESETS, first):
        optimizer, fired = built(kind)
        assert steps_taken(optimizer) == 0
        optimizer.step()
        assert (fired, steps_taken(optimizer)) == (["before", "after"], 1), kind.__name__


def two_groups() -> tuple[Trion, list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((6, 4), (6,))]
    return Trion(parameters, lr=0.02, rank=2), parameters


def set_rates(optimizer: Optimizer, *rates: float) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def test_a_warm_up_by_hand_that_begins_at_zero_gives_no_leave_for_one_rate() -> None:
    optimizer, parameters = two_groups()
    set_rates(optimizer, 0.0, 0.0)
    train(optimizer, parameters, range(1))
    resumed, others = two_groups()
    resumed.load_state_dict(optimizer.state_dict())
    for each, own in ((optimizer, parameters), (resumed, others)):
        set_rates(each, 0.01, 0.01)
        with pytest.raises(UserError, match=r"other_lr=0\.0003"):
            train(each, own, range(1))


def test_a_warm_up_by_hand_that_keeps_the_ratio_of_rates_is_taken() -> None:
    optimizer, parameters = two_groups()
    for step in range(3):
        set_rates(optimizer, 0.02 * step / 2, 3e-4 * step / 2)
        train(optimizer, parameters, range(1))
    set_rates(optimizer, 1e-3, 1e-3)  # they have been apart
    train(optimizer, parameters, range(1))


def moved(optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    before = [p.detach().clone() for p in parameters]
    train(optimizer, parameters, range(1))
    return [p.detach() - old for p, old in zip(parameters, before, strict=True)]


def test_a_limit_for_one_step_holds_for_that_step_beside_the_lasting_one() -> None:
    """As when Lightning clips."""
    norms = []
    for lasting, next_one in ((None, 0.1), (0.1, None), (0.1, 5.0), (5.0, 0.1)):
        parameters = weights()
        optimizer = LowRank(parameters, rank=2, eps=1.0, max_norm=lasting)
        optimizer.clips_next_at = next_one
        norms.append(torch.stack([part.norm() for part in moved(optimizer, parameters)]))
        assert (optimizer.clips_next_at, optimizer.max_norm) == (None, lasting)
    assert all(torch.equal(norm, norms[0]) for norm in norms)


def test_sparse_and_dense_projections_do_not_take_each_others_states() -> None:
    kind = optimizers()["RandomSubspace"]
    parameters = weights()
    optimizer = made(kind, parameters, projection=Sparse, per_tensor=True)
    train(optimizer, parameters, range(1))
    with pytest.raises(UserError, match="projection="):
        made(kind, weights(), projection=Dense, per_tensor=True).load_state_dict(optimizer.state_dict())


def test_unknown_settings_are_refused_in_the_name_of_the_class_that_was_asked_for() -> None:
    for kind in (LowRank, *PRESETS):
        for name in ("learning_rate", "maximize", "foreach", "capturable"):
            with pytest.raises(UserError, match=rf"{kind.__name__} has no setting {name}; it takes params, lr, .*seed"):
                kind(weights(), **{name: True})


def test_a_group_that_is_added_without_its_heads_is_said_to_be_taken_whole() -> None:
    groups = [{"params": [("q", nn.Parameter(torch.ones(8, 6)))], "heads": {"q": [4, 4]}}]
    late = [("late.q", nn.Parameter(torch.ones(8, 6)))]
    with pytest.warns(UserWarning, match=r"late\.q.* heads"):
        FactoredMuon(groups).add_param_group({"params": late})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FactoredMuon([*groups, {"params": late}]).add_param_group({"params": [("b", nn.Parameter(torch.ones(8)))]})
        FactoredMuon(groups).add_param_group({"params": late, "heads": {}})
        Muon(groups).add_param_group({"params": late})  # which takes all whole


def test_groups_and_conversions_find_stacks_by_the_type_of_their_module() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(8, 12, 16))
            self.kernels = weight_norm(nn.Conv1d(16, 12, 7))
            self.plain = nn.ConvTranspose1d(9, 8, 7)

    module = Experts()
    (matrices, *_) = ParameterGroups().build(module)
    assert matrices["stacks"] == ["up"]
    converted = to_low_rank(torch.optim.AdamW(module.parameters()), module, ["*"], rank=4)
    for optimizer in (converted, LowRank(ParameterGroups().build(module), rank=4)):
        how = {
            optimizer.name_of(p): parameter_summary(optimizer, p, group).how
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert how["up"] == "rank 4 of 12, each of 8"
        assert how["plain.weight"] == "rank 4 of 9"
        assert how["kernels.parametrizations.weight.original1"] == "rank 4 of 12"
    with pytest.raises(UserError, match="stacks='up'"):
        LowRank([{"params": list(module.named_parameters()), "stacks": "up"}])


@pytest.mark.usefixtures("unhooked")
def test_masks_learn_once_a_step_in_a_fit_after_one_with_another_optimiser(tmp_path, monkeypatch) -> None:
    fit(Plain(), [SubspaceProjection(rank=2)], tmp_path, max_steps=1)
    learnt, update = [], ByScore.update
    monkeypatch.setattr(ByScore, "update", lambda *asked: learnt.append(asked[1]) or update(*asked))
    trainer = fit(Plain(FactoredMuon), [MaskLearning(WEIGHTS, ByScore(every=2), density=0.5)], tmp_path, max_steps=4)
    assert learnt == [1, 2, 3]  # the masks are fixed then
    assert steps_taken(trainer.optimizers[0]) == 4
