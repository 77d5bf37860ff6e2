"""Images against class names, for growing class sets: the loss of a task covers only that task's classes.

Source: L_task of CoDyRA, arXiv 2412.01004, section 3, as in the authors' code.
Shapes: B images of this rank, C classes of all tasks so far, D embedding width. Sums over images run over all ranks
(see `lightspan.distributed` for the scale), as numbers per class: ranks exchange 2 C + 3 of them and no embedding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightspan.devices import wide_type
from lightspan.distributed import all_reduce_max, all_reduce_sums
from lightspan.errors import UserError


def current_class_text_loss(
    image_BD: Tensor, text_CD: Tensor, label_B: Tensor, current_C: Tensor, logit_scale: float | Tensor
) -> Tensor:
    """Cross-entropy from image to class text plus from class text to image, over the current task's classes.

    The logits of older classes are -inf, so their texts get no gradient, bit for bit. From a text to the images, every
    image of its class is a target of weight 1 (the weights are not normalised: a class without an image in the batch
    adds nothing, a class with two adds twice), and the sum is divided by the number of current classes. Half precision
    is widened to float32, also under autocast. Without any image the loss is 0.

    Args:
        image_BD: embeddings of length 1; ranks may differ in B.
        text_CD: embeddings of length 1, the same on all ranks.
        label_B: class of each image, one of the current ones.
        current_C: bool, which classes belong to the task.
        logit_scale: exp of CLIP's temperature parameter, > 0, frozen in the paper.
    Returns: scalar >= 0, the same on all ranks.
    Raises: UserError for a label that is not a current class. Checking on an accelerator would wait for it; there such
        a label makes the loss infinite.
    """
    if label_B.device.type == "cpu" and not bool(current_C[label_B].all()):
        wrong = int(label_B[~current_C[label_B]][0])
        raise UserError(
            f"label {wrong} is not a class of the current task; a batch may contain only images of the current task"
        )
    with torch.autocast(image_BD.device.type, enabled=False):
        wide = wide_type(image_BD.dtype, text_CD.dtype)
        logits_BC = logit_scale * image_BD.to(wide) @ text_CD.to(wide).mT
    from_image = F.cross_entropy(logits_BC.masked_fill(~current_C, float("-inf")), label_B, reduction="sum")
    # log sum exp over the images of all ranks, from sums relative to the largest.
    none_1C = logits_BC.new_full((1, len(text_CD)), torch.finfo(wide).min)
    above_BC = logits_BC - all_reduce_max(torch.cat([logits_BC.detach(), none_1C]).amax(dim=0))
    own = above_BC.gather(1, label_B[:, None]).sum()
    count_C = none_1C.new_zeros(len(text_CD)).index_add(0, label_B, torch.ones_like(label_B, dtype=wide))
    rows = own.new_full((), len(image_BD))
    exps_C, count_C, own, from_image, rows = all_reduce_sums(above_BC.exp().sum(dim=0), count_C, own, from_image, rows)
    # A class without an image counts 0 times, even if its sum has no logarithm.
    log_sum_C = exps_C.clamp_min(torch.finfo(wide).tiny).log()
    from_text = ((count_C * log_sum_C).sum() - own) / current_C.sum()
    return from_image / rows.clamp_min(1) + from_text
