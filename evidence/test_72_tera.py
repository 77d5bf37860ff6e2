"""TERA (arXiv 2007.06028) on generated speech: phones read from frozen features with 5 % of the labels.

2,560 utterances of 0.6 to 0.8 s by 10 speakers, who say 20 phones by a grammar
(`lightspan.datamodules.rendered.speech`), 30 minutes in all, as 40 log-mel bands. A Transformer of 3 blocks and 96
channels rebuilds spectrograms altered in time and in frequency, or in both with noise added in some steps, for equal
steps; nothing is fine-tuned. A linear probe of the phone on each frame is fitted on 128 of the utterances. 400 other
utterances test, as they are (20 dB above white noise) and at 5 dB. The rate of each arm and the penalty of each probe
are searched among the same for all, on utterances of the search seed.

Who speaks is not read any more: an utterance of 0.7 s is normalised over its own frames, which takes pitch and tilt
away, and no arm told speakers from one another better than another did. Nor are alterations in time or in frequency
alone, and spoken captions, which carried no claim that could be told.

Floor: chance, the most frequent phone. Ceiling: the same encoder taught the phones of all utterances for training.
Gate: the error of its guesses, by that of guesses of each band's mean.
"""

from functools import cache, partial
from typing import Any

import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.frames import FrameTransformer
from lightspan.datamodules.rendered.data import PARTS
from lightspan.datamodules.rendered.speech import SpeechSamples
from lightspan.evaluation.probes.linear_probe import fit_linear_probe, linear_accuracy
from lightspan.methods.masked.tera import TERA
from lightspan.nn.audio.log_mel import LogMel
from lightspan.nn.masking.spectrogram_alterations import SpectrogramAlterations
from lightspan.objectives.masked import hidden_absolute_error
from lightspan.optim.schedules import WarmupLine

SEEDS, SEARCH = (0, 1, 2), 100
TRAINING, LABELLED, TEST, PHONES = 2560, 128, 400, 20
SECONDS, SHORTEST, CLEAN_DB, NOISY_DB = 0.8, 0.6, 20.0, 5.0
BATCH, STEPS, MELS, WIDTH = 4, 2000, 40, 96
RATES, PENALTIES = (3e-4, 1e-3, 3e-3), (1.0, 10.0, 100.0)
BOTH, NOISY, ORACLE = "time and frequency", "time, frequency and noise", "taught phones"
ARMS = {BOTH: SpectrogramAlterations(), NOISY: SpectrogramAlterations(noise=0.15)}
BASELINES = ("log-mel", "random weights")

Batch = dict[str, Tensor]


@cache
def speech(part: str, count: int, seed: int, noise_db: float = CLEAN_DB) -> Batch:
    """All utterances of a set as one batch."""
    samples = SpeechSamples(PARTS[part], count, seed, seconds=SECONDS, shortest=SHORTEST, noise_db=noise_db)
    parts = [samples.batch(range(at, min(at + 64, count)), [0] * 64) for at in range(0, count, 64)]
    return {name: torch.cat([one[name] for one in parts]) for name in parts[0]}


def rows_of(given: Batch, rows: Tensor) -> Batch:
    return {name: field[rows] for name, field in given.items()}


class Taught(TERA):
    """The ceiling: told the phone of each frame."""

    def __init__(self, *given: Any, **optimization: Any) -> None:
        super().__init__(*given, **optimization)
        self.phones = nn.Linear(WIDTH, PHONES)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        clean = self.spectrogram(batch)
        logits = self.phones(self.backbone(*clean))[clean.valid_BT]
        return F.cross_entropy(logits, batch["phone"][clean.valid_BT])


def trained(arm: str, rate: float, given: Batch, seed: int) -> TERA:
    """In evaluation mode; of a baseline, untrained."""
    seed_everything(seed, verbose=False)
    model = (Taught if arm == ORACLE else TERA)(
        FrameTransformer(MELS, width=WIDTH, depth=3, heads=4, dropout=0.0),
        LogMel(mels=MELS),
        ARMS.get(arm),
        optimizer=partial(torch.optim.AdamW, lr=rate),
        lr_scheduler=partial(WarmupLine, warmup=0.07),
    )
    if arm not in BASELINES:
        generator = torch.Generator().manual_seed(seed)
        chosen = [torch.randperm(len(given["index"]), generator=generator)[:BATCH] for _ in range(STEPS)]
        batches = DataLoader(chosen, batch_size=None, collate_fn=partial(rows_of, given))  # type: ignore[arg-type]
        quiet_trainer(max_steps=STEPS, gradient_clip_val=5.0).fit(model, batches)
    return model.eval()


