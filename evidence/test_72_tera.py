"""TERA (arXiv 2007.06028) on generated speech: phones and speakers read from frozen features with 5 % of the labels.

2,560 utterances of 0.6 to 0.8 s by 10 speakers, who say 20 phones by a grammar
(`lightspan.datamodules.rendered.speech`), 30 minutes in all, as 40 log-mel bands. A Transformer of 3 blocks and 96
channels rebuilds spectrograms altered in time, in frequency, in both, or in both with noise added in some steps, for
equal steps; nothing is fine-tuned. Linear probes are fitted on 128 of the utterances: of the phone on each frame, of
the speaker on the mean of an utterance's frames. 400 other utterances test, as they are (20 dB above white noise) and
at 5 dB. The rate of each arm and the penalty of each probe are searched first, among the same for all, on seed 100 with
utterances of its own.

The second part has no claim: languages and keywords of spoken captions, on stamps that are not among those trained on.
"""

import contextlib
from collections.abc import Iterable
from functools import cache, partial
from itertools import product

import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightspan.backbones.frames import FrameTransformer
from lightspan.datamodules.audio.data import Recordings
from lightspan.datamodules.audio.spoken import KEYWORDS, SpokenCaptions
from lightspan.datamodules.loading.workers import Damaged
from lightspan.datamodules.rendered.data import PARTS
from lightspan.datamodules.rendered.speech import SpeechSamples
from lightspan.evaluation.probes.linear_probe import fit_linear_probe, linear_accuracy, linear_probe_accuracy
from lightspan.methods.masked.tera import TERA
from lightspan.nn.audio.log_mel import LogMel
from lightspan.nn.masking.spectrogram_alterations import SpectrogramAlterations
from lightspan.nn.tokens import valid_mean
from lightspan.objectives.masked import hidden_absolute_error
from lightspan.optim.schedules import WarmupLine

NEEDS = ("soundfile", "/usr/share/tuxpaint/stamps")
SEEDS, SEARCH = (0, 1, 2), 100
TRAINING, LABELLED, TEST = 2560, 128, 400
SECONDS, SHORTEST, CLEAN_DB, NOISY_DB = 0.8, 0.6, 20.0, 5.0
BATCH, STEPS, MELS = 4, 3000, 40
RATES, PENALTIES = (3e-4, 1e-3, 3e-3), (1.0, 10.0, 100.0)
ARMS = {
    "time": SpectrogramAlterations(band=0.0),
    "frequency": SpectrogramAlterations(share=0.0),
    "time and frequency": SpectrogramAlterations(),
    "time, frequency and noise": SpectrogramAlterations(noise=0.15),
}
BASELINES = ("log-mel", "random weights")
CHOSEN: dict[str, tuple[float, float, float]] = {
    "log-mel": (0.0, 100.0, 1.0),
    "random weights": (0.0, 10.0, 1.0),
    **dict.fromkeys(ARMS, (1e-3, 10.0, 1.0)),
}
"""Rate, and penalties of the probes of phones and of speakers; see `searched`."""
CAPTIONS, CAPTION_STEPS, CAPTION_SECONDS = (2000, 800), 600, 2.0

Batch = dict[str, Tensor]


@cache
def speech(part: str, count: int, seed: int, noise_db: float = CLEAN_DB) -> Batch:
    """All utterances of a set as one batch."""
    samples = SpeechSamples(PARTS[part], count, seed, seconds=SECONDS, shortest=SHORTEST, noise_db=noise_db)
    parts = [samples.batch(range(at, min(at + 64, count)), [0] * 64) for at in range(0, count, 64)]
    return {name: torch.cat([one[name] for one in parts]) for name in parts[0]}


def rows_of(given: Batch, rows: Tensor) -> Batch:
    return {name: field[rows] for name, field in given.items()}


def trained(arm: str, rate: float, given: Batch, seed: int, steps: int) -> TERA:
    """In evaluation mode; of a baseline, untrained."""
    seed_everything(seed, verbose=False)
    model = TERA(
        FrameTransformer(MELS, width=96, depth=3, heads=4, dropout=0.0),
        LogMel(mels=MELS),
        ARMS.get(arm),
        optimizer=partial(torch.optim.AdamW, lr=rate),
        lr_scheduler=partial(WarmupLine, warmup=0.07),
    )
    if arm in ARMS:
        generator = torch.Generator().manual_seed(seed)
        chosen = [torch.randperm(len(given["index"]), generator=generator)[:BATCH] for _ in range(steps)]
        batches = DataLoader(chosen, batch_size=None, collate_fn=partial(rows_of, given))
        quiet_trainer(max_steps=steps, gradient_clip_val=5.0).fit(model, batches)
    return model.eval()


