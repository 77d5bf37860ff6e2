"""`lightspan fit --dry-run` takes a batch through the model, once, and refuses only what the run would refuse."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.cli.config.build import Built
from lightspan.cli.config.resolve import resolve
from lightspan.cli.planning import rehearsal
from lightspan.cli.planning.rehearsal import rehearse
from lightspan.core.errors import UserError
from lightspan.optim.groups import ParameterGroups, Rule
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.training.wiring.optimizers import wire

RECIPE = str(Path(__file__).parents[2] / "tiny_project" / "tiny.yaml")


class Net(LightningModule):
    def __init__(self, width: int = 4, prepared: bool = True) -> None:
        super().__init__()
        self.layer, self.prepared, self.seen = nn.Linear(width, 2), prepared, []

    def training_step(self, batch: Tensor) -> Tensor:  # without the index of the batch, which Lightning allows too
        self.seen.append(type(batch))
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss + (0 if self.prepared else self.made_by_a_hook)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Bytes(LightningDataModule):
    """Rows of whole numbers, which only a hook makes numbers that a layer takes."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(8, 4, dtype=torch.uint8), batch_size=4)

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch.float()


def tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: LightningModule, *callbacks: Any, ranks: int = 1
) -> str:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(
        max_steps=1, callbacks=[*callbacks], enable_model_summary=False, default_root_dir=tmp_path, **quiet
    )
    built = Built(trainer, module, Bytes())
    if ranks > 1:
        monkeypatch.setattr(rehearsal, "_trainer_of_one_process", lambda *_: trainer)
        monkeypatch.setattr(type(trainer), "world_size", ranks)
    monkeypatch.setattr(rehearsal, "build", lambda *_: built)
    monkeypatch.syspath_prepend(str(Path(RECIPE).parent))
    return rehearse(resolve(RECIPE, (), (), ("tiny_lab",)))[-1]


def test_a_batch_goes_through_the_model_once_as_a_fit_would_take_it(monkeypatch, tmp_path):
    module = Net()
    before = module.layer.weight.clone()
    said = tried(monkeypatch, tmp_path, module)
    assert said == "Not tried: a step of an optimiser, several ranks together."
    assert len(module.seen) == 1
    assert torch.equal(module.layer.weight, before)


SHAPES = (
    r"builds but does not start: RuntimeError: .*shapes cannot be multiplied \(\d+x4 and 5x2\) "
    r"\(\S*test_rehearsal\.py:\d+\)$"  # a line of the module above, not of torch and not of what calls it
)


class Projected(Net):
    def configure_optimizers(self) -> Any:
        wire(self.trainer, self, [optimizer := LowRank(self.named_parameters(), rank=1)])
        return optimizer


def test_what_each_parameter_gets_is_printed_as_when_a_run_starts(monkeypatch, tmp_path, capsys):
    tried(monkeypatch, tmp_path, Projected())
    said = capsys.readouterr().out
    assert said.startswith("LowRank: what each parameter gets")
    assert "rank 1 of 2" in said


class Grouped(Net):
    def configure_optimizers(self) -> Any:
        optimizer = ParameterGroups(rules=[Rule(["layer.bias"], lr_scale=0.5)]).optimizer(
            self, lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.02)
        )
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer)]


def test_of_any_optimiser_the_groups_are_printed_with_their_rates_before_a_schedule_changes_them(
    monkeypatch, tmp_path, capsys
):
    tried(monkeypatch, tmp_path, Grouped())
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert title.strip() == "AdamW: which parameters train together"
    assert head.split() == ["group", "tensors", "numbers", "lr", "weight", "decay"]
    assert [row.split() for row in rows if row.strip()] == [
        ["matrices", "1", "8", "0.1", "0.02"],
        ["vectors-lr0.5", "1", "2", "0.05", "0"],
    ]


def test_shapes_that_do_not_fit_are_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=SHAPES):
        tried(monkeypatch, tmp_path, Net(width=5))


def test_of_several_ranks_the_shapes_alone_are_tried_and_a_fault_is_told(monkeypatch, tmp_path):
    module = Net()
    assert "forward pass" not in tried(monkeypatch, tmp_path, module, ranks=8)
    assert module.seen[0] is not Tensor  # a fake one, without memory
    assert "a forward pass (on shapes alone it stops, which" in tried(monkeypatch, tmp_path, Net(width=5), ranks=8)


class Prepares(Callback):
    prepares_optimizers = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.made_by_a_hook = 1.0


def test_what_a_hook_of_ones_own_would_have_made_is_no_fault(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="made_by_a_hook"):
        tried(monkeypatch, tmp_path, Net(prepared=False))
    said = tried(monkeypatch, tmp_path, Net(prepared=False), Prepares())
    assert "a forward pass (as it is here it stops, which may not happen in the run: AttributeError" in said


def test_a_module_that_optimises_by_hand_is_left_alone(monkeypatch, tmp_path):
    module = Net()
    module.automatic_optimization = False
    assert "a forward pass, since Net uses manual optimisation in it" in tried(monkeypatch, tmp_path, module)
    assert module.seen == []


def test_model_and_data_are_built_once_where_a_strategy_is_named(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(RECIPE).parent))
    from tiny_lab.parts import Rows, Tiny

    made: list[str] = []
    for part in (Tiny, Rows):

        def counting(self: Any, *args: Any, _init: Any = part.__init__, **kwargs: Any) -> None:
            made.append(type(self).__name__)
            _init(self, *args, **kwargs)

        counting.__wrapped__ = part.__init__  # jsonargparse reads the signature
        monkeypatch.setattr(part, "__init__", counting)
    lines = rehearse(resolve(RECIPE, (), ("trainer.strategy=ddp", "trainer.devices=2"), ("tiny_lab",)))
    assert sorted(made) == ["Rows", "Tiny"]
    assert lines[0].startswith("tiny: builds and starts; Tiny with 15 parameters.")
