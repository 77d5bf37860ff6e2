"""Whether AdamW's rate carries over: the best rates of optimisers of matrices, in units of AdamW's on the same model.

    python benchmarks/rates.py sweep|updates|other [--models NAME ...] [--arms NAME ...] [--text FOLDER]

`sweep` searches the best rate of each arm on small Llamas of three widths and two depths, which read the bytes of the
Python standard library's source: 300 steps, warm-up and cosine, decay 0.1, gradients clipped at 1. AdamW has one rate
for all parameters, as most users give it. The others keep AdamW's best rate for what is no matrix, so that one number
is searched: the rate of the matrices. By factors of 2 from a start, on one seed, until both neighbours of the best are
worse; then by factors of the root of 2, on the mean of two seeds, until that is so again; and at AdamW's rate. A run
counts by its online loss, the mean training loss of its last fifth, all of whose samples are new; both seeds' batches
are the same for all arms.

The matrices' arms step by the convention "adamw" of `lightspan.optim.matrices.conventions`: their rates and decay are
AdamW's if it holds, and the quotient of the two best rates is 1.

`updates` measures what single steps are, along runs at AdamW's best rate: the root of the mean square of the numbers of
an update, and its spectral norm over sqrt(out in), both without rate and decay; for AdamW also with another second beta
and other batches.

`other` trains a model, a tokenizer and a text that nothing here was chosen on: a small Llama with fewer keys than
queries, byte pairs, and Vim's manual (`--text` names another folder). AdamW at all rates, and the others at AdamW's,
not searched.

Rows are kept in benchmarks/results/rates*.json and never run again, as those of quality.py, which trains them.
"""

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import quality
import torch
from descent import descend
from quality import Candidate, NextByte, Row, Task
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from lightspan.core.drawing import COLOURS
from lightspan.core.errors import UserError
from lightspan.datamodules.text.windows import ByteText, TextData, Windows
from lightspan.optim.low_rank.inner import Adam
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices import conventions
from lightspan.optim.matrices.stacks import Layout
from lightspan.optim.muon import FactoredMuon, Muon

RESULTS = Path(__file__).parent / "results"
SEEDS = (100, 101)
MOMENTUM = {"adamw": 0.9, "muon": 0.95, "factored_muon": 0.9, "low_rank": 0.9}
"""Of matrices, by arm: the defaults. That of AdamW and LowRank is the first beta."""
SEARCHED = ("muon", "muon_by_heads", "nor_muon", "factored_muon", "low_rank")
"""Of quality.py's candidates, those with such a convention."""
START = 4e-3


def model_of(width: int, depth: int) -> NextByte:
    return NextByte(
        name=f"w{width}d{depth}",
        about=f"width {width}, {depth} blocks",
        corpus=ByteText,
        width=width, depth=depth, heads=width // 16, mlp_width=3 * width, context=64, steps=300, batch_size=8,
        other_lr=START,
    )  # fmt: skip


MODELS = {task.name: task for task in (model_of(width, depth) for depth in (2, 4) for width in (32, 64, 128))}


def arms() -> dict[str, Candidate]:
    """What is compared; steps are as long as the convention says."""
    own = {"convention": "adamw"}
    made = (
        Candidate("adamw", torch.optim.AdamW, START, "#1a1a1a", {"fused": True}, rank=None),
        Candidate("muon", Muon, START, COLOURS[0], own, rank=None, has_momentum=True),
        Candidate("factored_muon", FactoredMuon, START, COLOURS[1], own, rank=None, has_momentum=True),
        Candidate("low_rank", LowRank, START, COLOURS[2], {"inner": Adam(convention="adamw")}),
    )
    return {candidate.name: candidate for candidate in made}


def online(results: Path, task: Task, candidate: Candidate, lr: float, other_lr: float, seed: int) -> float:
    """The online loss of one run; infinite if it diverged."""
    point = lr, other_lr, MOMENTUM[candidate.name]
    loss = quality.measured(results, task, candidate, point, seed, "sweep")["online_loss"]
    return math.inf if loss is None else loss


def best_rate(results: Path, task: Task, candidate: Candidate, start: float, other_lr: float | None) -> float:
    """The best rate by the protocol of the module's docstring.

    Args:
        other_lr: of everything else; None for the same.
    """

    def mean(seeds: Sequence[int]) -> Callable[[tuple[float, ...]], float]:
        def loss(point: tuple[float, ...]) -> float:
            lr = rate(point[0])
            other = lr if other_lr is None else other_lr
            return statistics.mean(online(results, task, candidate, lr, other, seed) for seed in seeds)

        return loss

    coarse = descend(mean(SEEDS[:1]), ((start / START) ** 2,), [(4.0,), (0.25,)])
    return rate(descend(mean(SEEDS), coarse, [(2.0,), (0.5,)])[0])


def rate(square: float) -> float:
    """A rate from the square of its quotient by `START`, which stays a power of 2 in a search."""
    return float(f"{START * 2 ** (round(2 * math.log2(square)) / 4):.4g}")


