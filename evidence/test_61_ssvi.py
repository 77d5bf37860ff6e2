"""SSVI (arXiv 2402.11025) on digits and on a known support: sparse posteriors with coordinates that move or stay.

Digits: a network of 64-256-256-10 on the 8 x 8 digits, with 5 % of each layer's weights, 40 epochs. Arms:

- SSVI: a Gaussian posterior over the active weights, which move every 20 steps.
- static: the same posterior over random weights that stay.
- pruned: variational inference over all weights, of which after training the 5 % of each layer with the highest
  |mu| / sigma stay.
- RigL: the same share of single weights, moved by size and gradient, with weight decay.

All start from He-normal weights, those of sparse arms times 1 / sqrt(density), so that signals keep their size. Each
arm has four settings, chosen by the negative log-likelihood on 400 validation images with seed 100, which no claim is
measured on: `python evidence/test_61_ssvi.py` repeats the search. Predictions of the posterior arms average 20 sampled
networks. Inputs from elsewhere are told by the entropy of the prediction: images of noise, and clothes (Fashion-MNIST)
of 8 x 8 pixels, standardised as the digits are. The divergence counts in full (kl_scale 1).

Regression: 200 normal inputs, of which 20 have a weight of +-[0.5, 1.5], 300 samples, noise of 0.5; 20 coordinates are
active. The share of the 20 that are active at the end is the recovered support. Each arm has four rates, chosen by the
loss on 100 further samples with seed 100.
"""

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from lightspan.adapters.sparse_gaussian.costs import costs
from lightspan.adapters.sparse_gaussian.draws import Mean, Outputs, normal
from lightspan.adapters.sparse_gaussian.inject import Start, drawing, gaussian_layers, sparsify
from lightspan.adapters.sparse_gaussian.layer import SparseGaussian
from lightspan.adapters.sparse_gaussian.topology import Topology, move
from lightspan.backbones.vision import MLP
from lightspan.callbacks.training.mask_learning import MaskLearning
from lightspan.datamodules.images.small import Digits, FashionMNIST
from lightspan.methods.bayesian.ssvi import SSVI, entropy
from lightspan.methods.supervised.classifier import Classifier
from lightspan.optim.masks.drop_and_grow import DropAndGrow
from lightspan.optim.masks.reindex import reindex
from lightspan.optim.schedules import WarmupCosine
from lightspan.subspaces.masks.top_k import top_k
from lightspan.subspaces.sparse_gaussian.criteria import SNR, SizeOfMean, SizeSNR

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
SEEDS, SEARCH_SEED, VALIDATION = (0, 1, 2, 3, 4), 100, 400
DENSITY, EPOCHS, BATCH, EVERY, NETWORKS = 0.05, 40, 64, 20, 20
Settings = Mapping[str, float]
POSTERIOR = {"rate": (0.03, 0.1), "prior": (0.3, 1.0)}
GRIDS: dict[str, Mapping[str, tuple[float, ...]]] = {
    "SSVI": POSTERIOR,
    "static": POSTERIOR,
    "pruned": POSTERIOR,
    "RigL": {"rate": (0.03, 0.1), "decay": (5e-4, 5e-3)},
}
CHOSEN: dict[str, Settings] = {}


@dataclass(frozen=True)
class Outcome:
    """Of one trained network on images that it did not see. Accuracy in per cent, the loss in nats."""

    accuracy: float
    loss: float
    calibration_error: float
    noise: float
    clothes: float


def backbone(density: float) -> MLP:
    network = MLP((1, 8, 8), (256, 256))
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                layer.weight /= density**0.5
    return network


def optimization(settings: Settings) -> dict:
    sgd = partial(torch.optim.SGD, lr=settings["rate"], momentum=0.9, weight_decay=settings.get("decay", 0.0))
    return {"optimizer": sgd, "lr_scheduler": partial(WarmupCosine, warmup=0.05, final=0.0)}


def fit(method: LightningModule, data: Digits, callbacks: list[Callback]) -> None:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_epochs=EPOCHS, accelerator="cpu", limit_val_batches=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(method, datamodule=data)


