"""CroCo (arXiv 2210.10716) on pairs of rendered views of rooms, against MAE: completion, depth, matches and pose.

Arms with one vision transformer (6 x 6 patches of 48 x 48 pictures, 64 channels, 4 blocks), the same pairs and equal
steps: CroCo with nine tenths hidden, MAE with nine tenths and with three quarters, which sees both views of the pairs
as pictures of their own; beside them the untrained network. Each arm has the rate that was best of the same three in a
third of the steps on seed 100, by the depths of pairs that no arm is reported on. A probe learns from pairs that
nothing trained on, and chooses its penalty among them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from lightning import seed_everything
from masked_arms import HEADS, RATES, SEEDS, WIDTH, encoder, optimisation
from quiet import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightspan.datamodules.rendered.pairs import ScenePairs
from lightspan.evaluation.dense.depth_order import depth_of_patches
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.probes.probes import LinearProbe
from lightspan.methods.masked.croco import CroCo
from lightspan.methods.masked.mae import MAE
from lightspan.nn.decoders.cross_decoder import CrossDecoder, SelfFirst
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.masking.mask_samplers import RandomMasks, seen_and_hidden
from lightspan.nn.sequences.patches import at_places, patchify
from lightspan.objectives.masked import patch_regression
from lightspan.training.method import Method

SIDE, PATCH, GRID = 48, 6, (8, 8)
STEPS, BATCH, TRAINING, BANK, TEST, LOOKED_AT = 900, 32, 2000, 800, 400, 200
SEARCH_SEED, SEARCH_SHARE = 100, 3
PENALTIES = (10.0, 100.0, 1000.0, 10_000.0)


class Pairs(NamedTuple):
    """Views [2 N 3 h w], depths [N h w] of the first, matches [N h w 2] and co-visibility [N h w] in the second, and
    how the camera turned and moved, [N 6].
    """

    views: Tensor
    depth: Tensor
    matches: Tensor
    covisible: Tensor
    pose: Tensor


class Sets(NamedTuple):
    training: Pairs
    bank: Pairs
    test: Pairs


def sets(seed: int) -> Sets:
    """No room is in two of them."""
    data = ScenePairs(SIDE, SIDE, size=TRAINING, val_size=BANK, test_size=TEST, draw_seed=seed)
    data.setup()
    return Sets(*(drawn(samples) for samples in (data.train, data.val, data.test)))


def drawn(samples: object) -> Pairs:
    count = len(samples)  # type: ignore[arg-type]
    batch = samples.batch(range(count), [0] * count)  # type: ignore[attr-defined]
    first = (batch[name][:, 0] for name in ("depth", "matches", "covisible"))
    return Pairs(torch.stack(batch["views"]), *first, torch.cat([batch["turn"], batch["translation"]], dim=1))


def network() -> torch.nn.Module:
    return encoder(img_size=SIDE, patch_size=PATCH, in_chans=3, class_token=False)


def croco(rate: float) -> Method:
    decoder = CrossDecoder(WIDTH, width=WIDTH, depth=2, block=partial(SelfFirst, heads=HEADS))
    return CroCo(network(), decoder, **optimisation(rate))


def mae(ratio: float, rate: float) -> Method:
    masks = RandomMasks(ratio, nearest=True)
    return MAE(network(), MaskDecoder(WIDTH, width=WIDTH, depth=2, heads=HEADS), masks, **optimisation(rate))


ARMS: dict[str, Callable[[float], Method]] = {
    "CroCo": croco,
    "MAE, 0.9": partial(mae, 0.9),
    "MAE, 0.75": partial(mae, 0.75),
}


def trained(arm: str, pairs: Pairs, seed: int, rate: float, steps: int) -> Method:
    """In evaluation mode; with steps=0 the untrained method."""
    seed_everything(seed, verbose=False)
    method, generator = ARMS[arm](rate), torch.Generator().manual_seed(seed)
    rows = [torch.randperm(len(pairs.depth), generator=generator)[:BATCH] for _ in range(steps)]

    def batch(step: int) -> dict[str, object]:
        views = list(pairs.views[:, rows[step]])
        return {"views": views if arm == "CroCo" else [views[step % 2]], "index": rows[step]}

    if steps:
        loader: DataLoader = DataLoader([*range(steps)], batch_size=None, collate_fn=batch)  # type: ignore[arg-type]
        quiet_trainer(max_steps=steps).fit(method, loader)
    return method.eval()


def probed(bank: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """R2 of ridge regression of numbers on features."""
    return LinearProbe(PENALTIES).fit(Features(*bank), Features(*test)).scores["r2"]


@torch.no_grad()
def of_patches(method: Method, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """What the encoder says of each patch of the first views, and the patch's depth: its logarithm, from the mean of
    its picture.
    """
    tokens = torch.cat([method.backbone.tokens(part) for part in pairs.views[0].split(100)])  # type: ignore
    depth = depth_of_patches(pairs.depth, GRID).log()
    return tokens.flatten(0, 1), (depth - depth.mean(dim=1, keepdim=True)).flatten()


@torch.no_grad()
def of_pairs(method: Method, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Features of pairs, and pose: those of CroCo's decoder, or the encoder's of both views side by side."""
    first, second = (view.split(100) for view in pairs.views)
    if isinstance(method, CroCo):
        rows = [method.features({"views": [*both]}) for both in zip(first, second, strict=True)]
    else:
        rows = [
            torch.cat([method.features({"image": view}) for view in both], dim=1)
            for both in zip(first, second, strict=True)
        ]
    return torch.cat(rows), pairs.pose


