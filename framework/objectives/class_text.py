"""Images against class names, for class sets that grow: the loss of a task asks about that task's classes alone.

Source: L_task of CoDyRA, arXiv 2412.01004, section 3, as the authors' code has it.
Shapes: B images of this rank, C classes of all tasks so far, D embedding width.
"""

from torch import Tensor
from torch.nn import functional as F

from lightspan.errors import UserError


def current_class_text_loss(
    image_BD: Tensor, text_CD: Tensor, label_B: Tensor, current_C: Tensor, logit_scale: float | Tensor
) -> Tensor:
    """Cross-entropy from image to class text plus from class text to image, over the current task's classes.

    The logits of older classes are -inf, so their texts get no gradient, bit for bit. From a text to the images, every
    image of its class is a target of weight 1 (the weights are not normalised: a class without an image in the batch
    adds nothing, a class with two adds twice), and the sum is divided by the number of current classes.

    Args:
        image_BD, text_CD: embeddings of length 1.
        label_B: class of each image, one of the current ones.
        current_C: bool, which classes belong to the task.
        logit_scale: exp of CLIP's temperature parameter, > 0, frozen in the paper.
    Returns: scalar >= 0.
    Raises: UserError for a label that is no current class.
    """
    if not bool(current_C[label_B].all()):
        wrong = int(label_B[~current_C[label_B]][0])
        raise UserError(f"label {wrong} is no class of the current task; a batch holds images of its own task alone")
    logits_BC = logit_scale * image_BD @ text_CD.mT
    from_image = F.cross_entropy(logits_BC.masked_fill(~current_C, float("-inf")), label_B)
    target_BC = F.one_hot(label_B, len(text_CD)).to(logits_BC)[:, current_C]
    from_text = -(target_BC * F.log_softmax(logits_BC[:, current_C], dim=0)).sum() / target_BC.shape[1]
    return from_image + from_text
