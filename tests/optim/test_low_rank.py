"""LowRank: the limits in which it is a known optimiser, a slow twin written from the equations, state, resume, bad
input.
"""

import copy
import io
from itertools import pairwise

import pytest
import torch
from optim.plain_bases import IdentityBasis
from torch import nn

from lightspan.core.errors import UserError
from lightspan.optim import reference
from lightspan.optim.low_rank.bases import DCTBasis, PowerBasis
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.residuals import ErrorFeedback, Fira

BETAS, EPS = (0.9, 0.99), 1e-8


def matrices(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def give_gradients(parameters, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in parameters:
        p.grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(optimizer, parameters, steps, start=0):
    for step in range(start, start + steps):
        give_gradients(parameters, step)
        optimizer.step()


def test_full_rank_on_the_identity_is_torchs_adamw():
    # rank 5 of 5 counts as full, so one more column is added that never has a gradient
    (low,), (full,) = matrices((8, 6)), matrices((8, 6))
    ours = LowRank(
        [low], lr=0.1, rank=5, basis=IdentityBasis(), residual=None, betas=BETAS, weight_decay=0.1, refresh=3
    )
    theirs = torch.optim.AdamW([full], lr=0.1, betas=BETAS, eps=EPS, weight_decay=0.1)
    for step in range(12):
        give_gradients([low, full], step)
        low.grad[:, 5] = 0
        full.grad = low.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(low.data, full.data, atol=1e-12, rtol=0)


@pytest.mark.parametrize("basis", [DCTBasis(), PowerBasis()])
def test_unprojected_parameters_get_torchs_fused_adamw_bit_for_bit(basis):
    ours, theirs = (matrices((8, 6), (6,), (4, 4), dtype=torch.float32) for _ in range(2))
    groups = [{"params": ours[:2]}, {"params": ours[2:], "project": False, "lr": 0.02, "weight_decay": 0.0}]
    low = LowRank(groups, lr=0.1, rank=2, basis=basis, weight_decay=0.1)
    full = torch.optim.AdamW(
        [{"params": theirs[1:2]}, {"params": theirs[2:], "lr": 0.02, "weight_decay": 0.0}],
        lr=0.1,
        weight_decay=0.1,
        fused=True,
    )
    for step in range(5):
        for side in (ours, theirs):
            give_gradients(side, step)
        low.step()
        full.step()
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))


@pytest.mark.parametrize("residual", [None, Fira()])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 3, 2, 1)])
def test_power_low_rank_equals_its_reference(shape, residual):
    (weight,) = matrices(shape)
    start, settings = weight.detach().clone(), {"lr": 0.1, "betas": BETAS, "eps": EPS, "weight_decay": 0.1}
    optimizer = LowRank([weight], rank=3, residual=residual, refresh=4, **settings)
    frames, gradients = [], []
    for step in range(20):
        give_gradients([weight], step)
        optimizer.step()
        frames.append(optimizer.state[weight]["frame"].clone())
        gradients.append(weight.grad)
    assert sum(not torch.equal(a, b) for a, b in pairwise(frames)) == 4
    expected = reference.run(
        reference.LowRank, start, gradients, frames=frames, residual=residual is not None, **settings
    )
    torch.testing.assert_close(weight.detach(), expected.weight, atol=1e-10, rtol=0)


def test_a_wide_matrix_moves_like_the_transpose_of_a_tall_one():
    (tall,) = matrices((9, 5))
    wide = nn.Parameter(tall.detach().T.clone())
    ours = [LowRank([p], lr=0.1, rank=2, refresh=3) for p in (tall, wide)]
    for step in range(8):
        give_gradients([tall], step)
        wide.grad = tall.grad.T.clone()
        for optimizer in ours:
            optimizer.step()
    torch.testing.assert_close(tall.data, wide.data.T, atol=1e-12, rtol=0)


def test_matrices_do_not_influence_one_another():
    together = matrices((9, 5), (9, 5), (5, 9), (4, 4))
    alone = matrices((9, 5), (9, 5), (5, 9), (4, 4))[1]
    joint = LowRank(together, lr=0.1, rank=2, basis=DCTBasis(), refresh=1)
    single = LowRank([alone], lr=0.1, rank=2, basis=DCTBasis(), refresh=1)
    for step in range(6):
        give_gradients(together, step)
        alone.grad = together[1].grad.clone()
        joint.step()
        single.step()
    torch.testing.assert_close(together[1].data, alone.data, atol=1e-12, rtol=0)


