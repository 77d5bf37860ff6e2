"""DPTR (arXiv 2408.05706) on printed words: a decoder pre-trained on strings, then a reader of 200 pictures.

A small CLIP of pictures and letters of words stands in for CLIP. Of its image encoder every reader starts; arms differ
in their decoder alone: not pre-trained, pre-trained on strings without noise, with noise from pictures of scenes, and
with noise on what an untrained text encoder says. All are fine-tuned by equal steps, each at the rate that was best of
the same two in half of the steps, for words of the validation set on seed 100. They are judged by words and pictures
that no part has seen, as clean as those of training, and with more grain.

Sizes, words and steps are such that each part learns. On new words of seed 100's validation set the stand-in found 92 %
of words among 199, a decoder spelled 85 % of letters from its text encoder, and a reader without pre-training had 15 %
of letters right, where the best reading that is the same for all pictures has 7 %.
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

SEEDS, SEARCH_SEED = (0, 1, 2), 100
HEIGHT, WIDTH_OF_PICTURE, COLUMN, LONGEST, WIDTH, HEADS = 20, 64, 4, 5, 64, 4
FONTS = font_files(None)[:2]
PICTURES, FEW, BANK, JUDGED = 8000, 200, 256, 400
CLIP_STEPS, TEXT_STEPS, STEPS, SEARCH_STEPS = 1000, 300, 300, 150
CLIP_BATCH, BATCH, FEW_BATCH = 128, 96, 50
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
        data = PrintedWords(HEIGHT, WIDTH_OF_PICTURE, LONGEST, [*FONTS], grain, **read, **sizes)  # type: ignore[arg-type]
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


@torch.no_grad()
def pretrained(pair: DualEncoder, given: Sets, seed: int) -> dict[str, DPTR]:
    """Of each arm with pre-training, from one start of decoders."""
    start, untrained = first_decoder(seed), encoders().eval()
    bank = pair.image.tokens(given.scenes)  # type: ignore[operator]
    teachers = {"text": (pair, None), "text and noise": (pair, BankNoise(bank))}
    teachers["untrained text encoder"] = (untrained, BankNoise(bank))
    found = {}
    for arm, (teacher, noise) in teachers.items():
        found[arm] = DPTR(copy.deepcopy(teacher), copy.deepcopy(start), noise, **optimisation(RATE))
        with torch.enable_grad():
            trained(found[arm], given.training, PICTURES, BATCH, TEXT_STEPS, seed)
    return found


def starts_of(methods: dict[str, DPTR], seed: int) -> dict[str, LetterDecoder]:
    """Decoders with which readers start."""
    return {ARMS[0]: first_decoder(seed)} | {arm: method.decoder for arm, method in methods.items()}


def reader(
    pair: DualEncoder, start: LetterDecoder, given: Sets, seed: int, rate: float, steps: int = STEPS
) -> WordReader:
    seed_everything(seed + 2, verbose=False)
    merge = FeatureMerge(WIDTH, LONGEST + 1, HEADS, dropout=0.0)
    method = WordReader(copy.deepcopy(pair.image), copy.deepcopy(start), merge, **optimisation(rate))
    trained(method, given.training, FEW, FEW_BATCH, steps, seed)
    return method


@torch.no_grad()
def letters_right(method: WordReader, given: dict[str, Any]) -> float:
    """In per cent."""
    found = torch.cat([method(part) for part in given["image"].split(200)])
    return 100 * float(reading_scores(found, given["characters"])["letter_accuracy"])


@torch.no_grad()
def retrieval(pair: DualEncoder, given: dict[str, Any]) -> tuple[float, float]:
    """Per cent of pictures whose own word is the nearest of all words of a set, one picture each, and chance's."""
    first = {tuple(word): row for row, word in reversed([*enumerate(given["characters"].tolist())])}
    rows = torch.tensor(sorted(first.values()))
    image, text = pair.encode_image(given["image"][rows]), pair.encode_text(given["tokens"][rows], given["mask"][rows])
    return 100 * float(((image @ text.T).argmax(dim=1) == torch.arange(len(rows))).float().mean()), 100 / len(rows)


@torch.no_grad()
def strings_right(method: DPTR, given: dict[str, Any]) -> float:
    """Per cent of letters that a decoder spells from its text encoder."""
    found = method.decoder.read(method.memory(given["tokens"], given["mask"]))
    return 100 * float(reading_scores(found, given["characters"])["letter_accuracy"])


def test_dptr(evidence):
    searched = sets(SEARCH_SEED)
    pair = contrasted(searched, SEARCH_SEED)
    starts = starts_of(pretrained(pair, searched, SEARCH_SEED), SEARCH_SEED)

    def score(arm: str, rate: float) -> float:
        return letters_right(reader(pair, starts[arm], searched, SEARCH_SEED, rate, SEARCH_STEPS), searched.validation)

    chosen = {arm: max(RATES, key=partial(score, arm)) for arm in ARMS}
    clean: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    noisy: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    for seed in SEEDS:
        given = sets(seed)
        pair = contrasted(given, seed)
        methods = pretrained(pair, given, seed)
        found, chance = retrieval(pair, given.test)
        evidence.figure("new words found by the stand-in for CLIP", found, seed, "%")
        evidence.figure("new words found by chance", chance, seed, "%")
        for arm, each in methods.items():
            evidence.figure(f"letters of new strings right, decoder, {arm}", strings_right(each, given.test), seed, "%")
        starts = starts_of(methods, seed)
        for arm in ARMS:
            method = reader(pair, starts[arm], given, seed, chosen[arm])
            clean[arm][seed], noisy[arm][seed] = (letters_right(method, each) for each in (given.test, given.noisy))
    for arm in ARMS:
        for seed in SEEDS:
            evidence.figure(f"letters right, {arm}", clean[arm][seed], seed, "%")
            evidence.figure(f"letters right with more grain, {arm}", noisy[arm][seed], seed, "%")
    evidence.note(
        f"Words of 2 to {LONGEST} letters in {len(FONTS)} fonts. {CLIP_STEPS} steps of {CLIP_BATCH} pairs for the "
        f"stand-in of CLIP, {TEXT_STEPS} of {BATCH} strings, {STEPS} of {FEW_BATCH} out of {FEW} pictures; {JUDGED} "
        f"pictures to judge. Rates of {RATES} chosen in {SEARCH_STEPS} steps on seed {SEARCH_SEED}",
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
