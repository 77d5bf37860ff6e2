"""Learning from a network's own confident answers: weak views give targets, strong views are trained on them.

Source: the test-time objective of aTLAS, "Unsupervised FixMatch" (arXiv 2407.02880, section 5.3, appendix E), after
FixMatch (arXiv 2001.07685). Mended, against the authors' code: sharpening sharpens (theirs halves all probabilities and
divides by their sum, which does nothing), trusted samples count for every class (there for the last one alone), and a
batch in which nothing is kept has the loss 0 (there NaN).

Of pixels: the answers and weights of Tranheden et al., "DACS", WACV 2021, arXiv 2007.08702, section 3.

Shapes: B batch of this rank, C classes, N samples of a set, H W image.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.objectives.means import known_mean, mean

UNTRUSTED = -1


class PixelLabels(NamedTuple):
    """Answers int64 [B H W], and of each image the share of pixels with a sure one, [B] in float32 or wider."""

    label_BHW: Tensor
    sure_B: Tensor


def pseudo_label_loss(
    strong_BC: Tensor, weak_BC: Tensor, trusted_B: Tensor, confidence: float = 0.99, temperature: float = 0.5
) -> Tensor:
    """Cross-entropy of strong views against targets: a trusted label, or else the sharpened answer on the weak view
    where its largest probability is above `confidence`. Mean over the samples of all ranks that have a target; 0 of
    none.

    Args:
        strong_BC, weak_BC: logits of the two views; no gradient goes through the weak one.
        trusted_B: int64, the class of a trusted sample, `UNTRUSTED` of others.
        temperature: above 0; targets are p^(1/temperature), normalised. 1 leaves them as they are.
    """
    log_p_BC = wide(weak_BC.detach()).log_softmax(dim=1)
    target_BC = (log_p_BC / temperature).softmax(dim=1)
    is_trusted_B = trusted_B != UNTRUSTED
    label_BC = F.one_hot(trusted_B.clamp_min(0), target_BC.shape[1]).to(target_BC)
    target_BC = torch.where(is_trusted_B[:, None], label_BC, target_BC)
    kept_B = is_trusted_B | (log_p_BC.amax(dim=1).exp() > confidence)
    return known_mean(-(target_BC * wide(strong_BC).log_softmax(dim=1)).sum(dim=1), kept_B)


def trusted_labels(probability_NC: Tensor, most: int = 100) -> Tensor:
    """int64 [N]: the answer for the min(N / (10 C), most) samples of each class that it is most sure of, at least one;
    `UNTRUSTED` for all others. A class that is the answer for fewer has fewer.
    """
    count, classes = probability_NC.shape
    each = max(1, min(count // (10 * classes), most))
    sure_N, answer_N = probability_NC.max(dim=1) if count else (probability_NC.new_zeros(0), torch.zeros(0).long())
    labels_N = torch.full((count,), UNTRUSTED, dtype=torch.int64, device=probability_NC.device)
    for label in range(classes):
        members = (answer_N == label).nonzero()[:, 0]
        best = members[sure_N[members].argsort(descending=True, stable=True)[:each]]
        labels_N[best] = label
    return labels_N


@torch.no_grad()
def pixel_labels(logits_BCHW: Tensor, confidence: float) -> PixelLabels:
    """The most likely class of each pixel, and how many of an image's are likelier than `confidence`, in [0, 1]."""
    likely_BHW, label_BHW = wide(logits_BCHW).softmax(dim=1).max(dim=1)
    return PixelLabels(label_BHW, (likely_BHW > confidence).flatten(1).to(likely_BHW.dtype).mean(dim=1))


def pixel_cross_entropy(logits_BCHW: Tensor, label_BHW: Tensor, weight_BHW: Tensor | None = None) -> Tensor:
    """Mean over the pixels of all ranks of weight * cross-entropy, in nats, a scalar in float32 or wider; 0 without
    images.

    Args:
        label_BHW: int64; a pixel with one below 0 adds nothing to the sum, and counts.
        weight_BHW: >= 0, of a shape that expands to that of the labels; None is 1.
    """
    loss_BHW = F.cross_entropy(wide(logits_BCHW), label_BHW.clamp_min(-1), ignore_index=-1, reduction="none")
    return mean(loss_BHW if weight_BHW is None else weight_BHW * loss_BHW)
