"""Adaptation in a LightningModule that knows nothing of lightspan: what trains, what stays, and resuming."""

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightspan.adapters.codyra import GatedLoRA
from lightspan.adapters.inject import adapted_layers, frozen_hash
from lightspan.adapters.lora import LoRA
from lightspan.callbacks.training.adaptation import Adaptation
from lightspan.callbacks.training.rank_selection import RankSelection, threshold
from lightspan.core.errors import UserError

STEPS = 20


class Plain(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
        self.head = nn.Linear(12, 3)
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


def fit(module, callbacks, tmp_path, steps=STEPS, resume=None, **options):
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    loader = DataLoader(TensorDataset(x, x[:, :3].argmax(dim=1)), batch_size=16)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=callbacks, logger=False, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, loader, loader, ckpt_path=resume, weights_only=True)
    return trainer


def test_adapters_train_in_a_frozen_module_whose_statistics_stay(tmp_path):
    pretrained, module = Plain().state_dict(), Plain()
    fit(module, [Adaptation(LoRA(rank=2), ["net.*"], train=["head.*"])], tmp_path)
    assert set(adapted_layers(module)) == {"net.0", "net.3"}
    after = {name.replace(".base.", "."): t for name, t in module.state_dict().items()}
    changed = {name for name, tensor in pretrained.items() if not torch.equal(tensor, after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert sum(module.losses[-4:]) < 0.8 * sum(module.losses[:4])


def test_a_resumed_run_is_the_straight_one(tmp_path):
    def callbacks():
        return [Adaptation(LoRA(rank=2), ["net.0"]), Adaptation(GatedLoRA(rank=2), ["net.3"], train=["head.*"])]

    straight, first, second = Plain(), Plain(), Plain()
    fit(straight, callbacks(), tmp_path)
    fit(first, callbacks(), tmp_path, 8).save_checkpoint(tmp_path / "8.ckpt")
    fit(second, callbacks(), tmp_path, resume=tmp_path / "8.ckpt")
    assert first.losses + second.losses == straight.losses
    assert frozen_hash(second) == frozen_hash(straight)


def test_it_acts_once_a_module(tmp_path):
    module, callback = Plain(), Adaptation(LoRA(rank=2), ["net.0"], train=["head.*"])
    fit(module, [callback], tmp_path)
    fit(module, [callback], tmp_path)
    assert list(module.net[0].adapters) == ["default"]


def test_the_ladder_starts_after_the_dense_share_and_ends_at_its_top():
    kappas = [threshold(step, 500, 0.005, 0.5, 50) for step in range(1, 501)]
    assert kappas[:254] == [0.0] * 254
    assert kappas == sorted(kappas)
    assert kappas[-1] == 0.005
    assert len(set(kappas)) == 50
    assert sum(kappas) == pytest.approx(0.65, abs=0.03)


def test_gates_close_on_the_ladder_and_the_rest_is_written_into_the_weights(tmp_path):
    module, selection = Plain(), RankSelection(kappa_max=0.2)
    before = module.net[3].weight.clone()
    fit(module, [Adaptation(GatedLoRA(rank=6), ["net.3"], train=["head.*"]), selection], tmp_path)
    adapter = module.net[3].adapters["default"]
    assert 0 <= selection.ranks["net.3"] < 6
    change = module.net[3].base.weight - before
    assert torch.linalg.matrix_rank(change) == selection.ranks["net.3"]
    assert not adapter.delta().any()
    assert adapter.kept_rank == 6


def test_without_merging_the_pruned_adapter_stays(tmp_path):
    module, selection = Plain(), RankSelection(kappa_max=0.2, operator="cut", merge=False)
    before = module.net[3].weight.clone()
    fit(module, [Adaptation(GatedLoRA(rank=6), ["net.3"], train=["head.*"]), selection], tmp_path)
    assert torch.equal(module.net[3].base.weight, before)
    assert len(module.net[3].adapters["default"].gate_R) == selection.ranks["net.3"] < 6


def test_the_ladder_is_climbed_by_optimiser_steps(tmp_path):
    seen, kappa_max = [], 2.0**-10

    class Watch(lightning.Callback):
        def on_before_optimizer_step(self, trainer, *_):
            if trainer.global_step:
                seen.append((trainer.global_step, float(trainer.callback_metrics["train/kappa"])))

    options = {"accumulate_grad_batches": 2}
    callbacks = [
        Adaptation(GatedLoRA(rank=2), ["net.3"]),
        RankSelection(kappa_max=kappa_max, dense=0.0, levels=2),
        Watch(),
    ]
    fit(Plain(), callbacks, tmp_path, steps=6, **options)
    assert seen == [(1, 0), (2, 0), (3, kappa_max), (4, kappa_max), (5, kappa_max)]


def test_what_rank_selection_cannot_do_is_named(tmp_path):
    with pytest.raises(UserError, match="finds no GatedLoRA adapter named 'default' in Plain"):
        fit(Plain(), [Adaptation(LoRA(rank=2), ["net.3"]), RankSelection()], tmp_path)
    with pytest.raises(UserError, match=r"kappa_max=-1 must be at least 0, dense=0.5 in \[0, 1\)"):
        RankSelection(kappa_max=-1)
    with pytest.raises(UserError, match="operator='hard' must be one of soft, cut"):
        RankSelection(operator="hard")
    module = Plain()
    nn.utils.parametrizations.weight_norm(module.net[3])
    with pytest.raises(UserError, match=r"net.3 is a ParametrizedLinear whose weight is packed or recomputed"):
        fit(module, [Adaptation(GatedLoRA(rank=2), ["net.3"]), RankSelection()], tmp_path)
