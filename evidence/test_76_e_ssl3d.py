"""E-SSL3D (arXiv 2404.11737): features of LiDAR sweeps that move with the scene, for a detector with few labels.

Drawn streets of cars, poles and pedestrians, each swept twice by a LiDAR of 24 beams, which look far more than down, so
that there is more than ground, and much of it has moved in between. Pillars of one metre and four convolutions learn
from 400 streets without boxes. Then they are tuned, behind a new head, on 20 of them with boxes of cars and
pedestrians, twice with others, and judged on 96 more by the average precision, of centres that lie within a metre of
the true ones. Boxes without five returns are neither learned nor asked for. Arms with equal steps: E-SSL3D; the same
with a flow of zeros; BYOL, whose pooled features shall not change when a sweep is moved, mirrored and turned, so that
they are invariant where those of E-SSL3D are equivariant; random weights. Ceiling: an encoder that learned the boxes of
all 400 streets. Floor: random weights, and for the flow the invariant features.
The error of headings is that of the cells in which cars have their centres. Cars and pedestrians that move are judged
alone, too: what stands is then neither right nor wrong.
Rates are searched on streets that no figure is taken on.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from own_loss import own_loss
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.pillars import Pillars
from lightspan.core.collate import collated
from lightspan.core.noise import hashed_uniform, mixed_seed
from lightspan.core.ragged import row_owners
from lightspan.datamodules.points.batch import SweepsBatch
from lightspan.datamodules.points.sweeps import DrawnSweeps
from lightspan.datamodules.rendered.traffic import CAR, PEDESTRIAN, Lidar, Traffic
from lightspan.methods.contrastive.e_ssl3d import ESSL3D
from lightspan.methods.distillation.byol import BYOL
from lightspan.nn.heads.projector import Projector
from lightspan.nn.points.ground import GroundGroup, turned_by
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

SEEDS, SEARCH = (0, 1, 2), 100
STREETS, LABELLED, TEST, BATCH = 400, 20, 96, 4
STEPS, TUNING, DRAWS = 150, 120, 2
RATES, TUNING_RATE = (1e-3, 3e-3, 1e-2), 3e-3
KINDS, LEAST_RETURNS, NEAR, MOVES = (CAR, PEDESTRIAN), 5, 1.0, 0.3
FULL, STILL, INVARIANT, SCRATCH, ALL = "E-SSL3D", "flow of zeros", "invariant", "random weights", "all boxes"

TRAFFIC, LIDAR = Traffic(cars=14, pedestrians=10, speed=5.0, walk=1.5), Lidar(low=-14.0)
GROUP, BLUR = GroundGroup(), 0.7
USUAL = torch.tensor([[4.1, 1.75], [0.6, 0.6]])
"""Length and width of a car and of a pedestrian, in metres."""

Sweep = dict[str, Any]


def pillars() -> Pillars:
    return Pillars(reach=24, cell=1, stem=24, widths=[24, 32], depths=[1, 1], strides=[1, 2], up=16)


def adamw(rate: float) -> dict[str, Any]:
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=0.01),
        "lr_scheduler": partial(WarmupCosine, warmup=0.1, final=0.0),
    }


def seen_boxes(sweep: Sweep) -> Sweep:
    """With the boxes alone that have returns enough."""
    away = sweep["xyz"][None] - sweep["box"][:, None, :3]
    cos, sin = sweep["box"][:, 6, None].cos(), sweep["box"][:, 6, None].sin()
    own = torch.stack([cos * away[..., 0] + sin * away[..., 1], cos * away[..., 1] - sin * away[..., 0]], dim=-1)
    within = ((own.abs() <= sweep["box"][:, None, 3:5] / 2 + 0.1).all(dim=-1) & (sweep["classes"] > 0)).sum(dim=1)
    kept = (within >= LEAST_RETURNS) & (sweep["box"][:, :2].abs() < 24).all(dim=1)
    return sweep | {name: sweep[name][kept] for name in ("box", "box_class", "box_shift")}


@cache
def streets(seed: int) -> tuple[list[Sweep], list[Sweep]]:
    """To learn from, and to test on."""
    data = DrawnSweeps(TRAFFIC, LIDAR, size=STREETS, val_size=TEST, test_size=1, draw_seed=seed)
    data.setup()
    own, test = data.train, data.val
    return tuple([seen_boxes(part.sample(at, 0)) for at in range(len(part))] for part in (own, test))  # type: ignore


def batch_of(sweeps: Sequence[Sweep]) -> dict[str, Any]:
    return collated([*sweeps], SweepsBatch)


class PooledPillars(nn.Module):
    """Sweeps [B P 3], filled up with NaN, -> features pooled over their points."""

    def __init__(self) -> None:
        super().__init__()
        self.pillars = pillars()
        self.num_features = self.pillars.num_features

    def forward(self, xyz_BP3: Tensor) -> Tensor:
        there_BP = xyz_BP3.isfinite().all(dim=2)
        xyz_N3, offsets = xyz_BP3[there_BP], F.pad(there_BP.sum(dim=1).cumsum(0), (1, 0))
        return self.pillars.pooled(self.pillars(xyz_N3, offsets), xyz_N3, offsets)


def two_views(sweeps: Sequence[Sweep], seed: int) -> dict[str, Any]:
    """Each moved, mirrored and turned by quarters as E-SSL3D does, twice."""
    number_B, views = torch.tensor([sweep["index"] for sweep in sweeps]), []
    batch = batch_of(sweeps)
    owner_N = row_owners(batch["offsets"], len(batch["xyz"]))
    for view in range(2):
        seed_B = mixed_seed(number_B, seed, view)
        turn_B = (4 * hashed_uniform(seed_B, 1, (1,))[:, 0]).floor() / 4
        moved = GROUP.drawn(seed_B).after(turned_by(turn_B)).points(batch["xyz"], owner_N)
        parts = moved.split(batch["offsets"].diff().tolist())
        views.append(nn.utils.rnn.pad_sequence([*parts], batch_first=True, padding_value=float("nan")))
    return {"views": views, "index": number_B}


class Told(NamedTuple):
    """What a detector says of each cell: logits [B 2 H W], and shift, sides by their usual ones in logarithms, sine and
    cosine of the yaw, [B 6 H W].
    """

    logits: Tensor
    box: Tensor


class Detector(Method):
    """Centres of cars and pedestrians as maxima of a map, after CenterPoint (Yin et al., 2021, arXiv 2006.11275)."""

    batch_type = SweepsBatch

    def __init__(self, **optimization: Any) -> None:
        super().__init__(**optimization)
        self.backbone = pillars()
        width = self.backbone.num_features
        self.head = nn.Sequential(nn.Conv2d(width, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 1))
        nn.init.constant_(self.head[2].bias[:2], -4.0)  # few cells are centres

    def forward(self, batch: Any) -> Told:
        said = self.head(self.backbone(batch["xyz"], batch["offsets"]))
        return Told(said[:, :2], said[:, 2:])

    def at_centres(self, batch: Any) -> tuple[Tensor, ...]:
        """(sweep, class, row and column of each box's cell; what is to be told of it [K 6])."""
        box, side, cell = batch["box"], self.backbone.side, self.backbone.cell
        sweep = row_owners(batch["box_offsets"], len(box))
        kind = (batch["box_class"] == PEDESTRIAN).long()
        place = (box[:, :2] + self.backbone.reach) / cell
        x, y = place.floor().long().clamp(0, side - 1).unbind(1)
        shift = place - torch.stack([x, y], dim=1) - 0.5
        sides = (box[:, 3:5] / USUAL[kind]).log()
        return sweep, kind, y, x, torch.cat([shift, sides, box[:, 6:].sin(), box[:, 6:].cos()], dim=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        told = self(batch)
        sweep, kind, y, x, true = self.at_centres(batch)
        rows = torch.arange(self.backbone.side)
        near = [torch.exp(-((rows - at[:, None]) ** 2) / (2 * BLUR**2)) for at in (y, x)]
        heat = torch.zeros_like(told.logits)
        for at in range(len(sweep)):  # the nearer of two centres counts
            heat[sweep[at], kind[at]] = torch.maximum(heat[sweep[at], kind[at]], near[0][at][:, None] * near[1][at])
        p = told.logits.sigmoid().clamp(1e-4, 1 - 1e-4)
        losses = torch.where(heat == 1, -((1 - p) ** 2) * p.log(), -((1 - heat) ** 4) * p**2 * (1 - p).log())
        count = max(1, len(sweep))
        loss = (losses.sum() + (told.box[sweep, :, y, x] - true).abs().sum()) / count
        self.log_training({"train/loss": loss})
        return loss


class Found(NamedTuple):
    """What a detector says of sweeps: for each class and sweep scores [S] and places [S 2], and of each car that there
    is by how much its heading is wrong, in degrees.
    """

    scores: list[list[Tensor]]
    places: list[list[Tensor]]
    heading: Tensor


@torch.no_grad()
def found(detector: Detector, sweeps: Sequence[Sweep]) -> Found:
    scores, places, wrong = [[], []], [[], []], []
    cell, reach, side = detector.backbone.cell, detector.backbone.reach, detector.backbone.side
    for first in range(0, len(sweeps), 16):
        batch = batch_of(sweeps[first : first + 16])
        told = detector.eval()(batch)
        heat = told.logits.sigmoid()
        peak = torch.where(heat == F.max_pool2d(heat, 3, 1, 1), heat, 0).flatten(2)
        top = peak.topk(24, dim=2)
        y, x = top.indices // side, top.indices % side
        for row in range(len(heat)):
            for kind in range(2):
                shift = told.box[row, :2, y[row, kind], x[row, kind]].T
                middle = torch.stack([x[row, kind], y[row, kind]], dim=1) + 0.5 + shift
                scores[kind].append(top.values[row, kind])
                places[kind].append(middle * cell - reach)
        sweep, kind, y, x, true = detector.at_centres(batch)
        sin, cos = told.box[sweep, :, y, x][kind == 0, 4:].unbind(1)
        turn = torch.atan2(sin, cos) - torch.atan2(*true[kind == 0, 4:].unbind(1))
        wrong.append(((turn + torch.pi) % (2 * torch.pi) - torch.pi).abs())
    return Found(scores, places, torch.cat(wrong).rad2deg())


def precision(result: Found, sweeps: Sequence[Sweep], asked: Callable[[Tensor], Tensor]) -> float:
    """Average precision in per cent, the mean over classes; boxes that are not asked for, by their shift, count neither
    way.
    """
    each = []
    for number, kind in enumerate(KINDS):
        rows, total = [], 0
        for scores, places, sweep in zip(result.scores[number], result.places[number], sweeps, strict=True):
            own = sweep["box_class"] == kind
            boxes, wanted = sweep["box"][own, :2], asked(sweep["box_shift"][own])
            total += int(wanted.sum())
            taken = torch.zeros(len(boxes), dtype=torch.bool)
            apart = (places[:, None] - boxes).norm(dim=2)
            for at in scores.argsort(descending=True).tolist():
                free = apart[at].masked_fill(taken, float("inf"))
                best = int(free.argmin()) if len(boxes) else -1
                hit = best >= 0 and float(free[best]) <= NEAR
                if hit:
                    taken[best] = True
                if not hit or wanted[best]:
                    rows.append((float(scores[at]), hit))
        right = np.array([hit for _, hit in sorted(rows, key=lambda row: -row[0])], float)
        recall, exact = right.cumsum() / max(1, total), right.cumsum() / np.arange(1, len(right) + 1)
        envelope = np.maximum.accumulate(exact[::-1])[::-1]
        each.append(float(np.diff(recall, prepend=0) @ envelope))
    return 100 * float(np.mean(each))


def everything(shift: Tensor) -> Tensor:
    return torch.ones(len(shift), dtype=torch.bool)


def moving(shift: Tensor) -> Tensor:
    return shift.norm(dim=1) > MOVES


def built(arm: str, rate: float, seed: int) -> Any:
    torch.manual_seed(seed)
    if arm in (ALL, SCRATCH):
        return Detector(**adamw(rate))
    heads = [Projector(32, [64], 32, hidden_norm=False) for _ in range(2)]
    if arm == INVARIANT:
        return BYOL(PooledPillars(), *heads, momentum=0.99, **adamw(rate))
    return ESSL3D(pillars(), *heads, Projector(64, [64], 4, hidden_norm=False), GROUP, points=128, **adamw(rate))


def given(arm: str, sweeps: Sequence[Sweep], seed: int) -> dict[str, Any]:
    """What an arm learns from."""
    if arm == INVARIANT:
        return two_views(sweeps, seed)
    batch = batch_of(sweeps)
    return batch | {"flow": torch.zeros_like(batch["flow"])} if arm == STILL else batch


def trained(method: Any, arm: str, sweeps: Sequence[Sweep], steps: int, seed: int) -> Any:
    """On some sweeps a step; in evaluation mode."""
    draws = np.random.default_rng(seed)
    rows = [[step, *draws.choice(len(sweeps), BATCH, replace=False).tolist()] for step in range(steps)]
    batches: DataLoader[Any] = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=lambda row: given(arm, [sweeps[at] for at in row[1:]], row[0]),
    )
    if steps:
        quiet_trainer(max_steps=steps, gradient_clip_val=10.0).fit(method, batches)
    return method.eval()


@cache
def learned(arm: str, rate: float, seed: int, steps: int) -> Any:
    return trained(built(arm, rate, seed), arm, streets(seed)[0], steps, seed)


def labelled(seed: int, draw: int) -> list[Sweep]:
    own, _ = streets(seed)
    return [own[row] for row in np.random.default_rng([seed, draw]).choice(len(own), LABELLED, replace=False)]


def tuned(arm: str, rate: float, tuning_rate: float, seed: int, steps: int, tuning: int) -> dict[str, float]:
    """Figures of detectors of labelled sweeps, in others, and in their own before and after; means over draws."""
    test, each = streets(seed)[1], list[dict[str, float]]()
    for draw in range(DRAWS):
        detector, own = built(SCRATCH, tuning_rate, DRAWS * seed + draw), labelled(seed, draw)
        if arm != SCRATCH:
            backbone = learned(arm, rate, seed, steps).backbone
            detector.backbone.load_state_dict((backbone.pillars if arm == INVARIANT else backbone).state_dict())
        before = precision(found(detector, own), own, everything)
        result = found(trained(detector.train(), ALL, own, tuning, DRAWS * seed + draw), test)
        each.append(
            {
                "AP": precision(result, test, everything),
                "AP of what moves": precision(result, test, moving),
                "heading": float(result.heading.mean()),
                "own before": before,
                "own": precision(found(detector, own), own, everything),
            }
        )
    return {name: float(np.mean([one[name] for one in each])) for name in each[0]}


def compare(evidence: Any, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS, tuning: int = TUNING) -> None:
    early = evidence.search(
        {
            f"{arm}, before tuning": partial(
                lambda arm, rate: tuned(arm, rate, TUNING_RATE, SEARCH, steps, tuning)["AP"], arm
            )
            for arm in (FULL, INVARIANT)
        },
        RATES, what="rate of pre-training", seed=SEARCH,
    )  # fmt: skip
    rates = {arm: early[f"{arm}, before tuning"] for arm in (FULL, INVARIANT)}
    rates |= {STILL: rates[FULL], ALL: 1e-2, SCRATCH: 0.0}
    after = evidence.search(
        {
            arm: partial(lambda arm, rate: tuned(arm, rates[arm], rate, SEARCH, steps, tuning)["AP"], arm)
            for arm in (FULL, STILL, INVARIANT, SCRATCH)
        },
        RATES, what="rate of tuning", seed=SEARCH,
    )  # fmt: skip
    after |= {ALL: after[FULL]}
    runs = {arm: {s: tuned(arm, rates[arm], after[arm], s, steps, tuning) for s in seeds} for arm in rates}
    for arm, of_seed in runs.items():
        for seed, result in of_seed.items():
            for name, unit in (("AP", "%"), ("AP of what moves", "%"), ("heading", "degrees")):
                title = "error of headings" if name == "heading" else name
                evidence.figure(f"{title}, {arm}", result[name], seed, unit)
    for arm in (FULL, STILL, INVARIANT):
        tests = {s: [given(arm, streets(s)[1][at : at + BATCH], 0) for at in range(0, 32, BATCH)] for s in seeds}
        make = {s: partial(built, arm, 1e-3, s) for s in seeds}
        losses = [
            {s: own_loss(make[s], weights(s).state_dict(), tests[s]) for s in seeds}
            for weights in (lambda s, arm=arm: learned(arm, rates[arm], s, steps), lambda s, make=make: make[s]())
        ]
        evidence.gate(arm, *losses, by=0.3, lower_is_better=True)
    own = {name: {s: result[name] for s, result in runs[SCRATCH].items()} for name in ("own", "own before")}
    evidence.gate(SCRATCH, own["own"], own["own before"], by=10, unit="points")
    evidence.note(
        f"{STREETS} streets, {LABELLED} of them with boxes, {TEST} to test; {steps} and then {tuning} steps of {BATCH} "
        f"sweeps. Rates on seed {SEARCH}, whose streets are others."
    )

    def minus(arm: str, other: str, name: str = "AP") -> dict[int, float]:
        return {s: runs[arm][s][name] - runs[other][s][name] for s in seeds}

    def over(arm: str) -> dict[int, float]:
        return {s: runs[arm][s]["heading"] / runs[INVARIANT][s]["heading"] for s in seeds}

    for other, margin in ((SCRATCH, 4.0), (INVARIANT, 2.0)):
        evidence.claim(
            f"AP with {LABELLED} labelled sweeps, {FULL} minus {other}", minus(FULL, other), at_least=margin,
            unit="points", floor=minus(SCRATCH, other), ceiling=minus(ALL, other), arms=(FULL, other),
        )  # fmt: skip
    evidence.claim(
        f"error of headings, {FULL} over {INVARIANT}", over(FULL), at_most=0.85, floor=over(SCRATCH),
        ceiling=over(ALL), arms=(FULL, INVARIANT),
    )  # fmt: skip
    moves = "AP of what moves"
    evidence.claim(
        f"{moves}, {FULL} minus {STILL}", minus(FULL, STILL, moves), at_least=1.0, unit="points",
        floor=minus(INVARIANT, STILL, moves), ceiling=minus(ALL, STILL, moves), arms=(FULL, STILL),
    )  # fmt: skip


def test_e_ssl3d(evidence: Any) -> None:
    compare(evidence)
