"""State on the host: the same steps and checkpoints, each byte copied once each way, two transfers at a time, no races.

There is no GPU here. The meta device stands for one where copies are counted; where numbers matter, the host plays the
device as well, with streams that only record who knows of what.
"""

import copy
import dataclasses
import io
from pathlib import Path
from unittest import mock

import pytest
import rank_processes
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from every_preset import PRESETS, of_rank
from pairwise import pairwise
from step_costs import kept_in, step_costs
from stream_races import Streams, Watch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.reductions import StorageWeakRef

from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.core.sharded import local, with_part
from lightspan.optim.low_rank.bases import Every, PowerBasis
from lightspan.optim.low_rank.gradients import attach
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.presets import DCTAdamW, GaLore, LDAdam
from lightspan.optim.matrices import placement
from lightspan.optim.matrices.moments import BFloat16Moments, Int8Moments
from lightspan.optim.muon import FactoredMuon, Muon
from lightspan.training.strategies import shard_blocks

KINDS = [LowRank, *PRESETS]
SHAPES = [(24, 16), (16, 24), (24, 16), (20, 12), (24, 16), (3, 4), (7,), (30,)]
OF_FRAMES = {"frame", "columns", "draws"}


@pytest.fixture
def everywhere(monkeypatch):
    """The host plays the device, and no parameter is too small."""
    monkeypatch.setattr(placement, "has_host", lambda device: True)
    monkeypatch.setattr(placement, "SMALLEST_OFFLOADED", 0)


