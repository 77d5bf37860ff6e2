"""TERA (arXiv 2007.06028) on generated speech: phones and speakers read from frozen features with 5 % of the labels.

1,200 utterances of 1 to 2 s by 10 speakers, who say 20 phones by a grammar
(`lightspan.datamodules.rendered.speech`), 30 minutes in all, as 40 log-mel bands. A Transformer of 3 blocks and 96
channels rebuilds spectrograms altered in time, in frequency, in both, or in both with noise added in some steps, for
equal steps; nothing is fine-tuned. Linear probes are fitted on 60 of the utterances: of the phone on each frame, of the
speaker on the mean of an utterance's frames. 200 other utterances test, as they are (20 dB above white noise) and at
5 dB. The rate of each arm and the penalty of each probe are searched first, among the same for all, on seed 100.
"""

from functools import cache, partial
from itertools import product

import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightspan.analysis.linear_probe import linear_probe_accuracy
from lightspan.backbones.frames import FrameTransformer
from lightspan.datamodules.rendered.data import PARTS
from lightspan.datamodules.rendered.speech import SpeechSamples
from lightspan.methods.masked.tera import TERA
from lightspan.nn.audio.log_mel import LogMel
from lightspan.nn.masking.spectrogram_alterations import SpectrogramAlterations
from lightspan.nn.tokens import valid_mean
from lightspan.optim.schedules import WarmupLine

SEEDS, SEARCH = (0, 1, 2), 100
TRAINING, LABELLED, TEST = 1200, 60, 200
BATCH, STEPS, MELS = 16, 300, 40
RATES, PENALTIES = (1e-3, 3e-3), (1.0, 10.0, 100.0)
ARMS = {
    "time": SpectrogramAlterations(band=0.0),
    "frequency": SpectrogramAlterations(share=0.0),
    "time and frequency": SpectrogramAlterations(),
    "time, frequency and noise": SpectrogramAlterations(noise=0.15),
}
BASELINES = ("log-mel", "random weights")

Utterances = dict[str, Tensor]


@cache
def speech(part: str, count: int, seed: int, noise_db: float = 20.0) -> Utterances:
    """All utterances of a set as one batch."""
    samples = SpeechSamples(PARTS[part], count, seed, seconds=2.0, shortest=1.0, noise_db=noise_db)
    parts = [samples.batch(range(at, min(at + 50, count)), [0] * 50) for at in range(0, count, 50)]
    return {name: torch.cat([one[name] for one in parts]) for name in parts[0]}


def rows_of(given: Utterances, rows: Tensor) -> Utterances:
    return {name: field[rows] for name, field in given.items()}


def method(alterations: SpectrogramAlterations | None, rate: float) -> TERA:
    return TERA(
        FrameTransformer(MELS, width=96, depth=3, heads=4),
        LogMel(mels=MELS),
        alterations,
        optimizer=partial(torch.optim.AdamW, lr=rate),
        lr_scheduler=partial(WarmupLine, warmup=0.07),
    )


def trained(arm: str, rate: float, seed: int, steps: int = STEPS) -> TERA:
    """In evaluation mode; of a baseline, untrained."""
    seed_everything(seed, verbose=False)
    model, training = method(ARMS.get(arm), rate), speech("training", TRAINING, seed)
    if arm in ARMS:
        generator = torch.Generator().manual_seed(seed)
        chosen = [torch.randperm(TRAINING, generator=generator)[:BATCH] for _ in range(steps)]
        batches = DataLoader(chosen, batch_size=None, collate_fn=partial(rows_of, training))
        quiet_trainer(max_steps=steps, gradient_clip_val=5.0).fit(model, batches)
    return model.eval()


@torch.no_grad()
def frames(arm: str, model: TERA, given: Utterances) -> tuple[Tensor, Tensor, Tensor]:
    """(frames [B T D], means of utterances [B D], which frames are valid [B T])."""
    found = []
    for rows in torch.arange(len(given["index"])).split(50):
        of = rows_of(given, rows)
        clean = model.spectrogram(of)
        if arm == "log-mel":
            # With mean 0 of each band, the mean of an utterance would say nothing of its speaker.
            plain = LogMel(mels=MELS, normalise=False)(of["wave"], of["length"])
            found.append((clean.frames_BTF, valid_mean(*plain), clean.valid_BT))
        else:
            states = model.backbone(*clean)
            found.append((states, valid_mean(states, clean.valid_BT), clean.valid_BT))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def accuracies(
    arm: str, model: TERA, seed: int, penalties: dict[str, tuple[float, ...]]
) -> dict[str, dict[float, float]]:
    """Per cent, by what is read and the penalty of the probe."""
    labelled = rows_of(speech("training", TRAINING, seed), torch.arange(LABELLED))
    bank, part = frames(arm, model, labelled), "validation" if seed == SEARCH else "test"
    found: dict[str, dict[float, float]] = {}
    for name, noise_db in (("", 20.0), (" at 5 dB", 5.0)):
        given = speech(part, TEST, seed, noise_db)
        query = frames(arm, model, given)
        phones = bank[0][bank[2]], labelled["phone"][bank[2]], query[0][query[2]], given["phone"][query[2]]
        speakers = bank[1], labelled["label"], query[1], given["label"]
        for what, rows in ((f"phone{name}", phones), (f"speaker{name}", speakers)):
            found[what] = {l2: 100 * linear_probe_accuracy(*rows, l2=l2) for l2 in penalties[what.split()[0]]}
    return found


if __name__ == "__main__":
    import sys
    import time

    steps = int(sys.argv[1]) if sys.argv[1:] else STEPS
    torch.set_num_threads(1)
    both = {"phone": PENALTIES, "speaker": PENALTIES}
    for arm, rate in [(arm, 0.0) for arm in BASELINES] + [*product(ARMS, RATES)]:
        start = time.time()
        model = trained(arm, rate, SEARCH, steps)
        print(arm, rate, f"{time.time() - start:.0f} s", accuracies(arm, model, SEARCH, both), flush=True)
