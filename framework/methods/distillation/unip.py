"""UNIP: a small transformer learns the attention of one layer of a large one, whose heads look both near and far.

Source: Zhang et al., "UNIP: Rethinking Pre-trained Attention Patterns for Infrared Semantic Segmentation",
ICLR 2025, arXiv 2502.02257, section 4: NMI-HAD, with the details of the authors' code. Which layer it is, is told by
the mutual information of its queries and keys (`lightspan.evaluation.scores.attention_patterns`): the one nearest a
level between local and global. Of its logits S_T = q k^T / sqrt(d_T) and the student's S_S in its last layer,

    L = mean over images, heads and queries of KL(softmax(S_T) || softmax(S_S)), class token and registers among them

and nothing else. Values of the student's last layer, what comes after its attention and the last norm learn nothing
before fine-tuning. Left out: cross-entropy in place of KL, which has the same gradient, and the fine-tuning for
segmentation, whose four scales the paper all takes from the last layer.
Difference: what learns nothing is frozen, so that weight decay leaves it where it began; only the values, whose weight
is that of queries and keys too, still decay.
Shapes: B images of this rank, C h w image, H heads, N tokens, D width.
"""

from typing import Any

from torch import Tensor, nn

from lightspan.backbones.vit import TokenViT
from lightspan.core.errors import UserError
from lightspan.nn.sequences.attention_maps import attention_logits, attention_of, parameters_behind
from lightspan.nn.sequences.token_backbone import AllTokens
from lightspan.nn.teachers.frozen import Frozen, require_apart
from lightspan.nn.tokens import chosen_layers, feature_modules, token_features
from lightspan.nn.views import image_of
from lightspan.objectives.distillation import attention_divergence
from lightspan.training.method import Method


class UNIP(Method):
    """Holds the attention of a student's last layer to that of a teacher's chosen one. The student is kept.

    Batches hold one view of each image. Features are what enters the last layer, since that layer's own output is not
    trained: the mean over patches.

    Args:
        backbone: the student, of at least two blocks, such as `lightspan.backbones.vit.vit` with `last_heads` as many
            as the teacher has. Fine-tune it with the same.
        teacher: with trained weights. It is frozen, in evaluation mode, and part of the checkpoint; what comes behind
            `layer` is dropped. It sees the same images: patches and prefix tokens are the student's, widths need not
            be.
        layer: of the teacher, from 0, or from the end with -1 as the last.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    Raises: UserError for networks whose maps differ in heads or tokens, or whose attention cannot be read.
    """

    def __init__(self, backbone: nn.Module, teacher: nn.Module, layer: int, **optimization: Any) -> None:
        super().__init__(**optimization)
        student, taught = _plain("backbone", backbone), _plain("teacher", teacher)
        require_apart(taught, student)
        (place,) = chosen_layers(taught, [layer])
        heads, needed = attention_of(student, -1).num_heads, attention_of(taught, place).num_heads
        if heads != needed:
            raise UserError(
                f"the backbone's last layer has {heads} heads and layer {layer} of the teacher {needed}; both must "
                f"have as many: set last_heads={needed} of lightspan.backbones.vit.vit, and a width that it divides"
            )
        forms = [(network.patch_shape, network.num_prefix_tokens) for network in (student, taught)]
        if forms[0] != forms[1]:
            raise UserError(
                f"the backbone has patches of {forms[0][0]} (height, width, channels) and {forms[0][1]} prefix tokens, "
                f"the teacher {forms[1][0]} and {forms[1][1]}; both must be equal, so that their maps have as many rows"
            )
        if len(feature_modules(student)) < 2:
            raise UserError("the backbone has one block, before which nothing is trained; give it depth=2 or more")
        taught.cut_behind(place)
        for parameter in parameters_behind(student):
            parameter.requires_grad_(False)
        self.backbone, self.teacher = student, Frozen(AllTokens(taught))

    def features(self, batch: Any) -> Tensor:
        return token_features(self.backbone, lambda: Method.features(self, batch), (-2,))[0].pooled()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image_BChw, teacher = image_of(batch, "UNIP"), self.teacher.module.backbone
        (taught_BHNN,) = attention_logits(teacher, lambda: self.teacher(image_BChw))  # type: ignore[arg-type]
        outputs: list[Tensor] = []
        (seen_BHNN,) = attention_logits(self.backbone, lambda: outputs.append(self.backbone.tokens(image_BChw)))
        loss = attention_divergence(seen_BHNN, taught_BHNN)
        self.log_training({"train/loss": loss})
        # FSDP2 gathers a block's weights for the backward pass when a gradient comes to its output.
        return loss + 0 * outputs[0].sum()


def _plain(name: str, network: nn.Module) -> TokenViT:
    if not isinstance(network, TokenViT):
        raise UserError(
            f"UNIP reads the attention of a transformer, and {name} is {type(network).__name__}; use "
            "lightspan.backbones.vit.vit, or lightspan.backbones.vit.TokenViT around a VisionTransformer of timm"
        )
    return network
