"""The hot path asks the host for nothing, and a compiler can see through it.

No GPU is needed to see a synchronisation: tensors on the meta device have shapes and no values, so whatever waits for a
value raises.
"""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightspan.experiments.kronecker_bases import HadamardBasis, KroneckerDCTBasis
from lightspan.optim.bases import DCTBasis, WholeBasis
from lightspan.optim.core import Projected, update_weights
from lightspan.optim.gradients import attach
from lightspan.optim.inner import (
    SGD,
    AdamSettings,
    FactoredNewtonSchulz,
    MomentumNewtonSchulz,
    NeuronNewtonSchulz,
    NewtonSchulz,
    SelectiveNewtonSchulz,
)
from lightspan.optim.low_rank import LowRank
from lightspan.optim.moments import BFloat16Moments, Int8Moments
from lightspan.optim.presets import DCTAdamW, Dion2, FactoredMuon, LDAdam, Muon, NorMuon, Trion
from lightspan.optim.residuals import Apollo, ErrorFeedback, Fira

RULES = {
    "default": {},
    "dropped": {"residual": None},
    "apollo": {"residual": Apollo()},
    "feedback": {"residual": ErrorFeedback("int8"), "basis": DCTBasis()},
    "hadamard": {"basis": HadamardBasis(), "residual": None},
    "kronecker": {"basis": KroneckerDCTBasis()},
    "orthogonalised": {"inner": NewtonSchulz(), "residual": ErrorFeedback(kept=0.9)},
    "momentum": {"inner": SGD()},
    "muon": {"inner": MomentumNewtonSchulz(), "basis": WholeBasis(), "residual": None, "moments": Int8Moments()},
    "normuon": {"inner": NeuronNewtonSchulz(), "basis": WholeBasis(), "residual": None},
    "factored": {"inner": FactoredNewtonSchulz(), "basis": WholeBasis(), "residual": None, "moments": Int8Moments()},
    "dion2": {"inner": SelectiveNewtonSchulz(), "basis": WholeBasis(), "residual": None},
    "int8": {"moments": Int8Moments()},
    "bfloat16 moments": {"moments": BFloat16Moments()},
}


@pytest.mark.parametrize("refresh", [10**6, 1], ids=["steady", "refreshing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_never_waits_for_the_device(rule, dtype, refresh):
    weights = [nn.Parameter(torch.empty(32, 16, dtype=dtype, device="meta")) for _ in range(3)]
    weights += [nn.Parameter(torch.empty(16, 32, dtype=dtype, device="meta"))]  # vectors are torch.optim.AdamW's
    optimizer = LowRank(
        weights, lr=1e-3, rank=4, refresh=refresh, max_norm=1.0, weight_decay=0.1, check_finite=False, **RULES[rule]
    )
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
    "normuon": {"inner": NeuronNewtonSchulz(), "basis": WholeBasis(), "residual": None},
    "factored": {"inner": FactoredNewtonSchulz(), "basis": WholeBasis(), "residual": None},
    "dion2": {"inner": SelectiveNewtonSchulz(), "basis": WholeBasis(), "residual": None},
}


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


class Counted(TorchDispatchMode):
    """Bytes that gathers write, and how many tensors came from lists on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered, self.from_host = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default):
            self.gathered += out.nbytes
        self.from_host += func is torch.ops.aten.lift_fresh.default  # what torch.tensor(list) makes
        return out


def counted_steps(make, steps, absent=()):
    """What the last of some steps of four matrices and a vector costs."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(s, generator=generator)) for s in (*[(12, 8)] * 4, (8,))]
    optimizer = make(weights)
    for _ in range(steps):
        for i, weight in enumerate(weights):
            weight.grad = None if i in absent else torch.randn(weight.shape, generator=generator)
        with Counted() as counted:
            optimizer.step()
    return counted, optimizer


@pytest.mark.parametrize("absent", [(), (3,), (1,)], ids=["all", "the last missing", "a middle one missing"])
def test_a_steady_step_sends_nothing_from_the_host_and_copies_state_only_where_matrices_are_missing(absent):
    counted, _ = counted_steps(lambda weights: LowRank(weights, rank=4, refresh=8), 9, absent)  # one frame is due
    assert counted.from_host == 0
    assert (counted.gathered > 0) == (absent == (1,))  # neighbours in the stack are stepped where they are


@pytest.mark.parametrize("preset", [Muon, NorMuon, FactoredMuon, Dion2])
def test_whole_matrices_gather_nothing_and_send_nothing_from_the_host(preset):
    counted, _ = counted_steps(preset, 3)
    assert (counted.gathered, counted.from_host) == (0, 0)


@pytest.mark.parametrize("preset", [LDAdam, Trion, DCTAdamW])
def test_choosing_every_frame_in_every_step_copies_no_moments(preset):
    counted, optimizer = counted_steps(lambda weights: preset(weights, lr=1e-3, rank=4), 3)
    assert counted.from_host == 0
    frames = sum(b.layout.batch * b.layout.size * b.layout.rank * 4 for b in optimizer.buckets())
    # Selected columns are one gather of frames a step, whatever reads them.
    assert counted.gathered == (0 if preset is LDAdam else frames)


@pytest.mark.parametrize("backward", ["hooks", "projected"])
def test_asking_whether_a_frame_is_due_copies_no_state(backward):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    optimizer = LowRank(net.parameters(), rank=4, residual=None, refresh=100, backward=backward)
    attach(net, optimizer)
    for _ in range(3):
        with Counted() as counted:
            net(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (counted.gathered, counted.from_host) == (0, 0)


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
