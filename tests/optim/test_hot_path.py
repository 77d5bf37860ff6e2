"""The hot path asks the host for nothing, and a compiler can see through it.

No GPU is needed to see a synchronisation: tensors on the meta device have shapes and no values, so whatever waits for a
value raises.
"""

import weakref
from dataclasses import dataclass

import pytest
import torch
from every_preset import PRESETS, WHOLE, of_rank
from pairwise import pairwise
from step_costs import kept_in, step_costs
from torch import nn

from lightspan.optim.low_rank import bases
from lightspan.optim.low_rank.bases import DCTBasis, Every, Trigger
from lightspan.optim.low_rank.core import Projected, update_weights
from lightspan.optim.low_rank.gradients import attach
from lightspan.optim.low_rank.inner import SGD, AdamSettings, NewtonSchulz
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.presets import APOLLO, APOLLOMini, DCTAdamW, GaLore, LDAdam, Trion
from lightspan.optim.low_rank.residuals import Apollo, ErrorFeedback, Fira
from lightspan.optim.matrices import buckets
from lightspan.optim.matrices.elementwise import SMALLEST_QUANTISED
from lightspan.optim.matrices.moments import BFloat16Moments, Float32Moments, Int8Moments
from lightspan.optim.matrices.stacks import Layout
from lightspan.optim.muon import Dion2, Muon
from lightspan.subspaces import frames
from lightspan.triton_kernels import backproject_update, error_feedback, tiles
from lightspan.triton_kernels.project import project

RULES = {
    "default": {},
    "dropped": {"residual": None},
    "apollo": {"residual": Apollo()},
    "feedback": {"residual": ErrorFeedback("int8"), "basis": DCTBasis()},
    "orthogonalised": {"inner": NewtonSchulz(), "residual": ErrorFeedback(kept=0.9)},
    "momentum": {"inner": SGD()},
    "int8": {"moments": Int8Moments()},
    "bfloat16 moments": {"moments": BFloat16Moments()},
}


@pytest.mark.sample(6)
@pairwise(rule=[*RULES, *WHOLE], dtype=[torch.float32, torch.bfloat16], refresh=[10**6, 1])
def test_a_step_never_waits_for_the_device(rule, dtype, refresh):
    weights = [nn.Parameter(torch.empty(32, 16, dtype=dtype, device="meta")) for _ in range(3)]
    weights += [nn.Parameter(torch.empty(16, 32, dtype=dtype, device="meta"))]  # vectors are torch.optim.AdamW's
    options = {"lr": 1e-3, "max_norm": 1.0, "weight_decay": 0.1, "check_finite": False}
    if rule in WHOLE:
        optimizer = rule(weights, moments=Int8Moments(), **options)
    else:
        optimizer = LowRank(weights, rank=4, refresh=refresh, **options, **RULES[rule])
    optimizer.param_groups[0]["lr"] = torch.full(
        (), 1e-3, device="meta"
    )  # as a scheduler for captured graphs leaves it
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
    assert all(value.is_meta for weight in weights for key, value in optimizer.state[weight].items() if key != "step")


def test_the_check_for_finite_gradients_is_what_waits():
    weight = nn.Parameter(torch.empty(32, 16, device="meta"))
    optimizer = LowRank([weight], rank=4)
    weight.grad = torch.empty_like(weight)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        optimizer.step()


