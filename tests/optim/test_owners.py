"""Owners: two and three ranks divide a step and take that of one process, bit for bit, whatever the optimiser.

One set of processes for each number of ranks does all that the tests look at.
"""

import copy
import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
import torch.distributed as dist
from every_preset import PRESETS, of_rank
from lightning import Trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.core.memory import state_bytes
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.presets import Trion
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.optim.matrices.moments import BFloat16Moments, Float32Moments
from lightspan.optim.matrices.newton_schulz import operations
from lightspan.optim.matrices.owners import bytes_of, divided, fullest_rank
from lightspan.optim.muon import FactoredMuon, Muon
from lightspan.optim.virtual import virtual_steps
from lightspan.training.method import Method

SHAPES = [(24, 16), (16, 24), (24, 16), (12, 40), (6, 3, 2, 4), (2, 10, 8), (64, 80), (9,)]
"""Matrices, two of one shape; a convolution; a stack; a table for AdamW, so large that one rank owns it; a vector."""
VECTOR = 7
STEPS, SAVED = 3, 1
RULES: dict[str, Callable[..., MatrixOptimizer]] = {
    **{kind.__name__: lambda p, kind=kind, **own: kind(p, **of_rank(kind, 4), **own) for kind in (LowRank, *PRESETS)},
    "offload": lambda p, **own: LowRank(p, rank=4, offload=True, **own),
    "Muon by heads": lambda p, **own: Muon(p, by_heads=True, **own),
    "rounds at random": lambda p, **own: Muon(p, moments=BFloat16Moments(), **own),
}
BFLOAT16 = {"FactoredMuon", "rounds at random"}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(rule: str) -> list[nn.Parameter]:
    """The convolution's memory is channels_last."""
    dtype = torch.bfloat16 if rule in BFLOAT16 else torch.float32
    made = [draw(*shape, seed=seed).to(dtype) for seed, shape in enumerate(SHAPES)]
    made[4] = made[4].to(memory_format=torch.channels_last)
    return [nn.Parameter(each) for each in made]


def built(rule: str, weights: list[nn.Parameter], **own: Any) -> MatrixOptimizer:
    """Two groups, of different rates, with clipping and decay."""
    named = [(str(i), weight) for i, weight in enumerate(weights)]
    groups = [
        {"params": named[:3], "lr": 0.1, "heads": {"0": [8, 16], "1": [4, 4, 8]}},
        {"params": named[3:], "lr": 0.02, "project": ["3", "4", "5"], "stacks": ["5"]},
    ]
    return RULES[rule](groups, weight_decay=0.1, **{"max_norm": 5.0, "owners": True, **own})


def take(optimizer: MatrixOptimizer, weights: list[nn.Parameter], steps: range) -> None:
    """One matrix and the vector have no gradient in every other step; that of the last step is summed in two parts."""
    for step in steps:
        for seed, weight in enumerate(weights):
            gradient = draw(*weight.shape, seed=100 * step + seed).to(weight)
            weight.grad = None if seed in (2, VECTOR) and step % 2 else gradient
        optimizer.step()


def trained(rule: str, **own: Any) -> dict[str, Any]:
    """Weights after all steps, the state in the middle, and what this process kept."""
    weights = parameters(rule)
    optimizer = built(rule, weights, **own)
    take(optimizer, weights, range(SAVED))
    if optimizer.owners:
        optimizer.consolidate_state_dict()
    first = not dist.is_initialized() or not dist.get_rank()
    saved = copy.deepcopy(optimizer.state_dict()) if first else None
    middle = [weight.detach().clone() for weight in weights]
    take(optimizer, weights, range(SAVED, STEPS))
    kept = [i for i, weight in enumerate(weights) if optimizer.state.get(weight)]
    sizes = state_bytes(optimizer)
    return {
        "weights": [weight.detach().clone() for weight in weights], "middle": middle, "saved": saved, "kept": kept,
        "bytes": sizes, "norm": optimizer.gradient_norm,
    }  # fmt: skip


def resumed(rule: str, before: dict[str, Any]) -> list[Tensor]:
    """The second half of the steps, after a state that another number of ranks saved."""
    weights = parameters(rule)
    with torch.no_grad():
        for weight, value in zip(weights, before["middle"], strict=True):
            weight.copy_(value)
    optimizer = built(rule, weights)
    optimizer.load_state_dict(before["saved"])
    assert all(weight in optimizer.state for weight in weights) == (not dist.is_initialized())
    take(optimizer, weights, range(SAVED, STEPS))
    return [weight.detach().clone() for weight in weights]


