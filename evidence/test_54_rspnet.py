"""RSPNet (arXiv 2011.07949) on the shots of a real film: at which speed a clip plays, and of which shot it is.

The shots of Big Buck Bunny (Blender Foundation, CC-BY) of two seconds and more, grey, of 32 x 56 pixels; clips have 8
frames, of squares of 32 pixels, at normal or fourfold speed. A small R(2+1)D learns from two shots of three without
labels, and is judged on the others: by which of two clips its motion head takes for as fast as a third; by a linear
probe of the speed; and by the nearest neighbour of a clip of a shot's first half, cropped and lit anew, among clips of
all second halves. Arms with equal steps, and rates searched alike: RSPNet; its appearance task alone; its motion task
alone; random weights. That rides of bicycles in another film, of which nothing was learned, are told apart by speed is
a figure.

Rates are searched on shots that no figure is taken on. Floor: random weights. Ceiling: the same network trained on the
speeds and shots of all clips, those that it is judged on among them. Gates: relative speeds, or the nearest neighbours,
of the shots that an arm learned from.
"""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.clips import R2Plus1D
from lightspan.datamodules.video.reader import VideoIndex, colours, shots
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.methods.contrastive.rspnet import RSPNet
from lightspan.objectives.info_nce import row_cosine, unit
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

FOLDER = Path("/usr/local/share/films")
FILM, RIDES = FOLDER / "bbb.mp4", FOLDER / "bikes.mp4"
NEEDS = ("/usr/local/share/films/bbb.mp4", "/usr/local/share/films/bikes.mp4", "av")
SEEDS, SEARCH = (0, 1, 2), 100
HEIGHT, WIDTH, SIDE, LEAST, LONGEST, CUT = 32, 56, 32, 48, 120, 0.3
CREDITS = 11_700  # the frame with which they begin, or a little earlier
FRAMES, SPEEDS, DRAWS = 8, (1, 4), 10
STEPS, BATCH, EMBEDDED = 450, 16, 32
RATES = (1e-3, 3e-3, 1e-2)
FULL, LOOKS, MOTION, SCRATCH, TOLD = "RSPNet", "appearance alone", "motion alone", "random weights", "true labels"

Shots = Sequence[Tensor]


def decoded(path: Path) -> list[Tensor]:
    """Shots of at least two seconds, uint8 [F 32 56] each."""
    small, seen, changes = list[np.ndarray](), list[np.ndarray](), list[float]()
    with av.open(str(path)) as video:
        video.streams.video[0].codec_context.options = {"skip_loop_filter": "all"}  # pictures this small do not show it
        for number, frame in enumerate(video.decode(video=0)):
            if number >= CREDITS:
                break
            picture = frame.reformat(WIDTH, HEIGHT, "rgb24").to_ndarray()
            seen.append(colours(picture))
            changes.append(0.5 * float(np.abs(seen[-1] - seen[-2]).sum()) if number else 0.0)
            small.append(picture.mean(axis=2).astype(np.uint8))
    index = VideoIndex(np.arange(len(small)), 1 / 24, np.array(changes, np.float32))
    frames = torch.from_numpy(np.stack(small))
    return [frames[first:end] for first, end in shots(index, CUT) if end - first >= LEAST]


@cache
def film(seed: int) -> tuple[Shots, Shots]:
    """Shots to learn from, and to be judged on; those of the search are all of the former."""
    all_shots = scenes()
    own = [shot for number, shot in enumerate(all_shots) if number % 3 != 2]
    if seed != SEARCH:
        return own, all_shots[2::3]
    return [shot for number, shot in enumerate(own) if number % 3 != 2], own[2::3]


@cache
def scenes() -> list[Tensor]:
    """Their first five seconds at most."""
    return [shot[:LONGEST] for shot in decoded(FILM)]


@cache
def rides() -> list[Tensor]:
    """Of the other film, in pieces of as many frames as the shortest shots have."""
    return [piece for shot in decoded(RIDES) for piece in shot.split(LEAST) if len(piece) == LEAST]


def clip(shot: Tensor, first: int, speed: int) -> Tensor:
    """[T 32 56] in [0, 1]."""
    return shot[first : first + speed * FRAMES : speed].float() / 255


def latest(shot: Tensor) -> int:
    """The last frame at which clips of all speeds can begin."""
    return len(shot) - SPEEDS[-1] * (FRAMES - 1) - 1


def standardised(clip_TSS: Tensor) -> Tensor:
    return (clip_TSS[None] - 0.4) / 0.25


def middle(clip_THW: Tensor) -> Tensor:
    """Of the middle square, [1 T 32 32]."""
    left = (WIDTH - SIDE) // 2
    return standardised(clip_THW[..., left : left + SIDE])