COMPILED = {
    "adam": {"rank": 3, "residual": Fira()},
    "newton-schulz": {"rank": 3, "inner": NewtonSchulz(), "residual": ErrorFeedback(kept=0.5)},
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("rule", COMPILED)
def test_the_second_half_of_a_step_compiles_as_one_graph(rule):
    torch.manual_seed(0)
    weights = [torch.randn(8, 6) for _ in range(2)]
    optimizer = LowRank([nn.Parameter(w) for w in weights], **COMPILED[rule])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    bucket = optimizer.buckets()[0]
    gradients = [torch.randn(8, 6) for _ in range(2)]
    results = []
    for run in (update_weights, torch.compile(update_weights, fullgraph=True, backend="aot_eager")):
        moved, state = [w.clone() for w in weights], {key: value.clone() for key, value in bucket.state.items()}
        coordinates, energy = optimizer.rule.basis.project(gradients, state, bucket.layout, energy=True)
        projected = Projected(list(gradients), coordinates, energy, [], state)
        run(
            moved, state, bucket.layout, optimizer.rule, projected,
            AdamSettings((0.9, 0.99), 1e-8, torch.tensor(1)),
            lr=torch.tensor(0.1), keep=torch.tensor(0.99), clip=torch.tensor(0.5),
        )  # fmt: skip
        results.append([*moved, *state.values()])
    for straight, compiled in zip(*results, strict=True):
        torch.testing.assert_close(straight, compiled)


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", WHOLE, ids=lambda kind: kind.__name__)
def test_a_step_of_whole_matrices_compiles_as_one_graph(kind):
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(8, 6)) for _ in range(2)]
        optimizer = kind(weights, lr=0.1, weight_decay=0.1, moments=Float32Moments())
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
        (bucket,) = optimizer.buckets()
        apply = optimizer.step_of(bucket).apply
        apply = torch.compile(apply, fullgraph=True, backend="aot_eager") if compiled else apply
        with torch.no_grad():
            apply([weight.detach() for weight in weights], torch.tensor(0.5))
        results.append([*weights, *bucket.state.values()])
    for straight, traced in zip(*results, strict=True):
        torch.testing.assert_close(straight, traced)


@pytest.mark.sweep  # tracing a step takes seconds
@pytest.mark.parametrize("residual", [Fira(), None])
def test_a_compiled_step_has_fewer_than_four_graphs_and_none_is_new_after_the_second_refresh(residual):
    torch.compiler.reset()
    graphs = []

    def make():
        weights = [nn.Parameter(torch.ones(shape)) for shape in ((12, 8), (12, 8), (8,))]
        schedule = Every(3, staggered=False)
        return weights, LowRank(weights, lr=0.1, rank=4, residual=residual, refresh=schedule, check_finite=False)

    (weights, plain), (twins, optimizer) = make(), make()
    compiled = torch.compile(optimizer.step, backend=kept_in(graphs))
    generator, counts = torch.Generator().manual_seed(0), []
    for number in range(11):
        for weight, twin in zip(weights, twins, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator)
            twin.grad = weight.grad.clone()
        plain.step()
        (compiled if number else optimizer.step)()  # the first step chooses all frames, from random ones
        counts.append(len(graphs))
    assert 2 <= counts[-1] < 4
    assert counts[6] == counts[-1]
    for weight, twin in zip(weights, twins, strict=True):  # the graph may round numbers that it makes constants
        torch.testing.assert_close(twin, weight, rtol=1e-5, atol=1e-5)


