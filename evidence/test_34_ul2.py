"""UL2 (arXiv 2205.05131) on the Python standard library: one mixture of denoisers against each specialist.

Arms with one network (a decoder that sees its inputs in both directions, width 64, 2 blocks), the same steps of the
same number of texts, in rows of the same widths, so at equal compute: R alone (spans of 3 and 8 tokens, 15 %), S alone
(ends of texts), the mixture of seven, and the mixture without mode tokens. Arms differ in target tokens, which are
recorded. Tokens are 512 pieces of bytes, trained on the documents to train on. Each arm has the rate that was best of
the same four in as many steps on seed 100, by its own objective on documents that nothing else reads:
`python evidence/test_34_ul2.py` repeats that search.

Judged by bits per byte of held-out documents, sentinels and the last token among the bits: (i) short gaps, spans of 3
at 15 %; (ii) the last quarter of a text; (iii) long gaps, spans of 64 at 50 %. A specialist is told its own mode, as it
knows no other.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor
from torch.utils.data import default_collate

from lightspan.backbones.denoisers import PrefixDecoder
from lightspan.backbones.language import llama
from lightspan.backbones.trained_tokenizers import trained_tokenizer
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.text.corpus import Pieces
from lightspan.datamodules.text.denoising import Denoising, continuation
from lightspan.datamodules.text.documents import Skipped, TextTokens, encoded, find_documents
from lightspan.datamodules.text.spans import MIXTURE, Denoiser, Ending, Mode, Spans
from lightspan.datamodules.text.windows import in_validation
from lightspan.evaluation.scores.bits_per_byte import BitsPerByte
from lightspan.methods.masked.ul2 import UL2
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCHED = (0, 1, 2), 100
SIZE, INPUTS, TARGETS, STEPS, BATCH, JUDGED = 512, 104, 104, 1200, 16, 256
WIDTH, DEPTH, HEADS, MLP_WIDTH = 64, 2, 4, 172
RATES = (2e-3, 5e-3, 1e-2, 2e-2)


@dataclass(frozen=True)
class LastQuarter(Ending):
    """Exactly the last quarter of a text."""

    def hidden(self, length: int, generator: np.random.Generator) -> np.ndarray:
        return continuation(length, self.rate)


class Arm(NamedTuple):
    """own: the mode that it is told whatever the task; None tells it that of the task."""

    denoisers: tuple[Denoiser, ...]
    mode_tokens: bool = True
    own: Mode | None = None


R, S, MOD, PLAIN = "R only", "S only", "MoD", "MoD without mode tokens"
ARMS = {R: Arm(MIXTURE[:2], own="R"), S: Arm(MIXTURE[2:3], own="S"), MOD: Arm(MIXTURE), PLAIN: Arm(MIXTURE, False)}
CHOSEN = {R: 5e-3, S: 5e-3, MOD: 1e-2, PLAIN: 5e-3}
"""Rates."""
SHORT, END, LONG = "(i) short gaps", "(ii) last quarter", "(iii) long gaps"
TASKS: dict[str, Denoiser] = {SHORT: Spans(3, 0.15, "R"), END: LastQuarter(0.25, "S"), LONG: Spans(64, 0.5, "X")}


class Texts(NamedTuple):
    """Documents to train on, to choose by and to judge by; names and tokens of each."""

    training: tuple[list[str], list[TextTokens]]
    search: tuple[list[str], list[TextTokens]]
    test: tuple[list[str], list[TextTokens]]
    tokens: int


def texts() -> Texts:
    """Of the standard library, divided by their names."""
    sides: list[dict[str, bytes]] = [{}, {}, {}]
    for name, content in find_documents(None, (".py",), Skipped()):
        sides[1 + in_validation(name, 0.05) if in_validation(name, 0.1) else 0][name] = content
    tokenizer = trained_tokenizer((content.decode() for content in sides[0].values()), SIZE)
    made = [{name: encoded(content, tokenizer) for name, content in side.items()} for side in sides]
    kept = [{name: text for name, text in side.items() if len(text.tokens) > 1} for side in made]
    return Texts(*(([*side], [*side.values()]) for side in kept), len(tokenizer))  # type: ignore[call-arg, arg-type]


def form_of(denoisers: Sequence[Denoiser], mode_tokens: bool, tokens: int) -> Denoising:
    form = Denoising(INPUTS, TARGETS, denoisers, mode_tokens=mode_tokens)
    form.tokens_known = form.prepare(tokens)  # type: ignore[attr-defined]
    return form


def trained(arm: str, given: Texts, seed: int, rate: float, steps: int) -> tuple[UL2, float]:
    """In evaluation mode, and how many target tokens it learned from; with steps=0 untrained."""
    seed_everything(seed, verbose=False)
    form = form_of(ARMS[arm].denoisers, ARMS[arm].mode_tokens, given.tokens)
    network = llama(form.tokens_known, WIDTH, DEPTH, HEADS, MLP_WIDTH, INPUTS + TARGETS)  # type: ignore[attr-defined]
    optimization = {
        "optimizer": partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.1),
        "lr_scheduler": partial(WarmupCosine, warmup=0.1, final=0.1),
    }
    method, seen = UL2(PrefixDecoder(network), **optimization), Counter[str]()  # type: ignore[arg-type]
    step = method.training_step

    def counted(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        seen["targets"] += int((batch["target_segments"] > 0).sum())
        return step(batch, batch_idx)  # type: ignore[arg-type]

    method.training_step = counted  # type: ignore[method-assign, assignment]
    if steps:
        names, documents = given.training
        loader = ExactLoader(Pieces(documents, names, form), BATCH, seed)
        quiet_trainer(max_steps=steps, gradient_clip_val=1.0).fit(method, loader)  # type: ignore[arg-type]
    return method.eval(), float(seen["targets"])


@torch.no_grad()
def bits(method: UL2, of: tuple[list[str], list[TextTokens]], form: Denoising) -> float:
    """Per byte of `JUDGED` texts, the same for all arms."""
    names, documents = of
    pieces, metric = Pieces(documents, names, form), BitsPerByte()
    places = np.linspace(0, len(pieces) - 1, JUDGED).round().astype(int).tolist()
    for at in range(0, JUDGED, 64):
        batch = default_collate([pieces.sample(place, place) for place in places[at : at + 64]])
        nats, known = method.nats(batch)
        metric.update(nats[known], batch["target_bytes"])
    return float(metric.compute())


def judged(arm: str, method: UL2, task: str, given: Texts, mode: Mode | None = None) -> float:
    """Bits per byte of a task.

    Args:
        mode: what it is told; None tells it the arm's own, or that of the task.
    """
    told = mode or ARMS[arm].own or TASKS[task].mode
    denoiser = replace(TASKS[task], mode=told)  # type: ignore[type-var]
    return bits(method, given.test, form_of([denoiser], ARMS[arm].mode_tokens, given.tokens))


def unigram(given: Texts) -> float:
    """Bits per byte of held-out texts if each token is as frequent as in training, whatever stands around it."""
    counts = np.ones(given.tokens)
    for text in given.training[1]:
        counts += np.bincount(text.tokens, minlength=given.tokens)
    bits_of = -np.log2(counts / counts.sum())
    test = given.test[1]
    return float(sum(bits_of[text.tokens].sum() for text in test) / sum(text.byte_counts.sum() for text in test))


def test_ul2(evidence):
    given = texts()
    evidence.figure("bits per byte, tokens by their frequency alone", unigram(given))
    found: dict[tuple[str, str], dict[int, float]] = {}
    wrong: dict[int, float] = {}
    for seed in SEEDS:
        for arm in ARMS:
            method, targets = trained(arm, given, seed, CHOSEN[arm], STEPS)
            evidence.figure(f"target tokens, {arm}", targets, seed)
            for task in TASKS:
                found.setdefault((arm, task), {})[seed] = judged(arm, method, task, given)
                evidence.figure(f"{task}, {arm}", found[arm, task][seed], seed, "bits per byte")
            if arm == MOD:
                wrong[seed] = judged(arm, method, END, given, mode="R")
                evidence.figure(f"{END}, {MOD} told R", wrong[seed], seed, "bits per byte")
    evidence.note(
        f"{STEPS} steps of {BATCH} texts in rows of {INPUTS} and {TARGETS} tokens; {JUDGED} texts for each task. Rates "
        f"of {RATES} chosen on seed {SEARCHED}",
        CHOSEN,
    )

    def less(task: str, arm: str, than: str) -> dict[int, float]:
        return {seed: found[than, task][seed] - found[arm, task][seed] for seed in SEEDS}

    bits_ = {"unit": "bits per byte"}
    evidence.claim(f"{SHORT}, MoD below {R}", less(SHORT, MOD, R), at_least=-0.05, **bits_)
    evidence.claim(f"{END}, MoD below {S}", less(END, MOD, S), at_least=-0.05, **bits_)
    evidence.claim(f"{SHORT}, MoD below {S}", less(SHORT, MOD, S), at_least=0.15, **bits_)
    evidence.claim(f"{END}, MoD below {R}", less(END, MOD, R), at_least=0.15, **bits_)
    for arm in (R, S, PLAIN):
        evidence.claim(f"{LONG}, MoD below {arm}", less(LONG, MOD, arm), at_least=0.0, **bits_)
    rise = {seed: wrong[seed] - found[MOD, END][seed] for seed in SEEDS}
    evidence.claim(f"{END}, MoD told R minus told S", rise, at_least=0.0, **bits_)


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = texts()
    for arm in sys.argv[1:] or ARMS:
        for rate in RATES:
            start_s = time.process_time()
            method, _ = trained(arm, given, SEARCHED, rate, STEPS)
            own = bits(method, given.search, form_of(ARMS[arm].denoisers, ARMS[arm].mode_tokens, given.tokens))
            print(arm, rate, round(own, 4), f"{time.process_time() - start_s:.0f} s", flush=True)