@torch.no_grad()
def encoded(arm: str, model: TERA, given: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(frames [B T D], means of recordings [B D], which frames are valid [B T])."""
    found = []
    for rows in torch.arange(len(given["index"])).split(64):
        of = rows_of(given, rows)
        clean = model.spectrogram(of)
        if arm == "log-mel":
            # With mean 0 of each band, the mean of a recording would say nothing of its speaker.
            plain = LogMel(mels=MELS, normalise=False)(of["wave"], of["length"])
            found.append((clean.frames_BTF, valid_mean(*plain), clean.valid_BT))
        else:
            states = model.backbone(*clean)
            found.append((states, valid_mean(states, clean.valid_BT), clean.valid_BT))
    frames, means, valid = (torch.cat(part) for part in zip(*found, strict=True))
    return frames, means, valid


@torch.no_grad()
def error(model: TERA, given: Batch) -> tuple[float, float]:
    """L1 of the labelled cells of (the guesses, guesses of 0, the mean of each band)."""
    clean, altered, guess = model.guesses(given, 0)
    parts = guess, torch.zeros_like(guess)
    guessed, zeros = (hidden_absolute_error(part, clean.frames_BTF, altered.labelled_BTF) for part in parts)
    return float(guessed), float(zeros)


def measured(
    arm: str, rate: float, phone_l2: Iterable[float], speaker_l2: Iterable[float], seed: int, steps: int = STEPS
) -> dict[tuple[str, float], float]:
    """Per cent by what is read and the penalty of its probe; errors of the guesses with penalty 0."""
    training = speech("training", TRAINING, seed)
    model = trained(arm, rate, training, seed, steps)
    labelled = rows_of(training, torch.arange(LABELLED))
    frames, means, valid = encoded(arm, model, labelled)
    fit = partial(fit_linear_probe, max_iterations=60)
    phones = {l2: fit(frames[valid], labelled["phone"][valid], l2) for l2 in phone_l2}
    speakers = {l2: fit(means, labelled["label"], l2) for l2 in speaker_l2}
    part, found = "validation" if seed == SEARCH else "test", dict[tuple[str, float], float]()
    for name, noise_db in (("", CLEAN_DB), (" at 5 dB", NOISY_DB)):
        given = speech(part, TEST, seed, noise_db)
        frames, means, valid = encoded(arm, model, given)
        for l2, probe in phones.items():
            found[f"phones{name}", l2] = 100 * linear_accuracy(*probe, frames[valid], given["phone"][valid])
        for l2, probe in speakers.items():
            found[f"speakers{name}", l2] = 100 * linear_accuracy(*probe, means, given["label"])
    if arm in ARMS:
        found["L1", 0.0], found["L1 of means", 0.0] = error(model, speech(part, TEST, seed))
    return found


def captions(part: Recordings, count: int) -> Batch:
    """So many of a set, evenly spaced, without those that cannot be read."""
    samples = []
    for place in (torch.arange(min(count, len(part))) * len(part) // min(count, len(part))).tolist():
        with contextlib.suppress(Damaged):
            samples.append(part.sample(place, 0))
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def test_tera(evidence):
    runs = {
        arm: {seed: measured(arm, rate, [phone], [speaker], seed) for seed in SEEDS}
        for arm, (rate, phone, speaker) in CHOSEN.items()
    }
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for (name, _), value in found.items():
                evidence.figure(f"{name}, {arm}", value, seed, "" if name.startswith("L1") else "%")
    evidence.note(
        f"{STEPS} steps of {BATCH} utterances. Of rates {RATES} and penalties {PENALTIES}, chosen on seed {SEARCH} "
        f"(rate, phones, speakers): {CHOSEN}. Of log-mel, speakers are read from bands that are not normalised."
    )

    def gain(what: str, arm: str, over: str) -> dict[int, float]:
        _, phone, speaker = CHOSEN[arm]
        _, other_phone, other_speaker = CHOSEN[over]
        one, other = (phone, other_phone) if what.startswith("phones") else (speaker, other_speaker)
        return {seed: runs[arm][seed][what, one] - runs[over][seed][what, other] for seed in SEEDS}

    both, noisy = "time and frequency", "time, frequency and noise"
    for over in BASELINES:
        evidence.claim(f"phones, {both} minus {over}", gain("phones", both, over), at_least=5.0, unit="points")
    evidence.claim(
        f"phones at 5 dB, {noisy} minus {both}", gain("phones at 5 dB", noisy, both), at_least=1.0, unit="points"
    )
    for arm in ("frequency", both):
        evidence.claim(f"speakers, {arm} minus time", gain("speakers", arm, "time"), at_least=0.0, unit="points")


def test_captions(evidence):
    data = SpokenCaptions(seconds=CAPTION_SECONDS, level_db=-25.0)
    data.setup()
    training, test = captions(data.bank, CAPTIONS[0]), captions(data.test, CAPTIONS[1])
    for seed, arm in product(SEEDS, (*BASELINES, "time and frequency")):
        model = trained(arm, CHOSEN[arm][0], training, seed, CAPTION_STEPS)
        _, bank, _ = encoded(arm, model, training)
        _, query, _ = encoded(arm, model, test)
        languages = bank, training["label"], query, test["label"]
        evidence.figure(f"languages of captions, {arm}", 100 * linear_probe_accuracy(*languages, l2=10.0), seed, "%")
        known, asked = training["keyword"] < len(KEYWORDS), test["keyword"] < len(KEYWORDS)
        keywords = bank[known], training["keyword"][known], query[asked], test["keyword"][asked]
        evidence.figure(f"keywords of captions, {arm}", 100 * linear_probe_accuracy(*keywords, l2=10.0), seed, "%")
    common = test["keyword"][test["keyword"] < len(KEYWORDS)].bincount().max()
    share = 100 * float(common) / int((test["keyword"] < len(KEYWORDS)).sum())
    evidence.figure("share of the most frequent keyword among those of the test captions", share, unit="%")
    evidence.note(
        f"Captions: {CAPTIONS[0]} for training and {CAPTIONS[1]} for testing, up to {CAPTION_SECONDS} s of each, "
        f"{CAPTION_STEPS} steps of {BATCH}, penalty 10 for all; a few people speak each language."
    )


def searched() -> None:
    """Prints accuracies of every arm, rate and penalty on utterances of their own."""
    torch.set_num_threads(1)
    for arm, rate in [(arm, 0.0) for arm in BASELINES] + [*product(ARMS, RATES)]:
        found = measured(arm, rate, PENALTIES, PENALTIES, SEARCH)
        print(arm, rate, {f"{name} {l2:g}": round(value, 2) for (name, l2), value in found.items()}, flush=True)


if __name__ == "__main__":
    searched()
