"""Quality next to speed: what each optimiser reaches on equal data, and what it pays in state and time.

    python benchmarks/quality.py sweep|final|table|time [--task NAME] [--only NAME ... | --almost-no-state]
        [--steps N] [--seeds N ...] [--results FILE] [--clock wall|cpu]

`TASKS` says what is trained, `CANDIDATES` by what. In all tasks: one pass over data that are new in each step, the
project's parameter groups, gradients clipped at 1, a warm-up and a cosine schedule, a second beta of 0.95, decay 0.1 on
the matrices, a quarter of the width as rank (APOLLO-Mini: 1). The order of the data and the first weights follow from
the seed; one thread, so that the losses repeat bit by bit on one kind of processor.

`sweep` finds a point for each optimiser, on seed 100 and by the online loss: the mean training loss of the last fifth
of a run, whose samples are all new. Validation data are not used. A point is the rate of the matrices, that of
everything else, and the momentum of the matrices; of optimisers without one of their own, the first beta, which is then
that of everything else too. How long the past counts matters as much as a rate in runs of a few hundred steps, and
published defaults differ. A run of the search is a final run on another seed: what is best in a shorter run, where the
schedule falls sooner, is not best in a longer one. From where it starts the search moves to the first better of eight
neighbours until none is better: either rate or the share of momentum that a step forgets twice or half as large, or the
matrices' rate and this share together, since the best of one depends on the other. All optimisers are searched in this
way. Where a search starts decides how many runs it takes and, if the loss has one valley, not where it ends. `final`
trains seeds 0, 1 and 2 at this point and keeps a validation curve, which gives the time to the loss that AdamW ends at
on the same seed. `table` prints the results and draws them next to the results file.

What is not searched is a default or stands in `CANDIDATES`. Here FactoredMuon, this project's own, has an advantage on
`stdlib`: its defaults come from pilots on that task, with the seed of the search (docs/decisions.md, "Queries and keys
are orthogonalised by heads"). Other tasks, seeds and validation data had no part in them.

`--almost-no-state` takes AdamW, FactoredMuon and the presets that keep at most a twentieth of AdamW's state, `TINY`:
moments of 8 bits in small subspaces, orthogonalised coordinates, which need none, and with each a complement that keeps
nothing. They are searched as all others; an hour and a half for their search and final runs.

`--steps` makes runs longer or shorter than the table's. The search then starts at the table's best point and moves both
rates together, since the best ones fall with the length of a run, and momentum stays. 3,000 steps of `stdlib` take 9
minutes with AdamW, 11 with Muon and 15 with FactoredMuon, and a search at least three such runs: with these and
muon_by_heads, and --seeds 0, three and a quarter hours.

`time` measures what a whole training step takes, in interleaved rounds, and keeps it in quality_steps.json.

Budget: a run takes a minute of one core of a server CPU (AVX-512, 105 GFLOP/s in float32 products), of `large` one and
a half; nearly all of it is the model's. An optimiser on a task has 9 to 20 runs of the search and three final ones.

Every finished run is kept in benchmarks/results/quality.json under its task, optimiser, point, seed and steps, and is
never run again: stop and resume at any time, or let two processes work on different optimisers. Delete the rows of a
task or an optimiser after any other change to it. Times are of training alone, by the wall clock and by the
processor's; `table --clock cpu` is the one to read if the machine was shared.
"""

import argparse
import fcntl
import functools
import json
import math
import os
import statistics
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from descent import descend, neighbour
from optim_step import machine
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightspan.backbones.language import llama
from lightspan.core.drawing import COLOURS, canvas, png, tidy
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.core.memory import MIB, state_bytes
from lightspan.datamodules.image.sets.small import FashionMNIST
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.text.austen import Austen
from lightspan.datamodules.text.windows import ByteText, TextData
from lightspan.objectives.language import next_token_loss
from lightspan.optim.groups import TABLES, ParameterGroups
from lightspan.optim.low_rank.bases import DCTBasis
from lightspan.optim.low_rank.inner import NewtonSchulz
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.low_rank.presets import APOLLO, APOLLOMini, DCTAdamW, FiraAdam, GaLore, LDAdam, Trion
from lightspan.optim.matrices.moments import Int8Moments
from lightspan.optim.muon import FactoredMuon, Muon, NorMuon
from lightspan.optim.schedules import WarmupCosine

