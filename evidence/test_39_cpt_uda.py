"""Continued pre-training for domain adaptation (arXiv 2401.17514) on drawn reviews of books and of kitchen things.

Words of praise and blame differ between the domains, and a tenth of them contradicts the review; what a writer does
next is told in the same words in both, in half of the reviews. The prompt asks for two of these, as a language model
knows the words of its labels. A T5 of two blocks and 64 channels learns from 2,000 labelled reviews of books and as
many raw ones of kitchen things, and says of others of these whether they praise. Arms, with equal total steps: labelled
books alone (`source only`); first hidden words of books (`CPT, source`), of both (`CPT, both`), of both but only words
that tell nothing of the label (`CPT, uninformative`), then labelled books; and labelled books with the states of both
domains made alike (`MMD`).

Rate, and the weight of the discrepancy, are chosen of the same lists on seed 100 by the loss on held-out reviews of
books: no label of a kitchen thing is looked at. Where the best was an end of its list, the next value was tried too, by
factors of three, until the best was inside. `python evidence/test_39_cpt_uda.py` repeats the search of the lists.
Reviews, prompt and steps were settled on seed 101, where hidden words of both domains help.
"""

import itertools
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from quiet import quiet_trainer

from lightspan.backbones.denoisers import EncoderDecoder
from lightspan.backbones.language import t5
from lightspan.backbones.tokenizers import HashedWords
from lightspan.datamodules.text.domains import DomainDenoising, DomainPrompts, Prompt
from lightspan.datamodules.text.drawn_reviews import DrawnReviews
from lightspan.datamodules.text.word_choices import RandomWords, UninformativeWords, WordChoice
from lightspan.methods.language.prompted_classifier import Discrepancy, PromptedClassifier
from lightspan.methods.masked.ul2 import UL2
from lightspan.optim.schedules import WarmupCosine

SEEDS = (0, 1, 2, 3, 4)
SEARCHED = 100
FIRST, SECOND, BATCH, LENGTH, HIDDEN = 1600, 60, 64, 24, 0.25
RATES = (1e-3, 3e-3)
WEIGHTS = (0.1, 1.0)
VOCABULARY = 1024
SHARED, MIXED = 0.5, 0.1
PROMPT = Prompt("Review: {} so", ("disappointed", "delighted"))
ARMS: dict[str, WordChoice | None] = {
    "source only": None,
    "CPT, source": RandomWords(HIDDEN),
    "CPT, both": RandomWords(HIDDEN),
    "CPT, uninformative": UninformativeWords(HIDDEN),
    "MMD": None,
}
CHOSEN: dict[str, tuple[float, float]] = {
    "source only": (3e-2, 0.0),
    "CPT, source": (1e-3, 0.0),
    "CPT, both": (1e-3, 0.0),
    "CPT, uninformative": (1e-3, 0.0),
    "MMD": (1e-2, 0.1),
}
"""Rate and weight of the discrepancy."""


def fit(method: Any, data: Any, steps: int) -> None:
    quiet_trainer(max_steps=steps, max_epochs=-1, gradient_clip_val=1.0, limit_val_batches=0).fit(
        method, datamodule=data
    )


def optimisation(rate: float) -> dict[str, Any]:
    schedule = partial(WarmupCosine, warmup=0.1, final=0.0)
    return {"optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=0.01), "lr_scheduler": schedule}


def measured(arm: str, rate: float, weight: float, seed: int) -> dict[str, float]:
    """Accuracy in per cent in both domains, loss in nats on held-out books, and of the words that were hidden."""
    hide = ARMS[arm]
    settings: dict[str, Any] = {
        "domains": DrawnReviews(seed=seed, shared=SHARED, mixed=MIXED), "tokenizer": HashedWords(VOCABULARY),
        "prompt": PROMPT, "length": LENGTH, "batch_size": BATCH, "seed": seed,
    }  # fmt: skip
    seed_everything(seed, verbose=False)
    prompts = DomainPrompts(**settings)
    backbone = EncoderDecoder(t5(prompts.num_tokens, width=64, depth=2, heads=4, mlp_width=128))
    found: dict[str, float] = {}
    if hide is not None:
        raw, first = (
            DomainDenoising(hide=hide, source_alone=arm == "CPT, source", **settings),
            UL2(backbone, **optimisation(rate)),
        )
        fit(first, raw, FIRST)
        batch = next(iter(raw.val_dataloader()))
        with torch.no_grad():
            nats, known = first.eval().nats(batch)
        found["nats of hidden words"] = float(nats[known].mean())
    alignment = Discrepancy(weight) if arm == "MMD" else None
    method = PromptedClassifier(backbone.train(), 2, alignment, **optimisation(rate))
    fit(method, prompts, SECOND if hide is not None else FIRST + SECOND)
    figures: dict[str, float] = {}
    method.log_dict = lambda logged, **options: figures.update(  # type: ignore[method-assign]
        {name: figures.get(name, 0.0) + float(value) * options["batch_size"] for name, value in logged.items()}
    )
    with torch.no_grad():
        for stage, loader in (("val", prompts.val_dataloader()), ("test", prompts.test_dataloader())):
            for batch in loader:
                method.eval().evaluate(batch, stage)
            for name in ("accuracy", "loss_nats"):
                figures[f"{stage}/{name}"] /= len(loader.dataset)
    return found | {
        "target": 100 * figures["test/accuracy"],
        "source": 100 * figures["val/accuracy"],
        "source nats": figures["val/loss_nats"],
    }


def test_cpt_uda(evidence) -> None:
    runs: dict[str, dict[int, dict[str, float]]] = {
        arm: {seed: measured(arm, *chosen, seed) for seed in SEEDS} for arm, chosen in CHOSEN.items()
    }
    for arm, of_seed in runs.items():
        for seed, figures in of_seed.items():
            for name, value in figures.items():
                evidence.figure(f"{name}, {arm}", value, seed, "nats" if "nats" in name else "%")
    evidence.note(
        f"{FIRST + SECOND} steps of {BATCH} reviews in all, {FIRST} of them with {100 * HIDDEN:g} % of words hidden "
        f"where there is a first stage; rates and weights chosen on seed {SEARCHED} by books, from {RATES} and "
        f"{WEIGHTS} outwards",
        {arm: f"{rate:g}" + (f" and {weight:g}" if weight else "") for arm, (rate, weight) in CHOSEN.items()},
    )

    def gain(arm: str) -> dict[int, float]:
        return {seed: runs[arm][seed]["target"] - runs["source only"][seed]["target"] for seed in SEEDS}

    def spread(arm: str) -> float:
        return float(np.std([runs[arm][seed]["target"] for seed in SEEDS], ddof=1))

    both, uninformative = gain("CPT, both"), gain("CPT, uninformative")
    evidence.claim("target, CPT on both minus source only", both, at_least=10.0, unit="points")
    half = {seed: uninformative[seed] - both[seed] / 2 for seed in SEEDS}
    evidence.claim("gain of uninformative words minus half that of random ones", half, at_most=0.0, unit="points")
    evidence.claim(
        "spread over seeds, CPT on both minus MMD", spread("CPT, both") - spread("MMD"), at_most=0.0, unit="points"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for arm in sys.argv[1:] or ARMS:
        for rate, weight in itertools.product(RATES, WEIGHTS if arm == "MMD" else (0.0,)):
            start_s = time.process_time()
            found = measured(arm, rate, weight, SEARCHED)
            found.pop("target")  # not to be chosen by
            shown = {name: round(value, 4) for name, value in found.items()}
            print(arm, rate, weight, shown, f"{time.process_time() - start_s:.0f} s", flush=True)