def seen_anew(clips: Sequence[Tensor], generator: np.random.Generator) -> list[Tensor]:
    """Clips of one start, all from one square of them, mirrored or not, with one light."""
    side = int(generator.integers(20, HEIGHT + 1))
    top, left = int(generator.integers(HEIGHT - side + 1)), int(generator.integers(WIDTH - side + 1))
    mirrored, contrast, light = generator.random() < 0.5, generator.uniform(0.6, 1.4), generator.uniform(-0.2, 0.2)
    found = []
    for clip_THW in clips:
        square_TSS = clip_THW[:, top : top + side, left : left + side]
        square_TSS = F.interpolate(square_TSS[None], (SIDE, SIDE), mode="bilinear")[0]
        square_TSS = (contrast * (square_TSS - 0.4) + 0.4 + light).clamp(0, 1)
        found.append(standardised(square_TSS.flip(-1) if mirrored else square_TSS))
    return found


def batches(given: Shots, steps: int, seed: int) -> DataLoader:
    """Two starts of each shot at both speeds."""

    def batch(step: int) -> dict[str, Any]:
        generator = np.random.default_rng([seed, step])
        rows, views = generator.choice(len(given), BATCH, replace=False), list[list[Tensor]]()
        for row in rows.tolist():
            starts = generator.integers(latest(given[row]) + 1, size=2).tolist()
            views.append(
                [
                    view
                    for first in starts
                    for view in seen_anew([clip(given[row], first, speed) for speed in SPEEDS], generator)
                ]
            )
        return {"views": [torch.stack(column) for column in zip(*views, strict=True)], "index": torch.from_numpy(rows)}

    return DataLoader([*range(steps)], batch_size=None, collate_fn=batch)


class Labelled(Method):
    """The same network, trained on speeds and shots.

    Args:
        count: of the shots.
    """

    def __init__(self, count: int, **optimization: Any) -> None:
        super().__init__(**optimization)
        self.backbone = network()
        self.speed, self.shot = (nn.Linear(self.backbone.num_features, classes) for classes in (len(SPEEDS), count))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = self.backbone(torch.cat(batch["views"]))
        speed = torch.arange(len(SPEEDS)).repeat_interleave(len(batch["index"])).repeat(2)
        return F.cross_entropy(self.speed(features), speed) + F.cross_entropy(
            self.shot(features), batch["index"].repeat(2 * len(SPEEDS))
        )


def network() -> R2Plus1D:
    return R2Plus1D(8, (1, 1, 1), in_chans=1)


def built(arm: str, rate: float, seed: int) -> Any:
    torch.manual_seed(seed)
    optimization: dict[str, Any] = {
        "optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=1e-4),
        "lr_scheduler": partial(WarmupCosine, warmup=0.1, final=1e-3),
    }
    if arm == TOLD:
        return Labelled(sum(map(len, film(seed))), **optimization)
    trunk = network()
    heads = [nn.Linear(trunk.num_features, EMBEDDED) for _ in range(2)]
    return RSPNet(
        trunk, *heads, queue=512, momentum=0.99, batch_statistics=True, seed=seed,
        appearance_weight=float(arm != MOTION), motion_weight=float(arm != LOOKS), **optimization,
    )  # fmt: skip


@cache
def trained(arm: str, rate: float, seed: int, steps: int) -> Any:
    method = built(FULL if arm == SCRATCH else arm, rate, seed)
    if arm != SCRATCH:
        own, others = film(seed)
        given = [*own, *others] if arm == TOLD else own
        quiet_trainer(max_steps=steps).fit(method, batches(given, steps, seed))
    return method.eval()


class Clips(NamedTuple):
    """Of each shot several, [N 1 T 32 32].

    Attributes:
        query, same, other: as in RSPNet, of two starts; half of the queries play fast.
        fast: which queries these are, bool [N].
        early, late: of the first half of a shot, cropped and lit anew, and of the second half.
        shot: their numbers, int64 [N].
    """

    query: Tensor
    same: Tensor
    other: Tensor
    fast: Tensor
    early: Tensor
    late: Tensor
    shot: Tensor


def asked(given: Shots) -> Clips:
    rows: dict[str, list[Any]] = {name: [] for name in Clips._fields}
    for number, shot in enumerate(given):
        generator = np.random.default_rng(number)
        half = len(shot) // 2
        for draw in range(DRAWS):
            speeds = SPEEDS[:: 1 if draw % 2 else -1]
            first, second = generator.integers(latest(shot) + 1, size=2).tolist()
            early = clip(shot, int(generator.integers(half - FRAMES + 1)), 1)
            late = clip(shot, half + int(generator.integers(len(shot) - half - FRAMES + 1)), 1)
            made = (
                middle(clip(shot, first, speeds[0])), middle(clip(shot, second, speeds[0])),
                middle(clip(shot, second, speeds[1])), torch.tensor(speeds[0] > 1),
                seen_anew([early], generator)[0], middle(late), torch.tensor(number),
            )  # fmt: skip
            for name, value in zip(rows, made, strict=True):
                rows[name].append(value)
    return Clips(*(torch.stack(column) for column in rows.values()))