def sweep(results: Path, tasks: Iterable[Task], names: Iterable[str]) -> None:
    """All searches: AdamW's first, whose best rate the others begin at."""
    names = set(names)
    for task in tasks:
        every = arms()
        adamw = best_rate(results, task, every["adamw"], START, None)
        print(f"{task.name} adamw: best at {adamw:.4g}", flush=True)
        for name in MOMENTUM:
            if name in names - {"adamw"}:
                found = best_rate(results, task, every[name], adamw, adamw)
                print(f"{task.name} {name}: best at {found:.4g}, {found / adamw:.3g} of AdamW's", flush=True)
                for seed in SEEDS:
                    online(results, task, every[name], adamw, adamw, seed)


class Watched:
    """Builds an optimiser as `make` does, and measures updates of the matrices in some of its steps.

    Args:
        at: numbers of the steps that are measured, from 1.

    Attributes:
        found: a row for each matrix and step that was measured.
    """

    def __init__(self, make: Callable[..., Optimizer], at: Sequence[int]) -> None:
        self.make, self.at = make, set(at)
        self.steps = 0
        self.found: list[Row] = []
        self.before: list[Tensor] = []

    def __call__(self, groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
        optimizer = self.make(groups, **settings)
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._measure)
        return optimizer

    def _matrices(self, optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in optimizer.param_groups:
            if group["name"] == "matrices":
                yield from ((group, parameter) for parameter in group["params"])

    def _remember(self, optimizer: Optimizer, *_: Any) -> None:
        self.steps += 1
        if self.steps in self.at:
            self.before = [parameter.detach().clone() for _, parameter in self._matrices(optimizer)]

    def _measure(self, optimizer: Optimizer, *_: Any) -> None:
        if self.steps in self.at:
            for before, (group, now) in zip(self.before, self._matrices(optimizer), strict=True):
                lr, decay = group["lr"], group["weight_decay"]
                update = (before * (1 - lr * decay) - now.detach()) / lr
                spectral, size = torch.linalg.matrix_norm(update, 2).item(), update.numel() ** 0.5
                row = {"step": self.steps, "rms": update.norm().item() / size, "spectral": spectral / size}
                self.found.append(row | {"out": now.shape[0], "in": now.shape[1]})


def updates(results: Path, searched: Path, tasks: Iterable[Task]) -> None:
    """Measures the updates of each arm at AdamW's best rate, and of AdamW with other settings on the middle model."""
    rows = quality.json.loads(results.read_text()) if results.is_file() else []
    known = {(row["model"], row["arm"], row["beta2"], row["batch"]) for row in rows}
    for task in tasks:
        lr = adamw_rate(quality.read(searched), task)
        cases = [(task, name, quality.BETA2) for name in MOMENTUM]
        if task.name == "w64d2":
            cases += [(task, "adamw", 0.999)]
            cases += [(replace(task, batch_size=batch), "adamw", quality.BETA2) for batch in (2, 32)]
        for case, name, beta2 in cases:
            if (task.name, name, beta2, case.batch_size) in known:
                continue
            plain = arms()[name]
            watched = Watched(plain.constructor, (30, 75, 150, 225, 285))
            options = {**plain.options, "betas": (0.9, beta2)} if name == "adamw" else plain.options
            candidate = replace(plain, constructor=watched, options=options)
            quality.train(case, candidate, (lr, lr, MOMENTUM[name]), SEEDS[0], "sweep")
            about = {"model": task.name, "arm": name, "beta2": beta2, "batch": case.batch_size, "lr": lr}
            rows.append(about | summary(watched.found))
            print(rows[-1], flush=True)
            lines = ",\n".join(map(quality.json.dumps, rows))
            quality.write_atomic(results, f"[\n{lines}\n]\n")


def summary(found: list[Row]) -> Row:
    """Medians over the matrices, by step, and over all of it."""
    steps = sorted({row["step"] for row in found})

    def medians(key: str) -> list[float]:
        return [round(statistics.median(row[key] for row in found if row["step"] == step), 4) for step in steps]

    return {"steps": steps, **{key: medians(key) for key in ("rms", "spectral")}}


def adamw_rate(rows: list[Row], task: Task) -> float:
    """The best rate of AdamW's search. Raises: UserError before that."""
    best = best_of(rows, task.name, "adamw")
    if best is None:
        raise UserError(f"AdamW has not been searched on {task.name}; run `rates.py sweep` first")
    return best


def means(rows: list[Row], model: str, arm: str) -> dict[float, float]:
    """The mean loss over the seeds by rate, where both seeds ran."""
    losses: dict[float, dict[int, float]] = {}
    for row in rows:
        if (row["task"], row["optimizer"]) == (model, arm):
            loss = row["online_loss"]
            losses.setdefault(row["lr"], {})[row["seed"]] = math.inf if loss is None else loss
    return {lr: statistics.mean(each.values()) for lr, each in losses.items() if set(each) == set(SEEDS)}


def best_of(rows: list[Row], model: str, arm: str) -> float | None:
    """Where the mean over the seeds is lowest; None before two seeds ran."""
    found = means(rows, model, arm)
    return min(found, key=found.__getitem__, default=None)


def quotients(rows: list[Row], arm: str) -> dict[str, tuple[float, float, float | None]]:
    """By model: the best rate over AdamW's, and the mean loss minus AdamW's there and at AdamW's best rate, which is
    None where that was not run on both seeds.
    """
    found = {}
    for model in MODELS:
        adamw, own = means(rows, model, "adamw"), means(rows, model, arm)
        if adamw and own:
            theirs, ours = (min(each, key=each.__getitem__) for each in (adamw, own))
            least = adamw[theirs]
            found[model] = ours / theirs, own[ours] - least, own[theirs] - least if theirs in own else None
    return found


def in_conventions(arm: str, found: dict[str, float]) -> dict[str, dict[str, float]]:
    """Quotients of rates by model, as searched and as they are without the factor that grows with the width."""
    plain = "none" if arm == "low_rank" else "kimi"
    factors = {model: times_adamws(arm, MODELS[model].width) for model in found}
    return {"adamw": found, plain: {model: found[model] * factors[model] for model in found}}


def times_adamws(arm: str, width: int) -> float:
    """The factor of matrices whose shorter side is the width."""
    layout = Layout(width, width, 1, False, torch.float32, torch.device("cpu"), (0,))
    if arm == "low_rank":
        return conventions.coordinate_factor("adamw", layout)
    return conventions.shape_factor("adamw", layout) / conventions.shape_factor("kimi", layout)


def of_searches(rows: list[Row]) -> list[tuple[str, ...]]:
    """(task, width, quotient by arm ...) of the searches of quality.py, whose lengths of steps are those of "kimi"."""
    found = []
    for task in quality.TASKS.values():
        best = {arm: quality.best_point(quality.searched(rows, task, arm)) for arm in ("adamw", *SEARCHED)}
        if (adamw := best.pop("adamw")) is not None:
            cells = [
                "" if point is None else f"{point[0] / adamw[0] / times_adamws(arm, task.width):.2f}"
                for arm, point in best.items()
            ]
            found.append((task.name, str(task.width), *cells))
    return found


class PairedBytes(TextData):
    """Files as windows of byte pairs (tokens of a vocabulary that is learned from the training files)."""

    def __init__(self, folder: Path, vocabulary: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.folder, self.vocabulary = folder, vocabulary

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        files = sorted(self.folder.rglob("*.txt"))
        if len(files) < 20:
            raise UserError(f"--text {self.folder} has {len(files)} files ending in .txt, too few; name another folder")
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        held_out, kept = texts[::20], [text for number, text in enumerate(texts) if number % 20]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        learner = trainers.BpeTrainer(vocab_size=self.vocabulary, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(kept, learner)
        self.train, self.val = (
            Windows(np.array([i for each in tokenizer.encode_batch(part) for i in each.ids]), self.context + 1)
            for part in (kept, held_out)
        )


@dataclass(frozen=True, kw_only=True)
class OtherModel(NextByte):
    """A Llama of transformers with fewer keys than queries and tied embeddings, on byte pairs."""

    vocabulary: int = 1024

    def model(self) -> nn.Module:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.mlp_width,
                num_hidden_layers=self.depth, num_attention_heads=self.heads, num_key_value_heads=self.heads // 2,
                max_position_embeddings=self.context, tie_word_embeddings=True,
            )
        )  # fmt: skip


OTHER_RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def other(results: Path, folder: Path) -> None:
    """AdamW at all rates on both seeds, and the others at AdamW's best and its neighbours, without a search."""
    task = OtherModel(
        name="other", about="Vim's manual", corpus=partial(PairedBytes, folder, 1024),
        width=96, depth=3, heads=6, mlp_width=256, context=64, val_windows=64, steps=300, batch_size=8,
        other_lr=START,
    )  # fmt: skip
    every = arms()

    def final(name: str, lr: float) -> float:
        points = (lr, lr, MOMENTUM[name])
        runs = [quality.measured(results, task, every[name], points, seed, "final") for seed in SEEDS]
        return statistics.mean(map(quality.val_loss, runs))

    losses = {lr: final("adamw", lr) for lr in OTHER_RATES}
    best = min(losses, key=losses.__getitem__)
    at = OTHER_RATES.index(best)
    for lr in dict.fromkeys((best, *OTHER_RATES[max(at - 1, 0) : at + 2])):
        for name in MOMENTUM:
            print(f"{name} at {lr:g}: {final(name, lr):.4f} nats", flush=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=("sweep", "updates", "other"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--arms", nargs="+", default=list(MOMENTUM), choices=list(MOMENTUM))
    parser.add_argument("--text", type=Path, default=Path("/usr/share/vim/vim91/doc"), help="of `other`")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tasks = [MODELS[name] for name in options.models]
    searched = options.results / "rates.json"
    if options.stage == "sweep":
        sweep(searched, tasks, options.arms)
    elif options.stage == "updates":
        updates(options.results / "rates_updates.json", searched, tasks)
    else:
        other(options.results / "rates_other.json", options.text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
