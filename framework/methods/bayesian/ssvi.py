"""SSVI: a Bayesian network that is sparse from the first step, trained in a coordinate subspace that moves.

Source: Li, Miao, Qiu, Zhang, "Training Bayesian Neural Networks with Sparse Subspace Variational Inference", ICLR 2024,
arXiv 2402.11025. Layers and their movement are `lightspan.adapters.sparse_gaussian`; the KL divergence of a layer and
what a coordinate is worth are `lightspan.subspaces.sparse_gaussian.statistics` and `.criteria`, and
`lightspan.subspaces.masks.index_sets` says how many coordinates move. The loss (equation 6) is
L = cross-entropy + lambda KL, with lambda = kl_scale / N min(1, 2 t / T) after t of T steps and N training samples (the
authors count t in epochs). kl_scale = 0.01 with a prior of 0.005 is from their code: a strongly tempered posterior.
As in their code, the step that moves coordinates takes no step of the optimiser, and coordinates grow by the gradient
of the sampled network. Assumed: biases and norms are single numbers, without posterior or KL.
Shapes: B batch of this rank, C H W image, F features, K classes.
"""

import math
from typing import Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import BinaryAUROC, MulticlassCalibrationError

from lightspan.adapters.sparse_gaussian.costs import costs
from lightspan.adapters.sparse_gaussian.inject import Start, drawing, gaussian_layers, sparsify
from lightspan.adapters.sparse_gaussian.layer import OneDraw, Outputs, normal
from lightspan.adapters.sparse_gaussian.topology import Topology, move
from lightspan.core.devices import wide
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.datamodules.image.batch import ImageBatch, ViewsBatch
from lightspan.nn.image_numbers import index_in
from lightspan.nn.init import he_normal_
from lightspan.nn.labels import labels_of
from lightspan.nn.views import image_of
from lightspan.objectives.classes import label_cross_entropy, share_right
from lightspan.objectives.means import own_mean
from lightspan.optim.masks.follow import require_entrywise
from lightspan.optim.masks.reindex import reindex
from lightspan.subspaces.masks.allocation import PerTensorAllocation
from lightspan.training.method import Method

COUNTED = ("weights", "active", "stored_bytes", "dense_bytes", "sparse_flops", "dense_flops")
STEP_OF_NOISE = -2  # of the draws that make images of noise; steps and sampled networks count from 0


def kl_weight(kl_scale: float, samples: int, progress: float) -> float:
    """lambda: 0 at the start, kl_scale / samples from the middle of the run on."""
    return kl_scale / samples * min(1.0, 2 * progress)


