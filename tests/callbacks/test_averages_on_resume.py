"""Lightning's own callbacks that hold or change weights, in a run that goes on from any of its checkpoints."""

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.resilience.random_state import RandomState
from lightspan.core.errors import UserError

AN_EPOCH, STEPS = 3, 9


class Unfreezes(BaseFinetuning):
    """The body joins at the second epoch."""

    def freeze_before_training(self, pl_module) -> None:
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.02)


@pytest.fixture
def fit(make_trainer, net, batches, tmp_path):
    def fit(name, callback, ckpt_path=None):
        module = net()
        if isinstance(callback, BaseFinetuning):
            module.configure_optimizers = lambda: torch.optim.AdamW(
                (p for p in module.parameters() if p.requires_grad), lr=0.01
            )
        saver = Checkpoint(dirpath=str(tmp_path / name), every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(
            max_epochs=STEPS // AN_EPOCH, enable_checkpointing=True, callbacks=[RandomState(0), callback, saver]
        )
        trainer.fit(module, batches(AN_EPOCH), ckpt_path=ckpt_path, weights_only=True)
        return {name: value.tolist() for name, value in module.state_dict().items()}

    return fit


CALLBACKS = {
    "average": WeightAveraging,
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
    "EMA, every second step": lambda: EMAWeightAveraging(decay=0.9, update_every_n_steps=2, update_starting_at_step=3),
    "finetuning": Unfreezes,
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
def test_from_any_checkpoint_a_run_ends_with_the_straight_ones_weights(fit, tmp_path, make):
    straight = fit("straight", make())
    differ = []
    for step in range(1, STEPS + 1):
        if fit(f"from-{step}", make(), tmp_path / "straight" / f"step={step}.ckpt") != straight:
            differ.append(step)
    assert not differ


def swa():
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)


def test_a_run_with_swa_says_before_its_first_step_that_it_cannot_go_on_and_at_the_resume_why(fit, tmp_path):
    with pytest.warns(UserWarning, match="StochasticWeightAveraging exchanges .* this run cannot be resumed"):
        fit("straight", swa())
    with pytest.raises(UserError, match=r"was written after StochasticWeightAveraging had begun; .* EMAWeightAverag"):
        fit("resumed", swa(), tmp_path / "straight" / f"step={STEPS}.ckpt")
