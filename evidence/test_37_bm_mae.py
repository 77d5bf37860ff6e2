"""BM-MAE (arXiv 2505.00568): one encoder for every subset of registered modalities, and what is missing guessed.

Drawn trunks in three registered contrasts, 12 x 24 x 24 voxels; the second does not show lesions. A transformer
(width 96, 4 blocks, patches of 4^3 voxels) is pre-trained on 96 patients without labels, then for each of the seven
subsets of contrasts fine-tuned on 4 labelled patients to tell 12 organs, and judged by the mean Dice of 24 others. Arms
with equal steps of fine-tuning: BM-MAE, one pre-training for all subsets; scratch; for subsets of a single contrast
also an encoder pre-trained on that contrast alone. Ceiling: pre-trained by the organs of all 96 patients. Synthesis:
PSNR of the second and third contrast, guessed from the first, against the mean volume of the training patients; its
ceiling is the same network trained to translate the first contrast into the others alone.
The same synthesis on a real head: grey and white matter from the T1 image of the MNI152 template (nilearn's package),
at half its resolution, in crops of 24^3 voxels. Its back two thirds train and its front third is judged; the baseline
is the mean of the training crops.
Rates are searched on patients, or crops, that no figure is taken on.
"""

from collections.abc import Sequence
from functools import cache, partial
from importlib.util import find_spec
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightspan.backbones.placed_vit import ModalityViT
from lightspan.datamodules.volume.phantoms import ORGANS, Phantoms
from lightspan.methods.masked.bm_mae import BMMAE
from lightspan.nn.decoders.modality_decoder import ModalityDecoder
from lightspan.nn.masking.mask_samplers import MaskSampler
from lightspan.nn.sequences.patches import unpatchify
from lightspan.optim.schedules import WarmupCosine

NEEDS = ("nilearn", "nibabel")
SEEDS, SEARCH = (0, 1, 2, 3, 4), 100
SIDES, PATCH, WIDTH, DEPTH, HEADS = (12, 24, 24), (4, 4, 4), 96, 4, 4
UNLABELLED, LABELLED, TEST, BATCH = 96, 4, 24, 16
STEPS, TUNING = 400, 100
RATES = (1e-3, 3e-3, 1e-2)
SUBSETS = tuple(chain.from_iterable(combinations(range(3), count) for count in (1, 2, 3)))
MNI_SIDE, MNI_CROPS = 24, 192


class FirstSeen(MaskSampler):
    """Shows the first modality, and hides all others."""

    def draw(self, grid: tuple[int, ...], step: int, indices: Sequence[int], view: int = 0) -> np.ndarray:
        hidden = np.ones((len(indices), *grid), dtype=bool)
        hidden[:, 0] = False
        return hidden


