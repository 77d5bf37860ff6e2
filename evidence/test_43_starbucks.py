"""Starbucks (arXiv 2410.13230) on the functions of Python's standard library: the first line of a docstring finds its
function among those of files that were not trained on.

An encoder of 4 blocks and 64 channels reads hashed words at the sizes (1, 8), (2, 16), (3, 32), (4, 64). Arms, with
equal steps of the same pairs: Starbucks; 2DMSE, which draws a layer and a width in each step; a network of one block
whose first 8 coordinates alone are trained, the separate small model; the whole size alone, plain training; and
Starbucks after SMAE on the same functions' bodies and docstrings.

Files are divided by a hash of their path into those to train on, to choose on and to report on. Each arm's rate is
chosen of the same three on seed 100 by the mean of recall at 10 over the sizes it trains; that of SMAE itself was not
searched: `python evidence/test_43_starbucks.py` repeats that search.
"""

import copy
import functools
import sys
import time
from functools import partial

import numpy as np
import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor, nn

from lightspan.backbones.language import bert
from lightspan.backbones.tokenizers import HashedWords
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.text.functions import library_functions
from lightspan.datamodules.text.pairs import TextPairSamples, Texts
from lightspan.datamodules.text.whole_words import WholeWordSamples, WordCutter
from lightspan.datamodules.text.windows import in_validation
from lightspan.evaluation.scores.recall_at_k import RecallAtK
from lightspan.methods.contrastive.starbucks import SentenceRanking, Starbucks
from lightspan.methods.masked.smae import SMAE
from lightspan.nn.sequences.nested_sizes import FixedSizes, NestedSize, NestedSizes, RandomSizes
from lightspan.objectives.text_pairs import pair_scores
from lightspan.optim.schedules import WarmupCosine

SEEDS = (0, 1, 2)
SEARCHED = 100
RATES = (1e-3, 3e-3, 1e-2)
PAIRS = [(1, 8), (2, 16), (3, 32), (4, 64)]
SIZES = [NestedSize(*pair) for pair in PAIRS]
STEPS, BATCH, QUERY, DOCUMENT, WORDS = 400, 64, 16, 32, 2048
SMAE_STEPS, SMAE_RATE = 240, 3e-3
MASK = WORDS  # a number behind those of the tokenizer
CHOSEN = {"Starbucks": 3e-3, "2DMSE": 3e-3, "separate": 1e-2, "plain": 3e-3, "SMAE, then Starbucks": 3e-3}


class Alone(FixedSizes):
    """One size of a network that has more coordinates: a small model that is trained for itself."""

    def require(self, backbone: nn.Module, method: str) -> None:
        """Nothing: the whole network is not among the sizes."""


@functools.cache
def functions(part: str) -> tuple[list[str], list[str]]:
    """(docstrings, bodies) of the files to train on, to `choose` on or to `report` on."""
    sides: dict[str, list[tuple[str, str]]] = {"train": [], "choose": [], "report": []}
    for file, query, body in library_functions():
        held = "report" if in_validation(file, 0.15) else "choose" if in_validation("choose " + file, 0.15) else "train"
        sides[held].append((query, body))
    queries, bodies = zip(*sides[part], strict=True)
    return list(queries), list(bodies)


@functools.cache
def pairs(part: str) -> TextPairSamples:
    tokenizer, (queries, bodies) = HashedWords(WORDS), functions(part)
    return TextPairSamples(Texts.of(tokenizer, queries, QUERY), Texts.of(tokenizer, bodies, DOCUMENT))


@functools.cache
def texts() -> WholeWordSamples:
    queries, bodies = functions("train")
    return WholeWordSamples([*bodies, *queries], WordCutter(HashedWords(WORDS), DOCUMENT))


def encoder(depth: int) -> nn.Module:
    return bert(WORDS + 1, width=64, depth=depth, heads=4, mlp_width=128, context=DOCUMENT, dropout=0.0)


