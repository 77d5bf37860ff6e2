"""Arms that the evidence of Concrete merging (arXiv 2312.06173) compares, each with as many settings to choose from.

- single: each specialist on its own task. base: the pretrained network. average: of the specialists. They have nothing
  to choose.
- task arithmetic, TIES, DARE: chosen on each seed by the labels of the pictures for adaptation.
- AdaMerging (layer-wise) and Concrete task arithmetic: 1,000 and 500 steps on the same pictures without labels.
- Concrete AdaMerging: 500 steps for the mask, then 500 of AdaMerging under it, with the settings of that arm.
- aTLAS: 300 steps on those pictures with their labels.
- random mask: the mask of Concrete task arithmetic with its entries dealt anew inside each tensor, so that density and
  values are the same; its w is chosen on each seed by labels, as that of task arithmetic.

`NINE` and `SIX` list the settings. `search` prints what those of the four arms that are trained reach on a seed that no
figure comes from, by the labels of its pictures for adaptation.
"""

import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from merged_tasks import World, best_on_labels, learned, merged_by
from torch import nn

from lightspan.merging.arithmetic import Scales, TaskArithmetic, WeightedAverage
from lightspan.merging.dare import Dropped
from lightspan.merging.learned import MASK
from lightspan.merging.merger import Merger
from lightspan.merging.ties import Ties
from lightspan.methods.merging.adamerging import AdaMerging
from lightspan.methods.merging.atlas import Atlas
from lightspan.methods.merging.concrete_adamerging import ConcreteAdaMerging
from lightspan.methods.merging.concrete_arithmetic import ConcreteArithmetic

SEARCH_SEED, STEPS, LABELLED_STEPS = 100, 500, 300
WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
Grid = Mapping[str, Mapping[str, tuple[float, ...]]]  # values of each setting of each arm
NINE: Grid = {
    "task arithmetic": {"weight": WEIGHTS},
    "TIES": {"density": (0.1, 0.2, 0.5), "scale": (0.5, 1.0, 1.5)},
    "DARE": {"rate": (0.2, 0.5, 0.9), "weight": (0.1, 0.3, 0.5)},
    "random mask": {"weight": WEIGHTS},
    "AdaMerging": {"lr": (1e-4, 1e-3, 1e-2), "start": (0.1, 0.2, 0.3)},
    "Concrete task arithmetic": {"lr": (1e-3, 1e-2, 1e-1), "weight": (0.1, 0.2, 0.3)},
    "Concrete AdaMerging": {"lr": (1e-3, 1e-2, 1e-1), "inner_lr": (0.01, 0.1, 1.0)},
    "aTLAS": {"lr": (1e-2, 3e-2, 1e-1), "decay": (0.0, 0.1, 1.0)},
}
SIX: Grid = {
    "task arithmetic": {"weight": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)},
    "TIES": {"density": (0.1, 0.2, 0.5), "scale": (0.5, 1.0)},
    "DARE": {"rate": (0.5, 0.9), "weight": (0.1, 0.2, 0.3)},
    "random mask": {"weight": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)},
    "AdaMerging": {"lr": (1e-4, 1e-3, 1e-2), "start": (0.1, 0.2)},
    "Concrete task arithmetic": {"lr": (1e-3, 1e-2, 1e-1), "weight": (0.1, 0.2)},
    "Concrete AdaMerging": {"lr": (1e-3, 1e-2, 1e-1), "inner_lr": (0.01, 0.1)},
    "aTLAS": {"lr": (1e-2, 3e-2, 1e-1), "decay": (0.0, 0.1)},
}
MERGERS: dict[str, Callable[..., Merger]] = {
    "task arithmetic": lambda weight: TaskArithmetic(Scales(weight)),
    "TIES": Ties,
    "DARE": lambda rate, weight: TaskArithmetic(Dropped(rate, Scales(weight))),
}
TRAINED = ("AdaMerging", "Concrete task arithmetic", "Concrete AdaMerging", "aTLAS")
Chosen = Mapping[str, Mapping[str, float]]


def adamerging(
    w: World, seed: int, lr: float, start: float, steps: int = 2 * STEPS, mask: str | None = None
) -> nn.Module:
    return learned(AdaMerging, w, steps, lr, start=start, mask=mask, seed=seed)[1]


def concrete(w: World, seed: int, lr: float, weight: float) -> tuple[ConcreteArithmetic, nn.Module]:
    return learned(ConcreteArithmetic, w, STEPS, lr, weight=weight, seed=seed)  # type: ignore[return-value]


def concrete_adamerging(w: World, seed: int, lr: float, inner_lr: float, second: Mapping[str, float]) -> nn.Module:
    """Args:
    second: settings of the second stage, whose start the first resets its coefficients to.
    """
    with tempfile.TemporaryDirectory() as folder:
        learned(
            ConcreteAdaMerging,
            w,
            STEPS,
            lr,
            batch_size=32,
            inner=partial(torch.optim.SGD, lr=inner_lr),
            weight=second["start"],
            out=folder,
            seed=seed,
        )
        return adamerging(w, seed, **second, steps=STEPS, mask=str(Path(folder) / MASK))


def atlas(w: World, seed: int, lr: float, decay: float) -> nn.Module:
    adam = partial(torch.optim.AdamW, weight_decay=decay)
    return learned(Atlas, w, LABELLED_STEPS, lr, batch_size=64, optimizer=adam, val_every=100, seed=seed)[1]


def settings_of(values: Mapping[str, tuple[float, ...]]) -> list[dict[str, float]]:
    return [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]