def counted_steps(make, steps, absent=()):
    """What the last of some steps of four matrices and a vector costs."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(s, generator=generator)) for s in (*[(12, 8)] * 4, (8,))]
    optimizer = make(weights)
    for _ in range(steps):
        for i, weight in enumerate(weights):
            weight.grad = None if i in absent else torch.randn(weight.shape, generator=generator)
        with step_costs(stacks(optimizer)) as costs:
            optimizer.step()
    return costs


def stacks(optimizer):
    """All state of what is projected."""
    return [tensor for bucket in optimizer.buckets() for tensor in bucket.state.values()]


@pytest.mark.parametrize("absent", [(), (3,), (1,)], ids=["all", "the last missing", "a middle one missing"])
def test_a_steady_step_copies_state_only_where_matrices_are_missing(absent):
    costs = counted_steps(lambda weights: LowRank(weights, rank=4, refresh=10**6), 2, absent)
    assert (costs.copied_state > 0) == (absent == (1,))  # neighbours in the stack are stepped where they are


@pytest.mark.parametrize("backward", ["hooks", "projected"])
def test_asking_whether_a_frame_is_due_copies_no_state(backward):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    optimizer = LowRank(net.parameters(), rank=4, residual=None, refresh=100, backward=backward)
    attach(net, optimizer)
    for _ in range(3):
        with step_costs(stacks(optimizer)) as costs:
            net(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert costs.copied_state == 0


OWN_SCHEDULE = (LDAdam, Trion, *WHOLE)
SHAPES = [(64, 48), (48, 64), (80, 48), (96, 32), (40, 72), (56, 56)]
DTYPES = [torch.float32, torch.bfloat16]


def every_kind():
    assert {LDAdam, Trion, DCTAdamW} < set(PRESETS)
    return [LowRank, *PRESETS]


def costs_of(kind, dtype, device, refresh=10**6, matrices=SHAPES[:2], vectors=1, sizes=(7,), **options):
    """What the second step of two matrices of each shape and some vectors costs."""
    shapes = [*matrices * 2, *[(size,) for size in sizes] * vectors]
    weights = [nn.Parameter(torch.ones(shape, dtype=dtype, device=device)) for shape in shapes]
    options |= of_rank(kind, 4)
    options |= {} if kind in OWN_SCHEDULE else {"refresh": Every(refresh, staggered=False)}
    optimizer = kind(weights, lr=1e-3, weight_decay=0.1, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight)
        with step_costs(stacks(optimizer)) as costs:
            optimizer.step()
    return costs


@pytest.mark.sample(6)
@pairwise(kind=every_kind(), dtype=DTYPES, max_norm=[None, 1.0], refresh=[10**6, 1])
def test_a_step_exchanges_nothing_with_the_host_but_its_check_for_finite_gradients(kind, dtype, max_norm, refresh):
    sent = 2 if refresh == 1 and kind in (APOLLO, APOLLOMini) else 0  # the host draws: the matrices of either shape
    for check in (False, True):
        costs = costs_of(kind, dtype, "meta", refresh, check_finite=check, max_norm=max_norm)
        assert (costs.to_device, costs.from_device) == (sent, int(check))


@dataclass(frozen=True)
class These(Trigger):
    """Always the same matrices of a stack."""

    positions: tuple[int, ...]

    def due(self, asked, steps, phases):
        return [i for i in asked if i in self.positions]


@pytest.mark.sample(4)
@pytest.mark.parametrize("due", [(1,), (0, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("kind", [LowRank, GaLore, APOLLO, DCTAdamW])
def test_changing_some_frames_copies_the_state_of_no_other_matrix(kind, due):
    def copied(count):
        weights = [nn.Parameter(torch.ones(12, 8, device="meta")) for _ in range(count)]
        optimizer = kind(weights, rank=4, refresh=These(due))
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.empty_like(weight)
            with step_costs(stacks(optimizer)) as costs:
                optimizer.step()
        return costs.copied_state

    assert copied(4) == copied(9)


def test_copies_are_counted_wherever_they_hide():
    there = torch.ones(3, device="meta")
    hidden = {
        "a list": lambda: torch.tensor([1.0, 2.0], device="meta"),
        "a number": lambda: there.new_tensor(1.0),
        "a tensor": lambda: torch.ones(3).to("meta"),
        "into a tensor": lambda: there.copy_(torch.ones(3)),
        "an operand": lambda: there[torch.zeros(2, dtype=torch.int64)],
        "an index": lambda: there[[0, 2]],
        "a written index": lambda: there.__setitem__([0, 2], 1.0),
    }
    for copy in hidden.values():
        with step_costs() as costs:
            copy()
        assert (costs.to_device, costs.from_device) == (1, 0)
    for read in (there[0].item, lambda: bool(there[0]), there.tolist, there.cpu, lambda: float(there[0])):
        with step_costs() as costs:
            read()
        assert (costs.to_device, costs.from_device) == (0, 1)
    with step_costs() as costs:
        there.mul(2.0).add_(torch.tensor(1.0)).fill_(3.0)[1:].zero_()
        torch.full((), 2.0, device="meta")
    assert (costs.to_device, costs.from_device, costs.kernels.total()) == (0, 0, 5)


@pytest.mark.sample(6)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", every_kind())
def test_parameters_outside_the_frames_take_the_same_kernels_however_many_there_are(kind, dtype):
    few, many = (costs_of(kind, dtype, "meta", vectors=count, max_norm=1.0).kernels for count in (1, 9))
    assert few == many


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moments", [BFloat16Moments(), Int8Moments()])
def test_so_do_those_whose_moments_are_narrow(moments, dtype):
    few, many = (
        costs_of(LowRank, dtype, "meta", vectors=count, sizes=(7, SMALLEST_QUANTISED), moments=moments).kernels
        for count in (1, 9)
    )
    assert few == many


@pytest.mark.sample(4)
@pairwise(
    kind=[kind for kind in every_kind() if kind not in WHOLE], dtype=DTYPES, refresh=[10**6, 1], device=["cpu", "meta"]
)
def test_temporaries_of_a_step_are_less_than_half_of_a_float32_copy_of_its_gradients(
    kind, dtype, refresh, device, monkeypatch
):
    # Tiles that are as small beside these matrices as those of the CPU paths are beside a network's.
    monkeypatch.setattr(backproject_update, "WINDOW", 512)
    monkeypatch.setattr(error_feedback, "WINDOW", 512)
    monkeypatch.setattr(tiles, "CACHED", 512)
    costs = costs_of(kind, dtype, device, refresh, SHAPES, max_norm=1.0)
    assert 0 < costs.peak < 0.5 * sum(2 * 4 * rows * columns for rows, columns in SHAPES)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_adding_and_storing_an_error_takes_a_few_tiles_however_long_a_matrix_is(precision, monkeypatch):
    monkeypatch.setattr(error_feedback, "WINDOW", 512)

    def peaks(rows):
        residual, layout = (
            ErrorFeedback(precision),
            Layout(rows, 64, 4, False, torch.float32, torch.device("cpu"), (0,)),
        )
        state, gradient, one = residual.initial(layout), torch.ones(rows, 64), torch.ones(())
        coordinates, frame = torch.ones(1, rows, 4), torch.ones(1, 64, 4)
        with step_costs() as adding:
            sums = residual.accumulate([gradient], state, one)
        with step_costs() as storing:
            residual.remember(sums, coordinates, frame, None, state, (0.9, 0.99))
        return adding.peak - sums[0].nbytes, storing.peak

    assert peaks(24) == peaks(240)


@pytest.mark.sample(3)
@pairwise(kind=WHOLE, dtype=DTYPES, device=["cpu", "meta"])
def test_temporaries_of_whole_matrices_are_a_few_copies_of_those_that_step_at_once(kind, dtype, device, monkeypatch):
    largest = max(rows * columns for rows, columns in SHAPES)
    monkeypatch.setattr(buckets, "LARGEST_STACK", largest)
    costs = costs_of(kind, dtype, device, max_norm=1.0)
    assert 0 < costs.peak < 8 * 4 * largest


@pytest.mark.parametrize("kind", [Muon, LDAdam, Trion])
def test_stacks_of_rules_that_project_late_are_cut_and_step_as_one(kind, monkeypatch):
    def trained():
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(12, 8)) for _ in range(5)]
        optimizer = kind(weights, lr=0.1, **of_rank(kind, 4))
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(12, 8)
            optimizer.step()
        return weights, [bucket.layout.batch for bucket in optimizer.buckets()]

    whole, batches = trained()
    assert batches == [5]
    monkeypatch.setattr(buckets, "LARGEST_STACK", 200)
    cut, batches = trained()
    assert batches == [2, 2, 1]
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other)
    monkeypatch.setattr(buckets, "LARGEST_STACK", 1)
    assert trained()[1] == [1] * 5


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", [kind for kind in every_kind() if kind not in WHOLE])
def test_products_with_frames_read_bfloat16_where_weights_are_bfloat16(kind, monkeypatch):
    read = set()

    def watched(gradients, frame_BNR, energy):
        read.add(gradients[0].dtype)
        return project(gradients, frame_BNR, energy)

    for module in (bases, frames):
        monkeypatch.setattr(module, "project", watched)
    costs_of(kind, torch.bfloat16, "meta", refresh=1)
    assert read == {torch.bfloat16}


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", [kind for kind in every_kind() if kind is not Dion2])  # which gathers columns to step
def test_choosing_every_frame_again_copies_no_state(kind):
    assert costs_of(kind, torch.float32, "meta", refresh=1).copied_state == 0


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_error_feedback_holds_the_sums_of_one_shape_at_a_time(monkeypatch, max_norm):
    alive, accumulate = [], ErrorFeedback.accumulate

    def watched(self, *arguments):
        assert not any(reference() is not None for reference in alive)
        sums = accumulate(self, *arguments)
        alive[:] = [weakref.ref(matrix) for matrix in sums]
        return sums

    monkeypatch.setattr(ErrorFeedback, "accumulate", watched)
    weights = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((12, 8), (9, 7), (16, 6))]
    optimizer = LowRank(weights, rank=2, residual=ErrorFeedback("int8"), max_norm=max_norm)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert len(alive) == 1
