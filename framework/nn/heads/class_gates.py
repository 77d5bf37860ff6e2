"""Gates over embedding dimensions that a pair of classes chooses: a subspace of the features for each pair.

Source: Wu et al., "Rethinking Positive Pairs in Contrastive Learning" (Hydra), 2024, arXiv 2410.18200: the feature
filter sigma(f_g((f_l(y1) + f_l(y2)) / 2)) of a label embedding f_l and an MLP f_g, and its variant as a product of the
gates of single classes.
Shapes: B pairs, D embedding width, E label embedding width.
"""

import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.labels import require_labels


class ClassPairGate(nn.Module):
    """g(y1, y2) = sigmoid(MLP((e_y1 + e_y2) / 2)): int64 [B], [B] -> [B D] in (0, 1), the same for (y2, y1).

    The MLP is ReLU - BatchNorm - Linear, twice. BatchNorm sees the batch of pairs, so that gates depend on one another
    in training; with trainer.sync_batchnorm those of all ranks.

    Args:
        num_classes: labels are in [0, num_classes).
        out_features: D, the projector's `out_features`.
        label_features: E.
        hidden: width between both linear layers.
    """

    def __init__(self, num_classes: int, out_features: int, label_features: int = 512, hidden: int = 1024) -> None:
        super().__init__()
        require_in(
            "[1, inf)", num_classes=num_classes, out_features=out_features, label_features=label_features, hidden=hidden
        )
        self.num_classes, self.out_features = num_classes, out_features
        self.labels = nn.Embedding(num_classes, label_features)
        self.layers = nn.Sequential(
            *(nn.ReLU(), nn.BatchNorm1d(label_features), nn.Linear(label_features, hidden)),
            *(nn.ReLU(), nn.BatchNorm1d(hidden), nn.Linear(hidden, out_features)),
        )

    def forward(self, first_B: Tensor, second_B: Tensor) -> Tensor:
        """Raises: UserError for a single pair in training, and on the CPU for a label out of range."""
        self._require_valid(first_B, second_B)
        return self.layers((self.labels(first_B) + self.labels(second_B)) / 2).sigmoid()

    def _require_valid(self, *sides: Tensor) -> None:
        if self.training and len(sides[0]) == 1:
            raise UserError(
                "a batch of one class pair has no variance for the gate's BatchNorm; raise data.init_args.batch_size"
            )
        for label_B in sides:
            require_labels(label_B, self.num_classes, self)


class ClassProductGate(ClassPairGate):
    """g(y1) * g(y2), each of its own class alone, with the same arguments."""

    def forward(self, first_B: Tensor, second_B: Tensor) -> Tensor:
        """Raises: UserError as `ClassPairGate`."""
        self._require_valid(first_B, second_B)
        gates_2BD = self.layers(self.labels(torch.cat([first_B, second_B]))).sigmoid()
        return gates_2BD[: len(first_B)] * gates_2BD[len(first_B) :]
