"""PRE (arXiv 2309.07760) against CoOp and the written sentence, on few scenes of a domain that their CLIP has not seen.

A small CLIP is trained on drawn scenes for each seed. Prompts then learn from eight scenes of each of 36 things on a
lighter ground, and are tested on all 72. Both arms have the same steps, start and rates to choose from, by
their harmonic mean over three other seeds and scenes of a stream of their own: `python evidence/test_29_pre.py` repeats
that search.
"""

import time
from functools import partial

import numpy as np
import torch
from image_text import WORDS, Pairs, clip, image_rows, pairs, quiet, train

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.datamodules.image_text.scenes import THINGS, draw, factors
from lightspan.evaluation.probes.zero_shot import class_rows
from lightspan.methods.image_text.pre import PRE
from lightspan.nn.sequences.token_lstm import TokenLSTM

SEEDS = (0, 1, 2, 3, 4)
SEARCHED = (100, 101, 102)
RATES = (2e-3, 2e-2, 2e-1, 2.0)
CLIP_STEPS, STEPS, SHOTS = 560, 450, 8
PHRASE = "a photo of a"
ALL = np.arange(len(THINGS))
BASE = ALL[factors(ALL).sum(axis=1) % 2 == 0]
CHOSEN = {"PRE": 2e-1, "CoOp": 2e-1}


def scenes(seed: int, stream: int, things: np.ndarray, count: int, share: float = 0.0, shifted: bool = True) -> Pairs:
    generator = np.random.default_rng((seed, stream))
    first = things[np.arange(count) % len(things)]
    second = np.where(generator.random(count) < share, generator.choice(things, count), -1)
    images, captions = draw(first, second, 0.03, (0.2, 0.5) if shifted else (0.0, 0.35), generator)
    return pairs(images, captions, first)


def encoders(seed: int, steps: int = CLIP_STEPS) -> DualEncoder:
    model = clip(seed, 2e-3)
    train(model, scenes(seed, 0, ALL, 7200, 0.5, shifted=False), seed, steps)
    return model.encoders


def accuracies(rows_CD: torch.Tensor, image_ND: torch.Tensor, labels_N: torch.Tensor) -> dict[str, float]:
    """Base and new things, each among themselves, in per cent."""
    is_base_C = torch.isin(torch.from_numpy(ALL), torch.from_numpy(BASE))
    own_NC = is_base_C[labels_N][:, None] == is_base_C
    right_N = (image_ND @ rows_CD.T).masked_fill(~own_NC, -torch.inf).argmax(dim=1) == labels_N
    base, new = (100 * right_N[is_base_C[labels_N] == part].float().mean().item() for part in (True, False))
    return {"base": base, "new": new, "harmonic": 2 * base * new / max(base + new, 1e-9)}


def learned(
    name: str, frozen: DualEncoder, seed: int, rate: float, stream: int = 2, steps: int = STEPS
) -> dict[str, float]:
    torch.manual_seed(seed)
    encoder = TokenLSTM(64) if name == "PRE" else None
    optimizer = partial(torch.optim.SGD, lr=rate, momentum=0.9)
    model = quiet(PRE(frozen, encoder, phrase=PHRASE, base_classes=BASE.tolist(), optimizer=optimizer))
    model.name_classes(WORDS, THINGS)
    start = time.perf_counter()
    train(model, scenes(seed, 1, BASE, SHOTS * len(BASE)), seed, steps, size=32)
    seconds = time.perf_counter() - start
    test = scenes(seed, stream, ALL, 1440)
    with torch.no_grad():
        return accuracies(model.class_rows(), image_rows(frozen, test), test.labels) | {"seconds": seconds}


def written(frozen: DualEncoder, seed: int) -> dict[str, float]:
    test = scenes(seed, 2, ALL, 1440)
    with torch.no_grad():
        rows = class_rows(WORDS, frozen.encode_text, THINGS, [PHRASE + " {}"])
    return accuracies(rows, image_rows(frozen, test), test.labels)


def test_pre(evidence):
    runs: dict[str, dict[int, dict[str, float]]] = {"PRE": {}, "CoOp": {}, PHRASE: {}}
    for seed in SEEDS:
        frozen = encoders(seed)
        for name, rate in CHOSEN.items():
            runs[name][seed] = learned(name, frozen, seed, rate)
        runs[PHRASE][seed] = written(frozen, seed)
    for name, of_seed in runs.items():
        for seed, found in of_seed.items():
            for part in ("base", "new", "harmonic"):
                evidence.figure(f"{part}, {name}", found[part], seed=seed, unit="%")

    def gain(part: str, over: str) -> dict[int, float]:
        return {seed: runs["PRE"][seed][part] - runs[over][seed][part] for seed in SEEDS}

    evidence.note(
        f"{CLIP_STEPS} steps of CLIP on dark scenes, then {STEPS} steps of 32 of {SHOTS} scenes of each of {len(BASE)} "
        f"base things on a lighter ground; four tokens that begin as {PHRASE!r}. Rates of {RATES} "
        f"chosen on seeds {SEARCHED}",
        CHOSEN,
    )
    evidence.claim("new things, PRE minus CoOp", gain("new", "CoOp"), at_least=2.0, unit="points")
    evidence.claim("base things, PRE minus CoOp", gain("base", "CoOp"), at_least=-1.0, unit="points")
    evidence.claim("harmonic mean, PRE minus CoOp", gain("harmonic", "CoOp"), at_least=0.0, unit="points")
    evidence.claim(
        "harmonic mean, PRE minus the written sentence", gain("harmonic", PHRASE), at_least=0.0, unit="points"
    )
    slower = {seed: runs["PRE"][seed]["seconds"] / runs["CoOp"][seed]["seconds"] for seed in SEEDS}
    evidence.claim("training time, PRE over CoOp", slower, at_most=1.2)


if __name__ == "__main__":
    clips = {seed: encoders(seed) for seed in SEARCHED}
    for name in CHOSEN:
        for rate in RATES:
            found = [learned(name, clips[seed], seed, rate, stream=3)["harmonic"] for seed in SEARCHED]
            print(name, rate, np.round(found, 1), round(float(np.mean(found)), 2), flush=True)
