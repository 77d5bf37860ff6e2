"""Small siamese networks that learn, and the same with what keeps them from collapse left out."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.distributed import gather_rows, rank, world_size
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.methods.clustering.swav import SwAV
from lightspan.methods.contrastive.lejepa import LeJEPA
from lightspan.methods.contrastive.simclr import SimCLR
from lightspan.methods.contrastive.vicreg import VICReg
from lightspan.methods.distillation.byol import BYOL
from lightspan.methods.distillation.dino import DINO
from lightspan.nn.heads.dino_head import DINOHead
from lightspan.nn.heads.projector import Projector
from lightspan.training.method import Method
from lightspan.training.strategies import shard

WIDTH = 16


class Points:
    """Points near a six-dimensional plane; a view adds noise of its own."""

    def __init__(self, views: str = "noisy") -> None:
        generator = torch.Generator().manual_seed(7)
        plane = torch.randn(6, WIDTH, generator=generator)
        self.x = torch.randn(256, 6, generator=generator) @ plane / 6**0.5 + 0.5
        self.views = views

    def __len__(self) -> int:
        return len(self.x)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.zeros(WIDTH) if self.views == "constant" else self.x[index]
        noise = 0.3 if self.views == "noisy" else 0.0
        views = [x + noise * torch.randn(WIDTH, generator=generator) for _ in range(2)]
        return {"views": views, "index": torch.tensor(index)}


class Pairs(LightningDataModule):
    def __init__(self, views: str = "noisy", seed: int = 0, batch_size: int = 64) -> None:
        super().__init__()
        self.points, self.seed, self.batch_size = Points(views), seed, batch_size

    def train_dataloader(self) -> ExactLoader:
        return ExactLoader(self.points, self.batch_size, self.seed, rank(), world_size())


class Siamese(LightningModule):
    """Two views through one encoder and projector, by one of four objectives.

    `cosine`: they must agree, and nothing else: it collapses. `predicted`: the same with SimSiam's predictor and
    stop-gradient. `contrast`: InfoNCE. `variance`: VICReg's three terms.
    """

    def __init__(self, objective: str, rate: float = 1e-3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.projector = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 24))
        predictor = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24))
        self.predictor = predictor if objective == "predicted" else nn.Identity()
        self.objective, self.rate = getattr(self, objective), rate

    def configure_model(self) -> None:
        shard(self)

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        return self.encoder(batch["image"])

    def embeddings(self, batch: dict[str, Tensor]) -> Tensor:
        return self.projector(self.features(batch))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.objective(*(self.projector(self.encoder(view)) for view in batch["views"]))

    def cosine(self, a_BD: Tensor, b_BD: Tensor) -> Tensor:
        return -F.cosine_similarity(a_BD, b_BD).mean()

    def predicted(self, a_BD: Tensor, b_BD: Tensor) -> Tensor:
        pairs = ((a_BD, b_BD), (b_BD, a_BD))
        return sum(-F.cosine_similarity(self.predictor(one), other.detach()).mean() for one, other in pairs) / 2

    def contrast(self, a_BD: Tensor, b_BD: Tensor) -> Tensor:
        (a_ND, _), (b_ND, _) = gather_rows(F.normalize(a_BD)), gather_rows(F.normalize(b_BD))
        logits = a_ND @ b_ND.T / 0.2
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def variance(self, a_BD: Tensor, b_BD: Tensor) -> Tensor:
        (a_ND, _), (b_ND, _) = gather_rows(a_BD), gather_rows(b_BD)
        apart, together = torch.zeros(()), F.mse_loss(a_ND, b_ND)
        for z_ND in (a_ND, b_ND):
            c_ND = z_ND - z_ND.mean(dim=0)
            covariance = c_ND.T @ c_ND / (len(c_ND) - 1)
            spread = (1 - (covariance.diagonal() + 1e-4).sqrt()).relu().mean()
            off = covariance - covariance.diagonal().diag()
            apart = apart + 25 * spread + off.square().sum() / off.shape[0]
        return 25 * together + apart

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.rate)


class Net(nn.Sequential):
    """A backbone of points."""

    num_features = 32

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())


def made(method: type[Method], rate: float = 1e-3, seed: int = 0, **settings: Any) -> Any:
    """A shipped method on points, with the settings that its recipe has where none are given."""
    torch.manual_seed(seed)
    parts: dict[str, Any] = {"backbone": Net(), "optimizer": partial(torch.optim.Adam, lr=rate)}
    takes = inspect.signature(method).parameters
    if "head" in takes:
        parts["head"] = DINOHead(32, prototypes=32, hidden=(32,), bottleneck=16)
    if "projector" in takes:
        parts["projector"] = Projector(32, [32], 24)
    if "predictor" in takes:
        parts["predictor"] = Projector(24, [24], 24)
    return method(**parts | settings)


def with_(module: Any, change: Callable[[Any], Any]) -> Any:
    with torch.no_grad():
        change(module)
    return module


def dead(module: Any) -> None:
    """A projector whose last layer is zero and frozen."""
    last = list(module.projector.modules())[-1]
    for parameter in last.parameters():
        parameter.zero_().requires_grad_(False)


def constant(module: Any) -> None:
    """A backbone that does not look at its input."""
    module.backbone[0].weight.zero_()


DINO_HERE = {"momentum": 0.9, "freeze_prototypes": 0.0}
RATES = {
    "SimCLR": partial(made, SimCLR),
    "VICReg": partial(made, VICReg),
    "BYOL": partial(made, BYOL, momentum=0.9),
    "DINO": partial(made, DINO, **DINO_HERE),
    "LeJEPA": partial(made, LeJEPA, directions=64),
    "SwAV": partial(made, SwAV, prototypes=16, freeze_prototypes=0.0),
}
"""Methods that learn at a rate of 1e-3."""
EQUAL = "same embedding"
PLANTED: dict[str, tuple[Callable[[], Any], str]] = {
    "no stop-gradient, no negatives": (lambda: Siamese("cosine", 3e-3), "become one point"),
    "no variance": (lambda: made(VICReg, 1e-2, variance_weight=0.0), "become one point|few directions"),
    "no SIGReg": (lambda: made(LeJEPA, 1e-2, lam=0.0, directions=64), "become one point|few directions"),
    "no predictor": (lambda: made(BYOL, 1e-2, predictor=nn.Identity(), momentum=0.0), "become one point"),
    "no centring": (lambda: made(DINO, **DINO_HERE | {"centre_momentum": 1.0}), "all samples go to"),
    "no sharpening": (
        lambda: made(DINO, **DINO_HERE, teacher_temperature=1.0, final_temperature=1.0),
        "become one point|told apart",
    ),
    "dead projector": (lambda: with_(made(SimCLR), dead), EQUAL),
    "dead features": (lambda: with_(made(VICReg), constant), EQUAL),
    **{
        f"{name} at a rate 10,000 times as high": (partial(make, 10.0), "rate is likely too high")
        for name, make in RATES.items()
    },
    # The others, all but DINO, recover from the first steps at this rate and learn.
    "DINO at a rate 100 times as high": (partial(RATES["DINO"], 0.1), "rate is likely too high"),
}
"""What is wrong -> (the run, what must be said of it)."""
