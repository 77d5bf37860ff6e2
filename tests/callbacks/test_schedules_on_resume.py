"""A schedule of a run that goes on from any checkpoint stands, and trains, as that of the straight run."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from lightspan.callbacks.resilience.checkpoint import Checkpoint

STEPS, AN_EPOCH = 9, 3
FROM = (2, 3, 4, 9)  # inside an epoch, at a validation, at the end of an epoch, at the end of training
BY_STEPS, BY_EPOCHS = {"max_steps": STEPS}, {"max_epochs": STEPS // AN_EPOCH}
EVERY_STEP = {"every_n_train_steps": 1, "save_top_k": -1}
WHERE_LIGHTNING_DOES = {"save_top_k": -1}
AT_THE_END = {"every_n_train_steps": STEPS}
WITHIN_EPOCHS = {"val_check_interval": 2}
NO_VALIDATION = {"limit_val_batches": 0}


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)  # moves at each metric but the first


STEP_LR = partial(lr_scheduler.StepLR, step_size=1)
ONE_CYCLE = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=STEPS + 1)
EXPONENTIAL = partial(lr_scheduler.ExponentialLR, gamma=0.5)

LOSS, VALIDATION = {"monitor": "train/loss_nats"}, {"monitor": "val/loss_nats"}
SCHEDULES = {
    "plateau, step": (plateau, {"interval": "step", **LOSS}, {}),
    "plateau, step, frequency 2": (plateau, {"interval": "step", "frequency": 2, **LOSS}, {}),
    "plateau, step, validations": (plateau, {"interval": "step", "frequency": 2, **VALIDATION}, WITHIN_EPOCHS),
    "plateau, step, accumulation": (plateau, {"interval": "step", **LOSS}, {"accumulate_grad_batches": 2}),
    "plateau, epoch": (plateau, {"interval": "epoch", **VALIDATION}, {}),
    "plateau, epoch, frequency 2": (plateau, {"interval": "epoch", "frequency": 2, **VALIDATION}, {}),
    "plateau, epoch, validations": (plateau, {"interval": "epoch", **VALIDATION}, WITHIN_EPOCHS),
    "plateau, epoch, no validation": (plateau, {"interval": "epoch", **LOSS}, NO_VALIDATION),
    "StepLR, epoch": (STEP_LR, {"interval": "epoch"}, {}),
    "OneCycleLR, step": (ONE_CYCLE, {"interval": "step"}, {}),
    "ExponentialLR, epoch, frequency 2": (EXPONENTIAL, {"interval": "epoch", "frequency": 2}, {}),
}


@pytest.fixture
def fit(make_trainer, net, batches, tmp_path) -> Callable:
    def fit(name: str, case, saves, limit, ckpt_path=None):
        schedule, config, options = case
        module, folder = net(), tmp_path / name
        module.body[3].p = 0.0  # nothing here is random
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        scheduler = schedule(optimizer)
        configured = {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **config}}
        module.configure_optimizers = lambda: configured
        trainer = make_trainer(
            enable_checkpointing=True,
            callbacks=[Checkpoint(dirpath=str(folder), **saves)],
            **{"val_check_interval": 1.0, **limit, **options},
        )
        trainer.fit(
            module, batches(AN_EPOCH), DataLoader(list(batches(1)), None), ckpt_path=ckpt_path, weights_only=True
        )
        weights = [weight.tolist() for weight in module.state_dict().values()]
        rates = [group["lr"] for group in optimizer.param_groups]
        return {"rates": rates, "scheduler": scheduler.state_dict(), "weights": weights, "step": trainer.global_step}

    return fit


@pytest.mark.sample(8)
@pytest.mark.parametrize("case", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(
    ("saves", "limit"),
    [(EVERY_STEP, BY_STEPS), (WHERE_LIGHTNING_DOES, BY_STEPS), (WHERE_LIGHTNING_DOES, BY_EPOCHS)],
    ids=["each step", "by steps, saved where Lightning does", "by epochs, saved where Lightning does"],
)
def test_from_any_checkpoint_a_run_ends_with_the_straight_ones_rates_schedule_and_weights(
    fit, tmp_path, case, saves, limit
):
    straight = fit("straight", case, saves, limit)
    checkpoints = [path for step in FROM if (path := tmp_path / "straight" / f"step={step}.ckpt").exists()]
    assert checkpoints
    for path in checkpoints:
        assert fit(f"from {path.stem}", case, AT_THE_END, limit, path) == straight, path.name
