"""CLIP (arXiv 2103.00020) on drawn scenes, with things that no training scene shows, on stamps, and on digits.

Zero-shot accuracy is among 14 of the 72 things, which are in no training scene; retrieval among 128 scenes of two seen
things; stamps find their caption among those of all new stamps, where stamps of one caption share a hit; digits are
told by number words. Rates are searched on seed 100, on other scenes and on training stamps and digits that are held
out, by the zero-shot accuracy on unseen things, by retrieval, and by the accuracy.

Floors: the same scenes with the captions of others; chance for stamps and digits. Ceilings: scenes of all things; the
true captions in place of pictures; training on the new stamps too; the label of the digit whose pixels are nearest.
Floors and ceilings that are trained are of one seed. Gates: 128 training pairs find each other; training digits.
"""

from functools import cache

import numpy as np
import torch
from image_text import LENGTH, WORDS, Pairs, clip, image_rows, pairs, text_rows, train
from sklearn.datasets import load_digits
from torch import Tensor

from lightspan.datamodules.image.sets.small import evenly
from lightspan.datamodules.image_text.scenes import THINGS, draw, unseen_things
from lightspan.datamodules.image_text.stamps import Stamps
from lightspan.evaluation.probes.zero_shot import class_rows, retrieval_at_1, zero_shot_accuracy
from lightspan.methods.image_text.clip import CLIP

NEEDS = ("/usr/share/tuxpaint/stamps",)
SEEDS, SEARCH = (0, 1, 2), 100
RATES = (1e-3, 4e-3, 1.6e-2)
STEPS = {"scenes": 200, "stamps": 120, "digits": 100}
TEMPLATES = ("a {}", "there is a {}", "a photo of a {}")
ALL, UNSEEN = np.arange(len(THINGS)), unseen_things(0.2)
SEEN = np.setdiff1d(ALL, UNSEEN)
AMONG = 128
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def scenes(seed: int, stream: int, things: np.ndarray, count: int, share: float, shuffled: bool = False) -> Pairs:
    """Scenes whose first thing takes turns; a share of them have a second one."""
    generator = np.random.default_rng((seed, stream))
    first = things[np.arange(count) % len(things)]
    second = np.where(generator.random(count) < share, generator.choice(things, count), -1)
    images, captions = draw(first, second, 0.03, (0.0, 0.35), generator)
    if shuffled:
        captions = [captions[i] for i in generator.permutation(count)]
    return pairs(images, captions, first)


def zero_shot(model: CLIP, given: Pairs, templates: tuple[str, ...] = TEMPLATES, among: np.ndarray = UNSEEN) -> float:
    """In per cent, among these things."""
    with torch.no_grad():
        classes = class_rows(WORDS, model.encoders.encode_text, THINGS, templates)
    return 100 * zero_shot_accuracy(image_rows(model.encoders, given), classes, given.labels, torch.from_numpy(among))


def found(model: CLIP, given: Pairs) -> float:
    """Pictures that find their caption, in per cent."""
    return 100 * retrieval_at_1(image_rows(model.encoders, given), text_rows(model.encoders, given))


def some(given: Pairs, rows: Tensor) -> Pairs:
    return Pairs(*(x[rows] for x in given))


def on_scenes(
    rate: float, seed: int, stream: int = 1, things: np.ndarray = SEEN, shuffled: bool = False
) -> dict[str, float]:
    model, training = clip(seed, rate), scenes(seed, 0, things, 7200, 0.5, shuffled)
    train(model, training, seed, STEPS["scenes"])
    test, several = scenes(seed, stream, UNSEEN, 1400, 0.0), scenes(seed, stream + 10, SEEN, AMONG, 1.0)
    captions = text_rows(model.encoders, several)
    return {
        "unseen": zero_shot(model, test),
        "all": zero_shot(model, test, among=ALL),
        "one template": float(np.mean([zero_shot(model, test, (template,)) for template in TEMPLATES])),
        "retrieval": found(model, several),
        "true captions": 100 * retrieval_at_1(captions, captions),
        "learned": found(model, some(training, torch.arange(AMONG))),
    }


@cache
def stamps() -> tuple[Pairs, Pairs]:
    """Those of training, and new ones."""
    data = Stamps(tokenizer=WORDS, length=LENGTH)
    data.setup()
    read = []
    for part in (data.bank, data.test):
        images, *others = (
            torch.from_numpy(x) for x in (part.images.data.images, part.tokens, part.mask, part.images.data.labels)
        )
        read.append(Pairs((images.float() / 255 - 0.5) / 0.5, *others))
    return read[0], read[1]