def test_after_the_first_step_refreshes_are_spread_over_the_steps():
    parameters = matrices(*[(6, 4)] * 8)
    optimizer = LowRank(parameters, rank=2, refresh=4)
    changed = []
    for step in range(13):
        before = [optimizer.state[p]["frame"].clone() if p in optimizer.state else None for p in parameters]
        give_gradients(parameters, step)
        optimizer.step()
        after = [optimizer.state[p]["frame"] for p in parameters]
        changed.append(sum(b is None or not torch.equal(a, b) for a, b in zip(after, before, strict=True)))
    assert changed[0] == 8
    assert changed[4:] == [2] * 9


def test_a_parameter_without_gradient_stands_still_and_is_refreshed_when_it_first_has_one():
    with_gradient, without = matrices((6, 4), (6, 4))
    optimizer = LowRank([with_gradient, without], lr=0.1, rank=2, refresh=50)
    start = without.detach().clone()
    for step in range(3):
        give_gradients([with_gradient], step)
        optimizer.step()
    assert torch.equal(without, start)
    assert optimizer.state[without]["step"] == 0
    assert optimizer.state[with_gradient]["step"] == 3
    give_gradients([without], 7)
    with_gradient.grad = None
    optimizer.step()
    assert not torch.equal(without, start)
    assert optimizer.state[without]["age"].tolist() == [1.0, 1.0]


def test_a_zero_gradient_moves_nothing_but_the_decay():
    (weight,) = matrices((6, 4))
    start = weight.detach().clone()
    optimizer = LowRank([weight], lr=0.1, rank=2, weight_decay=0.5)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.data, start * 0.95)


def test_gradients_are_left_as_they_were():
    (weight,) = matrices((6, 4))
    give_gradients([weight], 0)
    before = weight.grad.clone()
    LowRank([weight], rank=2).step()
    assert torch.equal(weight.grad, before)


@pytest.mark.parametrize("basis", [PowerBasis(), DCTBasis()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_k_steps_saved_and_loaded_and_k_more_equal_2k_bit_for_bit(basis, dtype):
    shapes = (9, 5), (5, 9), (9, 5), (4,), (3, 2)
    straight = matrices(*shapes, dtype=dtype)

    def make(parameters):
        return LowRank(parameters, lr=0.05, rank=2, basis=copy.deepcopy(basis), refresh=3, weight_decay=0.1)

    optimizer = make(straight)
    train(optimizer, straight, 7)
    saved = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": [p.detach() for p in straight]}, saved)
    train(optimizer, straight, 7, start=7)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    resumed = [nn.Parameter(w) for w in loaded["weights"]]
    second = make(resumed)
    second.load_state_dict(loaded["optimizer"])
    train(second, resumed, 7, start=7)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    for a, b in zip(straight, resumed, strict=True):
        assert optimizer.state[a].keys() == second.state[b].keys()
        assert all(torch.equal(optimizer.state[a][key], second.state[b][key]) for key in optimizer.state[a])
        assert all(optimizer.state[a][key].dtype == second.state[b][key].dtype for key in optimizer.state[a])


def test_state_replaced_from_outside_is_picked_up():
    (weight,) = matrices((6, 4))
    optimizer = LowRank([weight], lr=0.1, rank=2)
    train(optimizer, [weight], 2)
    twin = copy.deepcopy(weight)
    moved = LowRank([twin], lr=0.1, rank=2)
    moved.load_state_dict(optimizer.state_dict())
    moved.state[twin] = {key: value.clone() for key, value in moved.state[twin].items()}
    train(optimizer, [weight], 2, start=2)
    train(moved, [twin], 2, start=2)
    assert torch.equal(weight, twin)


def test_state_has_the_promised_size_and_shares_no_storage_twice():
    (weight,) = matrices((12, 8), dtype=torch.float32)
    optimizer = LowRank([weight], rank=2)
    train(optimizer, [weight], 1)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in optimizer.state[weight].values()}
    numbers = 2 * 12 * 2 + 8 * 2 + 2 + 1 + 1  # moments, frame, age, limiter, step
    assert sum(storages.values()) == 4 * numbers


def test_the_closure_runs_with_gradients_enabled():
    (weight,) = matrices((6, 4))
    optimizer = LowRank([weight], rank=2)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


@pytest.mark.parametrize("residual", [None, Fira()])
def test_a_least_squares_problem_of_rank_two_is_solved_in_rank_three(residual):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(20, 2, generator=generator) @ torch.randn(2, 12, generator=generator)
    weight = nn.Parameter(torch.zeros(20, 12))
    optimizer = LowRank([weight], lr=0.1, rank=3, residual=residual, refresh=10)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        weight.grad = weight.detach() - target
        optimizer.step()
    assert (weight - target).norm() < 0.01 * target.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "LowRank rank=0 must be at least 1"),
        ({"lr": -1.0}, "LowRank lr=-1.0 must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"LowRank betas=\(0.9, 1.0\) must be in \[0, 1\)"),
        ({"refresh": 0}, "refresh=0 must be at least 1 step"),
        ({"rank": 9}, r"rank=9 is not below the shorter side of any matrix \(the largest is 4\)"),
        ({"rank": 4}, r"choose a rank from 1 to 3, or use AdamW$"),
    ],
)
def test_bad_settings_are_refused_with_value_and_limit(options, message):
    with pytest.raises(UserError, match=message):
        LowRank(matrices((6, 4), (3, 3)), **options)


