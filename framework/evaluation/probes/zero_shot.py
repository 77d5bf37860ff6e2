"""Classification by sentences that name the classes, and retrieval of texts by images.

Source: Radford et al., 2021, arXiv 2103.00020, section 3.1. Shapes: N images, C classes, D width of the common
space.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.tokenizing import cut
from lightspan.evaluation.labels import require_labels


def class_rows(
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[Tensor, Tensor], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str] = ("a photo of a {}",),
) -> Tensor:
    """A row for each class, [C D] of length 1: the mean over the sentences of a class of their rows of length 1.

    Args:
        encode: tokens and mask, int64 [C T] -> [C D] of any length, on the CPU or wherever it takes them itself.
        templates: sentences with {} where the class is named.
    Raises: UserError without a class or a template, and for a template without {}.
    """
    if not class_names or not templates or any("{}" not in template for template in templates):
        raise UserError(
            f"zero-shot classification needs class names ({len(class_names)} given) and sentences with {{}} for the "
            f"name, and templates are {list(templates)}"
        )
    rows = []
    for template in templates:
        texts = cut(tokenizer, [template.format(name) for name in class_names], padding=True, padding_side="right")
        tokens_CT, mask_CT = (torch.as_tensor(texts[name]) for name in ("input_ids", "attention_mask"))
        rows.append(normalize(encode(tokens_CT, mask_CT).float(), dim=1))
    return normalize(torch.stack(rows).mean(dim=0), dim=1)


def zero_shot_accuracy(image_ND: Tensor, class_CD: Tensor, label_N: Tensor, classes: Tensor | None = None) -> float:
    """Share of the images whose class has the row nearest to theirs by cosine, in [0, 1].

    Args:
        image_ND: of any length.
        class_CD: as `class_rows` gives them.
        label_N: int64 in [0, C).
        classes: int64, the only ones that are looked at; None takes all. An image of another class counts as wrong.
    Raises: UserError for no image, and labels that are not one whole number from 0 for each.
    """
    if not len(image_ND):
        raise UserError("zero-shot classification got no image; give it at least one validation sample")
    require_labels("zero-shot classification", image_ND, label_N)
    scores_NC = image_ND.float() @ class_CD.float().T
    if classes is not None:
        left_out_C = torch.ones(len(class_CD), dtype=torch.bool, device=class_CD.device)
        left_out_C[classes] = False
        scores_NC = scores_NC.masked_fill(left_out_C, -torch.inf)
    return (scores_NC.argmax(dim=1) == label_N).double().mean().item()


def retrieval_at_1(image_ND: Tensor, text_ND: Tensor) -> float:
    """Share of the images to which, of all N texts, their own is nearest by cosine, in [0, 1].

    Texts that are equally near share a hit: of n equal ones each counts 1 / n, so that encoders that have collapsed get
    1 / N. Raises: UserError for no image, or another number of texts.
    """
    if not len(image_ND) or len(image_ND) != len(text_ND):
        raise UserError(
            f"retrieval needs as many texts as images, at least one, and got {len(text_ND)} texts for "
            f"{len(image_ND)} images"
        )
    scores_NN = normalize(image_ND.float(), dim=1) @ normalize(text_ND.float(), dim=1).T
    best_NN = scores_NN >= scores_NN.amax(dim=1, keepdim=True)
    return (best_NN.diagonal().double() / best_NN.sum(dim=1)).mean().item()
