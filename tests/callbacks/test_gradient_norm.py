"""The logged norm is that of torch over all gradients, whatever the optimiser, the accumulation and the strategy."""

import json

import pytest
import rank_processes
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightspan.callbacks.training.subspace_projection import SubspaceProjection
from lightspan.callbacks.watching.gradient_norm import GradientNorm
from lightspan.core.distributed import end_process_group, rank, world_size
from lightspan.optim.low_rank.residuals import ErrorFeedback
from lightspan.training.loggers.jsonl import JsonlLogger
from lightspan.training.strategies import FSDP2, shard


class TorchsNorm(Callback):
    """What torch says of all gradients before clipping."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        gradients = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in pl_module.parameters()]
        self.norms.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))))


def logged(folder) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/gradient_norm"] for line in lines if "train/gradient_norm" in line}


LOW_RANK = {
    "AdamW": (),
    "projected": (SubspaceProjection(2, ["head.weight"]),),
    "error feedback": (SubspaceProjection(2, ["head.weight"], residual=ErrorFeedback()),),
}


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("kind", LOW_RANK)
def test_it_is_torchs_norm_before_clipping(make_trainer, net, batches, tmp_path, kind, clip):
    torchs = TorchsNorm()
    trainer = make_trainer(
        max_steps=4, logger=JsonlLogger(str(tmp_path)), log_every_n_steps=2, gradient_clip_val=clip,
        accumulate_grad_batches=2, callbacks=[*LOW_RANK[kind], torchs, GradientNorm()],
    )  # fmt: skip
    trainer.fit(net(), batches(8))
    expected = {step: pytest.approx(torchs.norms[step], rel=1e-5) for step in (1, 3)}
    assert logged(tmp_path) == expected


def test_training_is_the_same_with_and_without_it(make_trainer, net, batches):
    ends = []
    for watching in ([], [GradientNorm()]):
        module = net()
        projection = SubspaceProjection(2, ["head.weight"], residual=None)  # without it no row norm is needed
        make_trainer(max_steps=4, callbacks=[projection, *watching]).fit(module, batches(4))
        ends.append([p.detach().clone() for p in module.parameters()])
    assert all(map(torch.equal, *ends))


def test_several_optimisers_are_numbered(make_trainer, net, batches):
    module = net()
    module.automatic_optimization = False

    def training_step(batch, batch_idx):
        for optimizer in module.optimizers():
            optimizer.zero_grad()
            loss = module.head(module.features(batch)).square().mean()
            module.manual_backward(loss)
            optimizer.step()

    module.training_step = training_step
    module.configure_optimizers = lambda: [torch.optim.SGD(part.parameters()) for part in (module.body, module.head)]
    trainer = make_trainer(max_steps=4, callbacks=[GradientNorm()])
    trainer.fit(module, batches(4))
    assert {"train/gradient_norm_0", "train/gradient_norm_1"} <= trainer.callback_metrics.keys()


class Layers(LightningModule):
    """One layer is sharded by itself; rank r has rows r and r + 2 of the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 5)])
        self.head = nn.Linear(5, 3, bias=False)

    def configure_model(self) -> None:
        shard(self)

    def training_step(self, batch, batch_idx):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(batch_idx))[rank() :: world_size()]
        return self.head(self.layers[0](x).tanh()).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_layers(ranks: int, strategy) -> list[float]:
    norms = []

    class Read(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            norms.append(float(trainer.callback_metrics["train/gradient_norm"]))

    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, use_distributed_sampler=False,
        callbacks=[GradientNorm(), Read()],
    )  # fmt: skip
    trainer.fit(Layers(), DataLoader(range(2)))
    return norms


def one_of_two(rank: int, port: int, strategy: str, expected: list[float]) -> None:
    rank_processes.join(rank, port)
    assert fit_layers(2, FSDP2() if strategy == "fsdp2" else strategy) == pytest.approx(expected, rel=1e-5)
    end_process_group()


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_log_the_norm_of_one_process(strategy):
    rank_processes.start(one_of_two, 2, rank_processes.free_port(), strategy, fit_layers(1, "auto"))
