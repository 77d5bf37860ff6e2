"""What strangers put into checkpoints is theirs: a run takes its own file back, and goes on as if never stopped."""

import math

import pytest
import torch
from lightning import Callback
from torch import nn

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.resilience.random_state import RandomState
from lightspan.optim.low_rank.optimizer import LowRank


class Odd(Callback):
    """A callback whose values change their kind, as those of strangers may."""

    def __init__(self) -> None:
        self.values: list = []

    def state_dict(self):
        kinds = (0, torch.ones(2), False, "", (), {"a": 1}, math.nan)
        return {"value": kinds[len(self.values) % len(kinds)], "best": math.nan}

    def load_state_dict(self, state) -> None:
        self.values = [state]


class OddSchedule(torch.optim.lr_scheduler.LambdaLR):
    def __init__(self, optimizer) -> None:
        self.best: object = None
        super().__init__(optimizer, lambda step: 1.0)

    def step(self, *arguments) -> None:
        self.best = math.nan if self.last_epoch % 2 else (1, 2)
        super().step(*arguments)


def two_optimizers(module):
    """As of a GAN whose second network starts later: the second optimiser has not stepped yet."""
    module.automatic_optimization = False
    second = list(module.late.parameters())
    first = [p for p in module.parameters() if all(p is not other for other in second)]
    return [torch.optim.AdamW(first, lr=0.01), torch.optim.RMSprop(second, lr=0.01)]


OPTIMIZERS = {
    "schedule": lambda m: ([o := torch.optim.Adam(m.parameters(), lr=0.01)], [OddSchedule(o)]),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), max_iter=2),
    "late": two_optimizers,
    "none": lambda m: None,
    "stack": lambda m: LowRank([{"params": list(m.parameters()), "stacks": True}], rank=2),
}


class Stranger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.late, self.experts = nn.Linear(8, 8), nn.Parameter(torch.randn(3, 8, 8))
        self.register_buffer("graph", torch.eye(8).to_sparse())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_takes_its_own_checkpoint_and_ends_as_the_straight_one(kind, make_trainer, net, batches, tmp_path):
    def fit(steps, **options):
        module = net()
        torch.manual_seed(1)
        stranger = Stranger()
        module.late, module.experts = stranger.late, stranger.experts
        module.register_buffer("graph", stranger.graph)
        module.configure_optimizers = lambda: OPTIMIZERS[kind](module)
        step = module.training_step

        def training_step(batch, batch_idx):
            loss = step(batch, batch_idx) + sum(p.square().sum() for p in module.late.parameters())
            loss = loss + sum((module.graph @ expert).square().mean() for expert in module.experts)
            if kind == "late":
                optimizer = module.optimizers()[0]
                optimizer.zero_grad()
                module.manual_backward(loss)
                optimizer.step()
            return loss

        module.training_step = training_step
        callbacks = [Odd(), Checkpoint(every_n_train_steps=2, save_top_k=-1)]
        make_trainer(max_steps=steps, enable_checkpointing=True, callbacks=callbacks).fit(module, batches(6), **options)
        return module.state_dict()

    straight = fit(5)
    resumed = fit(5, ckpt_path=str(tmp_path / "checkpoints" / "step=2.ckpt"), weights_only=True)
    assert all(torch.equal(straight[name].to_dense(), resumed[name].to_dense()) for name in straight)


def test_a_seed_that_torch_drew_is_taken_back(make_trainer, net, batches, tmp_path):
    seeded = RandomState(seed=2**64 - 1)  # torch's own are of 64 bits without a sign

    def fit(steps, **options):
        callbacks = [seeded, Checkpoint(every_n_train_steps=2)]
        module = net()
        make_trainer(max_steps=steps, enable_checkpointing=True, callbacks=callbacks).fit(module, batches(6), **options)

    fit(2)
    fit(4, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"), weights_only=True)
