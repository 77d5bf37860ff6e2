"""CoDyRA (arXiv 2412.01004): sparse gates find where rank is needed, and forget less than LoRA of fixed rank.

Known ranks: from noisy targets, a student of four layers, linear and tanh, has to learn a teacher whose weights differ
from its own by changes of rank 0, 1, 2 and 4 (in an order drawn for each seed); errors are measured on noiseless
targets. All layers get 8 components.

Continual: an MLP pretrained on scikit-learn's digits learns five domains one after another, digits turned by 30 to 150
degrees, each with adapters of rank 8 on all layers that are merged before the next domain. Reported after the last one:
the mean accuracy over all five, that of the last one, and the drop on upright digits.

Settings come from searches over whole grids on seeds 100 to 102, in the continual part on images that no claim uses.
Known ranks: the rate, and for CoDyRA the last threshold; CoDyRA is judged by the highest rank correlation, LoRA by the
smallest error. Continual: the rate, the number of steps, since with fewer steps a fixed rank forgets less, and the last
threshold in units of the rate; the best average accuracy counts.
`python evidence/test_56_codyra.py` repeats them.
"""

import copy
from collections.abc import Callable
from itertools import product
from statistics import mean

import torch
from digits import accuracy, pretrain, shuffled
from scipy.ndimage import rotate
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.codyra import GatedLoRA, GatedLoRAUpdate, soft_threshold
from lightspan.adapters.inject import adapt, adapted_layers, fold
from lightspan.adapters.lora import LoRA
from lightspan.callbacks.training.rank_selection import threshold

SEEDS, SEARCH_SEEDS, RANK = (0, 1, 2, 3, 4), (100, 101, 102), 8
TRUE_RANKS, WIDTH, ROWS, FIT_STEPS, NOISE = (0, 1, 2, 4), 32, 16384, 1500, 0.1
DOMAINS, EPOCHS = (30, 60, 90, 120, 150), 30


def train(
    model: nn.Module,
    loss: Callable[[], Tensor],
    rate: float,
    steps: int,
    kappa_max: float | None,
    gates: str = "normal",
) -> dict[str, int]:
    """Adapts all linear layers: CoDyRA with a last threshold, plain LoRA with None. Returns the ranks that are left."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    spec = LoRA(rank=RANK) if kappa_max is None else GatedLoRA(rank=RANK, gates=gates)  # type: ignore[arg-type]
    adapt(model, layers, spec, show=False)
    adapters = {name: layer.adapters["default"] for name, layer in adapted_layers(model).items()}
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=rate, betas=(0.9, 0.9999))
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if kappa_max is not None:
            kappa = threshold(step, steps, kappa_max, dense=0.5, levels=50)
            with torch.no_grad():
                for adapter in adapters.values():
                    adapter.gate_R.copy_(soft_threshold(adapter.gate_R, kappa))
    return {n: a.kept_rank if isinstance(a, GatedLoRAUpdate) else RANK for n, a in adapters.items()}


# Known ranks


def fit(seed: int, rate: float, kappa_max: float | None, gates: str = "normal") -> tuple[float, list[int], list[int]]:
    """(test error over target variance, true ranks, recovered ranks), layer by layer."""
    torch.manual_seed(seed)
    student = nn.Sequential(*(part for _ in TRUE_RANKS for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
    teacher = copy.deepcopy(student)
    true = [TRUE_RANKS[i] for i in torch.randperm(len(TRUE_RANKS))]
    with torch.no_grad():
        for layer, rank in zip(teacher[::2], true, strict=True):
            left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q[:, :rank] for _ in range(2))
            layer.weight += left @ right.T  # every component is as large as the largest of the weight's
        x, unseen = torch.randn(ROWS, WIDTH), torch.randn(4096, WIDTH)
        y, unseen_y = teacher(x), teacher(unseen)
        y = y + NOISE * y.std() * torch.randn_like(y)

    def loss() -> Tensor:
        rows = torch.randint(ROWS, (256,))
        return F.mse_loss(student(x[rows]), y[rows])

    kept = train(student, loss, rate, FIT_STEPS, kappa_max, gates)
    with torch.no_grad():
        error = (F.mse_loss(student(unseen), unseen_y) / unseen_y.var()).item()
    return error, true, list(kept.values())


# Continual learning


def domains(seed: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Upright digits first, then the five domains: images to train on (600 upright, 140 a domain, all different ones),
    to choose settings on and to test on (the same images at every angle).
    """
    images, labels = shuffled(seed)

    def turned(part: slice, angle: float) -> tuple[Tensor, Tensor]:
        x = rotate(images[part], angle, axes=(2, 1), reshape=False, order=1) if angle else images[part]
        return torch.tensor(x, dtype=torch.float32).flatten(1), torch.tensor(labels[part])

    angles = (0, *DOMAINS)
    own = [slice(0, 600)] + [slice(600 + 140 * i, 740 + 140 * i) for i in range(len(DOMAINS))]
    return {
        "train": [turned(part, angle) for part, angle in zip(own, angles, strict=True)],
        "choose": [turned(slice(1300, 1500), angle) for angle in angles],
        "test": [turned(slice(1500, None), angle) for angle in angles],
    }


