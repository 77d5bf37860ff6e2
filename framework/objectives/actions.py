"""How far guesses of what an agent did are from that: numbers, or one of several actions.

Shapes: R rows of this rank, A numbers of an action or actions to choose from.
"""

from torch import Tensor

from lightspan.core.devices import wide
from lightspan.objectives.classes import label_cross_entropy, share_right
from lightspan.objectives.means import own_mean, squared_error


def action_figures(guess_RA: Tensor, action: Tensor) -> dict[str, Tensor]:
    """The loss over the rows of all ranks first, then what else tells how right the guesses of this rank are; by name.

    Source: of numbers the squared error of Brandfonbrener et al., 2023, arXiv 2305.16985; of numbered actions the
    cross-entropy takes its place. Without rows all are 0, with gradient 0.

    Args:
        guess_RA: numbers, or logits.
        action: floats [R A], which give `loss`, a mean over numbers, and `mean_absolute_error`; or whole numbers [R] in
            [0, A), which give `loss_nats` and `accuracy`.
    """
    if action.is_floating_point():
        error = own_mean((wide(guess_RA) - wide(action)).abs())
        return {"loss": squared_error(guess_RA, action), "mean_absolute_error": error}
    return {"loss_nats": label_cross_entropy(guess_RA, action), "accuracy": share_right(guess_RA, action)}