class SSVI(Method):
    """Trains a backbone and a linear classifier with a Gaussian posterior over a fixed share of their weights.

    Where `start` keeps the model's own weights, the classifier's are He-normal; its bias starts at zero.

    Right under DDP; strategies that split parameters are refused, since coordinates would cross their borders.
    Validation and test log accuracy, loss_nats (negative log-likelihood), ece (15 bins) and entropy_nats of the
    prediction; a test also logs auroc_noise, how well the entropy tells its images from images of noise. Loggers get
    what the layers cost beside dense ones once, as costs/..., see `lightspan.adapters.sparse_gaussian.costs`.

    Args:
        backbone: [B C H W] -> [B F], with F in its attribute `num_features`.
        num_classes: K, >= 2.
        density: share of active weights of each matched layer, in (0, 1].
        match: patterns of layers, by names such as backbone.conv1 and head; None takes all that can be sparse.
        dense: patterns of layers with all weights active; the paper's first convolution is one.
        allocation: how layers share the density; None gives the same to each.
        start: of the posteriors.
        topology: how coordinates move.
        prior_std: of N(0, prior_std^2), above 0.
        kl_scale: weight of the KL for one sample, >= 0.
        train_samples: N; None counts the samples of the training loader.
        draws: sampled networks whose probabilities a prediction averages; 0 predicts with the posterior mean.
        seed: of places, starts and all draws.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`. Decay acts on means alone.
    Raises: UserError for values out of range and layers that cannot be sparse.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        density: float = 0.1,
        match: list[str] | None = None,
        dense: list[str] | None = None,
        allocation: PerTensorAllocation | None = None,
        start: Start = Start(),  # noqa: B008 - frozen
        topology: Topology = Topology(),  # noqa: B008 - frozen
        prior_std: float = 0.005,
        kl_scale: float = 0.01,
        train_samples: int | None = None,
        draws: int = 0,
        seed: int = 0,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        width = getattr(backbone, "num_features", None)
        if not isinstance(width, int):
            raise UserError(
                f"SSVI needs the width of its backbone, and {type(backbone).__name__} has no attribute num_features; "
                "take one of lightspan.backbones.vision or set it"
            )
        require_in("[2, inf)", num_classes=num_classes)
        require_in("[0, inf)", draws=draws, kl_scale=kl_scale)
        require_in("[1, inf)", train_samples=train_samples)
        require_in("(0, inf)", prior_std=prior_std)
        self.num_classes = num_classes
        self.backbone, self.head = backbone, nn.Linear(width, num_classes)
        he_normal_(self.head)
        self.topology, self.prior_std, self.kl_scale = topology, prior_std, kl_scale
        self.train_samples, self.draws, self.seed = train_samples, draws, seed
        sparsify(self, match or ["*"], density, dense or [], allocation, start, seed)
        stages = ("val", "test")
        self.calibration = nn.ModuleDict({stage: MulticlassCalibrationError(num_classes) for stage in stages})
        self.auroc = BinaryAUROC()
        self._samples, self._steps = train_samples or 1, math.inf  # until training starts

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits [B K]; of the posterior mean, but inside of `drawing`."""
        return self.head(self.backbone(image_BCHW))

    def configure_model(self) -> None:
        self.require_whole("moves coordinates within whole parameters")

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        require_entrywise(configured["optimizer"] if isinstance(configured, dict) else configured)
        return configured

    def on_fit_start(self) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # a connector of the trainer sets it
            if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
                raise UserError(
                    f"{type(callback).__name__} averages numbers by their places, and SSVI moves what is there; "
                    "leave it out, and average predictions with draws"
                )

    def on_train_start(self) -> None:
        self._steps = self.trainer.estimated_stepping_batches
        if self._steps == math.inf:
            raise UserError("SSVI needs the run's length; set trainer.max_steps or trainer.max_epochs")
        if self.train_samples is None:
            dataset = getattr(self.trainer.train_dataloader, "dataset", None)
            if not hasattr(dataset, "__len__"):
                raise UserError("SSVI cannot count the training samples; set model.init_args.train_samples")
            self._samples = max(1, len(dataset))  # type: ignore[arg-type]

    def on_train_batch_start(self, batch: ImageBatch | ViewsBatch, batch_idx: int) -> None:
        if self.global_step == 0 and batch_idx == 0:
            watched = self.topology.until / self.topology.every if self.topology.alpha else 0.0
            found = vars(costs(self, image_of(batch, "SSVI")[:1], watched=watched))
            shown = {f"costs/{name}": float(found[name]) for name in COUNTED}
            for logger in self.trainer.loggers:
                logger.log_metrics(shown, step=0)

    def training_step(self, batch: ImageBatch | ViewsBatch, batch_idx: int) -> Tensor:
        image_BCHW, label_B = image_of(batch, "SSVI"), labels_of(batch, "SSVI")
        due = self._due()
        for layer in gaussian_layers(self).values():
            layer.watching = due
        with drawing(self, Outputs(self.seed, self.global_step, index_in(batch, self))):
            logits_BK = self(image_BCHW)
        nll, kl = label_cross_entropy(logits_BK, label_B), self.kl()
        loss = nll + kl_weight(self.kl_scale, self._samples, self.global_step / self._steps) * kl
        accuracy = share_right(logits_BK, label_B)
        figures = {"loss": loss, "loss_nats": nll, "kl_nats": kl, "accuracy": accuracy}
        self.log_training({f"train/{name}": value for name, value in figures.items()}, batch_size=len(label_B))
        return loss

    def kl(self) -> Tensor:
        """The divergence of all active coordinates from the prior, in nats."""
        return torch.stack([layer.kl(self.prior_std) for layer in gaussian_layers(self).values()]).sum()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """A step that moves coordinates goes through all hooks, and leaves the optimiser without a gradient."""

        def moving() -> None:
            optimizer_closure()
            self._move(optimizer)
            for parameter in self.parameters():
                parameter.grad = None

        super().optimizer_step(epoch, batch_idx, optimizer, moving if self._due() else optimizer_closure)

    def probabilities(self, image_BCHW: Tensor) -> Tensor:
        """[B K], of the posterior mean or averaged over networks 0 to draws - 1 of the seed."""
        if not self.draws:
            return wide(self(image_BCHW)).softmax(dim=1)
        total_BK: Any = 0
        for number in range(self.draws):
            with drawing(self, OneDraw(self.seed, number)):
                total_BK = total_BK + wide(self(image_BCHW)).softmax(dim=1)
        return total_BK / self.draws

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        inside_B = self._evaluate("test", batch)
        image_BCHW = batch["image"]
        noise_BCHW = normal(self.seed, STEP_OF_NOISE, "noise", image_BCHW.shape, index_in(batch, self)).to(image_BCHW)
        outside_B = torch.special.entr(self.probabilities(noise_BCHW)).sum(dim=1)
        told_B = torch.cat([torch.zeros_like(inside_B), torch.ones_like(outside_B)]).long()
        self.auroc(torch.cat([inside_B, outside_B]), told_B)
        self.log("test/auroc_noise", self.auroc, on_step=False, on_epoch=True, batch_size=len(inside_B))

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Probabilities [B K]."""
        return self.probabilities(batch["image"])

    def _evaluate(self, stage: str, batch: ImageBatch) -> Tensor:
        """Logs, and returns the entropy of each prediction [B]."""
        probability_BK, label_B = self.probabilities(batch["image"]), labels_of(batch, "SSVI")
        entropy_B = torch.special.entr(probability_BK).sum(dim=1)
        log_p_BK = probability_BK.clamp_min(torch.finfo(probability_BK.dtype).tiny).log()
        measured = {
            "accuracy": share_right(probability_BK, label_B),
            "loss_nats": own_mean(F.nll_loss(log_p_BK, label_B, reduction="none")),
            "entropy_nats": own_mean(entropy_B),
        }
        options: dict[str, Any] = {"batch_size": len(label_B), "sync_dist": True, "prog_bar": True}
        self.log_dict({f"{stage}/{name}": value for name, value in measured.items()}, **options)
        calibration: Any = self.calibration[stage]
        calibration(probability_BK, label_B)
        self.log(f"{stage}/ece", calibration, on_step=False, on_epoch=True, batch_size=len(label_B))
        return entropy_B

    def _due(self) -> bool:
        return self.topology.due(self.global_step, self._steps)

    def _move(self, optimizer: Any) -> None:
        layers = gaussian_layers(self)
        counts = {name: len(layer.mu) for name, layer in layers.items()}
        dropped = {name: self.topology.dropped(k, self.global_step, self._steps) for name, k in counts.items()}
        while (inside := getattr(optimizer, "optimizer", None)) is not None:  # Lightning's wrapper
            optimizer = inside
        for name, source_k in move(layers, dropped, self.topology.removal).items():
            for parameter in (layers[name].mu, layers[name].rho):
                reindex(optimizer, parameter, source_k)