def continual(seed: int, rate: float, steps: int, kappa_max: float | None, on: str) -> dict[str, float]:
    """Accuracies in percent after the last domain."""
    parts = domains(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    pretrain(model, *parts["train"][0], EPOCHS, batch=32, lr=1e-3)
    upright = accuracy(model, *parts[on][0])
    for x, y in parts["train"][1:]:

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            rows = torch.randint(len(x), (64,))
            return F.cross_entropy(model(x[rows]), y[rows])

        train(model, loss, rate, steps, kappa_max)
        fold(model)
    now, *final = [accuracy(model, *part) for part in parts[on]]
    return {"average": mean(final), "last": final[-1], "drop": upright - now}


FIT = {"LoRA": (3e-3, None), "CoDyRA": (1e-2, 1e-2)}
CONTINUAL = {"LoRA": (3e-4, 400, None), "CoDyRA": (1e-3, 200, 1e-3)}


def test_gates_recover_the_ranks_that_the_layers_need(evidence) -> None:
    correlation, idle, ratio = {}, {}, {}
    for seed in SEEDS:
        error, true, kept = fit(seed, *FIT["CoDyRA"])
        plain, _, _ = fit(seed, *FIT["LoRA"])
        correlation[seed] = float(spearmanr(true, kept).statistic)
        idle[seed] = float(kept[true.index(0)])
        ratio[seed] = error / plain
        for rank, count in sorted(zip(true, kept, strict=True)):
            evidence.figure(f"components kept where the true rank is {rank}", count, seed)
        evidence.figure("relative test error, CoDyRA", error, seed)
        evidence.figure("relative test error, LoRA", plain, seed)
    evidence.note(f"Known ranks: rate and last threshold by one search on seeds {SEARCH_SEEDS}", FIT)
    evidence.claim("rank correlation of kept and true ranks", correlation, at_least=0.9)
    evidence.claim("components kept where none is needed", idle, at_most=1.0)
    evidence.claim("test error, CoDyRA over LoRA", ratio, at_most=1.1)


def test_adaptive_ranks_forget_less(evidence) -> None:
    average, last, drop = {}, {}, {}
    for seed in SEEDS:
        found = {arm: continual(seed, *settings, "test") for arm, settings in CONTINUAL.items()}
        for arm, percents in found.items():
            for name, percent in percents.items():
                evidence.figure(f"{name}, {arm}", percent, seed, "%")
        average[seed] = found["CoDyRA"]["average"] - found["LoRA"]["average"]
        last[seed] = found["LoRA"]["last"] - found["CoDyRA"]["last"]
        drop[seed] = found["CoDyRA"]["drop"] / found["LoRA"]["drop"]
    evidence.note(f"Continual: rate, steps and last threshold by searches on seeds {SEARCH_SEEDS}", CONTINUAL)
    evidence.claim("average final accuracy, CoDyRA minus LoRA", average, at_least=2.0, unit="points")
    evidence.claim("accuracy of the last domain, LoRA minus CoDyRA", last, at_most=1.0, unit="points")
    evidence.claim("drop on upright digits, CoDyRA over LoRA", drop, at_most=0.5)


def search_known_ranks() -> None:
    for arm, kappas in (("LoRA", (None,)), ("CoDyRA", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1))):
        scores = {}
        for rate, kappa in product((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), kappas):
            runs = [fit(seed, rate, kappa) for seed in SEARCH_SEEDS]
            error = mean(r[0] for r in runs)
            rho = mean(float(spearmanr(r[1], r[2]).statistic) if len(set(r[2])) > 1 else 0.0 for r in runs)
            print(f"fit {arm} {rate:g} {kappa}: error {error:.6f}, rank correlation {rho:.2f}", flush=True)
            scores[rate, kappa] = -error if kappa is None else rho
        print(f'"{arm}": {max(scores, key=scores.__getitem__)}', flush=True)


def search_continual() -> None:
    for arm, ratios in (("LoRA", (None,)), ("CoDyRA", (0.1, 0.3, 1.0, 3.0, 10.0))):
        averages = {}
        for rate, steps, ratio in product((3e-4, 1e-3, 3e-3, 1e-2), (50, 100, 200, 400), ratios):
            kappa = None if ratio is None else ratio * rate
            runs = [continual(seed, rate, steps, kappa, "choose") for seed in SEARCH_SEEDS]
            means = {name: round(mean(r[name] for r in runs), 1) for name in runs[0]}
            print(f"continual {arm} {rate:g} {steps} {kappa}: {means}", flush=True)
            averages[rate, steps, kappa] = means["average"]
        print(f'"{arm}": {max(averages, key=averages.__getitem__)}', flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    search_known_ranks()
    search_continual()
