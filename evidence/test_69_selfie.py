"""Selfie (arXiv 1906.02940) on digits with few labels: candidates of the same image, of other images, and no training.

scikit-learn's 8 x 8 digits enlarged to 32 x 32 pixels, in 16 patches of 8 x 8, of which 4 are hidden. The patch network
is the first three stages of a convolutional network of four; two blocks of attention, 64 wide. It is pre-trained on the
images of 900 digits, then the whole network starts from it, with a last stage at random, and is fine-tuned on 10, 20 or
50 labelled digits of each class; 300 others are classified. Arms, with equal steps: Selfie, the same with the hidden
patches of other images as wrong candidates, random weights. The rates of each arm, of pre-training and of fine-tuning
(with ten labels a class), are searched first, among the same for all, on 597 digits that no figure is taken on.
"""

from itertools import product

import torch
from few_labels import BATCH, accuracy, adamw, digits_of, few, fine_tuned, pretrained, standardised
from lightning import seed_everything
from torch import Tensor, nn

from lightspan.backbones.vision import SmallConvNet
from lightspan.core.devices import wide
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.methods.contrastive.selfie import Selfie
from lightspan.nn.heads.attention_pool import SummaryTransformer
from lightspan.nn.masking.mask_samplers import RandomMasks, seen_and_hidden
from lightspan.nn.sequences.patches import at_places

SEEDS, SEARCH = (0, 1, 2, 3, 4), 100
SIDE, GRID, WIDTH, HIDDEN = 32, (4, 4), 16, 4
STEPS, TUNING, LABELS = 500, 100, (10, 20, 50)
RATES, TUNING_RATES = (1e-3, 3e-3), (1e-3, 4e-3)
VIEWS = RandomViews(1, scale=(0.5, 1.0), flip=0.0, degrees=10.0, brightness=0.2, contrast=0.2)
TUNING_VIEWS = RandomViews(1, scale=(0.7, 1.0), flip=0.0, degrees=10.0)


class OtherImages(Selfie):
    """As many candidates, of which the wrong ones are hidden patches of the images before it in the batch."""

    def logits(self, patches_BTD: Tensor, see_BK: Tensor, hide_BM: Tensor) -> Tensor:
        position_TD = self.positions()
        u_BD = self.summary(at_places(patches_BTD, see_BK) + position_TD[see_BK])
        v_BMD, h_BMD = u_BD[:, None] + position_TD[hide_BM], at_places(patches_BTD, hide_BM)
        count = h_BMD.shape[1]
        # At column k of place j: its own patch where k = j, else the patch j of the image (k - j) before.
        columns = [[h_BMD[:, j].roll((k - j) % count, dims=0) for k in range(count)] for j in range(count)]
        candidate_BMMD = torch.stack([torch.stack(of_place, dim=1) for of_place in columns], dim=1)
        return (wide(v_BMD)[:, :, None] * wide(candidate_BMMD)).sum(dim=3) / self.temperature


ARMS: dict[str, type[Selfie]] = {"Selfie": Selfie, "other images": OtherImages, "random weights": Selfie}


def method(arm: str, rate: float) -> Selfie:
    summary = SummaryTransformer(4 * WIDTH, depth=2, heads=4, mlp_width=128, dropout=0.0)
    network = SmallConvNet(1, WIDTH, stages=3)
    return ARMS[arm](network, summary, GRID, RandomMasks(0.25), temperature=8.0, **adamw(rate))


@torch.no_grad()
def right_choices(trained: Selfie, image: Tensor) -> float:
    """Share of held-out hidden patches that are put right, in per cent; chance is 25."""
    see, hide = seen_and_hidden(trained.masks.draw(GRID, 0, range(len(image))))
    logits = trained.logits(trained.patches(image), see, hide)
    return 100 * float((logits.argmax(dim=2) == torch.arange(HIDDEN)).double().mean())


