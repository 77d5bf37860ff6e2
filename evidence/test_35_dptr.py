"""DPTR (arXiv 2408.05706) on printed words: a decoder pre-trained on strings, then a reader of 400 pictures.

A small CLIP of pictures and letters of words stands in for CLIP. Of its image encoder both readers start; they differ
in their decoder alone: not pre-trained, or pre-trained on strings, with noise from pictures of scenes. Both are
fine-tuned by equal steps, at a rate that is searched on words of the search seed's validation set, and judged by words
and pictures that no part has seen.

Words have up to four letters and readers 500 steps: with five letters, 200 pictures and 300 steps, in an earlier
record, every arm read a fifth of the letters and nothing could be told of their decoders. Arms without noise, and with
an untrained text encoder, are left out for their cost.

Floor: the letters that are right if every picture is read as the same word. Ceiling: a reader without pre-training,
with the labels of all pictures. Gates: letters of the pictures that a reader learns from, by that floor.
"""

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightspan.backbones.conv_patches import column_vit
from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.text import TextTransformer
from lightspan.backbones.tokenizers import Letters
from lightspan.datamodules.rendered.scene_data import RenderedScenes
from lightspan.datamodules.rendered.scenes import SceneSpace
from lightspan.datamodules.rendered.words import PrintedWords, font_files
from lightspan.methods.image_text.clip import CLIP
from lightspan.methods.image_text.dptr import DPTR
from lightspan.methods.supervised.word_reader import WordReader
from lightspan.nn.bank_noise import BankNoise
from lightspan.nn.decoders.letter_decoder import LetterDecoder
from lightspan.nn.heads.attention_pool import FeatureMerge
from lightspan.objectives.letters import reading_scores
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

SEEDS, SEARCH = (0, 1, 2), 100
HEIGHT, WIDTH_OF_PICTURE, COLUMN, LONGEST, WIDTH, HEADS = 20, 48, 4, 4, 64, 4
FONTS = font_files(None)[:2]
PICTURES, FEW, BANK, JUDGED, GRAIN = 4000, 400, 256, 400, 0.05
CLIP_STEPS, TEXT_STEPS, STEPS = 500, 500, 500
CLIP_BATCH, BATCH, FEW_BATCH = 128, 96, 50
RATE, RATES = 2e-3, (5e-4, 1e-3, 2e-3)
ARMS = ("no pre-training", "DPTR")


class Sets(NamedTuple):
    """Batches of whole sets, and `scenes`, [N 3 h w], the pictures that noise is made of."""

    training: dict[str, Any]
    validation: dict[str, Any]
    test: dict[str, Any]
    scenes: Tensor


def sets(seed: int) -> Sets:
    read = {"tokenizer": Letters(), "sentence": "{}", "length": LONGEST + 2}
    sizes = {"size": PICTURES, "val_size": JUDGED, "test_size": JUDGED, "draw_seed": seed}
    words = PrintedWords(HEIGHT, WIDTH_OF_PICTURE, LONGEST, [*FONTS], GRAIN, **read, **sizes)  # type: ignore[arg-type]
    scenes = RenderedScenes(SceneSpace(HEIGHT, WIDTH_OF_PICTURE), size=BANK, draw_seed=seed)
    words.setup()
    scenes.setup()
    return Sets(whole(words.train), whole(words.val), whole(words.test), whole(scenes.train)["image"])


def whole(samples: Any) -> dict[str, Any]:
    return samples.batch(range(len(samples)), [0] * len(samples))


def encoders() -> DualEncoder:
    image = column_vit((HEIGHT, WIDTH_OF_PICTURE), COLUMN, width=WIDTH, depth=2, heads=HEADS)
    return DualEncoder(image, TextTransformer(Letters().vocab_size, WIDTH, 2, HEADS, LONGEST + 2), WIDTH)


def first_decoder(seed: int) -> LetterDecoder:
    seed_everything(seed + 1, verbose=False)
    return LetterDecoder(26, LONGEST, WIDTH, depth=1, heads=HEADS)


def optimisation(rate: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)) -> dict[str, Any]:
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=weight_decay, betas=betas),
        "lr_scheduler": partial(WarmupCosine, warmup=0.1, final=0.0),
    }


