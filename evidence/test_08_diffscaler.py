"""DiffScaler (arXiv 2404.09976) on digits: a frozen diffusion transformer that knows 0 to 4 learns to draw 5 to 9.

A transformer of 4 blocks and width 64 learns to tell the noise in the 8 x 8 digits 0 to 4. Each arm then has the same
number of steps on the digits 5 to 9, and a table of classes of its own:

- DiffScaler: scale, shift and a bottleneck of 8 in attention and MLP of every block; all else frozen.
- scale and shift: the same without the bottleneck.
- BitFit: all biases.
- full: everything.

What is measured: the loss on test images, mean over ten fixed levels and four fixed draws of noise; and the Frechet
distance of as many drawn images as there are test images, in the space of the 16 principal directions of the training
images. The frozen network is asked in the better of two ways, with the classes it never saw or without a class.

Rates: one search for all arms on seed 100, by the loss on 100 validation images that are neither trained nor tested on,
by factors of three until both neighbours are worse: `python evidence/test_08_diffscaler.py` repeats it.
"""

import copy
from functools import partial
from pathlib import Path

import torch
from lightning import Trainer, seed_everything
from torch import Tensor
from torchvision.io import encode_png
from torchvision.utils import make_grid

from lightspan.adapters.diffscaler import DiffScaler
from lightspan.adapters.full import Full
from lightspan.adapters.inject import activate, adapt
from lightspan.analysis.frechet import frechet_distance, principal_directions
from lightspan.backbones.diffusion import DiT
from lightspan.datamodules.classes import ClassSubset
from lightspan.datamodules.images import Digits
from lightspan.files import write_atomic
from lightspan.methods.generative.denoising_diffusion import DenoisingDiffusion
from lightspan.optim.schedules import WarmupCosine

SEEDS, SEARCH_SEED, VALIDATION = (0, 1, 2), 100, 100
OLD, NEW = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
PRETRAINING = {"steps": 1000, "batch": 64, "lr": 2e-3}
STEPS, BATCH, RANK = 200, 64, 8
LAYERS = ["*.attn.qkv", "*.attn.proj", "*.mlp.fc1", "*.mlp.fc2"]
RATES = {"DiffScaler": 1e-2, "scale and shift": 9e-2, "BitFit": 3e-2, "full": 9e-3}
DRAWS, DIRECTIONS, SAMPLING_STEPS = 4, 16, 25
PICTURE = Path(__file__).parent / "results" / "08_diffscaler.png"


def digits(classes: list[int], seed: int, val_size: int, batch: int = BATCH) -> ClassSubset:
    data = ClassSubset(Digits(), classes, batch, val_size=val_size, seed=seed)
    data.setup()
    return data


def everything(loader) -> dict[str, Tensor]:
    batches = list(loader)
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("image", "label")}


def fit(method: DenoisingDiffusion, data: ClassSubset, steps: int, lr: float) -> None:
    method.optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=0.0)
    method.lr_scheduler = partial(WarmupCosine, warmup=0.1, final=0.0)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, datamodule=data)


def pretrained(seed: int, val_size: int) -> DenoisingDiffusion:
    seed_everything(seed, verbose=False)
    method = DenoisingDiffusion(DiT(image_size=8, num_classes=10), torch.optim.AdamW)
    fit(method, digits(OLD, seed, val_size), int(PRETRAINING["steps"]), PRETRAINING["lr"])
    return method


def prepared(method: DenoisingDiffusion, arm: str) -> DenoisingDiffusion:
    """A copy in which the arm's parameters train and nothing else."""
    method = copy.deepcopy(method)
    if arm == "full":
        return method
    adapt(method.backbone, ["label"], Full(), name="new", train=["*.bias"] if arm == "BitFit" else [], show=False)
    if arm != "BitFit":
        adapt(method.backbone, LAYERS, DiffScaler(RANK if arm == "DiffScaler" else 0), name="new", show=False)
    return method


def tuned(method: DenoisingDiffusion, arm: str, seed: int, val_size: int, lr: float) -> DenoisingDiffusion:
    seed_everything(seed, verbose=False)
    method = prepared(method, arm)
    fit(method, digits(NEW, seed, val_size), STEPS, lr)
    return method


@torch.no_grad()
def loss(method: DenoisingDiffusion, held_out: dict[str, Tensor], told: bool = True) -> float:
    method.eval()
    draws = [method.held_out_loss(held_out, draw, told) for draw in range(DRAWS)]  # type: ignore[arg-type]
    return float(torch.stack(draws).double().mean())


def drawn(method: DenoisingDiffusion, label_B: Tensor) -> Tensor:
    return method.eval().sample(label_B, (1, 8, 8), steps=SAMPLING_STEPS)


def distance(method: DenoisingDiffusion, data: ClassSubset) -> float:
    test = everything(data.test_dataloader())
    mean, directions = principal_directions(everything(data.bank_dataloader())["image"].flatten(1), DIRECTIONS)
    a, b = (images.flatten(1).double() - mean for images in (drawn(method, test["label"]), test["image"]))
    return frechet_distance(a @ directions, b @ directions)