def test_matrices_of_one_row_have_no_rank_to_choose():
    with pytest.raises(UserError, match=r"would be projected; use AdamW$"):
        LowRank(matrices((1, 4)), rank=1)


def test_vectors_alone_are_refused():
    with pytest.raises(UserError, match="no matrix to project"):
        LowRank(matrices((6,)), rank=2)


def test_a_limiter_that_could_only_shrink_is_refused():
    with pytest.raises(UserError, match=r"limit=1.0 must be above 1"):
        Fira(1.0)


def saved_state(**options):
    (weight,) = matrices((12, 8), dtype=torch.float32)
    optimizer = LowRank([("net.weight", weight)], **options)
    train(optimizer, [weight], 1)
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("before", "now", "part", "state"),
    [
        ({}, {"basis": DCTBasis()}, "basis", r"net.weight contains age, exp_avg, .* keeps .*columns"),
        (
            {"residual": ErrorFeedback("int8")},
            {"residual": ErrorFeedback("int4")},
            "residual",
            r"net.weight has error of shape \(12, 8\), but this optimiser needs \(12, 4\)",
        ),
    ],
)
def test_state_of_another_rule_is_refused_with_the_difference(before, now, part, state):
    (weight,) = matrices((12, 8), dtype=torch.float32)
    optimizer, saved = LowRank([("net.weight", weight)], rank=3, **now), saved_state(rank=3, **before)
    with pytest.raises(UserError, match=f"made with {part}=.* but this LowRank has {part}="):
        optimizer.load_state_dict(saved)
    # A file that does not say its rule shows it by its state.
    for group in saved["param_groups"]:
        del group["rule"]
    with pytest.raises(UserError, match=state):
        optimizer.load_state_dict(saved)


def test_what_is_loaded_before_the_first_step_is_all_that_the_state_holds():
    def built():
        parameters = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(8, 4))]
        return LowRank(parameters, rank=2), parameters

    first, parameters = built()
    for parameter in parameters[:2]:  # the third has no gradient, and no state
        parameter.grad = torch.ones_like(parameter)
    first.step()
    for saved in (built()[0].state_dict(), first.state_dict()):
        loaded, own = built()
        loaded.load_state_dict(saved)
        assert list(loaded.state) == [own[number] for number in saved["state"]]
        assert loaded.state_dict()["state"].keys() == saved["state"].keys()


@pytest.mark.parametrize("switch", ["basis", "residual", "inner", "moments", "refresh"])
def test_a_switch_that_is_no_object_of_its_kind_is_refused(switch: str) -> None:
    with pytest.raises(UserError, match=rf"{switch}='svd' must be an object of a class in lightspan\.optim\."):
        LowRank([nn.Parameter(torch.zeros(8, 8))], rank=2, **{switch: "svd"})
