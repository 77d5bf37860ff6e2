"""SPT (arXiv 2310.02980) on digits as sequences of pixels: self-pretraining, and the same network from scratch.

scikit-learn's 8 x 8 digits as 64 steps of one grey value each: nothing tells a network of rows and columns. 300 digits
have labels, 200 others stop each training early, 360 are tested on. A transformer (2 blocks, width 64, sinusoidal
positions) and a diagonal state-space network of the same width and depth are trained in three ways, each for the same
number of optimiser steps of 25 digits:

- scratch: all steps on labels.
- SPT: first the hidden ones of the 17 grey values of the same 300 digits, half of each hidden, then labels.
- SPT, all inputs: the first stage on all digits for training that are not used to stop early, without their labels.

Every stage on labels keeps the weights of its best validation accuracy. The rate of each arm and network, of SPT the
same in both stages, is searched first among three, by that accuracy, on a draw of digits by seed 100; the third arm
takes the second's. The 360 test digits have no part in any choice.
"""

import contextlib
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from quiet import quiet_trainer
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.sequence import SequenceNetwork, sequence_state_space, sequence_transformer
from lightspan.datamodules.image.sets.small import Digits, Labelled
from lightspan.datamodules.sequence.pixels import PixelSequences
from lightspan.methods.masked.spt import SPT, LevelGuess, MaskedSteps
from lightspan.methods.supervised.sequence_classifier import SequenceClassifier
from lightspan.nn.masking.step_masks import StepMasks
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH_SEED = (0, 1, 2), 100
LABELLED, VALIDATION, BATCH, GREY_VALUES = 300, 200, 25, 17
BEFORE, TUNING = 1000, 700
NETWORKS: dict[str, Callable[[], SequenceNetwork]] = {
    "transformer": partial(sequence_transformer, width=64, depth=2, heads=4),
    "state space": partial(sequence_state_space, width=64, depth=2),
}
ARMS = ("scratch", "SPT", "SPT, all inputs")
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


def classified(network: SequenceNetwork, seed: int, rate: float, steps: int) -> dict[str, float]:
    """Accuracy in per cent on training, validation and test digits, with the weights that validate best."""
    method, data, best = SequenceClassifier(network, 10, **optimisation(rate)), digits(seed, LABELLED), Best()
    trainer = quiet_trainer(
        max_steps=steps, gradient_clip_val=1.0, callbacks=[best], limit_val_batches=None, check_val_every_n_epoch=8,
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


def measured(network: str, arm: str, rate: float, seed: int, steps: tuple[int, int]) -> dict[str, float]:
    seed_everything(seed, verbose=False)
    built, (before, tuning) = NETWORKS[network](), steps
    if arm == "scratch":
        return classified(built, seed, rate, before + tuning)
    of_place, nats = pretrained(built, seed, LABELLED if arm == "SPT" else None, rate, before)
    return classified(built, seed, rate, tuning) | {"place by place": of_place, "network": nats}


def searched(network: str, arm: str, steps: tuple[int, int]) -> dict[float, float]:
    """Validation accuracy for each rate, on the search seed."""
    return {rate: measured(network, arm, rate, SEARCH_SEED, steps)["validation"] for rate in RATES}


def compare(evidence: Any, seeds: tuple[int, ...], steps: tuple[int, int]) -> None:
    accuracy: dict[tuple[str, str], dict[int, float]] = {}
    chosen: dict[tuple[str, str], float] = {}
    for network in NETWORKS:
        for arm in ARMS[:2]:
            found = searched(network, arm, steps)
            chosen[network, arm] = max(found, key=lambda rate: found[rate])
            for rate, validated in found.items():
                evidence.figure(
                    f"search, validation accuracy at {rate:g}, {network}, {arm}", validated, SEARCH_SEED, "%"
                )
    chosen["transformer", ARMS[2]] = chosen["transformer", "SPT"]
    for (network, arm), rate in chosen.items():
        for seed in seeds:
            found_by_name = measured(network, arm, rate, seed, steps)
            accuracy.setdefault((network, arm), {})[seed] = found_by_name["test"]
            for name in ("test", "training"):
                evidence.figure(f"{name} accuracy, {network}, {arm}", found_by_name[name], seed, "%")
            for name in ("place by place", "network"):
                if name in found_by_name:
                    evidence.figure(f"hidden values, {name}, {network}, {arm}", found_by_name[name], seed, "nats")
    said = "; ".join(f"{network}, {arm} {rate:g}" for (network, arm), rate in chosen.items())
    evidence.note(
        f"A test digit is 0.28 points. {steps[0]} steps of self-pretraining and {steps[1]} on labels, or "
        f"{sum(steps)} on labels alone, of {BATCH} digits each. Rates of {RATES}, chosen on seed {SEARCH_SEED} by the "
        f"accuracy on {VALIDATION} validation digits: {said}. Place by place: the nats of a guess by the shares of "
        "grey values that each place has in the training digits. To guess grey values by cross-entropy and not by the "
        f"absolute error was chosen on seed {SEARCH_SEED} too."
    )

    def gain(network: str, arm: str) -> dict[int, float]:
        return {seed: accuracy[network, arm][seed] - accuracy[network, "scratch"][seed] for seed in seeds}

    def gap(arm: str) -> float:
        return float(np.mean([abs(accuracy["transformer", arm][s] - accuracy["state space", arm][s]) for s in seeds]))

    gains = gain("transformer", "SPT")
    evidence.claim("transformer, SPT minus scratch", gains, at_least=5.0, unit="points")
    evidence.claim(
        "transformer, the least of a seed, SPT minus scratch", min(gains.values()), at_least=0.1, unit="points"
    )
    evidence.claim(
        "transformer, SPT on all inputs minus scratch", gain("transformer", ARMS[2]), at_least=5.0, unit="points"
    )
    for arm in ARMS[:2]:
        evidence.figure(f"mean distance of both networks, {arm}", gap(arm), unit="points")
    evidence.claim("distance of both networks, SPT over scratch", gap("SPT") / max(gap("scratch"), 1e-9), at_most=0.5)


def test_spt(evidence) -> None:
    compare(evidence, SEEDS, (BEFORE, TUNING))
