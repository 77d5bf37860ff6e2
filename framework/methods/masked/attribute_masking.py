"""Attribute masking: a network of graphs learns from guessing the kinds of hidden nodes, such as elements of atoms.

Source: Hu et al., "Strategies for Pre-training Graph Neural Networks", 2020, arXiv 1905.12265, section 3.1.2, and its
code. All that is known of some nodes of each graph is replaced by a vector that is learned, and a linear layer guesses
their kinds from what the network makes of them:
L = mean over hidden nodes of -log softmax(W h_v + b)[kind of v].
Differences from the code: it hides the element of an atom and sets its chirality to none, here one vector stands for
both; which nodes are hidden is a function of seed, step and graph; nodes without a known kind are not hidden.
Not here: the masking of edges, and the supervised pre-training of whole graphs that follows in the paper.
Shapes: B graphs, N nodes of all, K kinds.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightspan.backbones.gin import GIN
from lightspan.core.noise import mixed_seed
from lightspan.core.ranges import require_in
from lightspan.datamodules.graph.batch import GraphBatch
from lightspan.nn.graphs import graphs_of, kinds_of
from lightspan.nn.image_numbers import index_in
from lightspan.nn.masking.row_masks import hidden_rows
from lightspan.objectives.classes import known_cross_entropy
from lightspan.objectives.means import known_mean
from lightspan.training.method import Method


class AttributeMasking(Method):
    """Trains a network of graphs to guess the kinds of hidden nodes; the network is kept.

    Batches are `GraphBatch` with `kind`.

    Args:
        backbone: what probes read.
        num_kinds: K, above every kind of the data, so their `node_kinds`.
        share: hidden of each graph's n nodes: the whole part of share n + 1; in [0, 1).
        seed: of which ones, >= 0.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for settings outside of these, and before the first step for a folder of graphs without kinds.
    """

    batch_type = GraphBatch
    reads_kinds = True

    def __init__(
        self, backbone: GIN, num_kinds: int = 128, share: float = 0.15, seed: int = 0, **optimization: Any
    ) -> None:
        super().__init__(**optimization)
        require_in("[2, inf)", num_kinds=num_kinds)
        require_in("[0, 1)", share=share)
        require_in("[0, inf)", seed=seed)
        self.backbone, self.num_kinds, self.share, self.seed = backbone, num_kinds, share, seed
        bound = (6 / (backbone.in_features + backbone.width)) ** 0.5
        self.mask = nn.Parameter(torch.empty(backbone.width).uniform_(-bound, bound))
        self.head = nn.Linear(backbone.width, num_kinds)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        require = getattr(getattr(self.trainer, "datamodule", None), "require_kinds", None)
        if stage == "fit" and require is not None:
            require("AttributeMasking")

    def features(self, batch: Any) -> Tensor:
        return self.backbone(*graphs_of(batch, "AttributeMasking"))

    def guessed(self, batch: Any, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, share of kinds guessed right, which nodes are hidden, bool [N]) with the nodes that a step hides."""
        graphs = graphs_of(batch, "AttributeMasking")
        kind_N = kinds_of(batch, len(graphs.node_NF), self.num_kinds, "AttributeMasking")
        seed_B = mixed_seed(index_in(batch, self), self.seed, step)
        hide_N = hidden_rows(graphs.offsets, self.share, seed_B, kind_N > 0)
        known_ND = self.backbone.embed(graphs.node_NF)
        seen_ND = torch.where(hide_N[:, None], self.mask.to(known_ND.dtype), known_ND)
        logits_NK = self.head(self.backbone.nodes(seen_ND, graphs.edge_index, graphs.edge_EG))
        loss = known_cross_entropy(logits_NK, kind_N, hide_N)
        right = known_mean((logits_NK.detach().argmax(dim=1) == kind_N).float(), hide_N)
        return loss, right, hide_N

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, right, _ = self.guessed(batch, self.global_step)
        self.log_training({"train/loss": loss, "train/hidden_accuracy": right})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs val/loss and val/hidden_accuracy, over the nodes that step 0 hides in each validation."""
        loss, right, hide_N = self.guessed(batch, 0)
        figures = {"val/loss": loss, "val/hidden_accuracy": right}
        self.log_dict(figures, batch_size=max(int(hide_N.sum()), 1), sync_dist=True)