def on_stamps(rate: float, seed: int, told: bool = False) -> dict[str, float]:
    """Trained on the new ones as well, if told."""
    training, test = stamps()
    if seed == SEARCH:
        held = torch.arange(len(training.labels)) % 5 == 0
        training, test = some(training, ~held), some(training, held)
    model = clip(seed, rate)
    given = Pairs(*(torch.cat(both) for both in zip(training, test, strict=True))) if told else training
    train(model, given, seed, STEPS["stamps"])
    return {
        "over chance": found(model, test) * len(test.labels) / 100,
        "learned": found(model, some(training, torch.randperm(len(training.labels))[:AMONG])),
    }


def on_digits(rate: float, seed: int) -> dict[str, float]:
    digits = load_digits()
    images, labels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None], digits.target.astype(np.int64)
    is_test = np.isin(np.arange(len(labels)), evenly(labels, 360))
    if seed == SEARCH:
        images, labels = images[~is_test], labels[~is_test]
        is_test = np.isin(np.arange(len(labels)), evenly(labels, 360))
    generator = np.random.default_rng(seed)
    said = [TEMPLATES[generator.integers(3)].format(NUMBERS[label]) for label in labels]
    given = pairs(images, said, labels)
    training, test = (some(given, torch.from_numpy(rows)) for rows in (~is_test, is_test))
    model = clip(seed, rate, channels=1, stages=3)
    train(model, training, seed, STEPS["digits"])
    with torch.no_grad():
        classes = class_rows(WORDS, model.encoders.encode_text, NUMBERS, TEMPLATES)
    nearest_N = torch.cdist(test.images.flatten(1), training.images.flatten(1)).argmin(dim=1)
    return {
        "accuracy": 100 * zero_shot_accuracy(image_rows(model.encoders, test), classes, test.labels),
        "nearest": 100 * float((training.labels[nearest_N] == test.labels).float().mean()),
        "learned": 100 * zero_shot_accuracy(image_rows(model.encoders, training), classes, training.labels),
    }


def test_clip(evidence) -> None:
    rates = evidence.search(
        {
            "scenes": lambda rate: on_scenes(rate, SEARCH, stream=2)["unseen"],
            "stamps": lambda rate: on_stamps(rate, SEARCH)["over chance"],
            "digits": lambda rate: on_digits(rate, SEARCH)["accuracy"],
        },
        RATES,
        seed=SEARCH,
    )
    makers = {"scenes": on_scenes, "stamps": on_stamps, "digits": on_digits}
    runs = {arm: {seed: make(rates[arm], seed) for seed in SEEDS} for arm, make in makers.items()}
    for arm, chance in (("scenes", 100 / AMONG), ("stamps", 100 / AMONG), ("digits", 10.0)):
        learned = {seed: one["learned"] for seed, one in runs[arm].items()}
        evidence.gate(arm, learned, chance, by=20.0, unit="points")
    others = on_scenes(rates["scenes"], SEEDS[0], shuffled=True)
    all_things = on_scenes(rates["scenes"], SEEDS[0], things=ALL)
    told = on_stamps(rates["stamps"], SEEDS[0], told=True)
    chance = 100 / len(UNSEEN)
    for seed, one in runs["scenes"].items():
        evidence.figure("zero-shot among all 72 things, unseen ones shown", one["all"], seed=seed, unit="%")
        evidence.figure("three templates minus one", one["unseen"] - one["one template"], seed=seed, unit="points")
    evidence.figure("zero-shot, captions of other scenes, over chance", others["unseen"] / chance, SEEDS[0])
    evidence.note(f"{STEPS} steps of 128 pairs; chance among unseen things is {chance:.1f} %.")

    def claim(
        name: str, arm: str, what: str, at_least: float, floor: float, ceiling: float | str, unit: str = "%"
    ) -> None:
        """The ceiling is a number, or the name of another figure of the same runs."""
        of = runs[arm]
        evidence.claim(
            name, {seed: one[what] for seed, one in of.items()}, at_least=at_least, unit=unit, floor=floor,
            ceiling={seed: one[ceiling] for seed, one in of.items()} if isinstance(ceiling, str) else ceiling,
            arms=(arm,),
        )  # fmt: skip

    least, told_all = max(60.0, 5 * chance), all_things["unseen"]
    claim("zero-shot on unseen things", "scenes", "unseen", least, others["unseen"], told_all)
    claim("captions found among 128", "scenes", "retrieval", 50.0, others["retrieval"], "true captions")
    claim("captions of new stamps found, over chance", "stamps", "over chance", 5.0, 1.0, told["over chance"], "")
    claim("zero-shot on digits by number words", "digits", "accuracy", 90.0, 10.0, "nearest")


if __name__ == "__main__":
    for one in RATES:
        print(one, on_scenes(one, SEARCH, stream=2), on_stamps(one, SEARCH), on_digits(one, SEARCH), flush=True)
    print(on_scenes(RATES[-1], SEARCH, stream=2, things=ALL), on_stamps(RATES[-1], SEARCH, told=True))