def trained(arm: str, settings: Settings, seed: int, val_size: int) -> SSVI | Classifier:
    torch.manual_seed(seed)
    data, density = Digits(BATCH, val_size=val_size, seed=seed), 1.0 if arm == "pruned" else DENSITY
    if arm == "RigL":
        classifier = Classifier(backbone(density), 10, **optimization(settings))
        with tempfile.TemporaryDirectory() as folder:
            masks = f"{folder}/masks.safetensors"
            learned = MaskLearning(["*.weight"], DropAndGrow(0.3, EVERY), DENSITY, seed=seed, path=masks)
            fit(classifier, data, [learned])
        return classifier
    method = SSVI(
        backbone(density), 10, density, start=Start(None, 0.05, 0.01), prior_std=settings["prior"],
        topology=Topology(alpha=0.3 if arm == "SSVI" else 0.0, every=EVERY), kl_scale=1.0, draws=NETWORKS,
        seed=seed, **optimization(settings),
    )  # fmt: skip
    fit(method, data, [])
    if arm == "pruned":
        for layer in gaussian_layers(method).values():
            keep(layer, top_k(SNR().of(layer.mu, layer.std), round(DENSITY * layer.count)))
    return method


@torch.no_grad()
def keep(layer: SparseGaussian, kept_k: Tensor) -> None:
    """Lets all other coordinates go."""
    layer.mu, layer.rho = nn.Parameter(layer.mu[kept_k]), nn.Parameter(layer.rho[kept_k])
    layer.places = layer.places[kept_k]


@cache
def clothes() -> Tensor:
    """[1000 1 8 8] in [0, 1]."""
    _, test = FashionMNIST().load()
    return F.adaptive_avg_pool2d(torch.from_numpy(test.images[:, None] / 255).float(), 8)


@torch.no_grad()
def outcome(method: SSVI | Classifier, val_size: int) -> Outcome:
    data = Digits(BATCH, val_size=val_size)
    with contextlib.redirect_stdout(io.StringIO()):
        data.setup()
    batches = list(data.val_dataloader())
    image, label, index = (torch.cat([one[key] for one in batches]) for key in ("image", "label", "index"))

    def probabilities(x: Tensor) -> Tensor:
        return method.probabilities(x) if isinstance(method, SSVI) else method(x).softmax(dim=1)

    def told(outside: Tensor) -> float:
        found = torch.cat([entropy(probability), entropy(probabilities(outside))])
        return binary_auroc(found, torch.arange(len(found)) >= len(probability)).item()

    method.eval()
    probability = probabilities(image)
    return Outcome(
        100 * (probability.argmax(1) == label).float().mean().item(),
        F.nll_loss(probability.clamp_min(1e-30).log(), label).item(),
        multiclass_calibration_error(probability, label, 10).item(),
        told(normal(0, -2, "noise", image.shape, index)),
        told((clothes() - data.train.mean) / data.train.std),
    )


def settings_of(arm: str, grids: Mapping[str, Mapping[str, tuple[float, ...]]]) -> list[dict[str, float]]:
    return [dict(zip(grids[arm], values, strict=True)) for values in product(*grids[arm].values())]


def test_moving_coordinates_train_better_networks(evidence) -> None:
    found = {}
    for seed in SEEDS:
        for arm in GRIDS:
            method = trained(arm, CHOSEN[arm], seed, 0)
            found[arm, seed] = outcome(method, 0)
            for name, value in vars(found[arm, seed]).items():
                evidence.figure(f"{name.replace('_', ' ')}, {arm}", value, seed, "%" if name == "accuracy" else "")
            if (arm, seed) == ("SSVI", 0):
                counted = costs(method, torch.zeros(1, 1, 8, 8), watched=0.75 / EVERY)
                for figure in counted.figures():
                    if "optimiser" not in figure.name:
                        evidence.figure(figure.name, figure.value, unit=figure.unit)
    evidence.note(
        "1,437 training and 360 test digits. Chosen: "
        + "; ".join(f"{arm}: {', '.join(f'{k} {v:g}' for k, v in CHOSEN[arm].items())}" for arm in GRIDS)
        + f". Each is one of {len(settings_of('SSVI', GRIDS))}, by the loss on {VALIDATION} validation images of seed "
        f"{SEARCH_SEED}."
    )

    def margin(name: str, arm: str, other: str) -> dict[int, float]:
        return {seed: getattr(found[arm, seed], name) - getattr(found[other, seed], name) for seed in SEEDS}

    evidence.claim("accuracy, SSVI minus static", margin("accuracy", "SSVI", "static"), at_least=2.0, unit="points")
    evidence.claim("accuracy, SSVI minus pruned", margin("accuracy", "SSVI", "pruned"), at_least=0.0, unit="points")
    evidence.claim("loss, SSVI minus RigL", margin("loss", "SSVI", "RigL"), at_most=0.0, unit="nats")
    evidence.claim("AUROC of noise, SSVI minus RigL", margin("noise", "SSVI", "RigL"), at_least=0.03)
    evidence.claim("AUROC of clothes, SSVI minus RigL", margin("clothes", "SSVI", "RigL"), at_least=0.03)