def share(method: DenoisingDiffusion, whole: DenoisingDiffusion) -> float:
    """Trained numbers over those of the network."""
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return trained / sum(p.numel() for p in whole.parameters())


def picture(methods: dict[str, DenoisingDiffusion], data: ClassSubset) -> None:
    """One row an arm of two drawings a new digit, below a row of real ones."""
    test = everything(data.test_dataloader())
    real = torch.stack([test["image"][test["label"] == label][i] for label in NEW for i in (0, 1)])
    labels = torch.tensor([label for label in NEW for _ in (0, 1)])
    rows = torch.cat([real, *(drawn(method, labels) for method in methods.values())])
    grid = make_grid(rows.clamp(real.min(), real.max()), nrow=len(labels), normalize=True, pad_value=0.5)
    large = (255 * grid).round().byte().repeat_interleave(4, 1).repeat_interleave(4, 2)
    write_atomic(PICTURE, encode_png(large).numpy().tobytes())


def test_diffscaler_comes_near_full_fine_tuning_and_forgets_nothing(evidence) -> None:
    closed, over_bitfit, over_scale, shares, unchanged, forgotten = {}, {}, {}, {}, {}, {}
    for seed in SEEDS:
        whole, new_data, old_data = pretrained(seed, 0), digits(NEW, seed, 0), digits(OLD, seed, 0)
        new, old = (everything(data.test_dataloader()) for data in (new_data, old_data))
        frozen = min(loss(whole, new), loss(whole, new, told=False))
        methods = {arm: tuned(whole, arm, seed, 0, rate) for arm, rate in RATES.items()}
        reached = {arm: loss(method, new) for arm, method in methods.items()}
        evidence.figure("loss on 5 to 9, frozen", frozen, seed)
        for arm, method in methods.items():
            evidence.figure(f"loss on 5 to 9, {arm}", reached[arm], seed)
            evidence.figure(f"trained share, {arm}", 100 * share(method, whole), seed, "%")
        for arm, method in {"frozen": whole, **methods}.items():
            evidence.figure(f"Frechet distance, {arm}", distance(method, new_data), seed)
        before = loss(whole, old)
        evidence.figure("loss on 0 to 4, before", before, seed)
        evidence.figure("loss on 0 to 4, full", loss(methods["full"], old), seed)
        if seed == SEEDS[0]:
            picture({"frozen": whole, **methods}, new_data)
        forgotten[seed] = 100 * (loss(methods["full"], old) / before - 1)
        closed[seed] = 100 * (frozen - reached["DiffScaler"]) / (frozen - reached["full"])
        over_bitfit[seed] = 100 * (1 - reached["DiffScaler"] / reached["BitFit"])
        over_scale[seed] = 100 * (1 - reached["DiffScaler"] / reached["scale and shift"])
        shares[seed] = 100 * share(methods["DiffScaler"], whole)
        activate(methods["DiffScaler"].backbone)
        unchanged[seed] = abs(loss(methods["DiffScaler"], old) - before)
    evidence.note(
        f"{PRETRAINING['steps']} steps on 0 to 4, then {STEPS} on 5 to 9, batch {BATCH}; rates by one search on seed "
        f"{SEARCH_SEED}: " + ", ".join(f"{arm} {rate:g}" for arm, rate in RATES.items()) + "."
    )
    evidence.note("results/08_diffscaler.png, seed 0: real images, then drawn by frozen, " + ", ".join(RATES) + ".")
    evidence.claim("share of the gap from frozen to full that DiffScaler closes", closed, at_least=70.0, unit="%")
    evidence.claim("trained share, DiffScaler", shares, at_most=15.0, unit="%")
    evidence.claim("loss of DiffScaler below BitFit", over_bitfit, at_least=0.0, unit="%")
    evidence.claim("loss of DiffScaler below scale and shift", over_scale, at_least=0.0, unit="%")
    evidence.claim("change of the loss on 0 to 4 with the bank removed", unchanged, at_most=0.0)
    evidence.claim("rise of the loss on 0 to 4 by full fine-tuning", forgotten, at_least=5.0, unit="%")


def search() -> None:
    """Prints the validation loss of every rate that the search visits."""
    whole = pretrained(SEARCH_SEED, VALIDATION)
    new, old = (everything(digits(part, SEARCH_SEED, VALIDATION).val_dataloader()) for part in (NEW, OLD))
    print(f"frozen: {loss(whole, new):.4f} with classes, {loss(whole, new, told=False):.4f} without", flush=True)
    print(f"loss on 0 to 4: {loss(whole, old):.4f}", flush=True)
    for arm in RATES:
        known: dict[int, float] = {}

        def held_out(power: int, arm: str = arm, known: dict[int, float] = known) -> float:
            if power not in known:
                rate = (1e-3 if arm == "full" else 1e-2) * 3.0**power  # where the search starts
                known[power] = loss(tuned(whole, arm, SEARCH_SEED, VALIDATION, rate), new)
                print(f"{arm} lr {rate:.2g}: {known[power]:.4f}", flush=True)
            return known[power]

        best = 0
        while (better := min((best - 1, best, best + 1), key=held_out)) != best:
            best = better


if __name__ == "__main__":
    search()