def random_masks(w: World, found: ConcreteArithmetic, seed: int, grid: Grid) -> list[nn.Module]:
    """Merges through the found mask with its entries in another order, one for each w."""
    generator = torch.Generator().manual_seed(seed)
    networks = []
    masks = {n: m.detach().flatten() for n, m in found.mask().items()}
    dealt = {n: m[torch.randperm(m.numel(), generator=generator)] for n, m in masks.items()}
    for settings in settings_of(grid["random mask"]):
        network = copy.deepcopy(w.base)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                change = found.span.vectors(name).sum(dim=0)
                parameter += settings["weight"] * dealt[name].view_as(parameter) * change
        networks.append(network)
    return networks


def by_labels(w: World, grid: Grid) -> dict[str, nn.Module]:
    """The arms without training whose settings are chosen on the labels of the pictures for adaptation."""
    merge = partial(merged_by, models=w.models(), network=w.base)
    return {
        arm: best_on_labels(w, [merge(merger(**settings)) for settings in settings_of(grid[arm])])
        for arm, merger in MERGERS.items()
    }


def trained(arm: str, w: World, seed: int, settings: Mapping[str, float], chosen: Chosen) -> nn.Module:
    if arm == "Concrete AdaMerging":
        return concrete_adamerging(w, seed, **settings, second=chosen["AdaMerging"])
    if arm == "Concrete task arithmetic":
        return concrete(w, seed, **settings)[1]
    return {"AdaMerging": adamerging, "aTLAS": atlas}[arm](w, seed, **settings)


def single(w: World, part: str = "score") -> float:
    """Accuracy of each specialist on its own task, in per cent, the mean over tasks."""
    return sum(w.accuracies(network, part, [task])[task] for task, network in w.specialists.items()) / len(w.tasks)


def measure(
    evidence: Any,
    made: Callable[[int], World],
    chosen: Chosen,
    grid: Grid = NINE,
    seeds: Iterable[int] = (0, 1, 2, 3, 4),
) -> None:
    """Records all arms and the claims of the card.

    Args:
        made: the tasks and specialists of a seed.
        chosen: settings of the arms that are trained.
        grid: what the settings were chosen from.
    """
    counts = {len(settings_of(values)) for values in grid.values()}
    assert len(counts) == 1, "an arm has more settings to choose from than another"
    over_ta, random_over_ta, over_adamerging = {}, {}, {}
    for seed in seeds:
        w = made(seed)
        average = merged_by(WeightedAverage(), w.models(), w.base)
        networks = {"base": w.base, "average": average, **by_labels(w, grid)}
        networks["AdaMerging"] = adamerging(w, seed, **chosen["AdaMerging"])
        found, networks["Concrete task arithmetic"] = concrete(w, seed, **chosen["Concrete task arithmetic"])
        networks["random mask"] = best_on_labels(w, random_masks(w, found, seed, grid))
        networks["Concrete AdaMerging"] = trained("Concrete AdaMerging", w, seed, chosen["Concrete AdaMerging"], chosen)
        networks["aTLAS, on labels"] = atlas(w, seed, **chosen["aTLAS"])
        reached = {arm: w.accuracy(network) for arm, network in networks.items()}
        evidence.figure("accuracy, single", single(w), seed, "%")
        for arm, value in reached.items():
            evidence.figure(f"accuracy, {arm}", value, seed, "%")
        evidence.figure("density of the mask", 100 * float(found.concrete.density().detach()), seed, "%")
        over_ta[seed] = reached["Concrete task arithmetic"] - reached["task arithmetic"]
        random_over_ta[seed] = reached["random mask"] - reached["task arithmetic"]
        over_adamerging[seed] = reached["Concrete AdaMerging"] - reached["AdaMerging"]
    evidence.note(
        f"Settings an arm: {counts.pop()}. Those of task arithmetic, TIES, DARE and the random mask were chosen on "
        f"each seed by the labels of the pictures for adaptation, the others on those of seed {SEARCH_SEED}",
        chosen,
    )
    evidence.claim("Concrete minus task arithmetic", over_ta, at_least=2.0, unit="points")
    evidence.claim("random mask minus task arithmetic", random_over_ta, at_most=0.5, unit="points")
    evidence.claim("Concrete AdaMerging minus AdaMerging", over_adamerging, at_least=-0.5, unit="points")


def search(made: Callable[[int], World], grid: Grid = NINE, arms: Iterable[str] = ()) -> None:
    """Prints accuracies of the search seed on the labels of its pictures for adaptation, and the best settings.

    Args:
        arms: of those that are trained; none: all. Concrete AdaMerging needs AdaMerging before it, whose settings it
            takes.
    """
    w = made(SEARCH_SEED)
    print(f"single {single(w, 'adapt'):.2f} %, base {w.accuracy(w.base, 'adapt'):.2f} %", flush=True)
    for arm, network in by_labels(w, grid).items():
        print(f"{arm}: {w.accuracy(network, 'adapt'):.2f} %", flush=True)
    best: dict[str, dict[str, float]] = {}
    for arm in arms or TRAINED:
        reached = []
        for settings in settings_of(grid[arm]):
            start = time.process_time()
            value = w.accuracy(trained(arm, w, SEARCH_SEED, settings, best), "adapt")
            print(f"{arm} {settings}: {value:.2f} %, {time.process_time() - start:.0f} s", flush=True)
            reached.append((value, settings))
        best[arm] = max(reached, key=lambda one: one[0])[1]
    print(best)
