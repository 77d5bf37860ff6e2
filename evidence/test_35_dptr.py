"""DPTR (arXiv 2408.05706) on printed words: a decoder pre-trained on strings, then a reader of 200 pictures.

A small CLIP of pictures and letters of words stands in for CLIP. Of its image encoder every reader starts; arms differ
in their decoder alone: not pre-trained, pre-trained on strings without noise, with noise from pictures of scenes, and
with noise on what an untrained text encoder says. All are fine-tuned by equal steps, each at the rate that was best of
the same two in half of the steps, for words of the validation set on seed 100. They are judged by words and pictures
that no part has seen, as clean as those of training, and with more grain.
"""

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning import seed_everything
from quiet import quiet_trainer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import DataLoader

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.text import TextTransformer
from lightspan.backbones.tokenizers import Letters
from lightspan.backbones.vit import TokenViT
from lightspan.datamodules.rendered.scene_data import RenderedScenes
from lightspan.datamodules.rendered.scenes import SceneSpace
from lightspan.datamodules.rendered.words import PrintedWords
from lightspan.method import Method
from lightspan.methods.image_text.clip import CLIP
from lightspan.methods.image_text.dptr import DPTR
from lightspan.methods.supervised.word_reader import WordReader
from lightspan.nn.bank_noise import BankNoise
from lightspan.nn.decoders.letter_decoder import LetterDecoder
from lightspan.nn.heads.attention_pool import FeatureMerge
from lightspan.objectives.letters import reading_scores
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH_SEED = (0, 1, 2), 100
HEIGHT, WIDTH_OF_PICTURE, LONGEST, WIDTH, HEADS = 32, 96, 10, 64, 4
PICTURES, FEW, BANK, JUDGED = 4000, 200, 256, 400
CLIP_STEPS, TEXT_STEPS, STEPS, SEARCH_STEPS = 300, 250, 120, 60
BATCH, FEW_BATCH = 96, 50
RATE, RATES = 2e-3, (1e-3, 3e-3)
GRAIN, MORE_GRAIN = 0.05, 0.2
ARMS = ("no pre-training", "text", "text and noise", "untrained text encoder")


class Sets(NamedTuple):
    """Batches of whole sets, and tokens of natural pictures' stand-ins are made from `scenes`, [N 3 h w]."""

    training: dict[str, Any]
    validation: dict[str, Any]
    test: dict[str, Any]
    noisy: dict[str, Any]
    scenes: Tensor


def sets(seed: int) -> Sets:
    def made(grain: float) -> PrintedWords:
        read = {"tokenizer": Letters(), "sentence": "{}", "length": LONGEST + 2}
        sizes = {"size": PICTURES, "val_size": JUDGED, "test_size": JUDGED, "draw_seed": seed}
        data = PrintedWords(HEIGHT, WIDTH_OF_PICTURE, LONGEST, grain=grain, **read, **sizes)  # type: ignore[arg-type]
        data.setup()
        return data

    clean, grainy = made(GRAIN), made(MORE_GRAIN)
    scenes = RenderedScenes(SceneSpace(HEIGHT, WIDTH_OF_PICTURE), size=BANK, draw_seed=seed)
    scenes.setup()
    return Sets(
        *(whole(one) for one in (clean.train, clean.val, clean.test, grainy.test)), whole(scenes.train)["image"]
    )


def whole(samples: Any) -> dict[str, Any]:
    return samples.batch(range(len(samples)), [0] * len(samples))


def encoders() -> DualEncoder:
    network = VisionTransformer(
        (HEIGHT, WIDTH_OF_PICTURE), 8, num_classes=0, global_pool="avg", embed_dim=WIDTH, depth=4, num_heads=HEADS,
        class_token=False, fc_norm=False,
    )  # fmt: skip
    return DualEncoder(
        TokenViT(network, sincos=True), TextTransformer(Letters().vocab_size, WIDTH, 2, HEADS, LONGEST + 2), WIDTH
    )


def decoder() -> LetterDecoder:
    return LetterDecoder(26, LONGEST, WIDTH, depth=1, heads=HEADS)


def optimisation(rate: float, weight_decay: float = 0.0) -> dict[str, Any]:
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=weight_decay),
        "lr_scheduler": partial(WarmupCosine, warmup=0.1, final=0.0),
    }