@torch.no_grad()
def seen(method: Any, clips: Tensor, motion: bool = False) -> Tensor:
    """The trunk's features, or what tells of motion: the motion head, or the share of normal speed."""
    features = torch.cat([method.backbone(some) for some in clips.split(64)])
    if not motion:
        return features
    return (
        method.speed(features).softmax(dim=1)[:, :1]
        if isinstance(method, Labelled)
        else method.student.motion(features)
    )


def relative(method: Any, clips: Clips) -> float:
    """How often a clip of the same speed is taken for the one nearer in speed, in per cent."""
    query, same, other = (seen(method, part, motion=True) for part in clips[:3])
    if isinstance(method, Labelled):
        return 100 * float(((query - same).abs() < (query - other).abs()).double().mean())
    return 100 * float((row_cosine(query, same) > row_cosine(query, other)).double().mean())


def speed_told(method: Any, own: Clips, others: Clips) -> float:
    """Of a linear probe, in per cent."""
    pairs = [(torch.cat([seen(method, of.query), seen(method, of.other)]), torch.cat([of.fast, ~of.fast]).long())
             for of in (own, others)]  # fmt: skip
    return 100 * linear_probe_accuracy(*pairs[0], *pairs[1])


def found_again(method: Any, clips: Clips) -> float:
    """Whose nearest neighbour among the late clips is of its shot, in per cent."""
    early, late = (unit(seen(method, part)) for part in (clips.early, clips.late))
    return 100 * float((clips.shot[(early @ late.T).argmax(dim=1)] == clips.shot).double().mean())


@cache
def clips_of(seed: int) -> tuple[Clips, Clips]:
    own, others = film(seed)
    return asked(own), asked(others)


@cache
def run(arm: str, rate: float, seed: int, steps: int) -> dict[str, float]:
    method, (own, others) = trained(arm, rate, seed, steps), clips_of(seed)
    return {
        "relative": relative(method, others),
        "speed": speed_told(method, own, others),
        "again": found_again(method, others),
        "rides": relative(method, asked(rides())),
        "own relative": relative(method, own),
        "own again": found_again(method, own),
    }


def compare(evidence: Any, seeds: Sequence[int] = SEEDS, steps: int = STEPS) -> None:
    def score(arm: str, rate: float) -> float:
        found = run(arm, rate, SEARCH, steps)
        return (found["speed"] + found["again"]) / 2

    rates = evidence.search({arm: partial(score, arm) for arm in (FULL, LOOKS, MOTION, TOLD)}, RATES, seed=SEARCH)
    rates |= {SCRATCH: 0.0}
    runs = {arm: {s: run(arm, rates[arm], s, steps) for s in seeds} for arm in rates}
    names = {
        "relative": "relative speeds told right", "speed": "speeds told by a linear probe",
        "again": "other half of a shot found", "rides": "relative speeds told right in another film",
    }  # fmt: skip
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for key, name in names.items():
                evidence.figure(f"{name}, {arm}", found[key], seed, "%")

    def column(arm: str, key: str) -> dict[int, float]:
        return {s: found[key] for s, found in runs[arm].items()}

    for arm in (FULL, MOTION):
        evidence.gate(arm, column(arm, "own relative"), 50.0, by=10, unit="points")
    evidence.gate(LOOKS, column(LOOKS, "own again"), column(SCRATCH, "own again"), by=5, unit="points")
    own, others = film(seeds[0])
    evidence.note(
        f"{len(own)} shots to learn from, {len(others)} to be judged on; {steps} steps of {BATCH} shots. Rates on seed "
        f"{SEARCH}, which learns from two of three of the former and is judged on the rest. Seeds share their shots."
    )
    evidence.claim(
        f"{names['relative']}, of {FULL}", column(FULL, "relative"), at_least=65.0, unit="%",
        floor=column(SCRATCH, "relative"), ceiling=column(TOLD, "relative"), arms=(FULL,),
    )  # fmt: skip
    for key, other, margin in (
        ("speed", LOOKS, 4.0), ("speed", SCRATCH, 4.0), ("again", MOTION, 5.0), ("again", SCRATCH, 3.0),
    ):  # fmt: skip
        gain = {arm: {s: runs[arm][s][key] - runs[other][s][key] for s in seeds} for arm in (FULL, SCRATCH, TOLD)}
        evidence.claim(
            f"{names[key]}, {FULL} minus {other}", gain[FULL], at_least=margin, unit="points", floor=gain[SCRATCH],
            ceiling=gain[TOLD], arms=(FULL,) if other == SCRATCH else (FULL, other),  # random weights have no rate
        )  # fmt: skip


def test_rspnet_on_a_film(evidence: Any) -> None:
    compare(evidence)