@torch.no_grad()
def error_of_other_by_right(method: CroCo, pairs: Pairs) -> float:
    """Error of guesses with another pair's second view, over that with the right one."""
    first, second = pairs.views
    seen, hidden = seen_and_hidden(method.masks.draw(GRID, 0, range(len(first))))
    target = at_places(patchify(first, (PATCH, PATCH)), hidden)
    right, other = (
        float(patch_regression(method.guess(first, given, seen, hidden), target))
        for given in (second, second.roll(1, 0))
    )
    return other / right


@torch.no_grad()
def attended(method: CroCo, pairs: Pairs) -> list[Tensor]:
    """Of each block, the patch of the second view to which each patch of the first attends most, its heads together:
    int64 [N T]. Nine tenths of the first views are hidden, as in training.
    """
    first, second = pairs.views
    seen, hidden = seen_and_hidden(method.masks.draw(GRID, 0, range(len(first))))
    order, found = torch.cat([seen, hidden], dim=1).argsort(dim=1), []

    def read(cross: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        parts = cross.query(given[0]), cross.key(given[1])  # type: ignore[operator]
        q, k = (part.unflatten(2, (cross.heads, -1)).transpose(1, 2) for part in parts)  # type: ignore[arg-type]
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=3).mean(dim=1)
        found.append(weights.argmax(dim=2).gather(1, order))

    hooks = [block.cross.register_forward_pre_hook(read) for block in method.decoder.blocks]  # type: ignore
    method.guess(first, second, seen, hidden)
    for hook in hooks:
        hook.remove()
    return found


