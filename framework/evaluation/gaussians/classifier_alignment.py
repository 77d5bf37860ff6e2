"""A classifier of all classes trained on features that are drawn from a Gaussian of each: SLCA's classifier alignment.

Source: Zhang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model", ICCV
2023, arXiv 2303.05118, and the authors' code, which has the shrinking of older means.
Shapes: B rows, F features, C classes, T tasks, S samples of a class.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide_type
from lightspan.core.noise import mixed_seed
from lightspan.evaluation.gaussians.class_gaussians import ClassGaussians


def aligned_cross_entropy(logits_BC: Tensor, label_B: Tensor, task_C: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of logits over `temperature` times the mean, over tasks, of the length of a task's part of them.

    A factor of all logits changes nothing, so that a row cannot lower its loss by longer logits.

    Args:
        label_B: whole numbers in [0, C), at least one.
        task_C: the task of each class, from 0 without gaps.
    """
    wide_BC = logits_BC.to(wide_type(logits_BC.dtype))
    squares_BT = wide_BC.new_zeros(len(wide_BC), int(task_C.max()) + 1).index_add(1, task_C, wide_BC.square())
    # A length of 0 has no gradient, and below the smallest number all logits are equal.
    length_B1 = squares_BT.clamp_min(torch.finfo(squares_BT.dtype).tiny).sqrt().mean(dim=1, keepdim=True)
    return F.cross_entropy(wide_BC / (temperature * length_B1), label_B)


@dataclass(frozen=True)
class ClassifierAlignment:
    """How a head is aligned.

    Attributes:
        epochs: >= 0; 0 leaves the head as it is.
        samples: S, of each class in an epoch, and rows of a batch, >= 1.
        lr, decay: of SGD with momentum 0.9: the rate at its start, which falls on a half cosine, > 0, and weight
            decay, >= 0.
        temperature: of `aligned_cross_entropy`, > 0.
        shrink: factor of the mean of a class that is infinitely old, in [0, 1]: 1 for the newest task, and
            shrink + (1 - shrink) (own task + 1) / (tasks so far) for the others.
        seed: of the samples and their order.
    """

    epochs: int = 5
    samples: int = 256
    lr: float = 0.01
    decay: float = 5e-4
    temperature: float = 0.1
    shrink: float = 0.9
    seed: int = 0

    @torch.enable_grad()
    def rows(
        self, weight_CF: Tensor, bias_C: Tensor, gaussians: ClassGaussians, task_C: Tensor, task: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(classes of the tasks up to this one, ascending, their rows of the aligned weight, and of the bias), in
        float32 or wider: a function of what is given, the same on every rank. A class without a Gaussian has no sample,
        and without any Gaussian the head stays as it is.

        Args:
            weight_CF, bias_C: of the head of all classes, which stay as they are.
            task_C: the task of each class.
        """
        classes = gaussians.known()
        seen_C = (task_C <= task).nonzero()[:, 0]
        place_C = torch.zeros_like(task_C)
        place_C[seen_C] = torch.arange(len(seen_C), device=seen_C.device)
        kind = wide_type(weight_CF.dtype)
        weight, bias = (p.detach()[seen_C].to(kind).requires_grad_() for p in (weight_CF, bias_C))
        optimizer = torch.optim.SGD([weight, bias], self.lr, momentum=0.9, weight_decay=self.decay)
        label_N = torch.tensor(classes, device=weight.device).repeat_interleave(self.samples)
        of_class = {number: int(task_C[number]) for number in classes}
        for epoch in range(self.epochs if classes else 0):
            optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
            seeds = self.seed, task, epoch
            scales = {c: self.shrink + (1 - self.shrink) * (of_class[c] + 1) / (task + 1) for c in classes}
            x_NF = torch.cat([gaussians.sample(c, self.samples, seeds, scales[c]) for c in classes]).to(kind)
            shuffle = torch.Generator().manual_seed(int(mixed_seed(torch.tensor(-1), *seeds)))
            for rows in torch.randperm(len(x_NF), generator=shuffle).to(weight.device).split(self.samples):
                logits_SC = F.linear(x_NF[rows], weight, bias)
                loss = aligned_cross_entropy(logits_SC, place_C[label_N[rows]], task_C[seen_C], self.temperature)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return seen_C, weight.detach(), bias.detach()
