"""CoDyRA (arXiv 2412.01004): sparse gates find where rank is needed, and forget less than LoRA of fixed rank.

Known ranks: from noisy targets, a student of four layers, linear and tanh, has to learn a teacher whose weights differ
from its own by changes of rank 0, 1, 2 and 4 (in an order drawn for each seed); errors are measured on noiseless
targets. All layers get 8 components. The ceiling is LoRA of the true ranks. The floor of the rank correlation is
chance, that of idle components as many of them in layers drawn blindly, and that of the error the student as it is.

Continual: an MLP pretrained on scikit-learn's digits learns five domains one after another, digits turned by 30 to 150
degrees, each with adapters of rank 8 on all layers that are merged before the next domain. Reported after the last one:
the mean accuracy over all five, and that of the last one. The floor is the network before the first domain, and the
ceiling all weights trained on all images at all angles. The drop on upright digits is a figure: a network that learns
nothing has none.

Rates come from one search for both arms, and CoDyRA's last threshold, in units of its rate, from another. Known ranks:
LoRA is judged by its error, and CoDyRA by its rank correlation, at each rate with the best of three thresholds.
Continual: both by the average accuracy, of the rates with which the last domain is learned too, since whoever learns
less of each domain forgets less. There the search has a third of the digits, of which no claim is measured.

Not held, none of the five: kept ranks follow the true ones at 0.73 where 0.9 was asked for, three components stay where
none is needed, and the error is 3.6 times LoRA's; after five domains both arms forgot as much.
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from statistics import mean

import numpy as np
import torch
from digits import accuracy, parted, pretrain
from scipy.ndimage import rotate
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.adapters.codyra import GatedLoRA, GatedLoRAUpdate, soft_threshold
from lightspan.adapters.inject import adapt, adapted_layers, fold
from lightspan.adapters.lora import LoRA
from lightspan.callbacks.training.rank_selection import threshold

# Seeds 0 to 9 were measured when CoDyRA's rate for known ranks was searched by the error, and held none either.
SEEDS, SEARCH_SEEDS, RANK = tuple(range(10, 20)), (100, 101, 102), 8
FIT_RATES, RATES, RATIOS = (1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3), (0.3, 1.0, 3.0)
TRUE_RANKS, WIDTH, ROWS, FIT_STEPS, NOISE = (0, 1, 2, 4), 32, 16384, 1500, 0.1
ANGLES, EPOCHS, STEPS = (30, 60, 90, 120, 150), 30, 200
UPRIGHT, OF_DOMAIN, LEARNED = 200, 50, 60.0
ARMS = ("CoDyRA", "LoRA")


def train(
    model: nn.Module, loss: Callable[[], Tensor], rate: float, steps: int, kappa_max: float | None, ranks: list[int]
) -> list[int]:
    """Adapts the linear layers that have a rank: CoDyRA with a last threshold, plain LoRA with None. Returns the ranks
    that are left.
    """
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    for name, rank in zip(layers, ranks, strict=True):
        if rank:
            adapt(model, [name], LoRA(rank) if kappa_max is None else GatedLoRA(rank), show=False)
    adapters = [layer.adapters["default"] for layer in adapted_layers(model).values()]
    gated = [adapter for adapter in adapters if isinstance(adapter, GatedLoRAUpdate)]
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=rate, betas=(0.9, 0.9999))
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if kappa_max is not None:
            kappa = threshold(step, steps, kappa_max, dense=0.5, levels=50)
            with torch.no_grad():
                for adapter in gated:
                    adapter.gate_R.copy_(soft_threshold(adapter.gate_R, kappa))
    return [adapter.kept_rank for adapter in gated]


# Known ranks


@cache
def fit(seed: int, rate: float, ratio: float | None, oracle: bool = False) -> dict[str, float]:
    """Test errors over the variance of the target, before and after, and of CoDyRA, whose last threshold is `ratio`
    times the rate, what its gates found.
    """
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

    @torch.no_grad()
    def error() -> float:
        return (F.mse_loss(student(unseen), unseen_y) / unseen_y.var()).item()

    found = {"untrained": error()}
    ranks = true if oracle else [RANK] * len(true)
    kept = train(student, loss, rate, FIT_STEPS, None if ratio is None else ratio * rate, ranks)
    found["error"] = error()
    if kept:
        found["correlation"] = float(spearmanr(true, kept).statistic) if len(set(kept)) > 1 else 0.0
        found["idle"], found["kept"] = float(kept[true.index(0)]), mean(kept)
        found |= {f"kept of {rank}": float(count) for rank, count in zip(true, kept, strict=True)}
    return found


def erring(rate: float) -> float:
    return -mean(fit(seed, rate, None)["error"] for seed in SEARCH_SEEDS)


def correlated(rate: float, ratio: float) -> float:
    return mean(fit(seed, rate, ratio)["correlation"] for seed in SEARCH_SEEDS)


def best_correlated(rate: float) -> float:
    return max(correlated(rate, ratio) for ratio in RATIOS)


def test_gates_recover_the_ranks_that_the_layers_need(evidence) -> None:
    torch.set_num_threads(1)
    scores = {"CoDyRA, known ranks": best_correlated, "LoRA, known ranks": erring}
    gated, plain = evidence.search(scores, FIT_RATES, what="rate, known ranks").values()
    ratios = evidence.search({"CoDyRA": partial(correlated, gated)}, RATIOS, what="threshold over rate, known ranks")
    ratio = ratios["CoDyRA"]
    runs = {
        "CoDyRA": {seed: fit(seed, gated, ratio) for seed in SEEDS},
        "LoRA": {seed: fit(seed, plain, None) for seed in SEEDS},
        "LoRA of the true ranks": {seed: fit(seed, plain, None, oracle=True) for seed in SEEDS},
    }

    def of(arm: str, name: str) -> dict[int, float]:
        return {seed: found[name] for seed, found in runs[arm].items()}

    for arm, by_seed in runs.items():
        for seed, found in by_seed.items():
            for name, value in found.items():
                evidence.figure(f"known ranks, {arm}, {name}", value, seed)
    for arm in ARMS:
        evidence.gate(f"{arm}, known ranks", of(arm, "error"), of(arm, "untrained"), by=0.1, lower_is_better=True)
    own = ("CoDyRA, known ranks",)
    evidence.claim(
        "rank correlation of kept and true ranks", of("CoDyRA", "correlation"), at_least=0.9,
        floor=dict.fromkeys(SEEDS, 0.0), ceiling=dict.fromkeys(SEEDS, 1.0), arms=own,
    )  # fmt: skip
    evidence.claim(
        "components kept where none is needed", of("CoDyRA", "idle"), at_most=1.0,
        floor=of("CoDyRA", "kept"), ceiling=dict.fromkeys(SEEDS, 0.0), arms=own,
    )  # fmt: skip

    def over_plain(arm: str, name: str) -> dict[int, float]:
        return {seed: runs[arm][seed][name] / runs["LoRA"][seed]["error"] for seed in SEEDS}

    evidence.claim(
        "test error, CoDyRA over LoRA", over_plain("CoDyRA", "error"), at_most=1.1,
        floor=over_plain("CoDyRA", "untrained"), ceiling=over_plain("LoRA of the true ranks", "error"),
        arms=[f"{arm}, known ranks" for arm in ARMS],
    )  # fmt: skip


# Continual learning


@cache
def domains(seed: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Upright digits first, then the five domains: images to train on, all different ones, and the others of the seed's
    part of the digits to judge by, the same at every angle; besides, all that are trained on at all angles.
    """
    images, labels = parted(seed, searching=seed in SEARCH_SEEDS)

    def turned(rows: np.ndarray, angle: float) -> tuple[Tensor, Tensor]:
        x = rotate(images[rows], angle, axes=(2, 1), reshape=False, order=1) if angle else images[rows]
        return torch.tensor(x, dtype=torch.float32).flatten(1), torch.tensor(labels[rows])

    cuts = [UPRIGHT + OF_DOMAIN * i for i in range(1 + len(ANGLES))]
    *own, judged = np.split(np.arange(len(labels)), cuts)
    angles = (0, *ANGLES)
    everything = [turned(np.concatenate(own), angle) for angle in angles]
    return {
        "train": [turned(rows, angle) for rows, angle in zip(own, angles, strict=True)],
        "all": [(torch.cat([x for x, _ in everything]), torch.cat([y for _, y in everything]))],
        "judge": [turned(judged, angle) for angle in angles],
    }