class Traffic:
    """The bytes of each broadcast."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        broadcast = dist.broadcast

        def counted(tensor: Tensor, **options: Any) -> Any:
            self.sizes.append(tensor.nbytes)
            return broadcast(tensor, **options)

        monkeypatch.setattr(dist, "broadcast", counted)


def traffic() -> list[list[int]]:
    """Of three steps; the first checks that weights are equal."""
    weights = parameters("Muon")
    optimizer = built("Muon", weights)
    found = []
    for step in range(3):
        with pytest.MonkeyPatch.context() as patch:
            counted = Traffic(patch)
            take(optimizer, weights, range(step, step + 1))
        found.append(counted.sizes)
    return found


def few_matrices() -> list[Tensor]:
    """One matrix, so that all ranks but one own nothing."""
    weight = nn.Parameter(draw(24, 16, seed=0))
    optimizer = FactoredMuon([weight], max_norm=1.0, owners=True)
    for step in range(2):
        weight.grad = draw(24, 16, seed=step)
        optimizer.step()
        assert optimizer.used_gradients
    assert bool(optimizer.state) == (dist.get_rank() == 0)
    return [weight.detach()]


def refusals() -> list[str]:
    """What is said of a NaN, of a state that is not whole, of weights that differ, and of weights that are split."""
    said, weights = [], parameters("LowRank")
    optimizer = built("LowRank", weights)
    take(optimizer, weights, range(1))
    before = [weight.detach().clone() for weight in weights]
    assert weights[3].grad is not None
    weights[3].grad[0, 0] = torch.nan
    with pytest.raises(UserError) as caught:
        optimizer.step()
    said.append(str(caught.value))
    assert all(torch.equal(weight, value) for weight, value in zip(weights, before, strict=True))
    with pytest.raises(UserError) as caught:
        optimizer.state_dict()
    said.append(str(caught.value))
    optimizer.consolidate_state_dict(to=1)
    if dist.get_rank() == 1:
        assert len(optimizer.state_dict()["state"]) == len(weights)
    take(optimizer, weights, range(1))
    with pytest.raises(UserError):
        optimizer.state_dict()  # of a state that has moved on
    different = nn.Parameter(draw(24, 16, seed=dist.get_rank()))
    different.grad = torch.ones_like(different)
    with pytest.raises(UserError) as caught:
        Muon([("odd", different)], owners=True).step()
    said.append(str(caught.value))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(UserError) as caught:
        Muon([nn.Parameter(distribute_tensor(draw(24, 16, seed=0), mesh))], owners=True)
    return [*said, str(caught.value)]


def apart() -> list[str]:
    """What each rank says of a gradient that one of them lacks, a matrix's or a vector's, and of a NaN."""
    said, here = [], dist.get_rank() == 1
    for at, value in ((1, None), (VECTOR, None), (1, torch.nan)):
        weights = parameters("Muon")
        optimizer = built("Muon", weights)
        take(optimizer, weights, range(1))
        before = [weight.detach().clone() for weight in weights]
        if here and value is None:
            weights[at].grad = None
        elif here:
            weights[at].grad[0, 0] = value  # type: ignore[index]
        with pytest.raises(UserError) as caught:
            optimizer.step()
        assert equal(weights, before)
        take(optimizer, weights, range(1, 2))
        said.append(str(caught.value))
    return said


def grown() -> list[Tensor]:
    """Weights of an optimiser that gets a larger matrix and a larger table after two steps, and is copied after three;
    on several ranks each keeps what it had.
    """
    weights = parameters("LowRank")[:4]
    optimizer = LowRank([{"params": [(str(i), weight) for i, weight in enumerate(weights)]}], rank=4, owners=True)
    take(optimizer, weights, range(2))
    kept = [weight in optimizer.state for weight in weights]
    new = [nn.Parameter(draw(50, 30, seed=20)), nn.Parameter(draw(90, 60, seed=21))]
    for at, weight in enumerate(new):
        optimizer.add_param_group({"params": [(f"new {at}", weight)], "project": not at})
        take(optimizer, [*weights, *new[: at + 1]], range(2 + at, 3 + at))
    assert kept == [weight in optimizer.state for weight in weights]
    copied = copy.deepcopy(optimizer)
    own = [weight for group in copied.param_groups for weight in group["params"]]
    take(copied, own, range(4, 5))
    take(optimizer, [*weights, *new], range(4, 5))
    assert equal(own, [*weights, *new])
    return own


def undone() -> bool:
    """Whether steps that are taken back leave nothing behind on any rank."""
    weights = parameters("Trion")
    optimizer = built("Trion", weights)
    take(optimizer, weights, range(1))
    kept = {w: {key: value.clone() for key, value in held.items()} for w, held in optimizer.state.items()}
    with virtual_steps(optimizer):
        take(optimizer, weights, range(1, 2))
    now = optimizer.state
    return now.keys() == kept.keys() and all(torch.equal(now[w][key], kept[w][key]) for w in kept for key in kept[w])


class Net(Method):
    """Each epoch is one step, of two micro-batches on each of `ranks`."""

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__(partial(Muon, lr=0.02, owners=True))
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 6)).double()
        self.ranks = ranks

    def train_dataloader(self) -> Any:
        draws = [torch.Generator().manual_seed(10 * self.trainer.current_epoch + rank) for rank in self.ranks]
        rows = [torch.randn(5, 8, generator=one, dtype=torch.float64) for one in draws for _ in range(2)]
        return torch.utils.data.DataLoader(rows, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[0, :, :6]).square().mean()


def fit(ranks: Sequence[int], folder: str, epochs: int, start: Path | None = None) -> tuple[Trainer, list[Tensor]]:
    """Trains with the data of these ranks, and clips; the weights afterwards."""
    several = len(ranks) == 1
    trainer = Trainer(
        accelerator="cpu", devices=2 if several else 1, strategy="ddp" if several else "auto", logger=False,
        max_epochs=epochs, reload_dataloaders_every_n_epochs=1, accumulate_grad_batches=2 * len(ranks),
        gradient_clip_val=0.5, default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    module = Net(ranks)
    trainer.fit(module, ckpt_path=start)
    return trainer, [weight.detach().clone() for weight in module.parameters()]


def one_rank(index: int, ranks: int, folder: str, saved_by: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=ranks)
    before = torch.load(saved_by, weights_only=True)
    out = {
        "trained": {rule: trained(rule) for rule in RULES},
        "resumed": {rule: resumed(rule, before[rule]) for rule in RULES},
        "traffic": traffic(),
        "few": few_matrices(),
        "said": refusals(),
        "apart": apart(),
        "grown": grown(),
        "undone": undone(),
    }
    if ranks == 2:
        os.environ.update(LOCAL_RANK=str(index), NODE_RANK="0")
        out["straight"] = fit([index], folder, 4)[1]
        fit([index], folder, 2)[0].save_checkpoint(Path(folder, "half.ckpt"))
        out["half"] = str(Path(folder, "half.ckpt"))
    torch.save(out, Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {rule: trained(rule) for rule in RULES}


@pytest.fixture(scope="module")
def runs(alone, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks: two go on from what one process saved, three from what two saved."""
    found, before = {}, alone
    for ranks in (2, 3):
        folder = tmp_path_factory.mktemp("owners")
        torch.save(before, folder / "before.pt")
        rank_processes.start(one_rank, ranks, ranks, str(folder), str(folder / "before.pt"))
        found[ranks] = [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(ranks)]
        before = found[ranks][0]["trained"]
    return found


