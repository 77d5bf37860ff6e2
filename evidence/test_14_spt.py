"""SPT (arXiv 2310.02980) on digits as sequences of pixels: self-pretraining, and the same transformer from scratch.

scikit-learn's 8 x 8 digits as 64 steps of one grey value each: nothing tells a network of rows and columns. 100 digits
have labels, 200 others stop each training early, 360 are tested on. A transformer (2 blocks, width 64, sinusoidal
positions) is trained in two ways, each for the same number of optimiser steps of 25 digits:

- scratch: all steps on labels.
- SPT: first the hidden ones of the 17 grey values of all digits for training that are not used to stop early, half of
  each hidden, then labels.

Every stage on labels keeps the weights of its best validation accuracy. Rates are searched by that accuracy on a draw
of digits of the search seed, SPT's the same in both stages; the 360 test digits have no part in any choice. An earlier
record had 300 labels, with which scratch had 88 % and little was left to gain, and a state-space network, which scratch
alone brought to 95 %.

Floor: chance, a tenth. Ceiling: scratch with the labels of all digits for training. Gates: for scratch the training
digits that are told; for SPT the nats of hidden values of validation digits, below those of the shares that the grey
values of each place have in training.
"""

import contextlib
import io
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from quiet import quiet_trainer
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.sequence import SequenceNetwork, sequence_transformer
from lightspan.datamodules.image.sets.small import Digits, Labelled
from lightspan.datamodules.sequence.pixels import PixelSequences
from lightspan.methods.masked.spt import SPT, LevelGuess, MaskedSteps
from lightspan.methods.supervised.sequence_classifier import SequenceClassifier
from lightspan.nn.masking.step_masks import StepMasks
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH = (0, 1, 2, 3), 100
LABELLED, VALIDATION, BATCH, GREY_VALUES = 100, 200, 25, 17
BEFORE, TUNING = 800, 300
ARMS = ("scratch", "SPT")
RATES = (1e-3, 2e-3, 4e-3)


class DrawnDigits(Digits):
    """The digits for training in an order of the seed."""

    def __init__(self, drawn_by: int) -> None:
        super().__init__()
        self.drawn_by = drawn_by

    def load(self) -> tuple[Labelled, Labelled]:
        training, test = super().load()
        order = np.random.default_rng(self.drawn_by).permutation(len(training.labels))
        return Labelled(training.images[order], training.labels[order]), test


class Best(Callback):
    """Keeps the weights of the best validation accuracy."""

    accuracy, weights = -1.0, dict[str, Tensor]()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy = float(trainer.callback_metrics["val/accuracy"])
        if accuracy > self.accuracy:
            self.accuracy = accuracy
            self.weights = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


def digits(seed: int, size: int | None) -> PixelSequences:
    with contextlib.redirect_stdout(io.StringIO()):
        data = PixelSequences(DrawnDigits(seed), batch_size=BATCH, train_size=size, val_size=VALIDATION, seed=seed)
        data.setup()
    return data


def optimisation(rate: float) -> dict[str, Any]:
    """The same for all arms."""
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=0.01),
        "lr_scheduler": partial(WarmupCosine, warmup=0.1, final=0.0),
    }


def pretrained(network: SequenceNetwork, seed: int, size: int | None, rate: float, steps: int) -> tuple[float, float]:
    """Nats on hidden values of the validation digits: of each place's grey values in training, smoothed by one count,
    and of the network, which is trained.
    """
    pretext = MaskedSteps(StepMasks(0.5, seed=seed))
    method, data = SPT(network, pretext, LevelGuess(GREY_VALUES), **optimisation(rate)), digits(seed, size)
    quiet_trainer(max_steps=steps, gradient_clip_val=1.0).fit(method, train_dataloaders=data.train_dataloader())
    assert data.train is not None
    trained_NL = levels(torch.stack([data.train.sample(i, 0)["sequence"] for i in range(len(data.train))]))
    share_LK = (F.one_hot(trained_NL, GREY_VALUES).sum(dim=0) + 1) / (len(trained_NL) + GREY_VALUES)
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for batch in data.val_dataloader():
            hidden_BL = pretext.masks.draw(64, 0, batch["index"])
            share_BL = share_LK[torch.arange(64), levels(batch["sequence"])]
            loss = method.eval().loss(batch, 0) * hidden_BL.sum()
            sums += torch.stack([-share_BL[hidden_BL].log().sum(), loss, hidden_BL.sum()]).double()
    of_place, of_network, hidden = sums.tolist()
    return of_place / hidden, of_network / hidden


