"""Conversion to a low-rank optimiser: what groups keep, which optimisers it is for, and schedules that go on."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR
from transformers import get_cosine_schedule_with_warmup

from lightspan.core.errors import UserError
from lightspan.optim.convert import hand_over, to_low_rank, to_low_rank_where_matched
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.schedules import WarmupCosine


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.hidden, self.conv = nn.Embedding(10, 8), nn.Linear(8, 12), nn.Conv2d(3, 9, 3)


def test_conversion_keeps_groups_rates_and_decay_and_projects_what_matches():
    model = Model()
    groups = [{"params": list(model.hidden.parameters()), "lr": 0.3}, {"params": list(model.conv.parameters())}]
    old = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), weight_decay=0.2)
    new = to_low_rank(old, model, ["hidden.*"], rank=4)
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in new.param_groups] == [
        (0.3, (0.8, 0.9), 0.2),
        (0.1, (0.8, 0.9), 0.2),
    ]
    projected = [p for g in new.param_groups for p in g["params"] if new.projected(p, g)]
    assert len(projected) == 1
    assert projected[0] is model.hidden.weight


def test_conversion_refuses_what_it_cannot_carry():
    model = Model()
    with pytest.raises(
        UserError, match=r"only Adam and AdamW can be made low-rank, but this module's optimiser is SGD"
    ):
        to_low_rank(torch.optim.SGD(model.parameters(), lr=0.1), model, ["*"], rank=4)
    with pytest.raises(
        UserError, match=r"pattern 'hiden\.\*' matches no trained parameter of Model; names look like hidden"
    ):
        to_low_rank(torch.optim.AdamW(model.parameters()), model, ["hiden.*"], rank=4)
    with pytest.raises(UserError, match=r"Adam with weight_decay=0.1 adds the decay to the gradient"):
        to_low_rank(torch.optim.Adam(model.parameters(), weight_decay=0.1), model, ["*"], rank=4)
    with pytest.raises(UserError, match="amsgrad=True has no low-rank counterpart"):
        to_low_rank(torch.optim.AdamW(model.parameters(), amsgrad=True), model, ["*"], rank=4)


def test_conversion_keeps_every_key_of_a_group_but_how_torch_computes():
    model = Model()
    groups = [{"params": [model.hidden.weight, model.hidden.bias], "lr_mult": 0.5, "note": ["mine"]}]
    new = to_low_rank(torch.optim.AdamW(groups, foreach=False, capturable=False), model, ["*"], rank=4)
    assert (new.param_groups[0]["lr_mult"], new.param_groups[0]["note"]) == (0.5, ["mine"])
    assert not new.param_groups[0].keys() & {"foreach", "fused", "capturable", "amsgrad", "maximize"}


def test_conversion_holds_groups_to_their_own_projection_and_rank():
    model = Model()
    old = torch.optim.AdamW(ParameterGroups().build(model), lr=0.1)
    old.param_groups[0]["rank"] = 3
    new = to_low_rank(old, model, ["*"], rank=4)
    assert [group["project"] for group in new.param_groups] == [["*"], False, False]
    assert new.param_groups[0]["rank"] == 3


def test_of_several_optimisers_those_become_low_rank_in_which_something_is_projected():
    model = nn.ModuleDict({"gen": nn.Linear(8, 8), "disc": nn.Linear(6, 6)})
    model.register_parameter("temperature", nn.Parameter(torch.zeros(())))

    def convert(match, rank):
        old = [torch.optim.AdamW(model["gen"].parameters()), torch.optim.SGD(model["disc"].parameters(), lr=0.1)]
        old += [torch.optim.RMSprop([model.temperature])]
        new = to_low_rank_where_matched(old, model, match, rank=rank)
        assert all(after is before or isinstance(after, LowRank) for before, after in zip(old, new, strict=True))
        return [isinstance(optimizer, LowRank) for optimizer in new]

    assert convert(["gen.*"], 4) == convert(["gen.*", "temperature"], 4) == convert(["*"], 7) == [True, False, False]
    with pytest.raises(UserError, match=r"this module's optimiser is SGD; .* or leave its parameters out of match"):
        convert(["*"], 4)
    with pytest.raises(UserError, match=r"pattern 'den.\*' matches no trained parameter of ModuleDict; .*gen"):
        convert(["den.*"], 4)
    with pytest.raises(UserError, match=r"rank=8 is not below the shorter side of any matrix \(the largest is 8\)"):
        to_low_rank_where_matched([torch.optim.AdamW(model["gen"].parameters())], model, ["gen.*"], rank=8)


def test_a_basis_that_is_none_is_refused_by_its_name():
    model = nn.Linear(4, 3)
    old = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(
        UserError, match=r"basis='whole' must be an object of a class in lightspan.optim.low_rank.bases"
    ):
        to_low_rank_where_matched([old], model, ["*weight"], rank=2, basis="whole")


def test_experts_and_ranks_by_default_are_judged_as_the_optimiser_judges_them():
    model = nn.ModuleDict({"head": nn.Linear(100, 90), "small": nn.Linear(10, 10), "moe": nn.Module()})
    model["moe"].experts = nn.Parameter(torch.zeros(4, 128, 128))
    model["moe"].phases = nn.Parameter(torch.zeros(128, 128, dtype=torch.complex64))

    def exchanged(**options):
        parts = [[model["head"].weight], [model["small"].weight], [model["moe"].experts], [model["moe"].phases]]
        new = to_low_rank_where_matched([torch.optim.AdamW(part) for part in parts], model, ["*"], **options)
        return [isinstance(optimizer, LowRank) for optimizer in new]

    assert exchanged() == exchanged(rank=64) == [True, False, True, False]
    assert exchanged(rank=64, backward="hooks", residual=None) == [True, False, False, False]


class WarmUpThen(torch.optim.lr_scheduler.LRScheduler):
    """A schedule of the kind that users write: another one in an attribute."""

    def __init__(self, optimizer, then):
        self.then = {"after": [then(optimizer)]}
        super().__init__(optimizer)

    def get_lr(self):
        return [base * min(self.last_epoch, 2) / 2 for base in self.base_lrs]

    def step(self, epoch=None):
        if getattr(self, "last_epoch", -1) >= 2:
            self.then["after"][0].step()
        else:
            super().step()


def falling(optimizer):
    return schedules.ExponentialLR(optimizer, 0.7)


def in_two_parts(optimizer, parts=None):
    first, second = parts or (schedules.LinearLR(optimizer, 0.1, total_iters=3), falling(optimizer))
    return schedules.SequentialLR(optimizer, [first, second], milestones=[3])


SCHEDULES = {
    "lambda": lambda o: schedules.LambdaLR(o, [lambda s: 1 / (1 + s), lambda s: 0.5**s]),
    "multiplicative": lambda o: schedules.MultiplicativeLR(o, lambda s: 0.9),
    "step": lambda o: schedules.StepLR(o, 2),
    "multi-step": lambda o: schedules.MultiStepLR(o, [2, 4]),
    "constant": lambda o: schedules.ConstantLR(o, 0.5, total_iters=3),
    "linear": lambda o: schedules.LinearLR(o, 0.1, total_iters=4),
    "exponential": falling,
    "polynomial": lambda o: schedules.PolynomialLR(o, total_iters=6, power=2),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 6),
    "warm restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: schedules.OneCycleLR(o, max_lr=[0.5, 0.2], total_steps=12),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.1, 0.4, step_size_up=3),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1),
    "swa": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=4),
    "transformers": lambda o: get_cosine_schedule_with_warmup(o, 3, 10),
    "ours": lambda o: WarmupCosine(o, total_steps=10, warmup=0.3),
    "sequential": in_two_parts,
    "chained": lambda o: schedules.ChainedScheduler([schedules.LinearLR(o, 0.1, total_iters=3), falling(o)]),
    "sequential in chained": lambda o: schedules.ChainedScheduler([in_two_parts(o), schedules.StepLR(o, 2)]),
    "sequential in chained in chained": lambda o: schedules.ChainedScheduler(
        [schedules.ChainedScheduler([in_two_parts(o), falling(o)]), schedules.StepLR(o, 4)]
    ),
    "one of a user's": lambda o: WarmUpThen(o, falling),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tensor_rates", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_goes_on_as_with_adamw_after_the_optimiser_was_exchanged(name, tensor_rates):
    def trajectory(exchange):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        lrs = [torch.tensor(lr) if tensor_rates else lr for lr in (0.3, 0.1)]
        groups = [{"params": part.parameters(), "lr": lr} for part, lr in zip(model, lrs, strict=True)]
        optimizer = torch.optim.AdamW(groups)
        scheduler = SCHEDULES[name](optimizer)
        if exchange:
            optimizer = to_low_rank(optimizer, model, ["*"], rank=2)
            hand_over(scheduler, optimizer)
        seen = []
        for _ in range(9):
            seen.append([(float(group["lr"]), *map(float, group["betas"])) for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step(*([1.0] if name == "plateau" else []))
        return seen

    expected = trajectory(exchange=False)
    assert trajectory(exchange=True) == expected
    assert expected[-1] != expected[0]