RESULTS = Path(__file__).parent / "results" / "quality.json"
SWEEP_SEED, FINAL_SEEDS = 100, (0, 1, 2)
BETA1, BETA2, WEIGHT_DECAY, CLIP = 0.9, 0.95, 0.1, 1.0
# Weights at the ends of a network, whose rows belong to a token, a class or a pixel, are no optimiser's matrices.
ENDS = (*TABLES, "patch_embed.proj.weight", "head.weight")
POINT = ("lr", "other_lr", "momentum")  # what is searched: rates of matrices and of everything else, and momentum
KEY = ("task", "optimizer", *POINT, "seed", "stage", "steps")
Row = dict[str, Any]
Point = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What is trained and for how long; the same for all optimisers.

    Args:
        name: in commands and result files.
        about: for readers of the table.
        width, depth, heads: of the transformer.
        steps: of a run, of the search or final.
        batch_size: samples of a step.
        other_lr: where the search for the rate of all but the matrices starts; all starts lie on one grid.
    """

    name: str
    about: str
    width: int
    depth: int
    heads: int
    steps: int
    batch_size: int
    other_lr: float

    @abstractmethod
    def data(self) -> Any:
        """A data module that has not been set up, with `train` and `val_dataloader()`."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The network, with weights drawn from torch's generator."""

    @abstractmethod
    def measures(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Means over the samples of a batch: "loss" in nats, which is trained, and what else validation reports."""


@dataclass(frozen=True, kw_only=True)
class NextByte(Task):
    """A Llama that predicts the next byte of a text.

    Args:
        corpus: the text, called with context, batch_size and val_windows.
        mlp_width, context: of the Llama.
        val_windows: to validate on, of texts that are held out.
    """

    corpus: Callable[..., TextData]
    mlp_width: int
    context: int = 128
    val_windows: int = 128

    def data(self) -> TextData:
        return self.corpus(context=self.context, batch_size=self.batch_size, val_windows=self.val_windows)

    def model(self) -> nn.Module:
        return llama(256, self.width, self.depth, self.heads, self.mlp_width, self.context)

    def measures(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        tokens_BT1 = batch["tokens"]
        return {"loss": next_token_loss(model(input_ids=tokens_BT1[:, :-1]).logits, tokens_BT1[:, 1:])}


@dataclass(frozen=True, kw_only=True)
class Clothes(Task):
    """A vision transformer that classifies Fashion-MNIST.

    Args:
        source: of the pictures, see `FashionMNIST`.
        patch_size: in pixels; divides 28.
        val_size: pictures of the training set that are held out to validate on.
    """

    source: Literal["full", "shipped"] = "full"
    patch_size: int = 7
    val_size: int = 2000

    def data(self) -> FashionMNIST:
        return FashionMNIST(self.batch_size, source=self.source, val_size=self.val_size)

    def model(self) -> nn.Module:
        return VisionTransformer(
            img_size=28, patch_size=self.patch_size, in_chans=1, num_classes=10, embed_dim=self.width,
            depth=self.depth, num_heads=self.heads, class_token=False, global_pool="avg",
        )  # fmt: skip

    def measures(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        scores_BK, label_B = model(batch["image"]), batch["label"]
        accuracy = (scores_BK.argmax(dim=1) == label_B).float().mean()
        return {"loss": nn.functional.cross_entropy(scores_BK, label_B), "accuracy": accuracy}


TASKS = {
    task.name: task
    for task in (
        NextByte(
            name="stdlib",
            about="A Llama of 2.3 million parameters on the bytes of the Python standard library's source, 300 steps "
            "of 8 windows of 128.",
            corpus=ByteText,
            width=192, depth=5, heads=6, mlp_width=512, steps=300, batch_size=8, other_lr=4.8e-2,
        ),
        NextByte(
            name="austen",
            about="The same Llama on the bytes of five novels by Jane Austen, validated on a sixth, 300 steps of 8 "
            "windows of 128.",
            corpus=Austen,
            width=192, depth=5, heads=6, mlp_width=512, steps=300, batch_size=8, other_lr=4.8e-2,
        ),
        NextByte(
            name="large",
            about="A Llama of three times as many parameters, 7.1 million, on the standard library's source, for half "
            "as many steps.",
            corpus=ByteText,
            width=288, depth=7, heads=9, mlp_width=768, steps=150, batch_size=8, other_lr=4.8e-2,
        ),
        Clothes(
            name="vit",
            about="A vision transformer of 1.2 million parameters that classifies Fashion-MNIST, 500 steps of 64 "
            "pictures, each seen once; 2,000 are held out for validation.",
            width=128, depth=6, heads=4, steps=500, batch_size=64, other_lr=3e-3,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """An optimiser of the table: one entry here is all that it needs.

    Args:
        name: in tables and result files.
        constructor: called with parameter groups, `lr` (of the matrices), `betas`, `weight_decay`, `rank`, `options`
            and perhaps `momentum`; gives an optimiser, or a list of those that step together.
        start: where the search for the matrices' rate starts, on a grid of factor two.
        colour: of its name in the figure, dark enough to read as text.
        options: what it is given beyond its defaults.
        rank: as a share of the width of the network; None for what has no rank.
        has_momentum: whether the momentum of the matrices is an argument of its own; otherwise it is the first beta.
    """

    name: str
    constructor: Callable[..., Optimizer | list[Optimizer]]
    start: float
    colour: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: float | None = 0.25
    has_momentum: bool = False


def muon_and_adamw(
    groups: list[dict[str, Any]], lr: float, weight_decay: float, momentum: float, betas: tuple[float, float]
) -> list[Optimizer]:
    """torch's Muon, which takes matrices only, and AdamW for the rest. Its adjustment brings the rate near AdamW's."""
    matrices, rest = ([group for group in groups if group["project"] is wanted] for wanted in (True, False))
    muon = torch.optim.Muon(
        matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=betas, fused=True)]


# The papers' 200 steps between frames belong to runs of ten thousand and more; with the 50 of `LowRank` all see several
# frames in a run.
CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        Candidate("adamw", torch.optim.AdamW, 1e-3, "#1a1a1a", {"fused": True}, rank=None),
        Candidate("muon", muon_and_adamw, 1.6e-2, COLOURS[0], rank=None, has_momentum=True),
        Candidate(
            "muon_by_heads",
            Muon,
            1.6e-2,
            "#7f7f7f",
            {"convention": "kimi", "by_heads": True},
            rank=None,
            has_momentum=True,
        ),
        Candidate("nor_muon", NorMuon, 1.6e-2, "#7a3b8f", {"convention": "kimi"}, rank=None, has_momentum=True),
        Candidate(
            "factored_muon", FactoredMuon, 1.6e-2, "#00695c", {"convention": "kimi"}, rank=None, has_momentum=True
        ),
        Candidate("low_rank", LowRank, 4e-3, COLOURS[1]),
        Candidate("galore", GaLore, 3.2e-2, COLOURS[2], {"refresh": 50}),
        Candidate("dct_adamw", DCTAdamW, 4e-3, COLOURS[3], {"error_feedback": "int8", "rotate": True}),
        Candidate("trion", Trion, 6.4e-2, COLOURS[4], has_momentum=True),
        Candidate("ldadam", LDAdam, 8e-3, COLOURS[5]),
        Candidate("fira", FiraAdam, 1.6e-2, "#b3202c", {"refresh": 50}),
        Candidate("apollo", APOLLO, 4e-3, "#2e86ab", {"refresh": 50}),
        Candidate("apollo_mini", APOLLOMini, 1e-3, "#6b4226", {"refresh": 50, "rank": 1}, rank=None),
        Candidate("tiny_low_rank", LowRank, 4e-3, "#b8860b", {"moments": Int8Moments()}, rank=1 / 16),
        Candidate("tiny_dct", LowRank, 4e-3, "#556b2f", {"moments": Int8Moments(), "basis": DCTBasis()}, rank=1 / 8),
        Candidate("tiny_apollo", APOLLO, 4e-3, "#4b0082", {"moments": Int8Moments(), "refresh": 50}, rank=1 / 16),
        Candidate(
            "tiny_orthogonal",
            LowRank,
            1.6e-2,
            "#c71585",
            {"moments": Int8Moments(), "inner": NewtonSchulz(convention="kimi")},
            rank=1 / 8,
        ),
        Candidate(
            "tiny_dct_orthogonal",
            LowRank,
            1.6e-2,
            "#008b8b",
            {"moments": Int8Moments(), "basis": DCTBasis(), "inner": NewtonSchulz(convention="kimi")},
            rank=1 / 2,
        ),
    )
}
TINY = tuple(name for name in CANDIDATES if name.startswith("tiny_"))
"""At most a twentieth of AdamW's state, with moments in 8 bits for what is no matrix too."""
YARDSTICKS = {"adamw": "AdamW", "muon": "Muon"}  # torch's own, with which the others are compared


@functools.cache
def data_of(task: Task) -> Any:
    """The data of a task, read once a process."""
    data = task.data()
    data.setup()
    return data


def optimizers(candidate: Candidate, task: Task, model: nn.Module, point: Point) -> list[Optimizer]:
    """What steps the parameters of a model together."""
    lr, other_lr, momentum = point
    groups = ParameterGroups(list(ENDS), other_lr=other_lr).build(model)
    own = {"momentum": momentum, "betas": (BETA1, BETA2)} if candidate.has_momentum else {"betas": (momentum, BETA2)}
    settings: dict[str, Any] = {"lr": lr, "weight_decay": WEIGHT_DECAY, **own}
    if candidate.rank is not None:
        settings["rank"] = round(candidate.rank * task.width)
    made = candidate.constructor(groups, **{**settings, **candidate.options})
    return made if isinstance(made, list) else [made]


def train(task: Task, candidate: Candidate, point: Point, seed: int, stage: str) -> Row:
    """One run, as the row that the results keep. Losses in nats; null where the run diverged, which ends it."""
    data = data_of(task)
    torch.manual_seed(seed)
    model = task.model()
    together = optimizers(candidate, task, model, point)
    schedules = [WarmupCosine(optimizer, task.steps) for optimizer in together]
    loader = ExactLoader(data.train, task.batch_size, seed)
    assert task.steps <= len(loader), "a sample met twice would make the online loss one of seen data"
    losses: list[float] = []
    walls: list[float] = []
    cpus: list[float] = []
    curve: list[tuple[int, float, float, float]] = []
    validation: dict[str, float] = {}
    checks = {round(task.steps * tenth / 10) for tenth in range(1, 11)} if stage == "final" else set()
    for step, batch in enumerate(islice(loader, task.steps), 1):
        wall, cpu = time.perf_counter(), time.process_time()
        loss = task.measures(model, batch)["loss"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        losses.append(loss.item())
        if not math.isfinite(losses[-1] + norm.item()):
            losses[-1] = math.nan
            break
        for optimizer, schedule in zip(together, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        if step in checks:
            validation = validate(task, model, data)
            curve.append((step, round(sum(walls), 3), round(sum(cpus), 3), round(validation["loss"], 5)))
    tail = losses[-max(task.steps // 5, 1) :]
    online = sum(tail) / len(tail)  # not a number if the run ended early: its last loss was none
    ended = len(losses) == task.steps and math.isfinite(validation.get("loss", math.nan))
    measured = {f"val_{name}": round(value, 5) if ended else None for name, value in validation.items()}
    values = (task.name, candidate.name, *point, seed, stage, task.steps)
    return dict(zip(KEY, values, strict=True)) | {
        "online_loss": round(online, 5) if math.isfinite(online) else None,
        "val_loss": None,
        **measured,
        "state_bytes": sum(state_bytes(optimizer) for optimizer in together),
        "wall_s": round(sum(walls), 2),
        "cpu_s": round(sum(cpus), 2),
        "step_wall_ms": round(1e3 * statistics.median(walls or [0.0]), 2),
        "step_cpu_ms": round(1e3 * statistics.median(cpus or [0.0]), 2),
        "curve": curve,  # (step, wall seconds, processor seconds, validation loss)
    }


@torch.no_grad()
def validate(task: Task, model: nn.Module, data: Any) -> dict[str, float]:
    """Means over the validation samples, which are the same for all runs."""
    sums: dict[str, float] = {}
    loader = data.val_dataloader()
    for batch in loader:
        for name, value in task.measures(model, batch).items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(next(iter(batch.values())))
    return {name: value / len(loader.indices) for name, value in sums.items()}


def read(results: Path) -> list[Row]:
    """Raises: UserError for a file that is no JSON, such as one cut short in a copy, or has other rows."""
    try:
        rows: list[Row] = json.loads(results.read_text()) if results.is_file() else []
        list(map(key_of, rows))
        return rows
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{results} is damaged ({error}); restore it, or move it away to begin anew") from error


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[part] for part in KEY)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time. The lock is on the folder itself, since the results file is replaced at each write."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def append(results: Path, row: Row) -> None:
    """Adds a row to those that stand in the file now; one line a row, in the order of the keys."""
    with locked(results.parent):
        rows = {key_of(known): known for known in read(results)} | {key_of(row): row}
        lines = ",\n".join(json.dumps(rows[key]) for key in sorted(rows))
        write_atomic(results, f"[\n{lines}\n]\n")


def measured(results: Path, task: Task, candidate: Candidate, point: Point, seed: int, stage: str) -> Row:
    """The row of a run: from the file, or by training it."""
    wanted = (task.name, candidate.name, *point, seed, stage, task.steps)
    row = next((row for row in read(results) if key_of(row) == wanted), None)
    if row is None:
        row = train(task, candidate, point, seed, stage)
        append(results, row)
        loss = row["online_loss" if stage == "sweep" else "val_loss"]
        at = f"{' / '.join(f'{one:.3g}' for one in point)} seed {seed}"
        print(f"{stage} {task.name} {candidate.name} {at}: {loss} nats, {row['wall_s']} s", flush=True)
    return row


BOTH_RATES = [(2.0, 2.0, 1.0), (0.5, 0.5, 1.0)]
"""Where the search of runs of another length looks."""
NEIGHBOURS = [
    (2.0, 1.0, 1.0), (0.5, 1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 0.5, 1.0), (1.0, 1.0, 2.0), (1.0, 1.0, 0.5),
    (2.0, 1.0, 2.0), (0.5, 1.0, 0.5),
]  # fmt: skip
"""Factors on both rates and on the share of the momentum that is forgotten."""


def search(loss: Callable[[Point], float], start: Point, neighbours: Sequence[Point] = NEIGHBOURS) -> Point:
    """The protocol of the module's docstring."""
    lr, other, forgets = descend(
        lambda point: loss((point[0], point[1], kept(point[2]))), (*start[:2], 1 - start[2]), neighbours
    )
    return lr, other, kept(forgets)


def beside(point: Point) -> set[Point]:
    """The neighbours of a point, as rows keep them."""
    near = [neighbour((*point[:2], 1 - point[2]), factors) for factors in NEIGHBOURS]
    return {(lr, other, kept(forgets)) for lr, other, forgets in near}


def kept(forgotten: float) -> float:
    """The momentum that forgets this share in a step; never below 0, where a line of shares ends."""
    return max(0.0, round(1 - forgotten, 6))


def sweep(results: Path, task: Task, candidate: Candidate, known: Point | None = None) -> Point:
    """The best point of an optimiser; a diverged run counts as the worst of all.

    Args:
        known: the best point of runs of another length, whose rates alone are searched anew.
    """

    def loss(point: Point) -> float:
        online = measured(results, task, candidate, point, SWEEP_SEED, "sweep")["online_loss"]
        return math.inf if online is None else online

    if known is None:
        search(loss, (candidate.start, task.other_lr, BETA1))
    else:
        search(loss, known, BOTH_RATES)
    best = best_point(searched(read(results), task, candidate.name))
    if best is None:
        raise UserError(f"{candidate.name} diverged at every rate from {candidate.start:.3g} down; lower its start")
    return best


def searched(rows: Iterable[Row], task: Task, name: str) -> list[Row]:
    """The runs of an optimiser's search."""
    wanted = (task.name, name, "sweep", task.steps)
    return [row for row in rows if (row["task"], row["optimizer"], row["stage"], row["steps"]) == wanted]


def best_point(swept: list[Row]) -> Point | None:
    """Where the online loss of a search is lowest; each line of the search keeps the best of those before it."""
    finite = [row for row in swept if row["online_loss"] is not None]
    best = min(finite, key=lambda row: row["online_loss"], default=None)
    return (best["lr"], best["other_lr"], best["momentum"]) if best else None


def extent(swept: list[Row]) -> str:
    """How much was searched, and whether all neighbours of the best point were tried, none of which is better then."""
    best = best_point(swept)
    assert best is not None
    tried = {(row["lr"], row["other_lr"], row["momentum"]) for row in swept}
    whole = "no neighbour is better" if beside(best) - {best} <= tried else "not all neighbours were tried"
    return f"{len(swept)} runs of {swept[0]['steps']} steps, {whole}"


def final_rows(rows: Iterable[Row], task: Task) -> dict[str, list[Row]]:
    """The final runs at the best point of the search, by optimiser in the order of CANDIDATES and then by seed."""
    chosen = {}
    for name in CANDIDATES:
        point = best_point(searched(rows, task, name))
        finals = [row for row in rows if key_of(row)[:5] == (task.name, name, *(point or ()))]
        finals = [row for row in finals if (row["stage"], row["steps"]) == ("final", task.steps)]
        if finals:
            chosen[name] = sorted(finals, key=lambda row: row["seed"])
    return chosen


def val_loss(row: Row) -> float:
    return math.inf if row["val_loss"] is None else row["val_loss"]


def time_to(curve: list[list[float]], loss: float, clock: str) -> float | None:
    """Seconds until a curve first reaches `loss`, on straight lines between its points; None if it never does."""
    at = {"wall": 1, "cpu": 2}[clock]
    before = None
    for point in curve:
        if point[3] <= loss:
            if before is None:
                return point[at]
            return before[at] + (point[at] - before[at]) * (before[3] - loss) / (before[3] - point[3])
        before = point
    return None


def mean_of(runs: list[Row], measure: str) -> str:
    """Empty unless all runs have it: a diverged one has none."""
    values = [row.get(measure) for row in runs]
    return "" if None in values else f"{statistics.mean(values):.4f}"


def gap(runs: list[Row], peers: list[Row]) -> str:
    """Mean and range, over the seeds that both have, of the difference of validation losses."""
    known = {row["seed"]: row for row in peers}
    gaps = [val_loss(row) - val_loss(known[row["seed"]]) for row in runs if row["seed"] in known]
    return f"{statistics.mean(gaps):+.4f} ({min(gaps):+.4f} to {max(gaps):+.4f})" if gaps else ""


def frontier(finals: Mapping[str, list[Row]]) -> set[str]:
    """The optimisers of which no other has a lower mean loss and no more state, to the hundredth of a MiB."""
    states = {name: round(runs[0]["state_bytes"] / MIB, 2) for name, runs in finals.items()}
    losses = {name: statistics.mean(map(val_loss, runs)) for name, runs in finals.items()}
    return {
        name
        for name in finals
        if not any(losses[other] < losses[name] and states[other] <= states[name] for other in finals)
    }


def table(rows: list[Row], task: Task, clock: str = "wall") -> str:
    """The results in Markdown; what compares with AdamW or Muon stays empty while these have no final run."""
    finals = final_rows(rows, task)
    adamw, best = finals.get("adamw", []), frontier(finals)
    measures = sorted({key for runs in finals.values() for row in runs for key in row if key.startswith("val_")})
    measures = [measure for measure in measures if measure != "val_loss"]
    columns = (
        "optimiser",
        "lr / other lr / momentum",
        "validation loss, nats",
        *(measure.removeprefix("val_") for measure in measures),
        *(f"minus {title}'s" for title in YARDSTICKS.values()),
        "state, MiB (ratio)",
        f"step, {clock} ms (ratio)",
        "s to AdamW's loss",
        "search",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]

    def ratio(value: float, key: str) -> str:
        return f" ({value / statistics.median(row[key] for row in adamw):.2f}x)" if adamw else ""

    for name, runs in finals.items():
        state = runs[0]["state_bytes"]
        step = statistics.median(row[f"step_{clock}_ms"] for row in runs)
        cells = (
            f"**{name}**" if name in best else name,
            " / ".join(f"{runs[0][name]:.3g}" for name in POINT),
            f"{statistics.mean(map(val_loss, runs)):.4f}",
            *(mean_of(runs, measure) for measure in measures),
            *("" if name == yardstick else gap(runs, finals.get(yardstick, [])) for yardstick in YARDSTICKS),
            f"{state / MIB:.2f}{ratio(state, 'state_bytes')}",
            f"{step:.1f}{ratio(step, f'step_{clock}_ms')}",
            when(runs, adamw, clock),
            extent(searched(rows, task, name)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def when(runs: list[Row], adamw: list[Row], clock: str) -> str:
    """Mean seconds to the loss that AdamW ends at on the same seed, and how many of the seeds get there. Where AdamW
    diverged there is no such loss.
    """
    ends = {row["seed"]: row["val_loss"] for row in adamw if row["val_loss"] is not None}
    times = [time_to(row["curve"], ends[row["seed"]], clock) for row in runs if row["seed"] in ends]
    reached = [seconds for seconds in times if seconds is not None]
    if not reached:
        return "never" if times else ""
    part = f" ({len(reached)} of {len(times)} seeds)" if len(reached) < len(times) else ""
    return f"{statistics.mean(reached):.1f}{part}"


def spread(wanted: list[float], gap: float) -> list[float]:
    """Ascending heights near ascending wanted ones, at least `gap` apart and at most 1."""
    heights: list[float] = []
    for height in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    return heights


def picture_of(results: Path, task: Task) -> Path:
    """Where the picture of a task is, next to the results."""
    return results.with_name(f"{results.stem}_{task.name}.png")


def draw(rows: list[Row], task: Task, path: Path) -> None:
    """State bytes against validation loss, a point an optimiser (torch's own are squares); bars span the seeds."""
    from matplotlib.ticker import FixedLocator, NullLocator

    points = [
        (statistics.mean(losses), min(losses), max(losses), runs[0]["state_bytes"] / MIB, name)
        for name, runs in final_rows(rows, task).items()
        if math.isfinite(max(losses := [val_loss(row) for row in runs]))
    ]
    if not points:
        raise UserError(
            f"there is no final run of {task.name} to draw; run `sweep` and `final` with --task {task.name}"
        )
    points.sort()
    low, high = min(point[1] for point in points), max(point[2] for point in points)
    margin = max(0.08 * (high - low), 1e-3)
    low, high = low - margin, high + margin
    figure, ((panel,),) = canvas(f"{task.name}: loss and optimiser state (mean and range of the seeds)", (8.4, 4.6))
    panel.set_xscale("log")
    panel.set(ylim=(low, high), xlabel="optimiser state, MiB", ylabel="validation loss, nats")
    heights = spread([(point[0] - low) / (high - low) for point in points], gap=0.062)
    for (mean, least, most, state, name), height in zip(points, heights, strict=True):
        colour, marker = CANDIDATES[name].colour, "s" if name in YARDSTICKS else "o"
        panel.errorbar(
            state, mean, [[mean - least], [most - mean]], fmt=marker, color=colour, markersize=5.5, capsize=2.5
        )
        panel.annotate(
            f"{name}  {mean:.3f}",
            xy=(state, mean),
            xytext=(1.06, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=colour,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "alpha": 0.4,
                "linewidth": 0.9,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
            zorder=1,
        )
    ticks = [2.0**k for k in range(-3, 8)]
    panel.set_xlim(min(point[3] for point in points) / 1.25, max(point[3] for point in points) * 1.25)
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter("{x:g}")
    tidy(panel)
    write_atomic(path, png(figure))


def step_times(task: Task, names: Sequence[str], rounds: int) -> dict[str, float]:
    """Medians of interleaved rounds, in ms of processor time, of a whole training step by optimiser."""
    batch = next(iter(ExactLoader(data_of(task).train, task.batch_size, SWEEP_SEED)))

    def step_of(name: str) -> Callable[[], float]:
        model = task.model()
        together = optimizers(CANDIDATES[name], task, model, (1e-6, 1e-6, BETA1))  # so that no repetition diverges

        def step() -> float:
            began = time.process_time()
            task.measures(model, batch)["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for optimizer in together:
                optimizer.step()
                optimizer.zero_grad()
            return 1e3 * (time.process_time() - began)

        step()  # the first one makes state and frames
        return step

    steps = {name: step_of(name) for name in names}
    times = [{name: step() for name, step in steps.items()} for _ in range(rounds)]
    return {name: round(statistics.median(row[name] for row in times), 2) for name in steps}


def keep_step_times(results: Path, task: Task, names: Sequence[str], rounds: int) -> None:
    """Writes the times of a task beside those of other tasks."""
    file = results.with_name(f"{results.stem}_steps.json")
    with locked(file.parent):
        known = json.loads(file.read_text()) if file.is_file() else {}
        host = machine()
        about = {"cpu": host["cpu"], "torch": host["torch"], "date": time.strftime("%Y-%m-%d"), "rounds": rounds}
        known[task.name] = {**about, "ms": step_times(task, names, rounds)}
        write_atomic(file, json.dumps(known, indent=1) + "\n")
    print(known[task.name])


def main(arguments: list[str] | None = None, tasks: Mapping[str, Task] = TASKS) -> int:
    """Exit status 1 if an optimiser failed; the others are run all the same."""
    parser = argparse.ArgumentParser(description="Compare optimisers on small models.")
    parser.add_argument("stage", choices=("sweep", "final", "table", "time"))
    parser.add_argument("--task", choices=list(tasks), default=next(iter(tasks)))
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--only", nargs="+", choices=list(CANDIDATES), metavar="NAME")
    some.add_argument("--almost-no-state", dest="only", action="store_const", const=["adamw", "factored_muon", *TINY])
    parser.add_argument("--steps", type=int, help="of a run (default: the task's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=FINAL_SEEDS, help="of final runs")
    parser.add_argument("--rounds", type=int, default=15, help="of `time`")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    chosen = parser.parse_args(arguments)
    if min(chosen.rounds, 1 if chosen.steps is None else chosen.steps) < 1:
        parser.error("--steps and --rounds must be at least 1")
    usual_task = tasks[chosen.task]
    task = replace(usual_task, steps=chosen.steps or usual_task.steps)
    if chosen.stage == "table":
        shown = {*chosen.only, *YARDSTICKS} if chosen.only else set(CANDIDATES)
        rows = [row for row in read(chosen.results) if row["optimizer"] in shown]
        print(table(rows, task, chosen.clock))
        if task == usual_task and not chosen.only:
            draw(rows, task, picture_of(chosen.results, task))
        return 0
    names = chosen.only or [name for name in CANDIDATES if name not in TINY]
    torch.set_num_threads(1)
    read(chosen.results)  # what is wrong with the results or the data is wrong for all
    data_of(task)
    if chosen.stage == "time":
        keep_step_times(chosen.results, task, names, chosen.rounds)
        return 0
    failed = False
    for name in names:
        try:
            known = None if task == usual_task else best_point(searched(read(chosen.results), usual_task, name))
            point = sweep(chosen.results, task, CANDIDATES[name], known)
            if chosen.stage == "final":
                for seed in chosen.seeds:
                    measured(chosen.results, task, CANDIDATES[name], point, seed, "final")
        except Exception:  # a night's work on the others must not end here
            traceback.print_exc()
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
