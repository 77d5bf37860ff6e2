"""SparK-CT (arXiv 2308.06534): SparK, contrast and dense masked modelling, when labels of drawn CT slices become few.

Drawn slices of bodies, 64 x 64 pixels, in four classes: no lesion, a solid one, a cyst, a ring. A small ResNet of four
stages, whose coarsest map has a stride of 16 pixels, is pre-trained on 1,500 of them without labels, then fine-tuned on
400, 120 or 40 labelled ones (100, 30 and 10 %) of other patients, drawn class by class, and classifies 600 of others
again. Where a slice has a label, its lesion has a radius of at least 3 pixels. Arms, with equal steps:
SparK; SimCLR; SparK's masked modelling with the network as it is, dense; random weights. The score is the mean over
classes of the AUC of one against the rest. The rates of each arm, of pre-training and of fine-tuning (with 40 labels),
are searched first, among the same for all, on slices that no figure is taken on. A step of SimCLR sees two views of
each slice; the processor time of a run is among the figures.
"""

import time
from functools import cache
from itertools import product

import numpy as np
import torch
from few_labels import BATCH, adamw, few, fine_tuned, pretrained, standardised
from lightning import seed_everything
from sklearn.metrics import roc_auc_score
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.rendered.data import MOST
from lightspan.datamodules.rendered.slices import KINDS, CutSlices, Ward
from lightspan.methods.contrastive.simclr import SimCLR
from lightspan.methods.masked.spark import SparK
from lightspan.nn.decoders.unet_decoder import UNetDecoder
from lightspan.nn.heads.projector import Projector
from lightspan.nn.masking.sparse_convs import ActiveCells
from lightspan.training.method import Method

SEEDS, SEARCH = (0, 1, 2, 3, 4), 100
WARD, SMALLEST, POOL = Ward(side=64, cuts=16, diseased=1.0, noise=0.04), 3.0, 6144
UNLABELLED, LABELLED, TEST = 1500, 400, 600
SHARES = (1.0, 0.3, 0.1)
STEPS, TUNING = 250, 160
RATES, TUNING_RATES = (1e-3, 3e-3), (3e-3, 1e-2)
SETTINGS = {"scale": (0.67, 1.0), "brightness": 0.2, "contrast": 0.2}
CHANNELS = (16, 24, 32, 64)


class DenseMaskedModelling(SparK):
    """The same guess from the same cells, whose zeros the network takes for pixels."""

    def maps(self, image_BChw: Tensor, active: ActiveCells) -> list[Tensor]:
        return self._dense_maps(active.alone(image_BChw))


def network() -> ResNet:
    stem = {"stem_width": 8, "stem_type": "deep"}
    made = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, in_chans=1, channels=CHANNELS, **stem)
    made.maxpool = nn.Identity()  # a stride of 16 in all
    return made


def method(arm: str, rate: float) -> Method:
    if arm == "SimCLR":
        return SimCLR(network(), Projector(CHANNELS[-1], [128], 64), 0.2, **adamw(rate))
    kind = DenseMaskedModelling if arm == "dense" else SparK
    return kind(network(), UNetDecoder(CHANNELS[::-1], in_chans=1, width=64, cell=16), **adamw(rate))


ARMS = ("SparK", "SimCLR", "dense", "random weights")


def slices(count: int, seed: int, stream: int) -> CutSlices:
    """Of patients that no other stream has."""
    return WARD.slices(seed, stream * MOST + np.arange(count))


@cache
def unlabelled(count: int, seed: int, stream: int) -> Tensor:
    return torch.from_numpy(slices(count, seed, stream).images).float() / 255


