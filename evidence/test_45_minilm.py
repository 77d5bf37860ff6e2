"""SAID and DID (arXiv 2012.13255) on a real encoder: all 22.6 M weights of MiniLM move in 200 dimensions.

MiniLM and a new head of two classes learn from food reviews which of them are "great". Three arms have as many numbers
to train: DID and SAID from the pretrained weights, and DID from random ones. SAID pays for the factors of 53 layers
(every linear layer, embedding, layer norm and the head) out of its dimensions. Each run is short: 30 steps of 16
reviews, cut at 48 tokens, Adam with a rate that falls to zero, no dropout, bfloat16 in the network and float32 in the
subspace. Seeds draw head, random weights, subspace, and which training reviews are read in which order. Beside them
stand the majority class, and a linear probe on frozen features of the same 480 reviews.

Directions are `Sparse`: a step of Fastfood in 22.6 M weights takes 1.2 s of one core, more than the network itself, and
0.15 s like this. Each direction touches one weight in 4,750, so 4 % of all weights move.

Rates, two for each arm, and the penalty of the probe come from one search on seed 100 and 500 reviews
held out of training: `python evidence/test_45_minilm.py` repeats it.
"""

from functools import cache, partial
from itertools import product
from statistics import mean
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from lightspan.analysis.linear_probe import linear_probe_accuracy
from lightspan.backbones.pretrained import minilm, minilm_tokenizer
from lightspan.datamodules.batches import LabelledTextBatch
from lightspan.datamodules.reviews import FoodReviews, Tokenized
from lightspan.errors import UserError
from lightspan.methods.language.text_classifier import TextClassifier
from lightspan.optim.random_subspace import RandomSubspace
from lightspan.subspaces.projections import Sparse

SEEDS, SEARCH_SEED = (0, 1, 2), 100
LENGTH, BATCH, STEPS, HELD_OUT = 48, 16, 30, 500
RATES_TRIED, PENALTIES_TRIED = (1e-1, 3e-1), (1.0, 10.0, 100.0, 1000.0)


class Arm(NamedTuple):
    pretrained: bool
    scales: bool


ARMS = {"DID": Arm(True, False), "SAID": Arm(True, True), "DID, random weights": Arm(False, False)}
RATES = {200: {"DID": 0.3, "SAID": 0.3, "DID, random weights": 0.3}}
PENALTIES = {True: 1000.0, False: 1000.0}
"""Of the probe on pretrained and on random features."""


@cache
def reviews(held_out: int) -> tuple[Tokenized, Tokenized]:
    """What is trained on, and what judges: the test reviews, or training reviews held out."""
    data = FoodReviews(minilm_tokenizer(), LENGTH, val_size=held_out)
    data.setup()
    assert data.train is not None
    return data.train.data, data.val.data


def batch(data: Tokenized, rows: Tensor) -> LabelledTextBatch:
    tokens, lengths, labels = (torch.from_numpy(array[rows.numpy()]).long() for array in data)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return {"tokens": tokens, "mask": mask, "label": labels, "index": rows}


def order(data: Tokenized, seed: int) -> Tensor:
    """The training reviews of one run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(data.labels), generator=generator)[: STEPS * BATCH]


def model_of(pretrained: bool, seed: int) -> TextClassifier:
    torch.manual_seed(seed)
    return TextClassifier(minilm(weights=pretrained, seed=seed), 2, torch.optim.Adam).eval()  # no dropout


@cache
def train(arm: Arm, dim: int, lr: float, seed: int, held_out: int = 0) -> tuple[float, float]:
    """Accuracy in per cent after the last step, and the mean training loss of the last ten steps in nats."""
    data, judge = reviews(held_out)
    model = model_of(arm.pretrained, seed)
    inner = partial(torch.optim.Adam, lr=lr)
    named = model.named_parameters()
    optimizer = RandomSubspace(named, inner, dim, Sparse, seed=seed, layer_scales=arm.scales)
    schedule = LinearLR(optimizer, 1.0, 0.0, STEPS)
    losses = []
    for rows in order(data, seed).split(BATCH):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model.loss_and_accuracy(batch(data, rows))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        parts = torch.arange(len(judge.labels)).split(100)
        right = [model.loss_and_accuracy(batch(judge, rows))[1].float() * len(rows) for rows in parts]
    return 100 * sum(map(float, right)) / len(judge.labels), mean(losses[-10:])


def probe(pretrained: bool, penalties: tuple[float, ...], seed: int, held_out: int = 0) -> dict[float, float]:
    """Accuracy in per cent of linear probes on features before any training."""
    data, judge = reviews(held_out)
    model, read = model_of(pretrained, seed), order(data, seed)

    def features(source: Tokenized, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = torch.cat([model.features(batch(source, part)) for part in rows.split(100)])
        return found.float(), torch.from_numpy(source.labels)[rows]

    known, asked = features(data, read), features(judge, torch.arange(len(judge.labels)))
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
    evidence.note(f"Rates on seed {SEARCH_SEED}: {RATES}; penalties of the probe: {PENALTIES}.")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dim", RATES)
def test_every_arm_trains(evidence, dim: int, seed: int) -> None:
    """A test for each seed, so that an interrupted run keeps what it has measured."""
    for name, arm in ARMS.items():
        accuracy, loss = train(arm, dim, RATES[dim][name], seed)
        evidence.figure(f"accuracy, {name}, d = {dim}", accuracy, seed, "%")
        evidence.figure(f"training loss of the last ten steps, {name}, d = {dim}", loss, seed, "nats")
        print(f"d = {dim}, seed {seed}, {name}: {accuracy:.1f} %, {loss:.3f} nats", flush=True)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("dim", RATES)
def test_factors_pay_for_themselves_and_pretraining_helps(evidence, dim: int) -> None:
    for ahead, behind, margin in (("SAID", "DID", -1.0), ("DID", "DID, random weights", 3.0)):
        a, b = ({seed: train(ARMS[name], dim, RATES[dim][name], seed)[0] for seed in SEEDS} for name in (ahead, behind))
        gains = {seed: a[seed] - b[seed] for seed in SEEDS}
        evidence.claim(f"{ahead} minus {behind}, d = {dim}", gains, at_least=margin, unit="points")


@pytest.mark.usefixtures("installed")
def test_frozen_features(evidence) -> None:
    for pretrained, l2 in PENALTIES.items():
        for seed in SEEDS:
            kind = "pretrained" if pretrained else "random"
            evidence.figure(f"accuracy of a probe on {kind} features", probe(pretrained, (l2,), seed)[l2], seed, "%")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for start in (True, False):
        print("probe", start, probe(start, PENALTIES_TRIED, SEARCH_SEED, HELD_OUT), flush=True)
    for dim, (name, arm) in product(RATES, ARMS.items()):
        scores = {rate: train(arm, dim, rate, SEARCH_SEED, HELD_OUT)[0] for rate in RATES_TRIED}
        print(dim, name, {rate: round(score, 1) for rate, score in scores.items()}, flush=True)
