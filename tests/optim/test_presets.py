"""Each preset equals its paper's equations, in float64 over 20 steps with refreshes.

The equations are those of `lightspan.optim.reference`. Frames that depend on signs or on random draws are handed to
them; that those frames are the papers' is tested on its own.
"""

import copy
import inspect
import io
import pickle
from itertools import pairwise

import pytest
import torch
from every_preset import PRESETS, WHOLE, of_rank
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from lightspan.core.errors import UserError
from lightspan.optim import muon, reference
from lightspan.optim.low_rank import presets
from lightspan.optim.low_rank.bases import Every
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.residuals import Fira
from lightspan.optim.matrices.moments import Float32Moments
from lightspan.optim.reference.ldadam import power_step
from lightspan.optim.reference.loop import tall

SHAPES = [(9, 6), (6, 9), (7, 7), (5, 3, 2, 2)]
STEPS, LR, DECAY = 20, [0.1 * (1 - t / 40) for t in range(20)], 0.1
EXACT = {"atol": 1e-10, "rtol": 0}


def start(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    return weight, [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def train(preset, shape, **options):
    """Final weight, and by step the frames or columns and the residual's buffer."""
    first, gradients = start(shape)
    weight = nn.Parameter(first.clone())
    optimizer = preset([weight], rank=options.pop("rank", 2), weight_decay=DECAY, **options)
    frames, buffers = [], []
    bucket = optimizer.buckets()[0]
    for gradient, lr in zip(gradients, LR, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = gradient.clone()
        optimizer.step()
        frames.append(optimizer.rule.basis.frame(bucket.state, bucket.layout)[0].clone())
        if "error" in bucket.state:
            buffers.append(bucket.state["error"][0].clone())
    flat = [g.flatten(1) for g in gradients]
    return weight.detach().flatten(1), first.flatten(1), flat, frames, buffers


def changes(frames):
    return sum(not torch.equal(a, b) for a, b in pairwise(frames))


@pytest.mark.parametrize("shape", SHAPES)
def test_fira_as_its_code_scales(shape):
    got, first, gradients, frames, _ = train(presets.FiraAdam, shape, refresh=5, scale_residual=False)
    settings = {"lr": LR, "weight_decay": DECAY, "scale_residual": False, "bound": 4.0}
    expected = reference.run(reference.FiraAdam, first, gradients, frames=frames, **settings)
    torch.testing.assert_close(got, expected.weight, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "settings"), [("GaLore", {}), ("FiraAdam", {"bound": 4.0})])
def test_galore_and_fira(name, settings, shape):
    got, first, gradients, frames, _ = train(getattr(presets, name), shape, refresh=5)
    assert changes(frames) == 3
    kind = getattr(reference, name)
    expected = reference.run(kind, first, gradients, frames=frames, lr=LR, weight_decay=DECAY, **settings)
    torch.testing.assert_close(got, expected.weight, **EXACT)
    own = reference.run(kind, first, gradients, lr=LR, rank=2, refresh=5).frames
    for ours, theirs in zip(frames, own, strict=True):
        torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("limit", "bound"), [(1.01, 4.0), (None, 4.0), (1.01, None)])
def test_apollo(shape, limit, bound):
    got, first, gradients, projections, _ = train(presets.APOLLO, shape, refresh=5, limit=limit, bound=bound)
    assert changes(projections) == 3
    settings = {"lr": LR, "limit": limit, "bound": bound, "weight_decay": DECAY}
    expected = reference.run(reference.APOLLO, first, gradients, frames=projections, **settings)
    torch.testing.assert_close(got, expected.weight, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_mini(shape):
    got, first, gradients, projections, _ = train(presets.APOLLOMini, shape, refresh=5, rank=1)
    settings = {"lr": LR, "bound": 4.0, "weight_decay": DECAY}
    expected = reference.run(reference.APOLLOMini, first, gradients, frames=projections, **settings)
    torch.testing.assert_close(got, expected.weight, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_ldadam(shape):
    got, first, gradients, frames, buffers = train(presets.LDAdam, shape)
    assert changes(frames) == STEPS - 1
    run = reference.run(reference.LDAdam, first, gradients, lr=LR, frames=frames, weight_decay=DECAY, reach=True)
    torch.testing.assert_close(got, run.weight, **EXACT)
    for ours, theirs in zip(buffers, run.buffers, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_ldadams_frames_span_one_power_iteration_on_momentum_and_gradient(shape):
    _, first, gradients, frames, buffers = train(presets.LDAdam, shape)
    run = reference.run(reference.LDAdam, first, gradients, lr=LR, frames=frames, weight_decay=DECAY, reach=True)
    for step in range(1, STEPS):
        a = tall(gradients[step]) + buffers[step - 1]
        m_hat = run.moments[step - 1][0] / (1 - 0.908**step)
        theirs = power_step(a, frames[step - 1], m_hat, 0.908)
        # ours orthonormalises between the two products and adds a trace of the old frame, 1e-6 of its length
        torch.testing.assert_close(frames[step] @ frames[step].T, theirs @ theirs.T, atol=1e-4, rtol=0)


@pytest.mark.sample(12)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("refresh", [1, 4])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("error_feedback", [None, "float32"])
def test_dct_adamw(error_feedback, norm, refresh, shape):
    got, first, gradients, frames, buffers = train(
        presets.DCTAdamW, shape, rank=3, refresh=refresh, norm=norm, error_feedback=error_feedback
    )
    assert changes(frames) >= 3
    run = reference.run(
        reference.DCTAdamW, first, gradients, lr=LR, rank=3, refresh=refresh, norm=norm,
        error_feedback=error_feedback is not None, weight_decay=DECAY,
    )  # fmt: skip
    torch.testing.assert_close(got, run.weight, **EXACT)
    assert len(buffers) == (STEPS if error_feedback else 0)
    for ours, theirs in zip(buffers, run.buffers, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_dct_adamw_without_rotation_leaves_moments_in_their_slots():
    got, first, gradients, *_ = train(presets.DCTAdamW, (9, 6), rank=3, rotate=False, error_feedback=None)
    settings = {"lr": LR, "rank": 3, "rotate": False, "error_feedback": False, "weight_decay": DECAY}
    run = reference.run(reference.DCTAdamW, first, gradients, **settings)
    torch.testing.assert_close(got, run.weight, **EXACT)


@pytest.mark.sample(6)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("convention", "norm"), [("kj", 2), ("kimi", 2), ("dion", 2), ("none", 1)])
def test_trion(convention, norm, shape):
    got, first, gradients, frames, buffers = train(presets.Trion, shape, rank=3, convention=convention, norm=norm)
    assert changes(frames) >= 3
    settings = {"lr": LR, "rank": 3, "norm": norm, "convention": convention, "weight_decay": DECAY}
    run = reference.run(reference.Trion, first, gradients, **settings)
    torch.testing.assert_close(got, run.weight, **EXACT)
    for ours, theirs in zip(buffers, run.buffers, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_trion_steps_what_it_does_not_project_as_adamw_at_a_rate_of_its_own():
    """At the rate of Newton-Schulz, 2e-2, vectors would move seventy times as far as published."""
    shapes = {"tall": (9, 6), "bias": (9,), "small": (6, 3), "head": (9, 5)}
    ours, theirs = ({name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()} for _ in range(2))
    groups = [
        {"params": [(name, ours[name]) for name in ("tall", "bias", "small")]},
        {"params": [("head", ours["head"])], "project": False},
    ]
    optimizer = presets.Trion(groups, rank=4)
    assert [(group["lr"], group["param_names"]) for group in optimizer.param_groups] == [
        (2e-2, ["tall"]), (3e-4, ["bias", "small"]), (3e-4, ["head"]),
    ]  # fmt: skip
    assert "lr" not in groups[0]
    rest = [theirs[name] for name in ("bias", "small", "head")]
    adamw = torch.optim.AdamW(rest, lr=3e-4, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    for step in range(3):
        for name, shape in shapes.items():
            gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            ours[name].grad, theirs[name].grad = gradient, gradient.clone()
        optimizer.step()
        adamw.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in ("bias", "small", "head"))


def test_trions_groups_keep_rates_of_their_own_and_can_be_added_to():
    tall, bias, late = (nn.Parameter(torch.ones(shape)) for shape in ((9, 6), (9,), (7,)))
    optimizer = presets.Trion([{"params": [tall, bias], "lr": 0.1}], rank=4, other_lr=1e-3)
    optimizer.add_param_group({"params": late})
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(0.1, 2), (1e-3, 1)]


def test_trion_refuses_a_rate_that_is_none():
    weight = nn.Parameter(torch.ones(9, 6))
    for rate in (-1.0, float("nan"), float("inf"), "fast", torch.tensor(torch.nan), torch.tensor(-1.0)):
        with pytest.raises(UserError, match=r"Trion other_lr=.* must be at least 0"):
            presets.Trion([weight], rank=2, other_lr=rate)


@pytest.mark.parametrize("rate", [float("nan"), torch.tensor(torch.nan), torch.tensor(torch.inf)])
def test_rates_that_are_not_finite_are_refused(rate):
    with pytest.raises(UserError, match=r"GaLore lr=.* must be at least 0"):
        presets.GaLore([nn.Parameter(torch.ones(9, 6))], rate, rank=2)


@pytest.mark.parametrize("scale", [2.0, 0.0, float("nan")])
def test_fira_names_the_scale_that_it_cannot_leave_out_of_the_residual(scale):
    with pytest.raises(UserError, match=rf"FiraAdam scale={scale} must be"):
        presets.FiraAdam([nn.Parameter(torch.ones(9, 6))], rank=2, scale=scale, scale_residual=False)


def named(kind, **options):
    """Those of the options that a preset has by name: some choose a frame in every step, some need none."""
    known = inspect.signature(kind).parameters
    return {name: value for name, value in options.items() if name in known}


def test_presets_are_found_and_go_by_one_name_each():
    assert len(PRESETS) >= 10
    assert len({id(kind) for kind in PRESETS}) == len(PRESETS)


# What a reference has otherwise: `bound` is not in the papers, and an error is not quantised there.
NOT_THE_PAPERS = {"bound": None, "error_feedback": True}


@pytest.mark.parametrize("kind", [LowRank, *PRESETS], ids=lambda kind: kind.__name__)
def test_every_preset_can_be_built_by_its_class_path_as_in_a_recipe(kind):
    """The parser reads in the calls of constructors which arguments of `LowRank` are left to a recipe."""
    parser = ArgumentParser()
    parser.add_argument("--optimizer", type=OptimizerCallable)
    path = f"{kind.__module__}.{kind.__name__}"
    given = parser.parse_args([f"--optimizer={path}", "--optimizer.weight_decay=0.5"])
    optimizer = parser.instantiate(given).optimizer([nn.Parameter(torch.ones(900, 800))])
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize("kind", [LowRank, *PRESETS], ids=lambda kind: kind.__name__)
def test_every_preset_has_a_reference_with_its_defaults(kind):
    equations = getattr(reference, kind.__name__)
    assert kind.__name__ in reference.__all__
    assert issubclass(equations, reference.Reference)
    assert f"`lightspan.optim.reference.{kind.__name__}`" in kind.__doc__
    ours, theirs = kind([nn.Parameter(torch.ones(900, 800))]), equations([nn.Parameter(torch.ones(900, 800))])
    for name in ("lr", "rank", "betas", "eps", "weight_decay"):
        assert name not in theirs.defaults or ours.defaults[name] == theirs.defaults[name], name
    settings, published = (
        {name: parameter.default for name, parameter in inspect.signature(one).parameters.items() if name != "params"}
        for one in (kind, equations)
    )
    # The engine takes a residual where its reference takes that residual's settings.
    settings |= {"residual": True, "limit": Fira().limit, "bound": Fira().bound} if kind is LowRank else NOT_THE_PAPERS
    shared = settings.keys() & published.keys()
    assert shared >= {"lr"} | ({"rank"} & settings.keys())
    assert {name: settings[name] for name in shared} == {name: published[name] for name in shared}


@pytest.mark.parametrize("kind", PRESETS, ids=lambda kind: kind.__name__)
def test_a_net_trains_as_its_reference_does(kind):
    """Matrices both ways, a convolution, vectors and a matrix below the rank, in one group. APOLLO's draws and signs of
    singular vectors are given to it; see above.
    """
    shapes, settings = [(9, 5), (5, 9), (6, 2, 2, 2), (7,), (8, 1)], {**named(kind, rank=2), "weight_decay": 0.1}
    options = named(kind, refresh=Every(3, staggered=False), bound=None, moments=Float32Moments())
    options |= {"error_feedback": "float32"} if kind is presets.DCTAdamW else {}
    ours, theirs = ([nn.Parameter(start(shape)[0]) for shape in shapes] for _ in range(2))
    fast = kind(ours, **settings, **options)
    slow = getattr(reference, kind.__name__)(theirs, **settings, **({"refresh": 3} if "refresh" in options else {}))
    given = {}
    if "APOLLO" in kind.__name__ or kind is presets.LDAdam:
        slow.choose = lambda a, state, group: given[state["shape"]]
    for step in range(8):
        for pair in zip(ours, theirs, strict=True):
            for weight in pair:
                generator = torch.Generator().manual_seed(step)
                weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        fast.step()
        for bucket in fast.buckets() if kind not in WHOLE else ():
            frames = fast.rule.basis.frame(bucket.state, bucket.layout)
            given |= {tuple(p.flatten(1).shape): q.clone() for p, q in zip(bucket.parameters, frames, strict=True)}
        slow.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copied", "pickled"]
)
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_a_copy_takes_another_group_and_steps_as_the_original(preset, way):
    model = nn.ModuleList([nn.Linear(5, 9), nn.Linear(9, 5)])
    optimizer = preset(model[0].parameters(), **of_rank(preset, 2))
    pairs = [way((model, optimizer)), (model, optimizer)]
    of_torch = vars(torch.optim.SGD(model.parameters(), 0.1)).keys()
    assert vars(pairs[0][1]).keys() >= vars(optimizer).keys() - of_torch
    for net, own in pairs:
        own.add_param_group({"params": net[1].parameters()})
        for step in range(3):
            for number, parameter in enumerate(net.parameters()):
                generator = torch.Generator().manual_seed(10 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            own.step()
    twin, model = (net for net, _ in pairs)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.sample(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_k_steps_saved_and_loaded_and_k_more_equal_2k_across_refreshes(preset, dtype):
    shapes = (9, 5), (5, 9), (9, 5), (4,)
    schedule = named(preset, refresh=3)

    def make(weights):
        return preset(weights, lr=0.05, **of_rank(preset, 2), weight_decay=0.1, **schedule)

    def steps(optimizer, weights, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for w in weights:
                w.grad = torch.randn(w.shape, generator=generator).to(dtype)
            optimizer.step()

    generator = torch.Generator().manual_seed(0)
    straight = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    optimizer = make(straight)
    steps(optimizer, straight, range(7))
    saved = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": [w.detach() for w in straight]}, saved)
    steps(optimizer, straight, range(7, 14))
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    resumed = [nn.Parameter(w) for w in loaded["weights"]]
    second = make(resumed)
    second.load_state_dict(loaded["optimizer"])
    steps(second, resumed, range(7, 14))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def two_groups():
    matrix, vector = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6))
    return presets.Trion([matrix, vector], lr=0.02, rank=2, other_lr=3e-4), [matrix, vector]


def stepped(optimizer, parameters):
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


SCHEDULES = torch.optim.lr_scheduler


def one_cycle(optimizer, rates):
    return SCHEDULES.OneCycleLR(optimizer, max_lr=rates, total_steps=100)


def cyclic(optimizer, rates):
    return SCHEDULES.CyclicLR(optimizer, base_lr=rates, max_lr=rates, cycle_momentum=False)


@pytest.mark.parametrize("schedule", [one_cycle, cyclic])
def test_a_schedule_with_one_rate_for_trions_two_groups_is_refused_at_the_first_step(schedule):
    optimizer, parameters = two_groups()
    schedule(optimizer, 0.02)
    with pytest.raises(UserError, match=r"the rate of Newton-Schulz, 0\.02, instead of other_lr=0\.0003; give .* list"):
        stepped(optimizer, parameters)
    assert all(torch.equal(parameter, torch.ones_like(parameter)) for parameter in parameters)


def test_so_it_is_when_the_group_of_adamw_comes_first():
    matrix, vector = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6))
    optimizer = presets.Trion([{"params": [vector]}, {"params": [matrix]}], lr=0.02, rank=2)
    one_cycle(optimizer, 0.02)
    with pytest.raises(UserError, match=r"the rate of Newton-Schulz, 0\.02, instead of other_lr=0\.0003"):
        stepped(optimizer, [matrix, vector])


@pytest.mark.parametrize("own_first", [True, False])
def test_so_it_is_when_the_group_of_adamw_has_a_rate_of_its_own(own_first):
    matrix, vector = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6))
    groups = [{"params": [vector], "lr": 0.05}, {"params": [matrix]}]
    optimizer = muon.FactoredMuon(groups if own_first else groups[::-1], lr=0.004)
    one_cycle(optimizer, 0.02)
    with pytest.raises(UserError, match=r"the rate of Newton-Schulz, 0\.02, instead of other_lr=0\.05; give .* list"):
        stepped(optimizer, [matrix, vector])
    optimizer = muon.FactoredMuon(groups, lr=0.004)
    one_cycle(optimizer, [group["lr"] for group in optimizer.param_groups])
    stepped(optimizer, [matrix, vector])


