"""SVFit (arXiv 2409.05926): singular values alone adapt a network to a shifted domain.

An MLP 64-128-128-10 is pretrained on scikit-learn's digits for 30 epochs, then adapted to digits of another domain with
10 images per class; test accuracy is measured on other images of that domain. Biases stay frozen in all arms:

- none: the pretrained network.
- SVFit: all singular values of the three weights, 202 numbers.
- random: equally many numbers, as a diagonal between random orthogonal frames of the same sizes.
- LoRA: rank 2 on the same weights, 1172 numbers.

Three domains: inverted contrast, digits turned by 20 degrees, stripes behind the digits. The same claims are made on
each. For each domain, the same search gives each arm its learning rate, on seeds 100 to 102 and a validation part that
no claim uses. `python evidence/test_02_svfit.py` repeats it.
"""

from collections.abc import Callable

import numpy as np
import torch
from digits import accuracy, pretrain, shuffled, step
from scipy.ndimage import rotate
from torch import Tensor, nn

from lightspan.adapters.adapter import AdapterSpec
from lightspan.adapters.inject import adapt
from lightspan.adapters.lora import LoRA
from lightspan.adapters.svfit import SVFit, SVFitUpdate, frames

SEEDS, SEARCH_SEEDS = (0, 1, 2, 3, 4), (100, 101, 102)
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
EPOCHS, STEPS, SHOTS = 30, 300, 10


class RandomFrames(SVFit):
    """SVFit with frames that know nothing of the weight."""

    def build(self, layer: nn.Module, name: str) -> SVFitUpdate:
        left_OR, values_R, right_RI = frames(layer)
        left_OR, right_IR = (torch.linalg.qr(torch.randn_like(t)).Q for t in (left_OR, right_RI.mT))
        return SVFitUpdate(layer, left_OR, values_R, right_IR.mT)


ARMS: dict[str, AdapterSpec | None] = {"none": None, "SVFit": SVFit(), "random": RandomFrames(), "LoRA": LoRA(rank=2)}
RATES = {
    "turned": {"SVFit": 3e-1, "random": 3e-2, "LoRA": 3e-3},
    "inverted": {"SVFit": 1e-1, "random": 1e-1, "LoRA": 3e-2},
    "striped": {"SVFit": 3e-1, "random": 1e-2, "LoRA": 3e-3},
}


def turned(images_NHW: np.ndarray) -> np.ndarray:
    return rotate(images_NHW, 20, axes=(2, 1), reshape=False, order=1)


def inverted(images_NHW: np.ndarray) -> np.ndarray:
    return 1 - images_NHW


def striped(images_NHW: np.ndarray) -> np.ndarray:
    return np.clip(images_NHW + 0.5 * (np.arange(8) % 4 < 2)[None, :, None], 0, 1)


DOMAINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"turned": turned, "inverted": inverted, "striped": striped}


def splits(seed: int, domain: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(pixels [N 64] in [0, 1], labels) of 900 images to pretrain on, and of the new domain 100 to adapt to, 200 to
    choose settings on and 397 to test on; no image is in two of them.
    """
    images, labels = shuffled(seed)
    parts = {
        "pretrain": slice(0, 900),
        "pool": slice(900, 1200),
        "choose": slice(1200, 1400),
        "test": slice(1400, None),
    }
    cut = {name: (images[part], labels[part]) for name, part in parts.items()}
    pool_x, pool_y = cut.pop("pool")
    few = np.concatenate([np.flatnonzero(pool_y == digit)[:SHOTS] for digit in range(10)])
    cut["adapt"] = pool_x[few], pool_y[few]
    for name in ("adapt", "choose", "test"):
        cut[name] = DOMAINS[domain](cut[name][0]), cut[name][1]
    return {name: (torch.tensor(x, dtype=torch.float32).flatten(1), torch.tensor(y)) for name, (x, y) in cut.items()}


def pretrained(seed: int, x: Tensor, y: Tensor) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    pretrain(model, x, y, EPOCHS, batch=32, lr=1e-3)
    return model


def run(arm: str, domain: str, seed: int, rate: float, on: str) -> tuple[float, int]:
    """(accuracy on a part, trained numbers) of an arm after `STEPS` full-batch steps of Adam."""
    parts = splits(seed, domain)
    model = pretrained(seed, *parts["pretrain"])
    spec = ARMS[arm]
    if spec is None:
        return accuracy(model, *parts[on]), 0
    injection = adapt(model, ["0", "2", "4"], spec, show=False)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=rate)
    for _ in range(STEPS):
        step(model, optimizer, *parts["adapt"])
    return accuracy(model, *parts[on]), injection.trainable


def test_singular_values_adapt_to_a_shifted_domain(evidence) -> None:
    evidence.note(f"Rates by one search for all arms on seeds {SEARCH_SEEDS}", RATES)
    for domain in DOMAINS:
        gaps: dict[str, dict[int, float]] = {"none": {}, "random": {}, "LoRA": {}}
        for seed in SEEDS:
            found = {arm: run(arm, domain, seed, RATES[domain].get(arm, 0.0), "test") for arm in ARMS}
            for arm, (percent, _) in found.items():
                evidence.figure(f"accuracy, {domain}, {arm}", percent, seed, "%")
            for arm in gaps:
                gaps[arm][seed] = found["SVFit"][0] - found[arm][0]
        behind_lora = {seed: -gap for seed, gap in gaps["LoRA"].items()}
        evidence.claim(f"{domain}: accuracy, SVFit minus no adaptation", gaps["none"], at_least=10.0, unit="points")
        evidence.claim(f"{domain}: accuracy, SVFit minus random frames", gaps["random"], at_least=3.0, unit="points")
        evidence.claim(f"{domain}: accuracy, LoRA minus SVFit", behind_lora, at_most=2.0, unit="points")
    evidence.claim("trained numbers, LoRA over SVFit", found["LoRA"][1] / found["SVFit"][1], at_least=5.0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for domain in DOMAINS:
        plain = np.mean([run("none", domain, seed, 0.0, "choose")[0] for seed in SEARCH_SEEDS])
        print(f"{domain} none: {plain:.1f}", flush=True)
        for arm in list(ARMS)[1:]:
            means = {r: np.mean([run(arm, domain, seed, r, "choose")[0] for seed in SEARCH_SEEDS]) for r in GRID}
            print(domain, arm, {r: round(float(m), 1) for r, m in means.items()}, max(means, key=means.get), flush=True)