def correspondence(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The patch of the second view that shows what the middle of each patch of the first does, int64 [N T]; and whether
    all four pixels about the middle are seen there, bool [N T].
    """
    middle = PATCH // 2 - 1

    def of_middles(field: Tensor) -> Tensor:
        inner = [field[:, middle + y :: PATCH, middle + x :: PATCH] for y in (0, 1) for x in (0, 1)]
        return torch.stack(inner).float().mean(dim=0)

    column, row = ((of_middles(pairs.matches) + 0.5) / PATCH).long().clamp(0, GRID[0] - 1).unbind(3)
    return (row * GRID[1] + column).flatten(1), (of_middles(pairs.covisible) == 1).flatten(1)


def hits(chosen: Tensor, pairs: Pairs) -> tuple[float, float]:
    """Per cent of co-visible patches whose choice is right, and of those among them that lie elsewhere in the second
    view.
    """
    truth, both = correspondence(pairs)
    moved = both & (truth != torch.arange(truth.shape[1]))
    every, of_moved = (100 * float((chosen == truth)[among].double().mean()) for among in (both, moved))
    return every, of_moved


def some(pairs: Pairs, rows: slice) -> Pairs:
    return Pairs(pairs.views[:, rows], *(field[rows] for field in pairs[1:]))


def measured(arm: str, given: Sets, seed: int, rate: float, steps: int) -> dict[str, float]:
    method = trained(arm, given.training, seed, rate, steps)
    found = {"R2 of depth": probed(of_patches(method, given.bank), of_patches(method, given.test))}
    found["R2 of pose"] = probed(of_pairs(method, given.bank), of_pairs(method, given.test))
    if isinstance(method, CroCo):
        found["other by right"] = error_of_other_by_right(method, given.test)
        bank, test = (some(pairs, slice(LOOKED_AT)) for pairs in (given.bank, given.test))
        of_bank = [hits(chosen, bank) for chosen in attended(method, bank)]
        block = of_bank.index(max(of_bank))  # chosen on other pairs
        found["hits"], found["hits of moved patches"] = hits(attended(method, test)[block], test)
    return found


def best_rate(arm: str, given: Sets) -> float:
    """By depths of the bank's pairs: one half is learned from, the other judged."""
    half = len(given.bank.depth) // 2
    one, other = some(given.bank, slice(half)), some(given.bank, slice(half, None))

    def score(rate: float) -> float:
        method = trained(arm, given.training, SEARCH_SEED, rate, STEPS // SEARCH_SHARE)
        return probed(of_patches(method, one), of_patches(method, other))

    return max(RATES, key=score)


def test_croco(evidence):
    searched = sets(SEARCH_SEED)
    chosen = {arm: best_rate(arm, searched) for arm in ARMS}
    runs: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in (*ARMS, "untrained")}
    same_place = {}
    for seed in SEEDS:
        given = sets(seed)
        for arm in ARMS:
            runs[arm][seed] = measured(arm, given, seed, chosen[arm], STEPS)
        runs["untrained"][seed] = measured("CroCo", given, seed, RATES[0], 0)
        same_place[seed] = hits(torch.arange(GRID[0] * GRID[1]).expand(TEST, -1), given.test)[0]
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for name, value in found.items():
                evidence.figure(f"{name}, {arm}", value, seed, "%" if name.startswith("hits") else "")
    for seed, share in same_place.items():
        evidence.figure("hits, of the same place", share, seed, "%")
    evidence.note(
        f"{TRAINING} pairs, {STEPS} steps of {BATCH}; {BANK} pairs for probes and {TEST} to judge. Rates of {RATES} "
        f"chosen in {STEPS // SEARCH_SHARE} steps on seed {SEARCH_SEED}",
        chosen,
    )

    def gain(name: str, over: str) -> dict[int, float]:
        return {seed: runs["CroCo"][seed][name] - runs[over][seed][name] for seed in SEEDS}

    evidence.claim(
        "error with another pair's second view by that with the right one",
        {seed: runs["CroCo"][seed]["other by right"] for seed in SEEDS},
        at_least=4 / 3,
    )
    evidence.claim("hits", {seed: runs["CroCo"][seed]["hits"] for seed in SEEDS}, at_least=40.0, unit="%")
    evidence.claim("R2 of depth, CroCo minus untrained", gain("R2 of depth", "untrained"), at_least=0.15)
    evidence.claim("R2 of depth, CroCo minus MAE, 0.75", gain("R2 of depth", "MAE, 0.75"), at_least=0.05)