def optimisation(rate: float) -> dict[str, object]:
    schedule = partial(WarmupCosine, warmup=0.1, final=0.0)
    return {"optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=0.01), "lr_scheduler": schedule}


def fit(method: object, samples: object, steps: int, seed: int) -> None:
    loader = ExactLoader(samples, BATCH, seed=seed)  # type: ignore[arg-type]
    trainer = quiet_trainer(max_steps=steps, max_epochs=-1, gradient_clip_val=1.0)
    trainer.fit(method, loader)  # type: ignore[arg-type]


def pretrained(seed: int, steps: int = SMAE_STEPS) -> tuple[nn.Module, dict[str, float]]:
    """(encoder, nats of the smallest size and of all before and after)."""
    seed_everything(seed, verbose=False)
    backbone = encoder(4)
    method = SMAE(backbone, FixedSizes(PAIRS), MASK, **optimisation(SMAE_RATE))  # type: ignore[arg-type]

    def nats() -> dict[str, float]:
        batch = next(iter(ExactLoader(texts(), 512, seed=1)))
        with torch.no_grad():
            encoder_S, decoder_S = method.eval().losses(batch)
        return {"smallest": float(encoder_S[0]), "encoder": float(encoder_S.mean()), "decoder": float(decoder_S.mean())}

    before = nats()
    fit(method.train(), texts(), steps, seed)
    return backbone, {
        f"{when} {name}": one for when, all_ in (("first", before), ("last", nats())) for name, one in all_.items()
    }


def trained(arm: str, rate: float, seed: int, steps: int = STEPS, start: nn.Module | None = None) -> Starbucks:
    """With the encoder that SMAE left, or a new one."""
    seed_everything(seed, verbose=False)
    sizes: NestedSizes = FixedSizes(PAIRS)
    if arm == "2DMSE":
        sizes = RandomSizes(PAIRS, seed)
    elif arm == "separate":
        sizes = Alone(PAIRS[:1])
    elif arm == "plain":
        sizes = FixedSizes(PAIRS[-1:])
    backbone = start if start is not None else encoder(1 if arm == "separate" else 4)
    method = Starbucks(backbone, sizes, SentenceRanking(), **optimisation(rate))  # type: ignore[arg-type]
    fit(method, pairs("train"), steps, seed)
    return method.eval()


@torch.no_grad()
def recall(method: Starbucks, part: str, sizes: list[NestedSize]) -> dict[str, float]:
    """Recall at 10 of each size, in per cent."""
    samples = pairs(part)
    batches = [samples_of(samples, first) for first in range(0, len(samples), 256)]
    found = [method.embedded(sizes, batch) for batch in batches]
    measured = {}
    for size in sizes:
        query, document = (torch.cat([rows[size][side] for rows in found]) for side in (0, 1))
        metric = RecallAtK(10)
        metric.update(*pair_scores(query, document, cosine=True))
        measured[str(size)] = 100 * float(metric.compute())
    return measured


def samples_of(samples: TextPairSamples, first: int) -> dict[str, Tensor]:
    rows = [samples.sample(index, 0) for index in range(first, min(first + 256, len(samples)))]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def judged(arm: str) -> list[NestedSize]:
    """The sizes an arm trains."""
    return SIZES[:1] if arm == "separate" else SIZES[-1:] if arm == "plain" else SIZES


def test_starbucks(evidence) -> None:
    runs: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in (*CHOSEN, "untrained")}
    for seed in SEEDS:
        for arm, rate in CHOSEN.items():
            start, learned = pretrained(seed) if arm.startswith("SMAE") else (None, {})
            runs[arm][seed] = recall(trained(arm, rate, seed, start=start), "report", judged(arm))
            for name, nats in learned.items():
                evidence.figure(f"{name}, SMAE", nats, seed, "nats")
        runs["untrained"][seed] = recall(trained("plain", 0.0, seed, steps=1), "report", SIZES)
    for arm, of_seed in runs.items():
        for seed, measured in of_seed.items():
            for size, value in measured.items():
                evidence.figure(f"recall at 10 of {size}, {arm}", value, seed, "%")
    small, whole = str(SIZES[0]), str(SIZES[-1])
    evidence.note(
        f"{len(pairs('train'))} pairs to train on, {len(pairs('report'))} to be found; {STEPS} steps of {BATCH}, "
        f"{SMAE_STEPS} of SMAE at {SMAE_RATE:g}. Rates of {RATES} chosen on seed {SEARCHED}",
        CHOSEN,
    )

    def gain(one: str, other: str, size: str) -> dict[int, float]:
        return {seed: runs[one][seed][size] - runs[other][seed][size] for seed in SEEDS}

    unit = "points"
    evidence.claim("smallest size, Starbucks minus 2DMSE", gain("Starbucks", "2DMSE", small), at_least=3.0, unit=unit)
    evidence.claim(
        "smallest size, Starbucks minus a separate model",
        gain("Starbucks", "separate", small),
        at_least=-2.0,
        unit=unit,
    )
    evidence.claim("whole size, Starbucks minus plain", gain("Starbucks", "plain", whole), at_least=-2.0, unit=unit)
    evidence.claim(
        "smallest size, with SMAE minus without",
        gain("SMAE, then Starbucks", "Starbucks", small),
        at_least=0.0,
        unit=unit,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    for arm in sys.argv[2:] or CHOSEN:
        start, learned = pretrained(SEARCHED) if arm.startswith("SMAE") else (None, {})
        print(arm, learned, f"{time.process_time():.0f} s", flush=True)
        for rate in RATES:
            started_s = time.process_time()
            found = recall(trained(arm, rate, SEARCHED, steps, copy.deepcopy(start)), "choose", judged(arm))
            shown = {size: round(value, 2) for size, value in found.items()}
            took = time.process_time() - started_s
            print(arm, rate, shown, round(float(np.mean([*found.values()])), 2), f"{took:.0f} s", flush=True)