@pytest.mark.parametrize(
    "rates",
    [
        (None, 0.02, None),
        (0.02, None, None),
        (torch.tensor(0.02), torch.tensor(3e-4), None),
        (torch.tensor(0.1), None, None),
    ],
    ids=["another group of AdamW has it", "matrices have one of their own", "rates are tensors", "one is a tensor"],
)
@pytest.mark.parametrize("schedule", ["one cycle", "cycles", "warm-up from zero"])
def test_so_it_is_whatever_rates_the_groups_have(schedule, rates):
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((6, 4), (6,), (5,))]
    groups = [{"params": [p]} if rate is None else {"params": [p], "lr": copy.deepcopy(rate)}
              for p, rate in zip(parameters, rates, strict=True)]  # fmt: skip
    optimizer = presets.Trion(groups, lr=0.02, rank=2)
    if schedule == "warm-up from zero":
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        SCHEDULES.LambdaLR(optimizer, lambda step: step / 10)
    else:
        {"one cycle": one_cycle, "cycles": cyclic}[schedule](optimizer, 0.02)
    with pytest.raises(UserError, match=r"the rate of Newton-Schulz, 0\.02, instead of other_lr=0\.0003"):
        stepped(optimizer, parameters)


def test_groups_are_named_once_and_those_that_are_given_stay_as_they_are():
    tall, bias, late = (nn.Parameter(torch.ones(shape)) for shape in ((9, 6), (9,), (7,)))
    given = [{"params": [tall, bias], "name": "first"}, {"params": [late], "name": "late"}]
    before = copy.copy(given[0]), copy.copy(given[1])
    optimizer = presets.Trion(given, rank=4)
    assert [group["name"] for group in optimizer.param_groups] == ["first", "first-other", "late"]
    assert [group.keys() for group in given] == [group.keys() for group in before]