def levels(sequence_NL1: Tensor) -> Tensor:
    return ((sequence_NL1[:, :, 0] + 1) / 2 * (GREY_VALUES - 1)).round().long()


def classified(
    network: SequenceNetwork, seed: int, rate: float, steps: int, labelled: int | None = LABELLED
) -> dict[str, float]:
    """Accuracy in per cent on training, validation and test digits, with the weights that validate best."""
    method, data, best = SequenceClassifier(network, 10, **optimisation(rate)), digits(seed, labelled), Best()
    every = 1 if labelled is None else 12  # about 50 steps
    trainer = quiet_trainer(
        max_steps=steps, gradient_clip_val=1.0, callbacks=[best], limit_val_batches=None, check_val_every_n_epoch=every,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(method, datamodule=data)
    method.load_state_dict(best.weights)
    method.eval()
    found = {}
    with torch.no_grad():
        loaders = {
            "training": data.bank_dataloader(),
            "validation": data.val_dataloader(),
            "test": data.test_dataloader(),
        }
        for name, loader in loaders.items():
            right = [method.predict_step(batch, 0).argmax(dim=1) == batch["label"] for batch in loader]
            found[name] = 100 * float(torch.cat(right).double().mean())
    return found


def measured(arm: str, rate: float, seed: int, labelled: int | None = LABELLED) -> dict[str, float]:
    """Args:
    labelled: how many digits have labels; None for all.
    """
    seed_everything(seed, verbose=False)
    network = sequence_transformer(width=64, depth=2, heads=4)
    if arm == "scratch":
        return classified(network, seed, rate, BEFORE + TUNING, labelled)
    of_place, nats = pretrained(network, seed, None, rate, BEFORE)
    return classified(network, seed, rate, TUNING) | {"place by place": of_place, "network": nats}


def test_spt(evidence) -> None:
    rates = evidence.search(
        {arm: lambda rate, arm=arm: measured(arm, rate, SEARCH)["validation"] for arm in ARMS}, RATES
    )
    runs = {arm: {seed: measured(arm, rates[arm], seed) for seed in SEEDS} for arm in ARMS}
    oracle = {seed: measured("scratch", rates["scratch"], seed, labelled=None)["test"] for seed in SEEDS}

    def by_seed(arm: str, figure: str) -> dict[int, float]:
        return {seed: runs[arm][seed][figure] for seed in SEEDS}

    for name, of_seed in {**{arm: by_seed(arm, "test") for arm in ARMS}, "all labels": oracle}.items():
        for seed, value in of_seed.items():
            evidence.figure(f"test accuracy, {name}", value, seed, "%")
    evidence.gate("scratch", by_seed("scratch", "training"), 10.0, by=50.0, unit="points")
    guesses = by_seed("SPT", "network"), by_seed("SPT", "place by place")
    evidence.gate("SPT", *guesses, by=0.1, unit="nats", lower_is_better=True)
    evidence.note(
        f"A test digit is 0.28 points. {BEFORE} steps of self-pretraining and {TUNING} on labels, or {BEFORE + TUNING} "
        f"on labels alone, of {BATCH} digits each. To guess grey values by cross-entropy and not by the absolute error "
        f"was chosen on seed {SEARCH}."
    )
    scratch = by_seed("scratch", "test")
    evidence.claim(
        "test accuracy, SPT minus scratch",
        {seed: value - scratch[seed] for seed, value in by_seed("SPT", "test").items()},
        at_least=5.0,
        unit="points",
        floor={seed: 10.0 - scratch[seed] for seed in SEEDS},
        ceiling={seed: oracle[seed] - scratch[seed] for seed in SEEDS},
        arms=ARMS,
    )
