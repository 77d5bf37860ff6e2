"""SoftCon (arXiv 2405.20462) on rendered land: soft contrast by tags against hard contrast alone, and random weights.

Scenes of 24 x 24 pixels, six bands and nine materials, of which a scene has one to five; views are crops of two of its
four seasons. A vision transformer of four blocks and 64 channels, in patches of 6. Hard contrast is SoftCon with a soft
weight of 0, which is MoCo v3 with masked queries. Noisy tags are flipped with probability 0.2. Frozen features of other
scenes are read by a linear probe of the materials with a tenth of the labels (mean average precision), and compared
pair by pair with the similarity of the scenes' tags (Spearman).
Weights of another kind of images: a transformer for three bands, trained by hard contrast on rendered objects, whose
first layer is made anew; against random weights with a third of the steps.
Each arm chooses among six settings on another seed, three rates and two soft weights or temperatures: `python
evidence/test_40_softcon.py` repeats that search.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from lightning import seed_everything
from quiet import quiet_trainer
from scene_probes import PENALTIES, adamw, kept, served
from scipy.stats import spearmanr
from torch import Tensor, nn

from lightspan.backbones.bands import other_bands
from lightspan.backbones.vit import TokenViT, vit
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.rendered.land import LandSeasons
from lightspan.datamodules.rendered.scene_data import RenderedScenes
from lightspan.datamodules.rendered.scenes import SceneSpace
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.probes.probes import LinearProbe
from lightspan.methods.contrastive.softcon import SoftCon
from lightspan.nn.heads.projector import Projector
from lightspan.objectives.soft_contrast import tag_similarity

SEEDS, SEARCH = (0, 1, 2), 100
BANDS = ("B2", "B3", "B4", "B8", "B11", "B12")
SIDE, PATCH, WIDTH = 24, 6, 64
STEPS, BATCH, SCENES, JUDGED, LABELS = 600, 64, 2048, 1024, 205
RATES, SOFT_WEIGHTS, TEMPERATURES = (1e-3, 3e-3, 1e-2), (1.0, 5.0), (0.2, 0.1)
FLIPPED = 0.2


class Arm(NamedTuple):
    """Whether there is a soft term, which tags are flipped, what share of the steps is taken, and from which start."""

    soft: bool = True
    flipped: float = 0.0
    share: float = 1.0
    from_colours: bool = False


SHORT = 1 / 3
ARMS = {
    "soft contrast": Arm(),
    "hard contrast": Arm(soft=False),
    "soft contrast, noisy tags": Arm(flipped=FLIPPED),
    "a third of the steps": Arm(share=SHORT),
    "a third of the steps, from colours": Arm(share=SHORT, from_colours=True),
}
UNTRAINED = "random weights"


class Setting(NamedTuple):
    """A rate, and of soft contrast its weight, of hard contrast the temperature: two values of each are tried."""

    rate: float
    weight: float
    temperature: float = 0.2


def settings(arm: str) -> list[Setting]:
    """As many of each arm."""
    if ARMS[arm].soft:
        return [Setting(rate, weight) for rate in RATES for weight in SOFT_WEIGHTS]
    return [Setting(rate, 0.0, temperature) for rate in RATES for temperature in TEMPERATURES]


CHOSEN = {
    "soft contrast": Setting(1e-2, 5.0),
    "hard contrast": Setting(1e-2, 0.0, 0.2),
    "soft contrast, noisy tags": Setting(1e-2, 5.0),
    "a third of the steps": Setting(1e-2, 5.0),
    "a third of the steps, from colours": Setting(1e-2, 5.0),
}


@lru_cache(maxsize=1)
def land(seed: int) -> tuple[LandSeasons, list[dict[str, Any]]]:
    """The scenes, and batches of one epoch after another, drawn once for all arms."""
    data = LandSeasons(
        side=SIDE,
        bands=BANDS,
        size=SCENES,
        val_size=JUDGED,
        test_size=JUDGED,
        batch_size=BATCH,
        draw_seed=seed,
        seed=seed,
    )
    data.setup()
    loader, batches = data.train_dataloader(), list[dict[str, Any]]()
    while len(batches) < STEPS:  # the loader goes on with the next epoch
        batches += [{**batch, "views": [view.half() for view in batch["views"]]} for batch in loader]
    return data, batches[:STEPS]


def network(bands: int) -> TokenViT:
    return vit(WIDTH, 4, 4, img_size=SIDE, patch_size=PATCH, in_chans=bands)


def method(backbone: nn.Module, setting: Setting) -> SoftCon:
    heads = (
        Projector(WIDTH, [256], 64, bias=False, batch_norm=True),
        Projector(64, [256], 64, bias=False, batch_norm=True),
    )
    return SoftCon(
        backbone,
        *heads,
        soft_weight=setting.weight,
        patch=(PATCH, PATCH),
        temperature=setting.temperature,
        momentum=0.98,
        **adamw(setting.rate),
    )


@lru_cache(maxsize=1)
def of_colours(seed: int) -> dict[str, Tensor]:
    """Weights of a network for three bands, trained on drawn objects."""
    data = RenderedScenes(
        SceneSpace(SIDE, SIDE), views=RandomViews(2, scale=(0.5, 1.0)), size=STEPS * BATCH, val_size=1, test_size=1,
        batch_size=BATCH, draw_seed=seed, seed=seed,
    )  # fmt: skip
    seed_everything(seed, verbose=False)
    trained = method(network(3), Setting(1e-3, 0.0))
    batches = kept(data, ("views", "tags", "tags_known", "index"))
    quiet_trainer(max_steps=STEPS, gradient_clip_val=3.0).fit(trained, served(batches))
    return trained.backbone.state_dict()


def flipped(batches: list[dict[str, Any]], share: float, seed: int) -> list[dict[str, Any]]:
    """Tags that are wrong with this probability, the same ones whenever a scene comes."""
    wrong = torch.rand(SCENES, batches[0]["tags"].shape[1], generator=torch.Generator().manual_seed(seed)) < share
    return [batch | {"tags": (batch["tags"] > 0).ne(wrong[batch["index"]]).long()} for batch in batches]


@torch.no_grad()
def seen(backbone: nn.Module, loader: Any) -> Features:
    """Features [N D] and tags of scenes on one day each."""
    backbone.eval()
    found = [(backbone(batch["image"]), batch["tags"]) for batch in loader]
    x, tags = (torch.cat(part) for part in zip(*found, strict=True))
    return Features(x, tags.bool())


def measured(arm: str, setting: Setting | None, seed: int) -> dict[str, float]:
    data, batches = land(seed)
    seed_everything(seed, verbose=False)
    if setting is None:
        backbone = network(len(BANDS))
    else:
        _, noise, share, from_colours = ARMS[arm]
        backbone = network(3 if from_colours else len(BANDS))
        if from_colours:
            backbone.load_state_dict(of_colours(seed))
            seed_everything(seed, verbose=False)
            other_bands(backbone, len(BANDS))
        steps = round(share * STEPS)
        given = flipped(batches[:steps], noise, seed) if noise else batches[:steps]
        trained = method(backbone, setting)
        quiet_trainer(max_steps=steps, gradient_clip_val=3.0).fit(trained, served(given))
        backbone = trained.backbone
    bank, query = seen(backbone, data.val_dataloader()), seen(backbone, data.test_dataloader())
    few = Features(bank.x[:LABELS], bank.label_N[:LABELS])
    scores = LinearProbe(PENALTIES).fit(few, query).scores
    x, tags = query.x[:512] - query.x[:512].mean(dim=0), query.label_N[:512]
    rows = torch.nn.functional.normalize(x, dim=1)
    alike, wanted = rows @ rows.T, tag_similarity(tags, tags)
    pairs = torch.triu_indices(len(x), len(x), 1)
    order = float(spearmanr(alike[tuple(pairs)].numpy(), wanted[tuple(pairs)].numpy()).statistic)
    variances = torch.linalg.svdvals(x).square()
    shares = variances / variances.sum()
    rank = float(torch.exp(-(shares * shares.clamp_min(1e-12).log()).sum()))
    return {"mAP": 100 * next(iter(scores.values())), "Spearman": order, "effective rank": rank}


def compare(evidence, seeds=SEEDS) -> None:
    runs = {arm: {seed: measured(arm, CHOSEN.get(arm), seed) for seed in seeds} for arm in (*ARMS, UNTRAINED)}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for name, value in found.items():
                evidence.figure(f"{name}, {arm}", value, seed, "%" if name == "mAP" else "")
    evidence.note(
        f"{STEPS} steps of {BATCH} scenes; chosen on seed {SEARCH} of rates {RATES}, and of soft weights "
        f"{SOFT_WEIGHTS} or temperatures {TEMPERATURES}",
        {arm: tuple(chosen) for arm, chosen in CHOSEN.items()},
    )

    def gain(better: str, worse: str, figure: str = "mAP") -> dict[int, float]:
        return {seed: runs[better][seed][figure] - runs[worse][seed][figure] for seed in seeds}

    soft, hard, noisy, short, colours = ARMS
    evidence.claim("mAP with a tenth of the labels, soft minus hard", gain(soft, hard), at_least=3.0, unit="points")
    evidence.claim("mAP, soft minus random weights", gain(soft, UNTRAINED), at_least=8.0, unit="points")
    evidence.claim("Spearman of pairs with their tags, soft minus hard", gain(soft, hard, "Spearman"), at_least=0.15)
    evidence.claim(
        "mAP with a fifth of the tags wrong, soft minus hard", gain(noisy, hard), at_least=0.0, unit="points"
    )
    evidence.claim(
        "mAP from weights of colours minus from random ones", gain(colours, short), at_least=0.0, unit="points"
    )


def test_softcon(evidence) -> None:
    compare(evidence)


if __name__ == "__main__":
    for name in ARMS:
        for setting in settings(name):
            print(
                name,
                setting,
                {key: round(value, 3) for key, value in measured(name, setting, SEARCH).items()},
                flush=True,
            )
    print(UNTRAINED, measured(UNTRAINED, None, SEARCH))