def test_rates_that_are_alike_by_hand_are_taken_among_groups_of_adamw_at_zero_and_after_the_first_step():
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((6, 4), (6,), (5,))]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    for alike, rate in ((slice(1, 3), 1e-3), (slice(0, 3), 0.0)):
        optimizer = presets.Trion(groups, lr=0.02, rank=2)
        for group in optimizer.param_groups[alike]:
            group["lr"] = rate
        stepped(optimizer, parameters)
    optimizer = presets.Trion(groups, lr=0.02, rank=2)
    stepped(optimizer, parameters)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    stepped(optimizer, parameters)


@pytest.mark.parametrize("number", [float, torch.tensor])
def test_one_rate_for_both_is_taken_where_both_are_equal_and_so_it_is_in_a_copy(number):
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((6, 4), (6,))]
    optimizer = muon.FactoredMuon(parameters, lr=number(4e-3), other_lr=4e-3)
    one_cycle(optimizer, 0.01)
    for together in ((optimizer, parameters), copy.deepcopy((optimizer, parameters))):
        stepped(*together)


def test_rates_that_were_made_equal_in_mid_run_are_taken_after_a_resume():
    (optimizer, parameters), (resumed, others) = two_groups(), two_groups()
    stepped(optimizer, parameters)
    optimizer.param_groups[1]["lr"] = optimizer.param_groups[0]["lr"]
    stepped(optimizer, parameters)
    resumed.load_state_dict(optimizer.state_dict())
    stepped(resumed, others)


def test_a_schedule_of_rates_that_are_tensors_does_not_change_the_rate_of_groups_to_come():
    given = torch.tensor(1e-3)
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((6, 4), (6,), (5,))]
    optimizer = presets.Trion(parameters[:2], lr=torch.tensor(0.02), rank=2, other_lr=given)
    schedule = SCHEDULES.LambdaLR(optimizer, lambda step: 0.5)
    stepped(optimizer, parameters[:2])
    schedule.step()
    optimizer.add_param_group({"params": parameters[2:]})
    assert [float(group["lr"]) for group in optimizer.param_groups[1:]] == pytest.approx([5e-4, 1e-3])
    assert float(given) == float(optimizer.param_groups[1]["other_lr"]) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: one_cycle(o, [group["lr"] for group in o.param_groups]),
        lambda o: SCHEDULES.LambdaLR(o, lambda step: 0.0),
        lambda o: SCHEDULES.ReduceLROnPlateau(o, min_lr=0.02),
    ],
)
def test_schedules_that_keep_trions_two_rates_apart_are_taken(schedule):
    optimizer, parameters = two_groups()
    schedule(optimizer)
    stepped(optimizer, parameters)