INPUTS, ACTIVE, SAMPLES, NOISE, STEPS = 200, 20, 300, 0.5, 2000
RATES = {"rate": (1e-3, 3e-3, 1e-2, 3e-2)}
REGRESSION = dict.fromkeys(("SSVI", "static", "pruned", "RigL"), RATES)
CHOSEN_RATES: dict[str, Settings] = {
    "SSVI": {"rate": 3e-3},
    "static": {"rate": 1e-3},
    "pruned": {"rate": 1e-2},
    "RigL": {"rate": 3e-3},
}


@dataclass(frozen=True)
class Recovered:
    """The share of the known support that is active at the end, and the squared error on new samples."""

    support: float
    error: float


def regression(arm: str, settings: Settings, seed: int) -> Recovered:
    """Equation 6 with a Gaussian likelihood of known noise; RigL is its limit without variance and divergence."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES + 100, INPUTS, generator=generator)
    known = torch.randperm(INPUTS, generator=generator)[:ACTIVE]
    sizes = 0.5 + torch.rand(ACTIVE, generator=generator)
    weight = torch.zeros(INPUTS).index_copy_(
        0, known, sizes * (2 * torch.randint(0, 2, (ACTIVE,), generator=generator) - 1)
    )
    y = x @ weight + NOISE * torch.randn(len(x), generator=generator)
    model = nn.Sequential(nn.Linear(INPUTS, 1, bias=False))
    layer = sparsify(
        model, ["0"], 1.0 if arm == "pruned" else ACTIVE / INPUTS, start=Start(0.01, 0.05, 0.01), seed=seed
    )["0"]
    topology = Topology(
        SizeOfMean() if arm == "RigL" else SizeSNR(), alpha=0.3 if arm in ("SSVI", "RigL") else 0.0, every=EVERY
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["rate"], momentum=0.9)
    for step in range(STEPS):
        rows = torch.randperm(SAMPLES, generator=generator)[:BATCH]
        layer.watching = topology.due(step, STEPS)
        with drawing(model, Mean() if arm == "RigL" else Outputs(seed, step, rows)):
            loss = (model(x[rows])[:, 0] - y[rows]).square().mean() / (2 * NOISE**2)
        if arm != "RigL":
            loss = loss + min(1.0, 2 * step / STEPS) / SAMPLES * layer.kl(1.0)
        optimizer.zero_grad()
        due = layer.watching
        loss.backward()
        if due:
            dropped = topology.dropped(len(layer.mu), step, STEPS)
            for source_k in move({"0": layer}, {"0": dropped}, topology.removal).values():
                for parameter in (layer.mu, layer.rho):
                    reindex(optimizer, parameter, source_k)
        else:
            optimizer.step()
    if arm == "pruned":
        keep(layer, top_k(SNR().of(layer.mu, layer.std), ACTIVE))
    with torch.no_grad():
        error = (model(x[SAMPLES:])[:, 0] - y[SAMPLES:]).square().mean().item()
    return Recovered(torch.isin(known, layer.places).float().mean().item(), error)


def test_the_known_support_is_found(evidence) -> None:
    found = {(arm, seed): regression(arm, CHOSEN_RATES[arm], seed) for arm in REGRESSION for seed in SEEDS}
    for (arm, seed), one in found.items():
        evidence.figure(f"recovered support, {arm}", 100 * one.support, seed, "%")
        evidence.figure(f"squared error on new samples, {arm}", one.error, seed)
    evidence.note(
        f"Squared error of the noise alone: {NOISE**2:g}. Rates: "
        + ", ".join(f"{arm} {CHOSEN_RATES[arm]['rate']:g}" for arm in REGRESSION)
        + "."
    )
    shares = {arm: {seed: 100 * found[arm, seed].support for seed in SEEDS} for arm in REGRESSION}
    evidence.claim("recovered support, SSVI", shares["SSVI"], at_least=90.0, unit="%")
    evidence.claim("recovered support, static", shares["static"], at_most=30.0, unit="%")


def search() -> None:
    """Prints every setting of the arms that are named, by the loss on validation data of the search seed."""
    for arm in sys.argv[1:] or [*GRIDS, "regression"]:
        if arm == "regression":
            for one in REGRESSION:
                for settings in settings_of(one, REGRESSION):
                    print(one, settings, regression(one, settings, SEARCH_SEED), flush=True)
            continue
        for settings in settings_of(arm, GRIDS):
            print(arm, settings, outcome(trained(arm, settings, SEARCH_SEED, VALIDATION), VALIDATION), flush=True)


if __name__ == "__main__":
    search()
