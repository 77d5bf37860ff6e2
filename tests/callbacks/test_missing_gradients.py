"""Parameters without a gradient are named once, with their cause; frozen and rarely used ones are not."""

import pytest
import rank_processes
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightspan.callbacks.training.subspace_projection import SubspaceProjection
from lightspan.callbacks.watching.missing_gradients import MissingGradients
from lightspan.core.distributed import end_process_group


class Branches(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.stopped, self.sometimes, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.frozen.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x = self.used(torch.ones(2, 3))
        if self.global_step == 1:
            x = self.sometimes(x)
        return (x + self.stopped(x).detach()).sum()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def run(make_trainer, module, *callbacks, steps=6, **options):
    make_trainer(max_steps=steps, callbacks=[*callbacks, MissingGradients()], **options).fit(
        module, DataLoader(range(16))
    )


def test_modules_are_named_once_with_their_cause(make_trainer, capsys):
    run(make_trainer, Branches())
    (said,) = capsys.readouterr().err.splitlines()
    assert "7 of 11 parameters had no gradient" in said
    assert "scale" in said
    assert "spare (4 parameters), which is never called" in said
    assert "stopped (2 parameters), which is called: its result does not reach the loss" in said
    assert not {"used", "sometimes", "frozen"} & set(said.replace(";", " ").split())


def test_a_short_run_says_it_at_its_end(make_trainer, capsys):
    run(make_trainer, Branches(), steps=1)
    assert "spare (4 parameters);" in capsys.readouterr().err


def test_a_run_that_fails_says_it_too(make_trainer, capsys):
    module = Branches()
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx) if batch_idx < 1 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(make_trainer, module)
    assert "spare (4 parameters)" in capsys.readouterr().err


@pytest.mark.parametrize("backward", ["whole", "hooks", "projected"])
def test_a_model_that_is_trained_whole_is_no_news(make_trainer, net, batches, capsys, backward):
    projection = SubspaceProjection(2, ["head.weight"], residual=None, backward=backward)
    make_trainer(max_steps=4, callbacks=[projection, MissingGradients()]).fit(net(), batches(4))
    assert "no gradient" not in capsys.readouterr().err


def test_no_listener_stays(make_trainer):
    module = Branches()
    run(make_trainer, module)
    assert not any(part._forward_pre_hooks for part in module.modules())


class OnOneRank(Branches):
    """Rank 1 alone leaves a layer out; nothing else needs an exchange in this strategy."""

    def training_step(self, batch, batch_idx):
        x = self.used(torch.ones(2, 3))
        rest = (self.spare, self.stopped, self.sometimes)
        return sum(part(x).sum() for part in rest[: 3 - self.global_rank]) + (x * self.scale).sum()


def one_of_two(rank: int, port: int, log: str) -> None:
    rank_processes.join(rank, port)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true", max_steps=4, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[MissingGradients()],
    )  # fmt: skip
    module = OnOneRank()
    # Without DDP's averaging, a rank keeps None where its own loss did not reach.
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters())
    sync = type(trainer.strategy).setup
    type(trainer.strategy).setup = lambda self, trainer: (sync(self, trainer), setattr(self, "model", module))[0]
    import contextlib

    with open(f"{log}-{rank}", "w") as file, contextlib.redirect_stderr(file):
        trainer.fit(module, DataLoader(range(16)))
    end_process_group()


@pytest.mark.ranks
def test_what_one_rank_lacks_is_named_with_its_rank(tmp_path):
    rank_processes.start(one_of_two, 2, rank_processes.free_port(), str(tmp_path / "said"))
    assert "on rank 1: 2 of 11 parameters had no gradient so far: sometimes" in (tmp_path / "said-0").read_text()
    assert "sometimes" not in (tmp_path / "said-1").read_text()