@cache
def pretrained(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    pretrain(model, *domains(seed)["train"][0], EPOCHS, batch=32, lr=1e-3)
    return model


def judged(model: nn.Module, seed: int) -> dict[str, float]:
    """Accuracies in per cent."""
    upright, *turned = [accuracy(model, *part) for part in domains(seed)["judge"]]
    own = accuracy(model, *domains(seed)["train"][-1])
    return {"average": mean(turned), "last": turned[-1], "upright": upright, "last, trained images": own}


@cache
def continual(seed: int, rate: float, ratio: float | None) -> dict[str, float]:
    """`judged` after the last domain."""
    model = copy.deepcopy(pretrained(seed))
    torch.manual_seed(seed)
    for x, y in domains(seed)["train"][1:]:

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(model(x), y)

        train(model, loss, rate, STEPS, None if ratio is None else ratio * rate, [RANK] * 3)
        fold(model)
    return judged(model, seed)


def at_once(seed: int) -> dict[str, float]:
    """`judged` of all weights trained on all training images at all angles."""
    model = copy.deepcopy(pretrained(seed))
    pretrain(model, *domains(seed)["all"][0], EPOCHS, batch=64, lr=1e-3)
    return judged(model, seed)


def searched_domains(arm: str, rate: float, ratio: float = 1.0) -> float:
    """The average accuracy; NaN, which is the worst, where the last domain is not learned."""
    found = [continual(seed, rate, None if arm == "LoRA" else ratio) for seed in SEARCH_SEEDS]
    learned = mean(one["last"] for one in found) >= LEARNED
    return mean(one["average"] for one in found) if learned else float("nan")


def test_adaptive_ranks_forget_less(evidence) -> None:
    torch.set_num_threads(1)
    scores = {f"{arm}, domains": partial(searched_domains, arm) for arm in ARMS}
    gated, plain = evidence.search(scores, RATES, what="rate, domains").values()
    threshold_scores = {"CoDyRA": partial(searched_domains, "CoDyRA", gated)}
    ratio = evidence.search(threshold_scores, RATIOS, what="threshold over rate, domains")["CoDyRA"]
    runs = {
        "CoDyRA": {seed: continual(seed, gated, ratio) for seed in SEEDS},
        "LoRA": {seed: continual(seed, plain, None) for seed in SEEDS},
        "before": {seed: judged(pretrained(seed), seed) for seed in SEEDS},
        "at once": {seed: at_once(seed) for seed in SEEDS},
    }

    def gap(name: str, first: str, second: str) -> dict[int, float]:
        return {seed: runs[first][seed][name] - runs[second][seed][name] for seed in SEEDS}

    for arm, by_seed in runs.items():
        for seed, found in by_seed.items():
            for name, percent in found.items():
                evidence.figure(f"{name}, {arm}", percent, seed, "%")
    for arm in ARMS:
        for seed, points in gap("upright", "before", arm).items():
            evidence.figure(f"drop on upright digits, {arm}", points, seed, "points")
        own = "last, trained images"
        trained, before = ({s: found[own] for s, found in runs[name].items()} for name in (arm, "before"))
        evidence.gate(f"{arm}, domains", trained, before, by=30.0, unit="points")
    arms = [f"{arm}, domains" for arm in ARMS]
    evidence.claim(
        "average final accuracy, CoDyRA minus LoRA", gap("average", "CoDyRA", "LoRA"), at_least=2.0, unit="points",
        floor=gap("average", "before", "LoRA"), ceiling=gap("average", "at once", "LoRA"), arms=arms,
    )  # fmt: skip
    evidence.claim(
        "accuracy of the last domain, LoRA minus CoDyRA", gap("last", "LoRA", "CoDyRA"), at_most=1.0, unit="points",
        floor=gap("last", "LoRA", "before"), ceiling=gap("last", "LoRA", "at once"), arms=arms,
    )  # fmt: skip