def equal(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def equal_states(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Bit for bit, and groups alike."""
    alike = one["state"].keys() == other["state"].keys() and one["param_groups"] == other["param_groups"]
    return alike and all(
        one["state"][i].keys() == other["state"][i].keys()
        and equal(list(one["state"][i].values()), [other["state"][i][key] for key in one["state"][i]])
        for i in one["state"]
    )


@pytest.mark.ranks
@pytest.mark.parametrize("rule", RULES)
def test_ranks_step_as_one_process_bit_for_bit(runs, alone, rule) -> None:
    for out in itertools.chain(*runs.values()):
        assert equal(out["trained"][rule]["weights"], alone[rule]["weights"])
        assert torch.equal(out["trained"][rule]["norm"], alone[rule]["norm"])


@pytest.mark.ranks
@pytest.mark.parametrize("rule", RULES)
def test_each_rank_keeps_the_state_of_its_own_parameters_alone(runs, alone, rule) -> None:
    for ranks, outs in runs.items():
        kept = [i for out in outs for i in out["trained"][rule]["kept"] if i != VECTOR]
        assert sorted(kept) == [i for i in range(len(SHAPES)) if i != VECTOR]
        assert all(VECTOR in out["trained"][rule]["kept"] for out in outs)
        sizes = [out["trained"][rule]["bytes"] for out in outs]
        vector = 2 * 4 * SHAPES[VECTOR][0] + 4
        assert sum(sizes) == alone[rule]["bytes"] + (ranks - 1) * vector


@pytest.mark.ranks
@pytest.mark.parametrize("rule", RULES)
def test_what_the_fullest_rank_keeps_is_foreseen(runs, rule) -> None:
    weights = parameters(rule)
    optimizer = built(rule, weights)
    take(optimizer, weights, range(1))
    for ranks, outs in runs.items():
        foreseen = fullest_rank(optimizer.divided(ranks), optimizer.state)
        assert sum(map(bytes_of, foreseen.values())) == max(out["trained"][rule]["bytes"] for out in outs)


@pytest.mark.ranks
@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_is_that_of_one_process_and_continues_on_any_number_of_ranks(runs, alone, rule) -> None:
    for outs in runs.values():
        assert equal_states(outs[0]["trained"][rule]["saved"], alone[rule]["saved"])
        assert all(equal(out["resumed"][rule], alone[rule]["weights"]) for out in outs)
    assert equal(resumed(rule, runs[3][0]["trained"][rule]), alone[rule]["weights"])


@pytest.mark.ranks
def test_each_weight_with_a_gradient_travels_once_a_step_and_nothing_else_does(runs) -> None:
    owned = [4 * draw(*shape, seed=0).numel() for shape in SHAPES[:-1]]
    for out in itertools.chain(*runs.values()):
        for step, sizes in enumerate(out["traffic"]):
            assert sorted(sizes) == sorted(size for i, size in enumerate(owned) if i != 2 or step % 2 == 0)


@pytest.mark.ranks
def test_a_trainer_saves_the_whole_state_and_one_process_goes_on_with_it(runs, tmp_path) -> None:
    """Gradients of two micro-batches are averaged over ranks in another order than in one process."""
    first, second = runs[2]
    assert equal(first["straight"], second["straight"])
    for start in (None, Path(first["half"])):
        for ours, theirs in zip(fit((0, 1), str(tmp_path), 4, start)[1], first["straight"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    saved = torch.load(first["half"], weights_only=True)["optimizer_states"][0]["state"]
    assert len(saved) == len(first["straight"])


@pytest.mark.ranks
def test_a_rank_that_owns_nothing_follows(runs) -> None:
    for out in itertools.chain(*runs.values()):
        assert equal(out["few"], runs[2][0]["few"])


@pytest.mark.ranks
def test_all_ranks_refuse_alike(runs) -> None:
    for out in itertools.chain(*runs.values()):
        broken, partial, different, split = out["said"]
        assert "the gradient of 3 is not finite" in broken
        assert "consolidate_state_dict" in partial
        assert "owners=True" in different
        assert "odd" in different
        assert "FSDP2" in split


@pytest.mark.ranks
def test_ranks_with_other_gradients_refuse_alike_before_anything_is_sent(runs) -> None:
    for outs in runs.values():
        for number, out in enumerate(outs):
            lacking, vector, broken = out["apart"]
            assert "one alone has that of 1;" in lacking
            assert f"one alone has that of {VECTOR};" in vector
            assert ("the gradient of 1 is" if number == 1 else "on another rank is") in broken


@pytest.mark.ranks
def test_parameters_that_are_added_later_take_no_state_from_the_others(runs) -> None:
    for out in itertools.chain(*runs.values()):
        assert equal(out["grown"], grown())


@pytest.mark.ranks
def test_steps_that_are_undone_leave_nothing_behind(runs) -> None:
    assert all(out["undone"] for out in itertools.chain(*runs.values()))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in BFLOAT16])
def test_owners_change_the_order_of_sums_alone(alone, rule) -> None:
    """Without random rounding: matrices are stepped one by one instead of in stacks."""
    for ours, theirs in zip(alone[rule]["weights"], trained(rule, owners=False)["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_costs_are_divided_longest_first() -> None:
    assert divided([7, 5, 4, 3, 1], 2) == [0, 1, 1, 0, 1]
    assert divided([3, 3, 3], 2) == [0, 1, 0]
    assert divided([2], 3) == [0]
    assert divided([], 3) == []
    assert divided([2, 1, 1], 2, [3, 0]) == [1, 1, 0]
    for costs in itertools.product((1, 2, 5), repeat=5):  # the bound of Graham 1969 for two
        first = [sum(c for c, chosen in zip(costs, one, strict=True) if chosen) for one in _choices(5)]
        best = min(max(load, sum(costs) - load) for load in first)
        load = sum(c for c, owner in zip(costs, divided(costs, 2), strict=True) if owner)
        assert max(load, sum(costs) - load) <= 7 / 6 * best


def _choices(count: int) -> list[tuple[bool, ...]]:
    return list(itertools.product((False, True), repeat=count))


def test_operations_are_those_of_newton_schulz() -> None:
    """As torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    from lightspan.optim.matrices.newton_schulz import COEFFICIENTS, orthogonalised

    for rows, columns in ((8, 8), (12, 8), (16, 8), (40, 8)):
        with FlopCounterMode(display=False) as counted:
            orthogonalised(draw(1, rows, columns, seed=0), None, COEFFICIENTS["jordan"])
        assert operations(rows, columns) == operations(columns, rows) == counted.get_total_flops()


def test_coordinates_need_all_frames_and_are_refused() -> None:
    with pytest.raises(UserError, match="owners"):
        LowRank([nn.Parameter(draw(8, 6, seed=0))], rank=2, residual=None, backward="hooks", owners=True)
    with pytest.raises(UserError, match="owners"):
        Trion([nn.Parameter(draw(8, 6, seed=0))], rank=2, owners="yes")
    assert Muon([nn.Parameter(draw(8, 6, seed=0))], moments=Float32Moments()).owners is False