def measured(
    arm: str, rate: float, tuning_rates: tuple[float, ...], labels: tuple[int, ...], seed: int, searching: bool,
    steps: int, tuning: int,
) -> dict[str, float]:  # fmt: skip
    """Accuracy for each rate of fine-tuning and number of labels, after one pre-training; accuracy of the pretext."""
    seed_everything(seed, verbose=False)
    train, test = digits_of(seed, searching, SIDE, test=200 if searching else 300)
    steps = 0 if arm == "random weights" else steps
    trained = pretrained(method(arm, rate), train[0], VIEWS, steps, seed)
    found = {"pretext": right_choices(trained, standardised(test[0]))} if steps else {}
    for tuning_rate, each in product(tuning_rates, labels):
        torch.manual_seed(seed)
        whole, rows = SmallConvNet(1, WIDTH, stages=4), few(train[1], each, seed)
        whole.load_state_dict(trained.backbone.state_dict(), strict=False)
        network = nn.Sequential(whole, nn.Linear(whole.num_features, 10))
        fine_tuned(network, (train[0][rows], train[1][rows]), TUNING_VIEWS, tuning, tuning_rate, seed)
        found[f"{tuning_rate:g}, {each}"] = accuracy(network, test)
    return found


def searched(arm: str, steps: int, tuning: int) -> tuple[float, float]:
    """(rate of pre-training, rate of fine-tuning) with the best accuracy on digits of their own."""
    rates, few_ = RATES if arm != "random weights" else RATES[:1], LABELS[:1]
    found = {rate: measured(arm, rate, TUNING_RATES, few_, SEARCH, True, steps, tuning) for rate in rates}
    return max(product(rates, TUNING_RATES), key=lambda pair: found[pair[0]][f"{pair[1]:g}, {few_[0]}"])


def compare(evidence, seeds=SEEDS, steps: int = STEPS, tuning: int = TUNING) -> None:
    chosen = {arm: searched(arm, steps, tuning) for arm in ARMS}
    runs = {
        arm: {seed: measured(arm, rate, (tuned,), LABELS, seed, False, steps, tuning) for seed in seeds}
        for arm, (rate, tuned) in chosen.items()
    }
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            for each in LABELS:
                value = found[f"{chosen[arm][1]:g}, {each}"]
                evidence.figure(f"accuracy with {each} labels a class, {arm}", value, seed, "%")
            if "pretext" in found:
                evidence.figure(f"hidden patches put right, {arm}", found["pretext"], seed, "%")
    said = ", ".join(f"{arm} {rate:g} and {tuned:g}" for arm, (rate, tuned) in chosen.items())
    evidence.note(
        f"{steps} steps of {BATCH} digits before, {tuning} steps on labels. Rates of {RATES} and {TUNING_RATES} chosen "
        f"on seed {SEARCH} and other digits: {said}."
    )
    accuracies = {
        arm: torch.tensor([found[f"{chosen[arm][1]:g}, {LABELS[0]}"] for found in of.values()], dtype=torch.float64)
        for arm, of in runs.items()
    }

    def gain(over: str) -> dict[int, float]:
        return dict(zip(seeds, (accuracies["Selfie"] - accuracies[over]).tolist(), strict=True))

    pretext = {arm: {seed: found["pretext"] for seed, found in runs[arm].items()} for arm in ("Selfie", "other images")}
    over_chance = {seed: value / (100 / HIDDEN) for seed, value in pretext["Selfie"].items()}
    evidence.claim("hidden patches put right over chance", over_chance, at_least=3.0)
    evidence.claim("ten labels, Selfie minus random weights", gain("random weights"), at_least=4.0, unit="points")
    spread = {arm: float(values.std()) for arm, values in accuracies.items()}
    difference = spread["Selfie"] - spread["random weights"]
    evidence.claim("deviation over seeds, Selfie minus random weights", difference, at_most=0.0, unit="points")
    easier = {seed: pretext["other images"][seed] - pretext["Selfie"][seed] for seed in seeds}
    evidence.claim("hidden patches put right, other images minus Selfie", easier, at_least=0.0, unit="points")
    evidence.claim("ten labels, Selfie minus other images", gain("other images"), at_least=0.0, unit="points")


def test_selfie(evidence) -> None:
    compare(evidence)
