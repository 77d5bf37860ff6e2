"""What an agent did, guessed from features: numbers in [-1, 1], or one of several actions.

Source: Brandfonbrener et al., 2023, arXiv 2305.16985, and the authors' code, whose actions are numbers under tanh.
`lightspan.objectives.actions` has the losses.
Shapes: B samples, F features, A numbers of an action or actions to choose from.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightspan.core.batches import described, range_on_host, require_fields, require_rows
from lightspan.core.devices import has_values
from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in
from lightspan.nn.heads.mlp_head import MLPHead
from lightspan.nn.init import he_normal_


class ActionHead(nn.Module, ABC):
    """An `MLPHead` with dropout, which starts He-normal: [B F] -> [B A].

    Args:
        in_features: F: of a policy the width of one image's code, of inverse dynamics of two.
        actions: A, at least 1.
        hidden: widths of the hidden layers.
        dropout: behind each of them, in [0, 1).
    """

    def __init__(
        self, in_features: int, actions: int, hidden: Sequence[int] = (256, 256), dropout: float = 0.1
    ) -> None:
        super().__init__()
        require_in("[1, inf)", actions=actions)
        self.in_features, self.actions = in_features, actions
        self.mlp = MLPHead(in_features, actions, hidden, dropout)
        he_normal_(self.mlp)

    @abstractmethod
    def forward(self, x_BF: Tensor) -> Tensor:
        """Guesses [B A]."""

    @abstractmethod
    def read(self, batch: Mapping[str, Any], method: str) -> Tensor:
        """`action` of a batch. Raises: UserError for a batch without such, or on the CPU with one out of range, which
        asking an accelerator would wait for.

        Args:
            method: its name, for messages.
        """


class ContinuousActions(ActionHead):
    """Numbers in [-1, 1], under tanh."""

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.mlp(x_BF).tanh()

    def read(self, batch: Mapping[str, Any], method: str) -> Tensor:
        action_BA = _action(batch, method)
        if not action_BA.is_floating_point() or action_BA.shape[1:] != (self.actions,):
            raise UserError(
                f"{method} guesses actions of {self.actions} numbers each, float [B, {self.actions}], and this batch "
                f"gives {described(action_BA)}; set model.init_args.head.init_args.actions to how many there are, or "
                "take lightspan.nn.heads.action_head.DiscreteActions for numbered actions"
            )
        on_host = action_BA.device.type == "cpu" and has_values(action_BA)
        if on_host and not bool((action_BA.abs() <= 1).all()):  # NaN is not, either
            raise UserError(
                f"{method}: action has numbers up to {float(action_BA.abs().max()):g}, and each must lie in [-1, 1], "
                "the range of tanh; scale actions when they are recorded"
            )
        return action_BA


class DiscreteActions(ActionHead):
    """One action in [0, A), of which guesses are logits."""

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.mlp(x_BF)

    def read(self, batch: Mapping[str, Any], method: str) -> Tensor:
        action_B = _action(batch, method)
        if action_B.is_floating_point() or action_B.ndim != 1:
            raise UserError(
                f"{method} chooses among {self.actions} actions by number, int64 [B], and this batch gives "
                f"{described(action_B)}; take lightspan.nn.heads.action_head.ContinuousActions for vectors in [-1, 1]"
            )
        ends = range_on_host(action_B)
        if ends is not None and (ends[0] < 0 or ends[1] >= self.actions):
            raise UserError(
                f"{method}: action has numbers from {ends[0]} to {ends[1]}, and the head knows those from 0 to "
                f"{self.actions - 1}; set model.init_args.head.init_args.actions to how many there are"
            )
        return action_B


def _action(batch: Mapping[str, Any], method: str) -> Tensor:
    require_fields(batch, method)
    action = batch.get("action")
    if not isinstance(action, Tensor) or action.ndim < 1:
        raise UserError(
            f"{method} needs what was done in each sample as action, and this batch holds "
            f"{', '.join(sorted(batch))}; take data of an agent, such as those of lightspan.datamodules.worlds"
        )
    require_rows(batch, "action", method)
    return action