@cache
def labelled(count: int, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """Equally many of each kind."""
    drawn = slices(POOL, seed, stream)
    clear = np.flatnonzero((drawn.label == 0) | (drawn.radius >= SMALLEST))
    label_N = torch.from_numpy(drawn.label[clear])
    rows = few(label_N, count // len(KINDS), seed)
    return torch.from_numpy(drawn.images[clear]).float()[rows] / 255, label_N[rows]


@torch.no_grad()
def auc(trained: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """Mean over classes of that of one against the rest, in per cent."""
    scores = trained(standardised(test[0])).softmax(dim=1)
    return 100 * float(roc_auc_score(test[1].numpy(), scores.double().numpy(), multi_class="ovr", average="macro"))


def measured(
    arm: str, rate: float, tuning_rates: tuple[float, ...], shares: tuple[float, ...], seed: int, searching: bool,
    steps: int, tuning: int,
) -> dict[str, float]:  # fmt: skip
    """AUC for each rate of fine-tuning and share of the labels, after one pre-training; its processor seconds."""
    seed_everything(seed, verbose=False)
    streams = (3, 4, 5) if searching else (0, 1, 2)
    pictures = unlabelled(UNLABELLED, seed, streams[0])
    train, test = (labelled(count, seed, stream) for count, stream in zip((LABELLED, TEST), streams[1:], strict=True))
    views, steps = RandomViews(2 if arm == "SimCLR" else 1, **SETTINGS), 0 if arm == "random weights" else steps
    began = time.process_time()
    trained = pretrained(method(arm, rate), pictures, views, steps, seed)
    found = {"seconds": time.process_time() - began}
    start = {name: tensor.clone() for name, tensor in trained.backbone.state_dict().items()}
    for tuning_rate, share in product(tuning_rates, shares):
        torch.manual_seed(seed)
        whole = network()
        whole.load_state_dict(start)
        rows = few(train[1], round(share * LABELLED / len(KINDS)), seed)
        tuned = nn.Sequential(whole, nn.Linear(CHANNELS[-1], len(KINDS)))
        fine_tuned(tuned, (train[0][rows], train[1][rows]), RandomViews(1, **SETTINGS), tuning, tuning_rate, seed)
        found[f"{tuning_rate:g}, {share:g}"] = auc(tuned, test)
    return found


def searched(arm: str, steps: int, tuning: int) -> tuple[float, float]:
    """(rate of pre-training, rate of fine-tuning) with the best AUC on slices of their own."""
    rates, fewest = RATES if arm != "random weights" else RATES[:1], SHARES[-1:]
    found = {rate: measured(arm, rate, TUNING_RATES, fewest, SEARCH, True, steps, tuning) for rate in rates}
    return max(product(rates, TUNING_RATES), key=lambda pair: found[pair[0]][f"{pair[1]:g}, {fewest[0]:g}"])


def compare(evidence, seeds=SEEDS, steps: int = STEPS, tuning: int = TUNING) -> None:
    chosen = {arm: searched(arm, steps, tuning) for arm in ARMS}
    scores: dict[str, dict[float, dict[int, float]]] = {arm: {share: {} for share in SHARES} for arm in ARMS}
    for arm, (rate, tuned) in chosen.items():
        for seed in seeds:
            found = measured(arm, rate, (tuned,), SHARES, seed, False, steps, tuning)
            if arm != "random weights":
                evidence.figure(f"processor time of pre-training, {arm}", found["seconds"], seed, "s")
            for share in SHARES:
                scores[arm][share][seed] = found[f"{tuned:g}, {share:g}"]
                evidence.figure(f"AUC with {100 * share:g} % of the labels, {arm}", scores[arm][share][seed], seed, "%")
    said = ", ".join(f"{arm} {rate:g} and {tuned:g}" for arm, (rate, tuned) in chosen.items())
    evidence.note(
        f"{steps} steps of {BATCH} slices before, {tuning} steps on labels. Rates of {RATES} and {TUNING_RATES} chosen "
        f"on seed {SEARCH} and other slices: {said}."
    )
    most, least = SHARES[0], SHARES[-1]

    def gain(over: str) -> dict[int, float]:
        return {seed: scores["SparK"][least][seed] - scores[over][least][seed] for seed in seeds}

    lost = {
        arm: {seed: 100 * (1 - scores[arm][least][seed] / scores[arm][most][seed]) for seed in seeds} for arm in ARMS
    }
    for arm, of_seed in lost.items():
        for seed, value in of_seed.items():
            evidence.figure(f"AUC lost from all labels to a tenth, {arm}", value, seed, "%")
    evidence.claim("AUC with 10 % of the labels, SparK minus random weights", gain("random weights"), at_least=5.0,
                   unit="points")  # fmt: skip
    for arm in ARMS[1:]:
        less = {seed: lost[arm][seed] - lost["SparK"][seed] for seed in seeds}
        evidence.claim(f"AUC lost from all labels to a tenth, {arm} minus SparK", less, at_least=0.0, unit="points")
    evidence.claim("AUC with 10 % of the labels, SparK minus dense", gain("dense"), at_least=0.0, unit="points")


def test_spark_ct(evidence) -> None:
    compare(evidence)