@cache
def patients(count: int, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """Volumes [N 3 D H W] and organs [N D H W] of patients that no other stream has."""
    cuts, side, _ = SIDES
    found = Phantoms(count + 1, cuts, side, val_size=1, contrasts=3, draw_seed=10 * seed + stream).find()
    read = [found.archive.read(number) for number in range(count)]
    volumes, organs = (np.stack([getattr(one, name) for one in read]) for name in ("values", "segmentation"))
    return torch.from_numpy(volumes).float(), torch.from_numpy(organs).long()


def method(rate: float, modalities: int = 3, masks: MaskSampler | None = None) -> BMMAE:
    return BMMAE(
        ModalityViT(PATCH, modalities, WIDTH, DEPTH, HEADS),
        ModalityDecoder(WIDTH, WIDTH // 2, 2, HEADS, dropout=0.0),
        masks,
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.05),
        lr_scheduler=partial(WarmupCosine, warmup=0.05, final=0.0),
    )


def chosen_rows(count: int, steps: int, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.choice(count, min(BATCH, count), replace=False) for _ in range(steps)]


def pretrained(volumes: Tensor, seed: int, rate: float, steps: int, masks: MaskSampler | None = None) -> BMMAE:
    """In evaluation mode; with steps=0 untrained."""
    seed_everything(seed, verbose=False)
    model = method(rate, volumes.shape[1], masks)
    if steps:
        rows = chosen_rows(len(volumes), steps, seed)
        batches = DataLoader(
            rows, batch_size=None, collate_fn=lambda row: {"volume": volumes[row], "index": torch.from_numpy(row)}
        )
        quiet_trainer(max_steps=steps, gradient_clip_val=3.0).fit(model, batches)
    return model.eval()


def psnr(guess: Tensor, truth: Tensor) -> float:
    """Of intensities in [0, 1], in dB."""
    return -10 * float((guess - truth).square().mean().log10())


def synthesised(model: BMMAE, volumes: Tensor) -> float:
    """PSNR of all modalities but the first, guessed from the first."""
    present = torch.tensor([[True] + [False] * (volumes.shape[1] - 1)]).expand(len(volumes), -1)
    return psnr(model.synthesise(volumes, present)[:, 1:], volumes[:, 1:])


class Segmenter(nn.Module):
    """Organs of voxels, from the mean of a place's tokens over the contrasts that there are."""

    def __init__(self, backbone: ModalityViT) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(WIDTH, len(ORGANS) * int(np.prod(PATCH)))

    def forward(self, volumes: Tensor, present: Tensor) -> Tensor:
        grid = self.backbone.grid(volumes)[1:]
        return unpatchify(self.head(self.backbone.at_places(volumes, present)), PATCH, grid)


def shown(subset: Sequence[int], rows: int) -> Tensor:
    present = torch.zeros(rows, 3, dtype=torch.bool)
    present[:, list(subset)] = True
    return present


def tuned(
    backbone: ModalityViT, given: tuple[Tensor, Tensor], subsets: Sequence[Sequence[int]], rate: float, seed: int,
    steps: int,
) -> Segmenter:  # fmt: skip
    """All weights of a copy; a step sees one of the subsets."""
    seed_everything(seed, verbose=False)
    network = Segmenter(ModalityViT(PATCH, 3, WIDTH, DEPTH, HEADS))
    network.backbone.load_state_dict(backbone.state_dict())
    (volumes, organs), generator = given, np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    schedule = WarmupCosine(optimizer, max(steps, 1), final=0.0)
    for row in chosen_rows(len(volumes), steps, seed):
        subset = subsets[generator.integers(len(subsets))]
        optimizer.zero_grad()
        F.cross_entropy(network(volumes[row], shown(subset, len(row))), organs[row]).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def dice(network: Segmenter, given: tuple[Tensor, Tensor], subset: Sequence[int]) -> float:
    """Mean over organs of the Dice of all patients' voxels together, in per cent."""
    volumes, organs = given
    guess, scores = network(volumes, shown(subset, len(volumes))).argmax(dim=1), []
    for organ in range(1, len(ORGANS)):
        a, b = guess == organ, organs == organ
        scores.append(2 * float((a & b).sum()) / max(float(a.sum() + b.sum()), 1.0))
    return 100 * float(np.mean(scores))


def of_one(volumes: Tensor, modality: int, seed: int, rate: float, steps: int) -> ModalityViT:
    """Pre-trained on a single contrast, whose map of patches is at its place among three; the others are untrained."""
    alone = pretrained(volumes[:, modality : modality + 1], seed, rate, steps).backbone.state_dict()
    torch.manual_seed(seed)
    whole = ModalityViT(PATCH, 3, WIDTH, DEPTH, HEADS)
    renamed = {name.replace("parts.0.", f"parts.{modality}."): weight for name, weight in alone.items()}
    whole.load_state_dict(whole.state_dict() | renamed)
    return whole


def untrained(seed: int) -> ModalityViT:
    return pretrained(torch.zeros(1, 3, *SIDES), seed, 1.0, steps=0).backbone


def encoder(arm: str, seed: int, rate: float, steps: int) -> ModalityViT:
    """Of one arm, as fine-tuning starts from it."""
    volumes, organs = patients(UNLABELLED, seed, 0)
    if arm == "organs of all":
        return tuned(untrained(seed), (volumes, organs), SUBSETS, rate, seed, steps).backbone
    return untrained(seed) if arm == "scratch" else pretrained(volumes, seed, rate, steps).backbone


def compare(evidence: Any, seeds: Sequence[int] = SEEDS, steps: int = STEPS, tuning: int = TUNING) -> None:
    held = patients(TEST, SEARCH, 2)
    searched = patients(UNLABELLED, SEARCH, 0)[0]
    rates = evidence.search(
        {
            "BM-MAE": lambda rate: synthesised(pretrained(searched, SEARCH, rate, steps), held[0]),
            "translation": lambda rate: synthesised(pretrained(searched, SEARCH, rate, steps, FirstSeen()), held[0]),
        },
        RATES,
        what="rate of pre-training",
        seed=SEARCH,
    )
    rates |= {"scratch": rates["BM-MAE"], "organs of all": rates["BM-MAE"]}
    starts = {arm: encoder(arm, SEARCH, rates[arm], steps) for arm in ("BM-MAE", "scratch", "organs of all")}

    def score(arm: str, rate: float) -> float:
        few = patients(LABELLED, SEARCH, 1)
        return float(np.mean([dice(tuned(starts[arm], few, [s], rate, SEARCH, tuning), held, s) for s in SUBSETS]))

    tuning_rates = evidence.search(
        {arm: partial(score, arm) for arm in starts}, RATES, what="rate of fine-tuning", seed=SEARCH
    )
    found: dict[str, dict[int, list[float]]] = {arm: {} for arm in (*starts, "its contrast alone")}
    sound: dict[str, dict[int, float]] = {arm: {} for arm in ("BM-MAE", "translation", "mean", "untrained")}
    learned: dict[str, dict[int, float]] = {arm: {} for arm in ("scratch", "no step")}
    for seed in seeds:
        volumes, few, test = patients(UNLABELLED, seed, 0)[0], patients(LABELLED, seed, 1), patients(TEST, seed, 2)
        whole = pretrained(volumes, seed, rates["BM-MAE"], steps)
        sound["BM-MAE"][seed] = synthesised(whole, test[0])
        translated = pretrained(volumes, seed, rates["translation"], steps, FirstSeen())
        sound["translation"][seed] = synthesised(translated, test[0])
        sound["untrained"][seed] = synthesised(pretrained(volumes, seed, 1.0, 0), test[0])
        sound["mean"][seed] = psnr(volumes.mean(dim=0)[None, 1:], test[0][:, 1:])
        backbones = {"BM-MAE": whole.backbone} | {
            arm: encoder(arm, seed, rates[arm], steps) for arm in ("scratch", "organs of all")
        }
        for arm, start in backbones.items():
            networks = [tuned(start, few, [subset], tuning_rates[arm], seed, tuning) for subset in SUBSETS]
            pairs = list(zip(networks, SUBSETS, strict=True))
            found[arm][seed] = [dice(network, test, subset) for network, subset in pairs]
            if arm == "scratch":
                learned["scratch"][seed] = float(np.mean([dice(network, few, subset) for network, subset in pairs]))
        blank = tuned(backbones["scratch"], few, SUBSETS, 1.0, seed, 0)
        learned["no step"][seed] = float(np.mean([dice(blank, few, subset) for subset in SUBSETS]))
        found["its contrast alone"][seed] = [
            dice(tuned(of_one(volumes, m, seed, rates["BM-MAE"], steps), few, [(m,)], tuning_rates["BM-MAE"], seed,
                       tuning), test, (m,))
            for m in range(3)
        ]  # fmt: skip
    for arm, of_seed in found.items():
        for seed, scores in of_seed.items():
            for subset, value in zip(SUBSETS, scores, strict=False):
                evidence.figure(f"Dice of contrasts {'+'.join(map(str, subset))}, {arm}", value, seed, "%")
    for arm, of_seed in sound.items():
        for seed, value in of_seed.items():
            evidence.figure(f"PSNR of two contrasts from the first, {arm}", value, seed, "dB")
    evidence.gate("BM-MAE", sound["BM-MAE"], sound["untrained"], by=3.0, unit="dB")
    evidence.gate("scratch", learned["scratch"], learned["no step"], by=10.0, unit="points of Dice")

    def less(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
        return {seed: a[seed] - b[seed] for seed in seeds}

    def mean(arm: str, count: int = len(SUBSETS)) -> dict[int, float]:
        return {seed: float(np.mean(found[arm][seed][:count])) for seed in seeds}

    evidence.claim(
        "PSNR of two contrasts from the first, BM-MAE minus the mean volume", less(sound["BM-MAE"], sound["mean"]),
        at_least=4.0, unit="dB", arms=("BM-MAE",), floor=less(sound["untrained"], sound["mean"]),
        ceiling=less(sound["translation"], sound["mean"]),
    )  # fmt: skip
    evidence.claim(
        "mean Dice of the seven subsets, BM-MAE minus scratch", less(mean("BM-MAE"), mean("scratch")), at_least=3.0,
        unit="points", arms=("BM-MAE", "scratch"), floor=less(mean("scratch"), mean("scratch")),
        ceiling=less(mean("organs of all"), mean("scratch")),
    )  # fmt: skip
    worst = {
        arm: {seed: float(np.min(np.subtract(found[arm][seed], found["scratch"][seed]))) for seed in seeds}
        for arm in ("BM-MAE", "organs of all")
    }
    blank_loss = {seed: -float(np.max(found["scratch"][seed])) for seed in seeds}
    evidence.claim(
        "Dice of the subset with the least gain, BM-MAE minus scratch", worst["BM-MAE"], at_least=-1.0, unit="points",
        arms=("BM-MAE", "scratch"), floor=blank_loss, ceiling=worst["organs of all"],
    )  # fmt: skip
    evidence.claim(
        "mean Dice of single contrasts, BM-MAE minus its contrast alone",
        less(mean("BM-MAE", 3), mean("its contrast alone")), at_least=-1.0, unit="points", arms=("BM-MAE",),
        floor=less(mean("scratch", 3), mean("its contrast alone")),
        ceiling=less(mean("organs of all", 3), mean("its contrast alone")),
    )  # fmt: skip


@cache
def template() -> Tensor:
    """T1, grey and white matter of the MNI152 template at 2 mm, [3 D H W] in [0, 1], the front last along H."""
    import nibabel

    folder = Path(str(find_spec("nilearn").origin)).parent / "datasets" / "data"  # type: ignore[union-attr]
    read = []
    for kind in ("t1", "gm", "wm"):
        file = folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
        image = nibabel.as_closest_canonical(nibabel.load(file))
        values = torch.from_numpy(np.asarray(image.dataobj, np.float32)).permute(2, 1, 0)
        read.append(values / values.max())
    return F.avg_pool3d(torch.stack(read), 2)


def crops(front: bool, count: int, seed: int) -> Tensor:
    """[N 3 s s s] that show some of the brain, from the front third or from the other two."""
    whole, generator, found = template(), np.random.default_rng((seed, front)), list[Tensor]()
    edge = 2 * whole.shape[2] // 3
    part = whole[:, :, edge:] if front else whole[:, :, :edge]
    while len(found) < count:
        at = [int(generator.integers(length - MNI_SIDE + 1)) for length in part.shape[1:]]
        crop = part[:, *(slice(first, first + MNI_SIDE) for first in at)]
        if float((crop[1] + crop[2] > 0.5).float().mean()) > 0.2:
            found.append(crop)
    return torch.stack(found)


def compare_head(evidence: Any, seeds: Sequence[int] = SEEDS, steps: int = STEPS) -> None:
    arms: dict[str, MaskSampler | None] = {"BM-MAE, head": None, "translation, head": FirstSeen()}

    def model(arm: str, seed: int, rate: float, steps: int) -> BMMAE:
        return pretrained(crops(False, MNI_CROPS, seed), seed, rate, steps, arms[arm])

    # The rate is chosen on other crops of the part that trains.
    known = crops(False, TEST, SEARCH + 1)
    rates = evidence.search(
        {arm: lambda rate, arm=arm: synthesised(model(arm, SEARCH, rate, steps), known) for arm in arms}, RATES,
        what="rate of pre-training on a head", seed=SEARCH,
    )  # fmt: skip
    found: dict[str, dict[int, float]] = {name: {} for name in (*arms, "mean", "untrained")}
    for seed in seeds:
        test = crops(True, TEST, seed)
        for arm in arms:
            found[arm][seed] = synthesised(model(arm, seed, rates[arm], steps), test)
        found["untrained"][seed] = synthesised(model("BM-MAE, head", seed, 1.0, 0), test)
        found["mean"][seed] = psnr(crops(False, MNI_CROPS, seed).mean(dim=0)[None, 1:], test[:, 1:])
    for name, of_seed in found.items():
        for seed, value in of_seed.items():
            evidence.figure(f"PSNR of grey and white matter from T1, {name}", value, seed, "dB")
    evidence.gate("BM-MAE, head", found["BM-MAE, head"], found["untrained"], by=3.0, unit="dB")
    gain = {name: {seed: of[seed] - found["mean"][seed] for seed in seeds} for name, of in found.items()}
    evidence.claim(
        "PSNR of grey and white matter from T1, BM-MAE minus the mean crop", gain["BM-MAE, head"], at_least=4.0,
        unit="dB", arms=("BM-MAE, head",), floor=gain["untrained"], ceiling=gain["translation, head"],
    )  # fmt: skip


def test_bm_mae_on_trunks(evidence) -> None:
    compare(evidence)


def test_bm_mae_on_a_head(evidence) -> None:
    compare_head(evidence)
