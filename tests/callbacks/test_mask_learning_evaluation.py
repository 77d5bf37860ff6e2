"""A checkpoint from before the mask was fixed is evaluated with the mask that validation in the fit would use."""

import os
from pathlib import Path
from typing import Any

import lightning
import pytest
import rank_processes
import torch
from masked_net import LEARNERS, WEIGHTS, Plain, loader
from torch import Tensor

from lightspan.callbacks.training.mask_learning import MaskLearning
from lightspan.core.distributed import end_process_group
from lightspan.core.sharded import whole
from lightspan.training.strategies import FSDP2, shard


class Evaluated(Plain):
    """Keeps the weights that each evaluation ran with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Tensor]] = []

    def configure_model(self) -> None:
        shard(self)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.net(batch[0])
        self.seen.append({name: whole(p.detach()).clone() for name, p in self.named_parameters()})

    test_step = predict_step = validation_step


def trainer_with(callback: MaskLearning, folder: Path, **options: Any) -> lightning.Trainer:
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "default_root_dir": folder}
    return lightning.Trainer(**quiet, **{"callbacks": [callback], "enable_checkpointing": False, **options})


def trained(kind: str, folder: Path, until: float) -> Evaluated:
    """After 12 steps, of which the checkpoint at.ckpt is the eighth, as is the one validation."""
    module, callback = Evaluated(), MaskLearning(WEIGHTS, LEARNERS[kind](), 0.3, until=until)
    keep = lightning.pytorch.callbacks.ModelCheckpoint(folder, "at", every_n_train_steps=8, save_top_k=-1)
    options = {"max_steps": 12, "max_epochs": -1, "val_check_interval": 8, "check_val_every_n_epoch": None}
    trainer = trainer_with(callback, folder, callbacks=[callback, keep], enable_checkpointing=True, **options)
    trainer.fit(module, loader(16), loader(64))
    return module


@pytest.mark.sample(6)
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize("kind", LEARNERS)
def test_a_middle_checkpoint_runs_with_the_mask_of_its_validation(kind: str, verb: str, tmp_path: Path) -> None:
    (in_fit,) = trained(kind, tmp_path, until=1.0).seen
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)["state_dict"]
    module, callback = Evaluated(), MaskLearning(WEIGHTS, LEARNERS[kind](), 0.3, until=1.0)
    run = getattr(trainer_with(callback, tmp_path), verb)
    run(module, loader(64), ckpt_path=tmp_path / "at.ckpt", weights_only=True)
    assert all(torch.equal(module.seen[0][name], in_fit[name]) for name in in_fit)
    masked = any(not torch.equal(in_fit[name], saved[name]) for name in WEIGHTS)
    assert masked == (kind != "drop and grow")  # whose weights are the masked ones
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    assert not module._state_dict_hooks


def test_a_checkpoint_with_a_fixed_mask_holds_the_masked_weights(tmp_path: Path, capsys: Any) -> None:
    (in_fit,) = trained("concrete", tmp_path, until=0.5).seen
    module, callback = Evaluated(), MaskLearning(WEIGHTS, LEARNERS["concrete"](), 0.3, until=0.5)
    trainer_with(callback, tmp_path).validate(module, loader(64), ckpt_path=tmp_path / "at.ckpt", weights_only=True)
    assert all(torch.equal(module.seen[0][name], in_fit[name]) for name in in_fit)
    assert (in_fit["net.0.weight"] != 0).sum() == 48
    assert "found no masks" not in capsys.readouterr().err


def test_that_there_is_no_mask_is_told(tmp_path: Path, capsys: Any) -> None:
    trainer_with(MaskLearning(WEIGHTS, LEARNERS["concrete"]()), tmp_path).validate(Evaluated(), loader(64))
    assert "MaskLearning found no masks in what is evaluated" in capsys.readouterr().err


def one_rank(rank: int, folder: str) -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "GROUP_RANK": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    module, callback = Evaluated(), MaskLearning(WEIGHTS, LEARNERS["concrete"](), 0.3, until=1.0)
    trainer = trainer_with(callback, Path(folder), devices=2, strategy=FSDP2(save_distributed_checkpoint=False))
    trainer.validate(module, loader(64), ckpt_path=Path(folder, "at.ckpt"), weights_only=True)
    torch.save(module.seen[0], Path(folder, f"{rank}.pt"))
    end_process_group()


@pytest.mark.ranks
def test_sharded_weights_are_masked_as_whole_ones(tmp_path: Path) -> None:
    (in_fit,) = trained("concrete", tmp_path, until=1.0).seen
    rank_processes.start(one_rank, 2, str(tmp_path))
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(seen, in_fit, rtol=1e-6, atol=1e-7)  # sigmoids of parts of another length