def trained(method: Method, given: dict[str, Any], rows: int, size: int, steps: int, seed: int) -> None:
    """On the first `rows` of a set; ends in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(rows, generator=generator)[:size] for _ in range(steps)]

    def batch(step: int) -> dict[str, Any]:
        return {name: field[chosen[step]] for name, field in given.items()}

    loader: DataLoader = DataLoader([*range(steps)], batch_size=None, collate_fn=batch)  # type: ignore[arg-type]
    quiet_trainer(max_steps=steps, gradient_clip_val=20.0).fit(method, loader)
    method.eval()


def contrasted(given: Sets, seed: int) -> DualEncoder:
    """The stand-in for CLIP."""
    seed_everything(seed, verbose=False)
    method = CLIP(encoders(), **optimisation(RATE, 0.1))
    trained(method, given.training, PICTURES, BATCH, CLIP_STEPS, seed)
    return method.encoders


@torch.no_grad()
def decoders(pair: DualEncoder, given: Sets, seed: int) -> dict[str, LetterDecoder]:
    """Of each arm, from one start."""
    seed_everything(seed + 1, verbose=False)
    start, untrained = decoder(), encoders()
    bank = pair.image.tokens(given.scenes)  # type: ignore[operator]
    teachers = {"text": (pair, None), "text and noise": (pair, BankNoise(bank))}
    teachers["untrained text encoder"] = (untrained, BankNoise(bank))
    found = {"no pre-training": start}
    for arm, (teacher, noise) in teachers.items():
        method = DPTR(copy.deepcopy(teacher), copy.deepcopy(start), noise, **optimisation(RATE))
        with torch.enable_grad():
            trained(method, given.training, PICTURES, BATCH, TEXT_STEPS, seed)
        found[arm] = method.decoder
    return found


def reader(
    pair: DualEncoder, start: LetterDecoder, given: Sets, seed: int, rate: float, steps: int = STEPS
) -> WordReader:
    seed_everything(seed + 2, verbose=False)
    merge = FeatureMerge(WIDTH, LONGEST + 1, HEADS)
    method = WordReader(copy.deepcopy(pair.image), copy.deepcopy(start), merge, **optimisation(rate))
    trained(method, given.training, FEW, FEW_BATCH, steps, seed)
    return method


@torch.no_grad()
def letters_right(method: WordReader, given: dict[str, Any]) -> float:
    """In per cent."""
    found = torch.cat([method(part) for part in given["image"].split(200)])
    return 100 * float(reading_scores(found, given["characters"])["letter_accuracy"])


def test_dptr(evidence):
    searched = sets(SEARCH_SEED)
    pair = contrasted(searched, SEARCH_SEED)
    starts = decoders(pair, searched, SEARCH_SEED)

    def score(arm: str, rate: float) -> float:
        return letters_right(reader(pair, starts[arm], searched, SEARCH_SEED, rate, SEARCH_STEPS), searched.validation)

    chosen = {arm: max(RATES, key=partial(score, arm)) for arm in ARMS}
    clean: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    noisy: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    for seed in SEEDS:
        given = sets(seed)
        pair = contrasted(given, seed)
        starts = decoders(pair, given, seed)
        for arm in ARMS:
            method = reader(pair, starts[arm], given, seed, chosen[arm])
            clean[arm][seed], noisy[arm][seed] = (letters_right(method, each) for each in (given.test, given.noisy))
    for arm in ARMS:
        for seed in SEEDS:
            evidence.figure(f"letters right, {arm}", clean[arm][seed], seed, "%")
            evidence.figure(f"letters right with more grain, {arm}", noisy[arm][seed], seed, "%")
    evidence.note(
        f"{CLIP_STEPS} steps of {BATCH} pairs for the stand-in of CLIP, {TEXT_STEPS} of {BATCH} strings, {STEPS} of "
        f"{FEW_BATCH} out of {FEW} pictures; {JUDGED} pictures to judge. Rates of {RATES} chosen in {SEARCH_STEPS} "
        f"steps on seed {SEARCH_SEED}",
        chosen,
    )

    def gain(of: dict[str, dict[int, float]], arm: str, over: str) -> dict[int, float]:
        return {seed: of[arm][seed] - of[over][seed] for seed in SEEDS}

    best = "text and noise"
    evidence.claim("letters right, DPTR minus no pre-training", gain(clean, best, ARMS[0]), at_least=8.0, unit="points")
    evidence.claim(
        "letters right with more grain, DPTR minus without noise",
        gain(noisy, best, "text"),
        at_least=0.0,
        unit="points",
    )
    evidence.claim(
        "letters right, DPTR minus with an untrained text encoder",
        gain(clean, best, ARMS[3]),
        at_least=4.0,
        unit="points",
    )
