"""Hydra: any two classes are a positive pair, in a subspace of the features that the pair chooses.

Source: Wu, Atito, Feng, Mo, Kittler, Awais, "Rethinking Positive Pairs in Contrastive Learning", 2024, arXiv
2410.18200, whose second version calls the method SimLAP, and the authors' code. The numbers of its equations could not
be looked up. The loss is in `lightspan.objectives.info_nce`, gates and pairs are in `lightspan.nn`. The online
classifier of that code, which reads detached features, is the callback `OnlineProbes`. Similarities are cosines of
gated embeddings, as in its function `apply_gate`. Its training step has since come to normalise before the gate and not
after it (simlap.py of erow/vitookit); then a gate that is half closed shrinks all similarities of an anchor, and the
temperature no longer says how sharp they are. The variant that trains with the classifier's loss too (sup_loss) and
Hydra-MoCo are left out. Assumed: the projector's hidden layer has a BatchNorm.
Shapes: B images of this rank, V views of each, R = B V rows, D embedding width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.core.distributed import gather_rows
from lightspan.core.ranges import require_temperatures
from lightspan.nn.class_pairs import ClassPairs
from lightspan.nn.views import labelled_views
from lightspan.nn.widths import require_projector, require_width
from lightspan.objectives.info_nce import class_pair_loss
from lightspan.objectives.means import own_mean
from lightspan.training.method import Method


class Hydra(Method):
    """Supervised contrast between classes of any pairs.

    With identical pairs and no gate it is close to SupCon, which is `lightspan.methods.contrastive.supcon`, but not the
    same: an anchor is its own positive, no other positive stands in a denominator, and each pair weighs the same.

    Views of an image are rows of their own (the paper's repeated augmentations); a small batch of many classes needs
    them to have positives. Loss and pairs are those of the rows of all ranks; with sync_batchnorm N ranks train as one.

    Args:
        backbone: [R C H W] -> [R num_features]; what probes read, and all that is kept.
        projector: [R num_features] -> [R D].
        gate: int64 [R], [R], a class pair for each anchor, -> [R D] in (0, 1), such as
            `lightspan.nn.heads.class_gates.ClassPairGate`; None keeps all dimensions.
        pairs: which class each row is paired with.
        temperature: > 0; the paper has 0.2 for vision transformers.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    learns_from_labels = True
    least_rows = 2
    keeps_apart = "there are enough negatives (data.init_args.batch_size) and temperature fits"

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        gate: nn.Module | None,
        pairs: ClassPairs,
        temperature: float = 0.1,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        require_temperatures(temperature=temperature)
        require_projector(backbone, projector)
        require_width(projector, "gate.out_features", getattr(gate, "out_features", None))
        self.backbone, self.projector, self.gate = backbone, projector, gate
        self.pairs, self.temperature = pairs, temperature

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views, label_B = labelled_views(batch, "Hydra")
        # An image's views stand together, so that the rows of all ranks have the order that one rank would give them.
        label_R = label_B.repeat_interleave(len(views))
        z_RD = self.projector(self.backbone(torch.stack(views, dim=1).flatten(0, 1)))
        label_N, first = gather_rows(label_R)
        partner_N = self.pairs.partners(label_N, self.global_step, batch_idx)
        partner_R = partner_N[first : first + len(label_R)]
        gate_RD = None if self.gate is None else self.gate(label_R, partner_R)
        loss = class_pair_loss(z_RD, label_R, partner_R, gate_RD, self.temperature)
        figures = {"train/loss": loss, "train/anchors_with_positives": own_mean(torch.isin(partner_R, label_N).float())}
        if gate_RD is not None:
            gate_RD = gate_RD.detach()
            figures["train/gate_mean"] = own_mean(gate_RD)
            # 0 when all pairs have come to share one subspace, and without a pair on this rank.
            spread_D = gate_RD.std(dim=0, correction=0) if len(gate_RD) else gate_RD.new_zeros(gate_RD.shape[1])
            figures["train/gate_spread"] = spread_D.mean()
        self.log_training(figures)
        return loss