@torch.no_grad()
def encoded(arm: str, model: TERA, given: Batch) -> tuple[Tensor, Tensor]:
    """Valid frames [N D] and their phones [N]."""
    found = []
    for rows in torch.arange(len(given["index"])).split(64):
        of = rows_of(given, rows)
        clean = model.spectrogram(of)
        states = clean.frames_BTF if arm == "log-mel" else model.backbone(*clean)
        found.append((states[clean.valid_BT], of["phone"][clean.valid_BT]))
    frames, phones = (torch.cat(part) for part in zip(*found, strict=True))
    return frames, phones


@torch.no_grad()
def error(model: TERA, given: Batch) -> tuple[float, float]:
    """L1 of the labelled cells of (the guesses, guesses of 0, the mean of each band)."""
    clean, altered, guess = model.guesses(given, 0)
    parts = guess, torch.zeros_like(guess)
    guessed, zeros = (hidden_absolute_error(part, clean.frames_BTF, altered.labelled_BTF) for part in parts)
    return float(guessed), float(zeros)


@cache
def measured(arm: str, rate: float, seed: int) -> dict[str, Any]:
    """Phones told, in per cent by the penalty of the probe, clean and at 5 dB; errors of the guesses."""
    training, part = speech("training", TRAINING, seed), "validation" if seed == SEARCH else "test"
    model = trained(arm, rate, training, seed)
    bank = encoded(arm, model, rows_of(training, torch.arange(LABELLED)))
    probes = {l2: fit_linear_probe(*bank, l2, max_iterations=60) for l2 in PENALTIES}
    found: dict[str, Any] = {}
    for name, noise_db in (("clean", CLEAN_DB), ("noisy", NOISY_DB)):
        asked = encoded(arm, model, speech(part, TEST, seed, noise_db))
        found[name] = {l2: 100 * linear_accuracy(*probe, *asked) for l2, probe in probes.items()}
        found["chance"] = 100 * float(asked[1].bincount().max()) / len(asked[1])
    if arm in ARMS:
        found["errors"] = error(model, speech(part, TEST, seed))
    return found


def test_tera(evidence):
    def validated(arm: str, rate: float) -> float:
        return max(measured(arm, rate, SEARCH)["clean"].values())

    rates = evidence.search({arm: partial(validated, arm) for arm in ARMS}, RATES)
    rates |= dict.fromkeys(BASELINES, 0.0) | {ORACLE: rates[BOTH]}
    of_probes = {arm: measured(arm, rate, SEARCH)["clean"] for arm, rate in rates.items()}
    penalties = {arm: max(of, key=of.__getitem__) for arm, of in of_probes.items()}
    runs = {arm: {seed: measured(arm, rate, seed) for seed in SEEDS} for arm, rate in rates.items()}

    def phones(arm: str, where: str = "clean") -> dict[int, float]:
        return {seed: found[where][penalties[arm]] for seed, found in runs[arm].items()}

    for arm in rates:
        for where, name in (("clean", "phones"), ("noisy", "phones at 5 dB")):
            for seed, value in phones(arm, where).items():
                evidence.figure(f"{name}, {arm}", value, seed, "%")
    for arm in ARMS:
        guessed, means = ({seed: found["errors"][i] for seed, found in runs[arm].items()} for i in range(2))
        evidence.gate(arm, guessed, means, by=0.1, unit="of L1", lower_is_better=True)
    evidence.note(f"{STEPS} steps of {BATCH} utterances. Penalties of {PENALTIES}", penalties)
    chance = {seed: found["chance"] for seed, found in runs[BOTH].items()}

    def minus(of: dict[int, float], arm: str, where: str) -> dict[int, float]:
        return {seed: of[seed] - value for seed, value in phones(arm, where).items()}

    for what, where, arm, over, margin in (
        *(("phones", "clean", BOTH, over, 5.0) for over in BASELINES),
        ("phones at 5 dB", "noisy", NOISY, BOTH, 1.0),
    ):
        evidence.claim(
            f"{what}, {arm} minus {over}",
            minus(phones(arm, where), over, where),
            at_least=margin,
            unit="points",
            floor=minus(chance, over, where),
            ceiling=minus(phones(ORACLE, where), over, where),
            arms=(arm, over) if over in ARMS else (arm,),
        )
