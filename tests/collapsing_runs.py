"""Small siamese networks that learn, and the same with what keeps them from collapse left out."""

from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.distributed import gather_rows, rank, world_size
from lightspan.strategies import shard

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