def parameters(dtype=torch.float32, device="cpu", shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def made(kind, weights, **options):
    options |= of_rank(kind, 4)
    return kind([{"params": weights[:-1]}, {"params": weights[-1:]}], weight_decay=0.1, **options)


def train(optimizer, weights, steps, absent=()):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for i, weight in enumerate(weights):
            gradient = torch.randn(weight.shape, generator=generator).to(weight)
            weight.grad = None if step in absent and i in absent[step] else gradient
        optimizer.step()


def away(optimizer):
    """What should be on the host, by the meaning of the names of state alone."""
    return [
        local(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if key not in OF_FRAMES | {"step"} and parameter.numel() >= placement.SMALLEST_OFFLOADED
    ]


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def equal(one, other):
    """Whether two optimisers keep the same state, bit for bit."""
    states = zip(*(list(optimizer.state_dict()["state"].values()) for optimizer in (one, other)), strict=True)
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in states)


@pytest.mark.sample(6)
@pairwise(kind=KINDS, dtype=[torch.float32, torch.bfloat16], on=[True, False])
def test_what_is_on_the_host_is_copied_once_each_way_in_a_step_and_nothing_else_is(kind, dtype, on, monkeypatch):
    monkeypatch.setattr(placement, "LARGEST_TRANSFER", 4096)
    monkeypatch.setattr(placement, "SMALLEST_OFFLOADED", 20)
    weights = parameters(dtype, "meta")
    optimizer = made(kind, weights, offload=on, check_finite=False, max_norm=1.0)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        with step_costs() as costs:
            optimizer.step()
    hosted = away(optimizer)
    expected = nbytes(hosted) if on else 0
    assert (costs.bytes_to_device, costs.bytes_from_device) == (expected, expected)
    assert costs.to_device == costs.from_device
    assert (costs.to_device > 0) == on
    assert {value.device.type for value in hosted} == {"cpu" if on else "meta"}
    every = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    rest = [value for value in every if all(value is not tensor for tensor in hosted)]
    assert rest
    assert all(value.is_meta for value in rest)


@pytest.mark.parametrize("kind", [LowRank, DCTAdamW, Muon])
def test_at_most_two_transfers_are_on_the_device_and_no_larger_than_they_must_be(kind, monkeypatch):
    monkeypatch.setattr(placement, "LARGEST_TRANSFER", 3000)
    monkeypatch.setattr(placement, "SMALLEST_OFFLOADED", 20)
    monkeypatch.setattr(placement, "ALIGNMENT", 1)
    run, slots, sizes = placement._run_offloaded, set(), []

    def watched(transfer):
        def apply(states):
            guests = [state[key] for state, names in zip(states, transfer.offloaded, strict=True) for key in names]
            slots.update(StorageWeakRef(guest.untyped_storage()) for guest in guests)
            there = [slot for slot in slots if not slot.expired()]
            assert len(there) <= 2
            sizes.append(nbytes(guests))
            assert sum(guest.untyped_storage().nbytes() for guest in guests[:1]) < 3000
            transfer.apply(states)

        return dataclasses.replace(transfer, apply=apply)

    monkeypatch.setattr(placement, "_run_offloaded", lambda device, transfers: run(device, [*map(watched, transfers)]))
    weights = parameters(device="meta")
    optimizer = made(kind, weights, offload=True, check_finite=False)
    with step_costs():
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
    assert len(sizes) > 3
    assert sum(sizes) == nbytes(away(optimizer))


RULES = {
    **{kind.__name__: (kind, {}) for kind in KINDS},
    "int8": (LowRank, {"moments": Int8Moments()}),
    "bfloat16 moments": (LowRank, {"moments": BFloat16Moments(), "residual": None}),
    "Muon int8": (Muon, {"moments": Int8Moments()}),
}


@pytest.mark.sample(10)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_steps_and_state_are_the_same_bit_for_bit(rule, dtype, everywhere):
    kind, options = RULES[rule]
    owner = {"max_norm": 1.0, **options}
    if kind in (LowRank, GaLore):
        owner["refresh"] = Every(2)
    (weights, plain), (others, hosted) = (
        (own := parameters(dtype), made(kind, own, offload=on, **owner)) for on in (False, True)
    )
    for optimizer, own in ((plain, weights), (hosted, others)):
        train(optimizer, own, range(5), absent={2: (0, 6), 3: (2, 5)})  # also one in the middle of a stack
    assert any(bucket.offloaded for bucket in hosted.buckets())
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert equal(plain, hosted)


@pytest.mark.parametrize("kind", [LowRank, DCTAdamW, Muon])
def test_stacks_that_are_cut_to_visit_step_as_one(kind, everywhere, monkeypatch):
    weights, others = parameters(), parameters()
    plain, hosted = made(kind, weights), made(kind, others, offload=True)
    train(plain, weights, range(4))
    monkeypatch.setattr(placement, "LARGEST_TRANSFER", 1)
    train(hosted, others, range(4))
    assert max(len(bucket.parameters) for bucket in plain.buckets()) > 1
    assert {len(bucket.parameters) for bucket in hosted.buckets()} == {1}
    for one, other in zip(weights, others, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_on_the_host_notice_nothing(kind, monkeypatch):
    monkeypatch.setattr(placement, "LARGEST_TRANSFER", 1)
    monkeypatch.setattr(placement, "_run_offloaded", None)
    weights, others = parameters(), parameters()
    plain, switched = made(kind, weights), made(kind, others, offload=True)
    train(plain, weights, range(3))
    train(switched, others, range(3))
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert equal(plain, switched)
    assert len(plain.buckets()) == len(switched.buckets())


@pytest.mark.parametrize("backward", ["hooks", "projected"])
def test_backward_passes_that_project_find_their_frames(backward, everywhere):
    results = []
    for on in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
        optimizer = LowRank(net.parameters(), rank=3, residual=None, refresh=3, backward=backward, offload=on)
        attach(net, optimizer)
        for step in range(5):
            net(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([parameter.detach().clone() for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", [LowRank, LDAdam, FactoredMuon])
@pytest.mark.parametrize("on", [True, False])
def test_a_checkpoint_continues_with_the_switch_and_without_it(kind, on, everywhere):
    """Also in bfloat16, whose roundings follow from the number of steps taken."""
    weights = parameters(torch.bfloat16)
    optimizer = made(kind, weights, offload=on)
    train(optimizer, weights, range(3))
    file = io.BytesIO()
    torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, file)
    train(optimizer, weights, range(3, 6))
    for switched in (True, False):
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        again = saved["weights"]
        resumed = made(kind, again, offload=switched)
        resumed.load_state_dict(saved["optimizer"])
        train(resumed, again, range(3, 6))
        assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
        assert equal(optimizer, resumed)


def test_the_two_largest_transfers_may_be_there_at_once(monkeypatch):
    host, sizes = placement.HostState(frozenset({"stays"})), (6000, 5000, 9000, 10)
    state = {nn.Parameter(torch.empty(n)): {"stays": torch.empty(n), "goes": torch.empty(n)} for n in sizes}
    assert host.sizes(state) == (4 * 20_000, 4 * 20_000)  # less than is sent at once
    monkeypatch.setattr(placement, "LARGEST_TRANSFER", 4 * 7000)
    assert host.sizes(state) == (4 * 20_000, 4 * 16_000)
    monkeypatch.setattr(placement, "LARGEST_TRANSFER", 1)
    assert host.sizes(state) == (4 * 20_000, 4 * 15_000)
    assert placement.StatePlacement().sizes(state) == (0, 0)


def test_state_that_others_moved_to_the_device_goes_home():
    """Lightning does so when it has loaded a checkpoint."""
    weights = parameters(device="meta", shapes=[(96, 64), (5000,), (7,)])
    optimizer = LowRank(weights, rank=4, offload=True, check_finite=False)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        with step_costs():
            optimizer.step()
            hosted = away(optimizer)
            assert len(hosted) == 6
            assert all(value.device.type == "cpu" for value in hosted)
            for state in optimizer.state.values():
                state.update({key: value.to("meta") for key, value in state.items()})
    assert all(value.is_meta for value in away(optimizer))


def test_loading_puts_state_where_it_lives():
    weights = parameters(device="meta", shapes=[(96, 64), (5000,), (7,)])
    optimizer = LowRank(weights, rank=4, offload=True, check_finite=False)
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    with step_costs():
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(value.device.type == "cpu" for value in away(optimizer))
    assert optimizer.state[weights[0]]["frame"].is_meta
    assert optimizer.state[weights[1]]["step"].is_meta
    assert all(value.is_meta for value in optimizer.state[weights[2]].values())


def test_copies_of_an_optimiser_keep_the_switch(everywhere):
    weights = parameters()
    optimizer = made(LowRank, weights, offload=True)
    train(optimizer, weights, range(2))
    twins, twin = copy.deepcopy((weights, optimizer))
    train(optimizer, weights, range(2, 4))
    train(twin, twins, range(2, 4))
    assert any(bucket.offloaded for bucket in twin.buckets())
    assert all(torch.equal(a, b) for a, b in zip(weights, twins, strict=True))


def raced(kind, monkeypatch, left_out=None):
    """The streams of the second step, and the state that is away."""
    weights = parameters(torch.bfloat16)
    optimizer = made(kind, weights, offload=True)
    train(optimizer, weights, range(1))
    streams = Streams(left_out)
    monkeypatch.setattr(placement, "streams_of", lambda device: streams)
    with Watch(streams):
        optimizer.step()
    return streams, away(optimizer)


@pytest.mark.parametrize("kind", [LowRank, DCTAdamW, FactoredMuon])
def test_no_two_streams_meet_and_at_the_end_the_host_may_read_everything(kind, everywhere, monkeypatch):
    monkeypatch.setattr(placement, "LARGEST_TRANSFER", 2000)
    streams, hosted = raced(kind, monkeypatch)
    assert streams.made == 4  # two for the matrices, two for the rest
    assert streams.waits > 9
    assert streams.races == []
    assert hosted
    assert streams.host_knows(hosted)
    assert streams.host_knows(streams.slots)


def test_every_wait_is_needed(everywhere, monkeypatch):
    monkeypatch.setattr(placement, "LARGEST_TRANSFER", 2000)
    waits = raced(LowRank, monkeypatch)[0].waits
    for number in range(waits):
        assert raced(LowRank, monkeypatch, number)[0].races, number


def test_a_step_that_fails_leaves_no_copy_under_way(everywhere, monkeypatch):
    monkeypatch.setattr(placement, "LARGEST_TRANSFER", 2000)
    weights = parameters()
    optimizer = made(LowRank, weights, offload=True)
    train(optimizer, weights, range(1))
    streams = Streams()
    monkeypatch.setattr(placement, "streams_of", lambda device: streams)
    bucket = optimizer.buckets()[1]
    bucket.group = {}  # which has no rate
    with Watch(streams), pytest.raises(KeyError):
        optimizer.step()
    assert streams.waits > 3
    assert streams.host_knows(away(optimizer))
    assert streams.host_knows(streams.slots)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(13, 9), nn.Tanh(), nn.Linear(9, 20))

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return self.layers(x_BD)


SHARDED = {"LowRank": lambda p, on: LowRank(p, rank=3, refresh=2, max_norm=0.5, moments=Int8Moments(), offload=on)}
SHARDED["Muon"] = lambda p, on: Muon(p, offload=on)


def sharded(mesh, build, on):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.LayerNorm(20), nn.Linear(20, 4))
    shard_blocks(model, mesh)
    return model, build(model.named_parameters(), on)


def sharded_steps(model, optimizer, steps):
    for step in steps:
        model(torch.randn(8, 13, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [local(parameter).clone() for parameter in model.parameters()]


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2)
    mesh, out = init_device_mesh("cpu", (2,)), {}
    everywhere = mock.patch.multiple(
        placement, has_host=lambda device: True, SMALLEST_OFFLOADED=0, LARGEST_TRANSFER=1 << 12
    )
    with everywhere:
        for name, build in SHARDED.items():
            weights = {}
            for on in (False, True):
                model, optimizer = sharded(mesh, build, on)
                sharded_steps(model, optimizer, range(3))
                saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
                dcp.save(saved, checkpoint_id=Path(folder, f"{name} {on}"))
                weights[on] = sharded_steps(model, optimizer, range(3, 5))
                out[name, "away", on] = sum(len(bucket.offloaded) for bucket in optimizer.buckets())
            for before, after in ((True, False), (False, True)):
                model, optimizer = sharded(mesh, build, after)
                found = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
                dcp.load(found, checkpoint_id=Path(folder, f"{name} {before}"))
                set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
                weights[before, after] = sharded_steps(model, optimizer, range(3, 5))
            out[name, "equal"] = [
                all(torch.equal(a, b) for a, b in zip(weights[False], other, strict=True)) for other in weights.values()
            ]
    torch.save(out, Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.mark.ranks
def test_shards_step_and_resume_the_same_bit_for_bit(tmp_path):
    rank_processes.start(one_rank, 2, str(tmp_path))
    for index in range(2):
        out = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        for name in SHARDED:
            assert out[name, "equal"] == [True] * 4
            assert out[name, "away", False] == 0
            assert out[name, "away", True] > 0


def test_a_part_of_a_sharded_tensor_may_be_on_another_device_than_its_mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        like = DTensor.from_local(torch.zeros(3, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
        part = torch.empty(3, 2, device="meta")
        found = with_part(like, part)
        assert found.device.type == "meta"
        assert (found.shape, found.placements, found.device_mesh) == (like.shape, like.placements, like.device_mesh)
        held = torch.ones(3, 2)
        with_part(like, held).mul_(2)
        assert torch.equal(held, torch.full((3, 2), 2.0))
    finally:
        end_process_group()
    assert with_part(torch.zeros(1), part) is part


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_the_switch_is_a_switch(value):
    with pytest.raises(UserError, match=f"LowRank offload={value!r} must be True or False"):
        LowRank(parameters(), rank=4, offload=value)


def test_frames_that_follow_moments_before_the_step_are_refused():
    with pytest.raises(UserError, match=r"offload=True keeps moments on the host .* set momentum=0"):
        LowRank(parameters(), rank=4, basis=PowerBasis(momentum=0.5), offload=True)
    LowRank(parameters(), rank=4, basis=PowerBasis(momentum=0.5))
    LDAdam(parameters(), rank=4, offload=True)


@pytest.mark.sweep  # tracing a step takes seconds
def test_a_compiled_step_is_the_same_with_state_on_the_host(everywhere):
    torch.compiler.reset()
    graphs = []
    weights, others = parameters(shapes=SHAPES[:2]), parameters(shapes=SHAPES[:2])
    plain = LowRank(weights, rank=4, check_finite=False)
    hosted = LowRank(others, rank=4, check_finite=False, offload=True)
    compiled = torch.compile(hosted.step, backend=kept_in(graphs))
    for step in range(4):
        for weight, other in zip(weights, others, strict=True):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            other.grad = weight.grad.clone()
        plain.step()
        (compiled if step else hosted.step)()
    assert graphs
    for one, other in zip(weights, others, strict=True):  # the graph may round numbers that it makes constants
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
