"""CAE (arXiv 2202.03026) on the shipped Fashion-MNIST images, against MAE and I-JEPA.

One vision transformer (4 x 4 patches, 64 channels, 4 blocks) for all arms, equal steps, optimiser and crops; targets
of CAE are codes of k-means over patches. Frozen patches are read by k nearest neighbours of their mean. Rates are
chosen by that accuracy on 500 validation images of the search seed. An earlier record took the largest of three rates,
with which one of three runs collapsed.

CAE without alignment and the attentive probe of that record are left out for their cost.

Floor: the untrained network. Ceiling: the same network taught the labels of the training images. Gates: the arm's own
loss on test images, by that of the untrained network. For the prediction of features, floor is the untrained network
and ceiling a guess without error.
"""

from functools import partial

import torch
from masked_arms import WIDTH, cae, encoded, encoder, i_jepa, mae, optimisation, train
from own_loss import own_loss
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.image.sets.small import FashionMNIST
from lightspan.evaluation.probes.knn import knn_accuracy
from lightspan.methods.masked.cae import CAE
from lightspan.nn.masking.mask_samplers import seen_and_hidden
from lightspan.nn.views import image_of
from lightspan.training.method import Method

SEEDS, SEARCH = (0, 1, 2), 100
STEPS, BATCH = 300, 64
RATES = (1e-3, 3e-3, 1e-2)
ORACLE = "taught labels"


class Taught(Method):
    """The ceiling: told the class."""

    def __init__(self, rate: float) -> None:
        super().__init__(**optimisation(rate))
        self.backbone, self.head = encoder(), nn.Linear(WIDTH, 10)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        tokens = self.backbone.tokens(image_of(batch, "Taught"))  # type: ignore[operator, arg-type]
        return F.cross_entropy(self.head(tokens[:, 1:].mean(dim=1)), batch["label"])


ARMS = {"CAE": cae, "MAE": mae, "I-JEPA": i_jepa, ORACLE: Taught}


def clothes(seed: int) -> FashionMNIST:
    views = RandomViews(count=1, scale=(0.5, 1.0), brightness=0.0, contrast=0.0)
    return FashionMNIST(BATCH, views, val_size=500, seed=seed)


@torch.no_grad()
def alignment(method: CAE, images: Tensor) -> float:
    """R^2 of predicted features of hidden patches by the encoder's own, over all numbers."""
    seen, hidden = seen_and_hidden(method.masks.draw((7, 7), 0, range(len(images))))
    wanted = method.patch_features(images, hidden)
    left = (method.predict(images, seen, hidden) - wanted).square().mean()
    return float(1 - left / (wanted - wanted.mean(dim=(0, 1))).square().mean())


def measured(arm: str, seed: int, rate: float, steps: int = STEPS, validation: bool = False) -> dict[str, float]:
    """One run, or with steps=0 the untrained network."""
    data = clothes(seed)
    method = train(lambda: ARMS[arm](rate), data, seed, steps)
    held_out = list(data.val_dataloader() if validation else data.test_dataloader())
    bank, test = (encoded(method, batches) for batches in (list(data.bank_dataloader()), held_out))
    means = [tokens.mean(dim=1) for tokens, _ in (bank, test)]
    found = {"kNN": 100 * knn_accuracy(means[0], bank[1], means[1], test[1])}
    if arm != ORACLE:
        batches = ({"image": batch["image"], "index": batch["index"]} for batch in held_out)
        found["loss"] = own_loss(partial(ARMS[arm], 1e-3), method.state_dict(), batches)
    if isinstance(method, CAE):
        found["R2"] = alignment(method, torch.cat([batch["image"] for batch in held_out]))
    return found


def test_cae(evidence):
    def validated(arm: str, rate: float) -> float:
        return measured(arm, SEARCH, rate, validation=True)["kNN"]

    arms = ("CAE", "MAE", "I-JEPA")
    rates = evidence.search({arm: partial(validated, arm) for arm in arms}, RATES)
    rates[ORACLE] = rates["MAE"]
    runs = {arm: {seed: measured(arm, seed, rates[arm]) for seed in SEEDS} for arm in ARMS}
    before = {arm: {seed: measured(arm, seed, 1.0, steps=0) for seed in SEEDS} for arm in arms}
    runs["untrained"] = before["CAE"]
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            evidence.figure(f"kNN, {arm}", found["kNN"], seed, "%")
    for arm in arms:
        left = {seed: runs[arm][seed]["loss"] / before[arm][seed]["loss"] for seed in SEEDS}
        evidence.gate(arm, left, 1.0, by=0.1, unit="of its loss", lower_is_better=True)
    evidence.note(f"2,500 training and 1,000 test images, {STEPS} steps of {BATCH}, k = 20.")
    for arm, over, margin in (
        ("CAE", "MAE", 2.0),
        ("CAE", "untrained", 15.0),
        ("MAE", "untrained", 3.0),
        ("I-JEPA", "untrained", 3.0),
    ):

        def gain(arm: str, over: str = over) -> dict[int, float]:
            return {seed: runs[arm][seed]["kNN"] - runs[over][seed]["kNN"] for seed in SEEDS}

        evidence.claim(
            f"kNN, {arm} minus {over}",
            gain(arm),
            at_least=margin,
            unit="points",
            floor=gain("untrained"),
            ceiling=gain(ORACLE),
            arms=(arm, over) if over in arms else (arm,),
        )
    evidence.claim(
        "R2 of predicted features of hidden patches, test images",
        {seed: found["R2"] for seed, found in runs["CAE"].items()},
        at_least=0.5,
        floor={seed: found["R2"] for seed, found in before["CAE"].items()},
        ceiling=1.0,
        arms=("CAE",),
    )
