"""Two real ranks under Lightning read shards, and keep the ledger, as one rank does; a run moves between them.

As a script (FOLDER STEPS DEVICES [CHECKPOINT]) this file is the run; each rank writes what it saw to FOLDER/RANK.json.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightspan.callbacks.watching.ledger import Ledger
from lightspan.cli.runs.ledger import balance
from lightspan.core.distributed import end_process_group
from lightspan.datamodules.shards.stream import Shards

pytestmark = pytest.mark.ranks


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.trained: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.trained.append(batch["label"].tolist())
        return self.weight * batch["label"].double().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated += batch["label"].tolist()

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
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[Ledger(str(folder / "ledger.json"))],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    shards = [str(folder / f"part-{number}.tar") for number in range(3)]
    data = Shards(shards, shards[2:], batch_size=6, window=2, seed=4, skip_damaged=True)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder / f"ranks={devices}.ckpt")
    result = {"trained": module.trained, "validated": module.validated, "weight": module.weight.item()}
    end_process_group()
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, steps, devices, *checkpoint = sys.argv[1:]
    seen = run(Path(folder), int(steps), int(devices), Path(checkpoint[0]) if checkpoint else None)
    Path(folder, f"{os.environ.get('LOCAL_RANK', 0)}.json").write_text(json.dumps(seen))


def test_a_run_over_damaged_shards_moves_from_one_to_two_ranks_and_back_without_losing_a_sample(tmp_path: Path) -> None:
    """7, 0 and 8 samples, of which one is damaged, in batches of 6: 2 steps an epoch, and 3 samples carried on."""
    # Here and not above: the ranks import this file as a script, without the test folder on their path.
    from shard_files import damage, write_shards

    def ledger() -> dict:
        return json.loads((tmp_path / "ledger.json").read_text())

    shards = write_shards(tmp_path, (7, 0, 8))
    Path(f"{shards[2]}.index.json").unlink()  # the first run scans it, and the others read what it kept
    damage(shards[0], json.loads(Path(f"{shards[0]}.index.json").read_text())["starts"][3] + 520)
    alone = run(tmp_path, 6, 1)
    straight = ledger()

    assert run(tmp_path, 2, 1)["trained"] == alone["trained"][:2]
    command = [sys.executable, __file__, str(tmp_path), "4", "2", str(tmp_path / "ranks=1.ckpt")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    together = [first + second for first, second in zip(*(rank["trained"] for rank in ranks), strict=True)]
    assert together == alone["trained"][2:4]
    assert sorted(ranks[0]["validated"] + ranks[1]["validated"]) == sorted(alone["validated"][:8])
    assert ledger()["ranges"] == [[0, 0, 15], [1, 0, 9]]
    last = run(tmp_path, 6, 1, tmp_path / "ranks=2.ckpt")
    assert last["trained"] == alone["trained"][4:]
    assert last["weight"] == pytest.approx(alone["weight"], rel=1e-12)

    assert ledger() == straight
    assert straight["ranges"] == [[0, 0, 15], [1, 0, 15], [2, 0, 6]]
    assert {entry["damaged"] for entry in straight["replaced"]} == {3}
    assert balance(straight).times.sum() == 36
