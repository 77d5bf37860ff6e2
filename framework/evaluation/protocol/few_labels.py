"""Fine-tuning of a whole encoder on few labels.

Source: Chen et al., "SimCLR", 2020, arXiv 2002.05709, appendix B.5, for convolutional networks: SGD with Nesterov
momentum 0.9 at 0.05 for 256 samples, no decay and no warm-up, 60 epochs of 1 % and 30 of 10 % of the labels, as many of
each class, under crops and flips alone. For transformers: AdamW with a rate that falls from layer to layer, Bao et al.,
"BEiT", 2021, arXiv 2106.08254, and He et al., "MAE", 2021, arXiv 2111.06377, appendix A.1.
Shapes: B samples of a batch, D features, K classes.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lightspan.evaluation.protocol.linear_heads import REFERENCE_BATCH
from lightspan.evaluation.protocol.subject import Judged, ProtocolSubject, tuned_copy
from lightspan.optim.groups import ParameterGroups
from lightspan.optim.random_subspace import OptimizerCallable
from lightspan.optim.schedules import WarmupCosine

SIMCLR: OptimizerCallable = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)


class WithNewHead(nn.Module):
    """A network and a linear head at zero, as MAE's nearly is (its deviation is 2e-5)."""

    def __init__(self, network: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.network, self.head = network, nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


def fine_tuned(
    subject: ProtocolSubject,
    judged: Judged,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    batch_size: int,
    classes: int,
    optimizer: OptimizerCallable = SIMCLR,
    groups: ParameterGroups | None = None,
    warmup: float = 0.0,
) -> Tensor:
    """Logits of the evaluation samples, [M K], after all weights were trained on these batches. The network itself
    stays as it was.

    Args:
        batches: (images, labels [B]), `steps` of them.
        batch_size: by which the optimiser's rates are scaled: they are those of 256 samples.
        groups: with `layer_decay`, say; None is one rate for all.
        warmup: share of the steps, in [0, 1); a cosine to 0 follows.
    Raises: UserError as `ParameterGroups.optimizer`.
    """
    model = WithNewHead(tuned_copy(judged.network), judged.bank.rows().shape[1], classes).to(subject.device)
    made = (groups or ParameterGroups()).optimizer(model, optimizer)
    _scale(made, batch_size / REFERENCE_BATCH)
    schedule = WarmupCosine(made, steps, warmup=warmup, final=0.0)
    for x, label_B in batches:
        loss = cross_entropy(model.head(subject.features(model.network, judged, x)), label_B)
        made.zero_grad()
        loss.backward()
        made.step()
        schedule.step()
    model.eval()
    return subject.logits(model.network, model.head, judged)


def _scale(optimizer: Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group.update({name: group[name] * factor for name in ("lr", "other_lr") if group.get(name) is not None})
