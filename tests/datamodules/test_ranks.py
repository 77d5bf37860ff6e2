"""Two real ranks under Lightning see, step by step, what one rank sees, also when they resume its checkpoint."""

import json
from pathlib import Path

import pytest
import rank_processes
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from lightspan.core.distributed import end_process_group
from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader
from lightspan.datamodules.loading.ranks import evaluation_loader, train_loader

pytestmark = pytest.mark.ranks


class Numbers:
    def __len__(self) -> int:
        return 27

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index), "seed": torch.tensor(seed)}


class Data(LightningDataModule):
    def train_dataloader(self) -> ExactLoader:
        return train_loader(Numbers(), 8, 3, 0, self.trainer)

    def val_dataloader(self) -> EvaluationLoader:
        return evaluation_loader(Numbers(), 8, 0, self.trainer)


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.trained: list[list[tuple[int, int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.trained.append(list(zip(batch["index"].tolist(), batch["seed"].tolist(), strict=True)))
        return self.weight * batch["index"].double().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def run(folder: Path, steps: int, devices: int, checkpoint: Path | None = None) -> dict:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        val_check_interval=4,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=Data(), ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder / f"ranks={devices}.ckpt")
    result = {"trained": module.trained, "validated": module.validated, "weight": module.weight.item()}
    end_process_group()
    return result


def _resumes(rank: int, port: int, folder: str) -> None:
    """One of two ranks; what it saw goes to FOLDER/RANK.json."""
    rank_processes.join(rank, port)
    seen = run(Path(folder), 5, 2, Path(folder, "ranks=1.ckpt"))
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))


def test_two_ranks_that_resume_the_checkpoint_of_one_see_together_what_one_rank_sees(tmp_path: Path) -> None:
    """27 samples in batches of 8 make 3 steps an epoch: the checkpoint lies in the first, the end in the second."""
    alone = json.loads(json.dumps(run(tmp_path, 5, 1)))
    run(tmp_path, 2, 1)
    rank_processes.start(_resumes, 2, rank_processes.free_port(), str(tmp_path))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    together = [first + second for first, second in zip(*(rank["trained"] for rank in ranks), strict=True)]
    assert together == alone["trained"][2 * 2 :]
    assert [rank["weight"] for rank in ranks] == pytest.approx([alone["weight"]] * 2, rel=1e-12)
    validated = sorted(ranks[0]["validated"] + ranks[1]["validated"])
    assert validated == sorted([*range(27)] * (len(validated) // 27))
    assert set(validated) == set(alone["validated"])