def trained(method: Method, given: dict[str, Any], rows: int, size: int, steps: int, seed: int) -> None:
    """On the first `rows` of a set; ends in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(rows, generator=generator)[:size] for _ in range(steps)]

    def batch(step: int) -> dict[str, Any]:
        return {name: field[chosen[step]] for name, field in given.items()}

    loader: DataLoader = DataLoader([*range(steps)], batch_size=None, collate_fn=batch)  # type: ignore[arg-type]
    method.train()  # all alike: a decoder that was pre-trained comes in evaluation mode, without dropout
    quiet_trainer(max_steps=steps, gradient_clip_val=20.0).fit(method, loader)
    method.eval()


def contrasted(given: Sets, seed: int) -> DualEncoder:
    """The stand-in for CLIP."""
    seed_everything(seed, verbose=False)
    method = CLIP(encoders(), **optimisation(RATE, 0.1, (0.9, 0.98)))
    trained(method, given.training, PICTURES, CLIP_BATCH, CLIP_STEPS, seed)
    return method.encoders


def starts_of(pair: DualEncoder, given: Sets, seed: int) -> dict[str, LetterDecoder]:
    """The decoder with which the reader of each arm starts."""
    with torch.no_grad():
        bank = pair.image.tokens(given.scenes)  # type: ignore[operator]
    method = DPTR(copy.deepcopy(pair), first_decoder(seed), BankNoise(bank), **optimisation(RATE))
    trained(method, given.training, PICTURES, BATCH, TEXT_STEPS, seed)
    return {ARMS[0]: first_decoder(seed), ARMS[1]: method.decoder}


def reader(
    pair: DualEncoder, start: LetterDecoder, given: Sets, seed: int, rate: float, pictures: int = FEW
) -> WordReader:
    seed_everything(seed + 2, verbose=False)
    merge = FeatureMerge(WIDTH, LONGEST + 1, HEADS, dropout=0.0)
    method = WordReader(copy.deepcopy(pair.image), copy.deepcopy(start), merge, **optimisation(rate))
    trained(method, given.training, pictures, FEW_BATCH, STEPS, seed)
    return method


@torch.no_grad()
def letters_right(method: WordReader, given: dict[str, Any]) -> float:
    """In per cent."""
    found = torch.cat([method(part) for part in given["image"].split(200)])
    return 100 * float(reading_scores(found, given["characters"])["letter_accuracy"])


def best_constant(given: dict[str, Any]) -> float:
    """Letters that are right if each place is read as its most frequent letter, in per cent of all letters."""
    characters_BT = given["characters"]
    right = sum(int(column[column > 0].bincount().max()) for column in characters_BT.unbind(1) if column.any())
    return 100 * right / int((characters_BT > 0).sum())


def test_dptr(evidence):
    searched = sets(SEARCH)
    pair = contrasted(searched, SEARCH)
    starts = starts_of(pair, searched, SEARCH)

    def validated(arm: str, rate: float) -> float:
        return letters_right(reader(pair, starts[arm], searched, SEARCH, rate), searched.validation)

    rates = evidence.search({arm: partial(validated, arm) for arm in ARMS}, RATES)
    right: dict[str, dict[int, float]] = {arm: {} for arm in (*ARMS, "all labels", "constant")}
    learned: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    for seed in SEEDS:
        given = sets(seed)
        few = {name: field[:FEW] for name, field in given.training.items()}
        pair = contrasted(given, seed)
        starts = starts_of(pair, given, seed)
        for arm in ARMS:
            method = reader(pair, starts[arm], given, seed, rates[arm])
            right[arm][seed], learned[arm][seed] = letters_right(method, given.test), letters_right(method, few)
        oracle = reader(pair, starts[ARMS[0]], given, seed, rates[ARMS[0]], PICTURES)
        right["all labels"][seed] = letters_right(oracle, given.test)
        right["constant"][seed] = best_constant(given.test)
    for arm, of_seed in right.items():
        for seed, value in of_seed.items():
            evidence.figure(f"letters right, {arm}", value, seed, "%")
    for arm in ARMS:
        evidence.gate(arm, learned[arm], right["constant"], by=30.0, unit="points")
    evidence.note(
        f"Words of 2 to {LONGEST} letters in {len(FONTS)} fonts. {CLIP_STEPS} steps of {CLIP_BATCH} pairs for the "
        f"stand-in of CLIP, {TEXT_STEPS} of {BATCH} strings, {STEPS} of {FEW_BATCH} out of {FEW} pictures; {JUDGED} "
        "pictures to judge."
    )

    def gain(arm: str) -> dict[int, float]:
        return {seed: right[arm][seed] - right[ARMS[0]][seed] for seed in SEEDS}

    evidence.claim(
        "letters right, DPTR minus no pre-training",
        gain("DPTR"),
        at_least=8.0,
        unit="points",
        floor=gain("constant"),
        ceiling=gain("all labels"),
        arms=ARMS,
    )
